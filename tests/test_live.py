"""Latents of a model at hand: encodings as sae-lens and sparsify compute them, the windows that are kept, and clear errors."""
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import save_file

from tokenlabel import live
from tokenlabel.live import (
    PACKAGED, SAE, encode, find_site, hooked, latents, make_heap, open_sae, push, read_sae, read_vectors, reconstruct, sample_texts,
    split_rows)

# Written by sae-lens and sparsify themselves, each in an environment of its own: settings, weights, activations.
REFERENCE = json.loads((Path(__file__).parent / "autoencoders.json").read_text())
TEXTS = [f"the {a} and the {b} sat on the {c}." for a in ("cat", "dog", "horse") for b in ("animal", "book") for c in ("mat", "car", "house")]


def write_folder(folder, case, hook="layers.1"):
    "The folder of a case, as the other program writes it."
    sparsify = "encoder.weight" in case["weights"]
    folder = folder / (hook if sparsify else "sae")
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(case["config"]))
    weights = {name: torch.tensor(w["values"]).reshape(w["shape"]) for name, w in case["weights"].items()}
    save_file(weights, folder / ("sae.safetensors" if sparsify else "sae_weights.safetensors"))
    return folder


@pytest.mark.parametrize("name", REFERENCE["cases"])
def test_activations_agree_with_the_programs_that_wrote_the_folder(name, tmp_path):
    case, x = REFERENCE["cases"][name], torch.tensor(REFERENCE["x"])
    sae = read_sae(write_folder(tmp_path, case))
    torch.testing.assert_close(encode(sae, x), torch.tensor(case["activations"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(reconstruct(sae, x), torch.tensor(case["reconstruction"]), atol=1e-5, rtol=0)


def test_both_versions_of_the_settings_are_understood(tmp_path):
    cases = REFERENCE["cases"]
    found = {name: read_sae(write_folder(tmp_path / str(n), cases[name])) for n, name in enumerate(cases)}
    assert {sae.hook for name, sae in found.items() if "sparsify" not in name} == {"blocks.1.hook_resid_post"}
    assert {name: sae.start for name, sae in found.items() if name in ("standard", "version 2", "sparsify")} == {
        "standard": False, "version 2": True, "sparsify": None}
    assert (found["version 5, topk"].kind, found["version 5, topk"].k, found["standard"].context) == ("topk", 4, 16)
    assert (found["sparsify"].hook, found["sparsify"].side, found["sparsify, transcoder"].side) == ("layers.1", "output", "input")


def test_centred_vectors_where_training_had_them(tmp_path):
    case = REFERENCE["cases"]["version 5, standard"]
    config = case["config"] | dict(model_from_pretrained_kwargs=dict(center_writing_weights=True))
    sae, x = read_sae(write_folder(tmp_path, case | dict(config=config))), torch.tensor(REFERENCE["x"])
    plain = read_sae(write_folder(tmp_path / "plain", case))
    torch.testing.assert_close(encode(sae, x + 7), encode(plain, x - x.mean(-1, keepdim=True)))


@pytest.mark.parametrize("change, message", [
    (dict(architecture="temporal"), "architecture 'temporal' is not one of standard, topk, jumprelu, gated"),
    (dict(normalize_activations="expected_average_only_in"), "needs a factor that the folder does not have"),
    (dict(reshape_activations="hook_z"), "outputs of attention heads"),
    (dict(activation_fn="tanh-relu"), "activation function 'tanh-relu' is neither relu nor topk"),
    (dict(metadata={}), "cfg.json has no hook_name"),
    (dict(architecture="jumprelu"), "the weights have no threshold"),
    (dict(architecture="topk", k=11), "k 11 is not in 1 to 10"),
    (dict(architecture="topk"), "k 0 is not in 1 to 10")])
def test_settings_that_would_change_activations_are_refused(change, message, tmp_path):
    case = REFERENCE["cases"]["standard"]
    folder = write_folder(tmp_path, case | dict(config=case["config"] | change))
    with pytest.raises(ValueError, match=re.escape(message)) as caught: read_sae(folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("sae: ")


def test_folders_of_another_format_are_refused(tmp_path):
    def message(folder):
        with pytest.raises(ValueError) as caught: read_sae(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)
    assert "no such folder" in message(tmp_path / "nowhere")
    assert "no cfg.json; expected a folder of SAELens or sparsify" in message(tmp_path)
    folder = write_folder(tmp_path, REFERENCE["cases"]["standard"])
    assert "several autoencoders; give the folder of one" in message(tmp_path) and "sae" in message(tmp_path)
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "sae_weights.safetensors cannot be read" in message(folder)
    weights.unlink()
    assert "no sae_weights.safetensors or sae.safetensors" in message(folder)
    (folder / "cfg.json").write_text("[1]")
    assert "cfg.json is no object" in message(folder)


@pytest.mark.parametrize("name, shape, message", [("b_enc", (9,), "b_enc has the shape (9,), not (10,)"),
                                                  ("W_dec", (6, 10), "W_dec has the shape (6, 10), not (10, 6)")])
def test_weights_of_a_wrong_shape_are_refused(name, shape, message, tmp_path):
    case = REFERENCE["cases"]["standard"]
    size = torch.Size(shape).numel()
    weights = case["weights"] | {name: dict(shape=list(shape), values=[0.0] * size)}
    with pytest.raises(ValueError, match=re.escape(message)): read_sae(write_folder(tmp_path, case | dict(weights=weights)))


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_those_of_the_hidden_states(family, tiny_lm):
    lm = tiny_lm(family)
    ids = torch.tensor([lm.encode_start(TEXTS[0])])
    with torch.no_grad(): states = lm.model.base_model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(read_vectors(lm, find_site(lm, "blocks.0.hook_resid_post"), ids), states[1])
    torch.testing.assert_close(read_vectors(lm, find_site(lm, "blocks.1.hook_resid_pre"), ids), states[1])
    site = find_site(lm, "blocks.1.mlp.hook_post")
    assert read_vectors(lm, site, ids).shape == (*ids.shape, site.width) and site.width != 32
    assert read_vectors(lm, find_site(lm, "blocks.1.hook_mlp_out"), ids).shape == (*ids.shape, 32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_the_model_goes_on_with_other_vectors(family, hook, tiny_lm):
    lm = tiny_lm(family)
    ids, site = torch.tensor([lm.encode_start(TEXTS[0])]), find_site(lm, hook)
    other = torch.randn(1, ids.shape[1], 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, seen = lm.model(ids).logits, []
        with hooked(site, lambda x: seen.append(x)): assert torch.equal(lm.model(ids).logits, plain)
        with hooked(site, lambda x: other): changed = lm.model(ids).logits
        assert torch.equal(lm.model(ids).logits, plain) and len(seen) == 1
    assert not torch.allclose(changed, plain)


def test_a_heap_keeps_the_best_of_all_rows():
    draw, rows, L = torch.Generator().manual_seed(0), 60, 4
    values = torch.rand(rows, 50, L, generator=draw) * (torch.rand(rows, 1, L, generator=draw) < .5)
    ids = torch.arange(rows, dtype=torch.int32)[:, None].expand(-1, 50)
    heap, most = make_heap(L, 7), values.amax(1)
    for part in torch.arange(rows).split(11): push(heap, torch.where(most[part] > 0, most[part], -1.0), ids[part], values[part])
    for n in range(L):
        best = most[:, n].topk(7)
        assert dict(zip(heap.key[n].tolist(), heap.ids[n, :, 0].tolist())) == dict(zip(best.values.tolist(), best.indices.tolist()))
        assert torch.equal(heap.values[n].amax(1), heap.key[n])  # the window has the largest activation


def test_a_heap_of_a_latent_that_seldom_fires_has_empty_places():
    heap, values = make_heap(2, 5), torch.zeros(3, 4, 2)
    values[1, 2, 0] = 3.0
    push(heap, torch.where(values.amax(1) > 0, values.amax(1), -1.0), torch.zeros(3, 4, dtype=torch.int32), values)
    assert (heap.key >= 0).sum(1).tolist() == [1, 0]


def all_values(lm, sae_or_layer, texts, context):
    "Activations of each row, without the first token."
    sae, site = live.open_sae(lm, sae_or_layer)
    rows = [row for text in texts for row in split_rows(lm, text, context, lm.encode_start("") if sae.start is None else [])]
    return [encode(sae, read_vectors(lm, site, torch.tensor([row])))[0, 1:] for row in rows if len(row) > 1]


def test_windows_are_those_of_the_whole_corpus(tiny_lm, monkeypatch):
    monkeypatch.setattr(live, "ROWS", 5)
    monkeypatch.setattr(live, "TOP", 4)
    lm = tiny_lm("gpt2")
    found, whole = latents(lm, 1, TEXTS, context=12, progress=False), all_values(lm, 1, TEXTS, 12)
    assert found.tokens == sum(map(len, whole))
    most = torch.stack([row.amax(0) for row in whole])
    torch.testing.assert_close(found.rows, (most > 0).sum(0))
    torch.testing.assert_close(found.count, sum((row > 0).sum(0) for row in whole))
    for n in range(len(found)):
        top = [max(window.values) for window in found.windows(n)["top"]]
        want = [value for value in most[:, n].topk(4).values.tolist() if value > 0]
        assert top == pytest.approx(want, abs=1e-5)


def test_deciles_go_from_strong_to_weak_and_silent_windows_are_silent(tiny_lm):
    found = latents(tiny_lm("llama"), 0, TEXTS * 3, context=10, progress=False)
    number = int(((found.rows > 20) & (found.rows < 60)).nonzero()[0])
    windows = found.windows(number)
    deciles = [[max(window.values) for window in windows[n]] for n in range(1, 11)]
    assert all(deciles) and sum(map(len, deciles)) == min(int(found.rows[number]), 50)
    assert all(min(a) >= max(b) for a, b in zip(deciles, deciles[1:])) and min(map(min, deciles)) > 0
    assert windows["silent"] and not any(any(window.values) for window in windows["silent"])
    texts = {"".join(window.tokens) for window in windows["silent"]}
    firing = {"".join(window.tokens) for kind in ("top", *range(1, 11)) for window in windows[kind]}
    assert not texts & firing


@pytest.mark.filterwarnings("ignore:feature")
def test_hard_negatives_share_more_tokens_with_the_top_windows(tiny_lm):
    lm = tiny_lm("llama")
    directions = torch.randn(64, len(lm.embedding[0]), generator=torch.Generator().manual_seed(0))
    sae = SAE("topk", "layers.0", dict(W_enc=directions.T, W_dec=directions, b_enc=torch.zeros(64), b_dec=torch.zeros(len(directions[0]))), k=1)
    found = latents(lm, sae, [text.replace("the", word) for word in ("the", "a", "one") for text in TEXTS * 4], context=12, progress=False)
    number = int((found.fires.sum(0) - len(found.fires) / 4).abs().argmin())  # fires in a quarter of the rows
    plain, hard = (found.windows(number, hard)["silent"] for hard in (False, True))
    top = {token for window in found.windows(number)["top"] for token in window.tokens}
    shared = lambda windows: sum(len(top & set(window.tokens)) for window in windows)
    assert len(plain) == len(hard) == 50 and shared(hard) > shared(plain)
    assert not any(any(window.values) for window in hard)
    assert found.feature(number) == found[number] != found.feature(number, hard_negatives=True)


def test_a_latent_becomes_a_feature_that_knows_its_source(tiny_lm):
    lm = tiny_lm("gpt2")
    found = latents(lm, 1, TEXTS, progress=False)
    number = int(((found.rows > 3) & (found.rows < len(TEXTS))).nonzero()[0])
    feature = found[number]
    assert feature.source == dict(model=lm.name, layer="blocks.1.mlp.hook_post", index=number)
    assert max(span.activation for spans in feature.spans for span in spans) == 1
    assert set(feature.texts) <= {text.strip() for text in TEXTS}
    with pytest.raises(IndexError, match="latent 9999 is not one of the"): found[9999]


def test_a_dead_latent_says_so(tiny_lm):
    weights = dict(W_enc=torch.zeros(32, 3), b_enc=torch.tensor([1.0, 0.0, -1.0]), W_dec=torch.zeros(3, 32), b_dec=torch.zeros(32))
    found = latents(tiny_lm("gpt2"), SAE("standard", "blocks.0.hook_resid_post", weights, start=False), TEXTS, progress=False)
    assert found.count.tolist() == [found.tokens, 0, 0]
    with pytest.raises(ValueError, match=f"latent 2 is dead on these texts: it does not fire on {found.tokens} tokens"): found[2]


def test_single_neurons_are_as_in_all_of_them(tiny_lm):
    lm = tiny_lm("gpt2")
    whole, part = latents(lm, 0, TEXTS, progress=False), latents(lm, 0, TEXTS, only=[40, 7], progress=False)
    assert part.numbers == [7, 40] and torch.equal(part.rows, whole.rows[[7, 40]])
    torch.testing.assert_close(part.top.key.sort().values, whole.top.key[[7, 40]].sort().values)


def same(one, other):
    for heap in ("top", "drawn"):
        torch.testing.assert_close(getattr(one, heap).key.sort().values, getattr(other, heap).key.sort().values)
    for name in ("rows", "count"): assert torch.equal(getattr(one, name), getattr(other, name))
    torch.testing.assert_close(one.silent_key.sort().values, other.silent_key.sort().values)
    assert one.tokens == other.tokens


def test_a_call_that_was_killed_goes_on_where_it_was(tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "EVERY", -1)
    monkeypatch.setattr(live, "ROWS", 4)
    lm, read = tiny_lm("gpt2"), []
    def stopped():
        yield from TEXTS[:11]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): latents(lm, 1, stopped(), folder=tmp_path, progress=False)
    add = live.add_rows
    monkeypatch.setattr(live, "add_rows", lambda found, site, rows, number: (read.extend(rows), add(found, site, rows, number)))
    found = latents(lm, 1, TEXTS, folder=tmp_path, progress=False)
    assert 0 < len(read) < len(TEXTS)
    monkeypatch.setattr(live, "ROWS", 32)
    same(found, latents(lm, 1, TEXTS, progress=False))
    read.clear()
    same(found, latents(lm, 1, TEXTS, folder=tmp_path, progress=False))
    assert not read  # all is there


def test_a_state_of_another_call_is_refused(tiny_lm, tmp_path):
    lm, how = tiny_lm("gpt2"), dict(folder=tmp_path, progress=False)
    latents(lm, 1, TEXTS, **how)
    for model, layer, texts, message in (
            (lm, 0, TEXTS, "another model, autoencoder or setting"), (tiny_lm("gpt2", 1), 1, TEXTS, "another model"),
            (lm, 1, TEXTS[::-1], "made from other texts"), (lm, 1, TEXTS[:5], f"{len(TEXTS)} texts were read before, and 5 are given")):
        with pytest.raises(ValueError, match=message): latents(model, layer, texts, **how)
    (tmp_path / "latents.safetensors").write_bytes(b"no state")
    with pytest.raises(ValueError, match="damaged.*remove it to begin again"): latents(lm, 1, TEXTS, **how)


def test_memory_does_not_grow_with_the_corpus(tiny_lm, tmp_path):
    lm = tiny_lm("gpt2")
    sizes = []
    for n, times in enumerate((1, 8)):
        latents(lm, 1, (text for _ in range(times) for text in TEXTS), folder=tmp_path / str(n), progress=False)
        sizes.append((tmp_path / str(n) / "latents.safetensors").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 200


SQUARE = dict(W_enc=torch.eye(32), b_enc=torch.zeros(32), W_dec=torch.eye(32), b_dec=torch.zeros(32))


@pytest.mark.parametrize("sae, how, message", [
    (2, {}, "hook 'blocks.2.mlp.hook_post': .* has the layers 0 to 1"),
    (SAE("standard", "blocks.0.attn.hook_z", SQUARE), {}, "no such place; expected blocks.N.hook_resid_pre"),
    (SAE("standard", "model.layers.7", SQUARE), {}, "no such place"),
    (SAE("standard", "blocks.0.hook_resid_post", {"W_enc": torch.eye(9)}, name="nine"), {}, "nine: .* vectors of width 9; .* has width 32"),
    (SAE("standard", "blocks.0.mlp.hook_post", SQUARE, name="x"), {}, "vectors of width 32; .* has width 128"),
    (SAE("topk", "blocks.0.hook_resid_post", SQUARE, k=3), dict(only=[4]), "a top-k autoencoder compete; one alone cannot be encoded"),
    (1, dict(only=[128]), "expected numbers from 0 to 127"), (1, dict(only=[]), "expected numbers from 0"),
    (1, dict(context=1), "expected at least 2 tokens")])
def test_what_cannot_work_is_refused_before_the_model_runs(sae, how, message, tiny_lm, monkeypatch):
    lm = tiny_lm("gpt2")
    monkeypatch.setattr(live, "read_vectors", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message) as caught: latents(lm, sae, TEXTS, progress=False, **how)
    assert "\n" not in str(caught.value)


def test_arguments_of_another_kind(tiny_lm):
    lm = tiny_lm("gpt2")
    with pytest.raises(TypeError, match="texts has to be a list"): latents(lm, 0, "one text")
    with pytest.raises(TypeError, match="the language model is a list"): latents(TEXTS, 0, TEXTS)
    with pytest.raises(TypeError, match="expected an SAE, a folder, 'default' or the number of a layer, got 1.5"): latents(lm, 1.5, TEXTS)
    with pytest.raises(TypeError, match="text 1 is no string, it is 3"): latents(lm, 0, ["a b", 3], progress=False)
    with pytest.raises(ValueError, match="no token behind the first"): latents(lm, 0, ["", "a"], progress=False)


def test_the_packaged_autoencoder_is_small_and_its_latents_have_unit_directions():
    assert sum(file.stat().st_size for file in PACKAGED.iterdir()) < 8_000_000
    sae = read_sae(PACKAGED)
    assert (sae.kind, sae.hook, sae.start) == ("topk", "blocks.14.hook_resid_post", False)
    torch.testing.assert_close(sae.weights["W_dec"].norm(dim=1), torch.ones(len(sae.weights["W_dec"])), atol=1e-3, rtol=0)


def test_the_packaged_autoencoder_explains_texts_it_was_not_trained_on(lm):
    sae, site = open_sae(lm, "default")
    x = torch.cat([read_vectors(lm, site, torch.tensor([lm.encode_start(text)]))[0, 1:] for text in sample_texts()[:12]])
    def explained(sae): return 1 - float((x - reconstruct(sae, x)).square().sum() / (x - x.mean(0)).square().sum())
    order = torch.rand(sae.weights["W_dec"].shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled = sae.weights | dict(W_dec=sae.weights["W_dec"].gather(1, order), W_enc=sae.weights["W_enc"].T.gather(1, order).T)
    assert explained(sae) > 0.5 > 0.2 > explained(SAE("topk", sae.hook, shuffled, k=sae.k))


def test_numbers_of_numpy_are_numbers(tiny_lm):
    import numpy as np
    assert latents(tiny_lm("llama"), 0, TEXTS, only=np.arange(2), progress=False).numbers == [0, 1]
