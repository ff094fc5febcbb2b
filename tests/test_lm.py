"""The language model: sources, models that are refused, labels, text and tokens, the fingerprint."""
import re
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from conftest import FAMILIES, MODEL_SIZE, TOKENIZER_SIZE, make_tiny_lm, tiny_config, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tokenlabel.lm import LM, load_lm

# --- sources  -----------------------------------------------------------------------------------------


def test_a_folder_and_a_model_in_memory_are_the_same_model(tiny_lm, tmp_path):
    lm = tiny_lm("gemma3")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loaded = load_lm(tmp_path)
    ids = torch.tensor([[1, 60, 290]])
    assert torch.equal(loaded.model(ids).logits, lm.model(ids).logits)
    assert loaded.name == tmp_path.name
    assert loaded.fingerprint == lm.fingerprint == load_lm(str(tmp_path)).fingerprint


def test_a_hub_name_is_looked_up_in_the_hub(tiny_lm, tmp_path, monkeypatch):
    lm = tiny_lm("gpt_neox")
    repository = tmp_path / "models--somebody--tiny"  # the layout of the hub's own cache
    snapshot = repository / "snapshots" / ("0" * 40)
    lm.model.save_pretrained(snapshot)
    lm.tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded = load_lm("somebody/tiny")
    assert loaded.name == "somebody/tiny" and loaded.fingerprint == lm.fingerprint
    with pytest.raises(OSError, match="cannot load somebody/else from the model hub"):
        load_lm("somebody/else")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_frozen_and_its_logits_follow_from_vectors(tiny_lm, family):
    lm = tiny_lm(family)
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    ids = torch.tensor([[1, 70, 290, 261]])
    expected = lm.model(input_ids=ids).logits
    embeds = lm.embedding[ids] * lm.embed_scale
    assert torch.equal(lm.embed(ids), embeds)
    hidden = lm.model.base_model(inputs_embeds=embeds).last_hidden_state
    assert torch.allclose(lm.logits(hidden), expected, atol=1e-5)
    assert lm.head.weight.shape == lm.embedding.shape
    assert torch.allclose(lm.logits(hidden, [9, 4]), expected[..., [9, 4]], atol=1e-5)
    assert lm.context_length == (128 if family == "gemma3" else 256)
    assert (lm.head.bias is not None) == (family == "phi")
    assert (lm.embed_scale != 1) == (family in ("gemma", "gemma3"))


@pytest.mark.parametrize("config, scale", [
    (transformers.CohereConfig(logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2), 0.25),
    (transformers.GraniteConfig(logits_scaling=8.0, embedding_multiplier=3.0, pad_token_id=0, bos_token_id=1), 0.125),
], ids=["cohere", "granite"])
def test_a_scale_on_the_logits_is_found(config, scale):
    config.update(dict(vocab_size=MODEL_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                       num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2))
    lm = load_lm(transformers.AutoModelForCausalLM.from_config(config), tokenizer=tiny_tokenizer(bos=False))
    assert lm.logit_scale == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_half_precision_passes_the_probe(family):
    model = tiny_model(family)
    lm = load_lm(model, tokenizer=tiny_tokenizer(bos=True), dtype=torch.bfloat16)
    assert lm.dtype == torch.bfloat16 and lm.device.type == "cpu"
    assert lm.logits(torch.ones(lm.head.weight.shape[1]), [5]).dtype == torch.float32


# --- models and sources that are refused ------------------------------------------------------------------------------


def test_a_model_whose_logits_do_not_follow_from_its_hidden_states_is_refused():
    model = tiny_model("llama")
    forward = model.forward
    model.forward = lambda *args, **kwargs: SimpleNamespace(logits=forward(*args, **kwargs).logits.square())
    with pytest.raises(ValueError, match="LlamaForCausalLM: its logits are not"):
        load_lm(model, tokenizer=tiny_tokenizer(bos=False))


def test_a_model_that_changes_its_embeddings_is_refused():
    model = tiny_model("gpt2")
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="GPT2LMHeadModel: the input of its first layer"):
        load_lm(model, tokenizer=tiny_tokenizer(bos=False))


SMALL = dict(vocab_size=MODEL_SIZE, hidden_size=32, num_hidden_layers=2)


@pytest.mark.parametrize("config", [
    transformers.Mamba2Config(**SMALL, state_size=8, num_heads=8, head_dim=8, n_groups=1),
    transformers.MptConfig(vocab_size=MODEL_SIZE, d_model=32, n_heads=4, n_layers=2),
    transformers.BloomConfig(vocab_size=MODEL_SIZE, hidden_size=32, n_layer=2, n_head=4),
    transformers.GPTNeoConfig(**SMALL | dict(num_layers=2), num_heads=4, attention_types=[[["global", "local"], 1]]),
], ids=lambda config: config.model_type)
def test_a_model_that_cannot_read_words_side_by_side_is_refused(config):
    "Recurrent models, and attention that counts places in memory, not positions."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"^{type(model).__name__}: .* not supported"):
        load_lm(model, tokenizer=tiny_tokenizer(bos=False))


def test_a_source_of_another_kind_and_a_model_without_tokenizer_are_refused():
    with pytest.raises(ValueError, match="needs its tokenizer"):
        load_lm(tiny_model("llama"))
    with pytest.raises(TypeError, match="int"):
        load_lm(3)
    with pytest.raises(ValueError, match="dtype 'float32' is neither"):
        load_lm(dtype="float32")


def test_a_model_without_output_layer_is_refused():
    model = tiny_model("llama").base_model
    with pytest.raises(ValueError, match="LlamaModel has no output layer"):
        load_lm(model, tokenizer=tiny_tokenizer(bos=False))


def test_a_tokenizer_of_another_model_is_refused():
    config = tiny_config("llama")
    config.vocab_size = 280
    with pytest.raises(ValueError, match=f"ids up to {TOKENIZER_SIZE - 1}, the model 280 embeddings"):
        load_lm(transformers.AutoModelForCausalLM.from_config(config), tokenizer=tiny_tokenizer(bos=False))


def test_a_control_token_without_an_embedding_does_no_harm():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra {i}>" for i in range(30)]})
    assert len(tokenizer) > MODEL_SIZE
    assert load_lm(tiny_model("llama"), tokenizer=tokenizer).admissible.sum() == TOKENIZER_SIZE - 3 - 128


def test_the_default_model_loads_fast(lm):
    assert str(lm).startswith("LM('SmolLM2-135M-Instruct': 49,152 tokens of width 576")
    times = []
    for _ in range(3):
        start = time.process_time()  # unlike the time on the wall, independent of other processes
        load_lm()
        times.append(time.process_time() - start)
    assert min(times) < 3


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_special_and_padded_ids_and_fragments_of_characters_are_no_labels(tiny_lm, family):
    lm = tiny_lm(family)
    assert lm.admissible.shape == (MODEL_SIZE,) and lm.admissible.dtype == torch.bool
    fragments = [id for id in range(TOKENIZER_SIZE) if "\ufffd" in lm.token(id)]
    assert len(fragments) == 128  # bytes from 0x80 on
    assert set((~lm.admissible).nonzero()[:, 0].tolist()) == {0, 1, 2, *fragments, *range(TOKENIZER_SIZE, MODEL_SIZE)}


def test_added_control_tokens_are_no_labels_but_added_words_and_blanks_are():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.add_tokens(["<tool_call>", "[INST]", "   ", "zebra"])
    lm = load_lm(tiny_model("llama"), tokenizer=tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<tool_call>", "[INST]", "   ", "zebra"])
    assert lm.admissible[ids].tolist() == [False, False, True, True]


def test_of_the_default_model_all_but_17_control_tokens_and_314_fragments_are_labels(lm):
    assert lm.admissible.sum() == 49_152 - 17 - 314
    assert not lm.admissible[lm.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<repo_name>"])].any()


# --- text and tokens --------------------------------------------------------------------------------------------------


def spacing_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    "Tokenizers that put a space in front of their input: SentencePiece's way, and GPT-2's with add_prefix_space."
    words = ["the", "cat", "polar", "bear", "a", "c", "e", "t", "h", "p", "o", "l", "r", "b", ".", ",", ":"]
    if kind == "bytelevel":
        base = tiny_tokenizer(bos=True).backend_tokenizer
        base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", "\n\n", *words]
        pieces += [f"▁{word}" for word in words] + ["▁t", "▁th", "▁c", "ca"]
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("c", "a"), ("ca", "t"), ("▁c", "a")]
        merges += [("▁", "a"), ("\n", "\n")]
        merges = [(a, b) for a, b in merges if a + b in vocabulary]
        base = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        base.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                          decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=base)


@pytest.fixture(scope="session", params=["default", "bytelevel", "metaspace"])
def any_lm(request, tiny_lm):
    "The default model, and models whose tokenizers put a space in front of what they are given."
    if request.param == "default":
        return request.getfixturevalue("lm")
    tokenizer = spacing_tokenizer(request.param)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return load_lm(tiny_model("llama"), tokenizer=tokenizer)


TEXTS = ["", " cat", "cat", " the cat", "\n the cat", "\n\n", ".", ": the cat, a bear", " 鹦鹉 naïve", "  two", " 🦜\t"]


@pytest.mark.parametrize("text", TEXTS)
def test_encode_gives_back_the_text(any_lm, text):
    ids = any_lm.encode(text)
    decoded = any_lm.tokenizer.decode(any_lm.tokenizer("a", add_special_tokens=False).input_ids + ids)
    assert decoded.lstrip(" ") == "a" + text


@pytest.mark.parametrize("text", [" cat", " the cat", "\n the cat", ": the cat"])
def test_encode_continues_encode_start(any_lm, text):
    assert any_lm.encode_start("the") + any_lm.encode(text) == any_lm.encode_start("the" + text)


def test_encode_keeps_or_omits_the_leading_space(any_lm):
    assert any_lm.token(any_lm.encode(" cat")[0])[0] == " "
    assert any_lm.token(any_lm.encode("cat")[0])[0] == "c"


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_encode_round_trips_any_text(text):
    lm = make_tiny_lm("gpt2")
    ids = lm.encode(text)
    assert lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    offsets_ids, offsets = lm.encode_offsets(text)
    assert offsets_ids == ids
    for (start, end), after in zip(offsets, offsets[1:] + [(len(text), len(text))]):
        part = text[start:end]
        assert 0 <= start <= end <= len(text) and part == part.strip() and start <= after[1]


@pytest.mark.parametrize("family, starts", [("llama", True), ("gpt2", False), ("opt", True)])
def test_encode_start_has_a_start_token_where_the_tokenizer_has_one(tiny_lm, family, starts):
    lm = tiny_lm(family)
    assert lm.encode_start(" cat") == [lm.tokenizer.bos_token_id] * starts + lm.encode(" cat")
    assert lm.encode_start("") == [lm.tokenizer.bos_token_id] * starts
    assert lm.encode("") == []


def test_encode_start_has_no_end_token():
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    lm = load_lm(tiny_model("llama"), tokenizer=tokenizer)
    assert lm.encode_start(" cat") == [1, *lm.encode(" cat")]


def test_offsets_lie_on_the_words(any_lm):
    text = " the cat: a bear\n"
    ids, offsets = any_lm.encode_offsets(text)
    assert ids == any_lm.encode(text)
    covered = {i for start, end in offsets for i in range(start, end)}
    assert covered == {i for i, char in enumerate(text) if not char.isspace()}


def test_show_makes_white_space_visible(lm):
    assert lm.show(lm.encode(" animal")) == "·animal"
    assert lm.show(lm.encode(" polar bear\n")) == "·polar·bear⏎"
    assert lm.show(lm.encode(" animal")[0]) == lm.show(torch.tensor(lm.encode(" animal")[0])) == "·animal"
    assert lm.show([]) == ""


def test_fragments_are_shown_as_bytes_and_whole_characters_as_themselves(any_lm):
    ids = any_lm.encode("x鹦")[1:]
    assert any_lm.show(ids) == "鹦"
    if len(ids) == 3:
        assert [any_lm.show(id) for id in ids] == ["⟨E9⟩", "⟨B9⟩", "⟨A6⟩"]
        assert any_lm.show(ids[:2]) == "⟨E9 B9⟩"


def test_ids_without_a_token_are_shown_and_have_no_text(tiny_lm):
    lm = tiny_lm("llama")
    cat, = lm.encode(" cat")
    assert lm.show([cat, MODEL_SIZE - 1, cat]) == f"·cat⟨id {MODEL_SIZE - 1}⟩·cat"
    assert lm.token(MODEL_SIZE - 1) == ""


@pytest.mark.parametrize("kind", ["default", "metaspace", "tiny"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_show_never_fails_and_never_shows_a_replacement_character(kind, data):
    lm = SHOWN(kind)
    ids = data.draw(st.lists(st.integers(0, len(lm.embedding) - 1), max_size=8))
    shown = lm.show(ids)
    assert "\ufffd" not in shown and not re.search(r"[\s\x00-\x1f]", shown.replace("⟨", " ").split(" ")[0])
    shown.encode()  # no lone surrogates
    for id in ids:
        assert "\ufffd" not in lm.show(id)


_SHOWN: dict[str, LM] = {}


def SHOWN(kind: str) -> LM:  # hypothesis wants no fixtures that change between examples
    if kind not in _SHOWN:
        _SHOWN[kind] = (load_lm() if kind == "default" else make_tiny_lm("gpt_neox") if kind == "tiny" else
                        load_lm(tiny_model("llama"), tokenizer=spacing_tokenizer("metaspace")))
    return _SHOWN[kind]


def test_a_token_is_its_exact_text(lm):
    texts = [" animal", "animal", "\n", " ", "中", ",", "ing"]
    assert [lm.token(lm.encode(text)[0]) for text in texts] == texts


# --- the fingerprint --------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_content():
    def fingerprint(seed=0, bos=False, change=lambda model: None):
        model = tiny_model("llama", seed)
        change(model)
        return load_lm(model, tokenizer=tiny_tokenizer(bos)).fingerprint

    def nudge(model):
        model.model.norm.weight.data[3] += 1e-3

    def rename(model):
        model.config._name_or_path = "elsewhere"

    assert fingerprint() == fingerprint() == fingerprint(change=rename)
    used = load_lm(tiny_model("llama"), tokenizer=tiny_tokenizer(False))
    used.tokenizer(["the cat", "a dog and the horse"], padding=True, truncation=True, max_length=4)  # it keeps these
    assert used.fingerprint == fingerprint()
    assert len({fingerprint(), fingerprint(seed=1), fingerprint(bos=True), fingerprint(change=nudge)}) == 4
