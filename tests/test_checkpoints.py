"""Folders and models that a user may hand in: each is used as it is, or refused in one line that names the file and the fault."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import MODEL_SIZE, tiny_config, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tokenlabel.cli import main
from tokenlabel.lm import load_lm
from tokenlabel.checkpoint import from_pretrained, weights_fault

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sound"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer(True).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


# --- what is changed in a sound folder ----------------------------------------------------------------------------------


def config(**values):
    def change(folder):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | values))
    return change


def saved_from(kind, **values):
    def change(folder):
        settings = tiny_config("llama")
        settings.update(values)
        kind(settings).save_pretrained(folder)
    return change


def weights(change):
    "Other weights in model.safetensors: `change` maps names and weights to new ones."
    def rewrite(folder):
        new = dict(change(name, weight) for name, weight in load_file(folder / "model.safetensors").items())
        new = {name: weight.contiguous() for name, weight in new.items() if name}
        save_file(new, folder / "model.safetensors", {"format": "pt"})
    return rewrite


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_object(folder):
    torch.save(load_file(folder / "model.safetensors") | {"where": Path("here")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(folder):
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink()


def index(**places):
    "Other files for weights."
    def change(folder):
        path = folder / "model.safetensors.index.json"
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {"weight_map": found["weight_map"] | places}))
    return change


def text(name, content): return lambda folder: (folder / name).write_text(content)
def cut(name): return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)
def without(name): return lambda folder: (folder / name).unlink()


def both(*changes):
    def change(folder):
        for each in changes: each(folder)
    return change


def tokenizer_of_kind(kind):
    def change(folder):
        path = folder / "tokenizer.json"
        settings = json.loads(path.read_text())
        settings["model"]["type"] = kind
        path.write_text(json.dumps(settings))
    return change


def quantized(**values): return config(quantization_config=values)
def matrix_as(dtype): return weights(lambda name, weight: (name, weight.to(dtype) if weight.ndim == 2 else weight))


def broken(value):
    def change(name, weight):
        if name == "model.layers.1.mlp.up_proj.weight": weight[3, 5] = value
        return name, weight
    return weights(change)


CASES = {  # name: (change, what the message has in it)
    "classifier": (saved_from(transformers.LlamaForSequenceClassification), "model.safetensors has no output layer"),
    "bare": (saved_from(transformers.LlamaModel), "model.safetensors has no output layer"),
    "tied classifier": (saved_from(transformers.LlamaForSequenceClassification, tie_word_embeddings=True), "score.weight"),
    "wrapper": (weights(lambda name, weight: ("module." + name, weight)), "begin with 'module.'"),
    "renamed": (weights(lambda name, weight: (name.replace("q_proj", "query"), weight)), r"lacks 2 weights \(.*q_proj.weight"),
    "one lacking": (weights(lambda name, weight: (name if "layers.1.mlp.up" not in name else "", weight)),
                    r"lacks 1 weight \(model.layers.1.mlp.up_proj.weight\)"),
    "fewer layers": (config(num_hidden_layers=1), "has 9 weights .*layers.1.* without a place in LlamaForCausalLM"),
    "more layers": (config(num_hidden_layers=3), r"lacks 9 weights \(model.layers.2"),
    "bias for weight": (weights(lambda name, weight: (name.replace("norm.weight", "norm.bias"), weight)), "lacks 5 weights"),
    "one row more": (config(vocab_size=MODEL_SIZE + 1),
                     r"model.safetensors .* is \[320, 32\], and config.json makes it \[321, 32\]"),
    "wider": (config(intermediate_size=64), r"\[32, 48\], and config.json makes it \[32, 64\]"),
    "another family": (config(model_type="bert"), "model.safetensors lacks"),
    "NaN": (broken(float("nan")), "model.safetensors has weights that are not finite.*layers.1.mlp.up_proj"),
    "infinite": (broken(float("-inf")), "model.safetensors has weights that are not finite"),
    "integers": (matrix_as(torch.int8), "model.safetensors: .* is I8: it is quantized, and config.json does not say how"),
    "bytes": (matrix_as(torch.uint8), "quantized"),
    "8-bit floats": (matrix_as(torch.float8_e4m3fn), "F8_E4M3: it is quantized"),
    "integers in a pickle": (both(matrix_as(torch.int8), as_bin), "pytorch_model.bin: .* is torch.int8"),
    "integers in shards": (both(sharded, lambda folder: save_file(
        {n: w.to(torch.int32) for n, w in load_file(folder / "model-00001-of-00005.safetensors").items()},
        folder / "model-00001-of-00005.safetensors", {"format": "pt"})), "model-00001-of-0000.* is I32"),
    "bitsandbytes": (quantized(quant_method="bitsandbytes", load_in_8bit=True), "config.json.*by bitsandbytes.*bitsandbytes"),
    "unnamed 4-bit": (quantized(load_in_4bit=True), "config.json.*quantized by bitsandbytes"),
    "gptq": (quantized(quant_method="gptq", bits=4), "config.json.*quantized by gptq.*optimum"),
    "awq": (quantized(quant_method="awq", bits=4), "config.json.*quantized by awq.*gptqmodel"),
    "hqq": (quantized(quant_method="hqq"), "config.json.*quantized by hqq.*HQQ"),
    "torchao": (quantized(quant_method="torchao", quant_type="int8_weight_only"), "config.json.*quantized by torchao.*torchao"),
    "compressed-tensors": (quantized(quant_method="compressed-tensors"), "config.json.*by compressed-tensors.*pip install"),
    "unknown method": (quantized(quant_method="seven"), "config.json.*quantized by seven, which transformers does not know"),
    "no method": (quantized(bits=3), "config.json.*quantized by an unnamed method"),
    "method is a text": (config(quantization_config="gptq"), "config.json.*quantized by gptq"),
    "pointer": (text("model.safetensors", POINTER), "model.safetensors: it is a Git LFS pointer"),
    "cut": (cut("model.safetensors"), "model.safetensors: it is cut or damaged"),
    "empty": (text("model.safetensors", ""), "model.safetensors: it is cut or damaged"),
    "no weights": (without("model.safetensors"), "no file named model.safetensors"),
    "pickle cut": (both(as_bin, cut("pytorch_model.bin")), "pytorch_model.bin: it is cut or damaged"),
    "pickle pointer": (both(as_bin, text("pytorch_model.bin", POINTER)), "pytorch_model.bin: it is a Git LFS pointer"),
    "shard cut": (both(sharded, cut("model-00002-of-00005.safetensors")), "model-00002-of-0000.*cut or damaged"),
    "shard pointer": (both(sharded, text("model-00002-of-00005.safetensors", POINTER)), "model-00002-of-0000.*LFS pointer"),
    "shard missing": (both(sharded, without("model-00002-of-00005.safetensors")), "model-00002-of-0000"),
    "index cut": (both(sharded, cut("model.safetensors.index.json")), "model.safetensors.index.json: it is not JSON"),
    "tokenizer newer": (tokenizer_of_kind("BPE2"), "tokenizer.json: it is cut or damaged, or is of a newer kind"),
    "tokenizer cut": (cut("tokenizer.json"), "tokenizer.json: it is not JSON, or was cut"),
    "tokenizer pointer": (text("tokenizer.json", POINTER), "tokenizer.json: it is a Git LFS pointer"),
    "tokenizer list": (text("tokenizer.json", "[1]"), "tokenizer.json: it is no JSON object"),
    "tokenizer config list": (text("tokenizer_config.json", "[1]"), "tokenizer_config.json: it is no JSON object"),
    "tokenizer config cut": (cut("tokenizer_config.json"), "tokenizer_config.json: it is not JSON"),
    "no tokenizer": (without("tokenizer.json"), "model: .*tokenizer"),
    **{f"deep {name}": (text(name, DEEP), f"{name}: its JSON is nested too deep") for name in
       ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")},
    "config cut": (cut("config.json"), "config.json: it is not JSON, or was cut"),
    "config list": (text("config.json", "[]"), "config.json: it is no JSON object"),
    "config null": (text("config.json", "null"), "config.json: it is no JSON object"),
    "generation config": (text("generation_config.json", '{"watermarking_config": 5}'), "generation_config.json: "),
    "zeros": (weights(lambda name, weight: (name, weight * (name != "lm_head.weight"))), "has only zeros in its output layer"),
    "a pickle of objects": (with_object,
                            "pytorch_model.bin: it holds other Python objects than weights, or is cut; save"),
    "index names another folder": (both(sharded, index(**{"lm_head.weight": "../other.safetensors"})), "names '../other.safetensors', which is no"),
    "index names another path": (both(sharded, index(**{"lm_head.weight": "/tmp/other.safetensors"})), "which is no file of the folder"),
    "index names the wrong file": (both(sharded, index(**{"lm_head.weight": "model-00002-of-00005.safetensors"})), r"1 weight \(lm_head.weight\) lie"),
    "index without files": (both(sharded, text("model.safetensors.index.json", '{"metadata": {}, "weight_map": []}')), "weight_map does not say"),
    "index without metadata": (both(sharded, text("model.safetensors.index.json", '{"weight_map": {}}')), "index.json: it has no metadata"),
    "config number as text": (config(hidden_size="wide"), "config.json: .*hidden_size"),
    "config unknown activation": (config(hidden_act="foo"), "config.json: KeyError: 'foo'"),
    "too many rows": (config(vocab_size=10 ** 10), "config.json: vocab_size is 10,000,000,000, and the files of weights have"),
    "too many layers": (config(num_hidden_layers=10 ** 9), "config.json: num_hidden_layers is 1,000,000,000"),
    "too wide": (config(hidden_size=10 ** 6), "config.json: hidden_size is 1,000,000, and the files of weights have"),
    "config negative": (config(vocab_size=-1), "config.json: .*negative"),
    "config unknown model": (config(model_type="nix"), "config.json: .*model type `nix`"),
    "own code": (config(model_type="nix", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
                 "config.json: .*custom code"),
    "adapter": (text("adapter_config.json", '{"peft_type": "LORA"}'), "has an adapter .adapter_config.json.; merge it"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_folder_is_refused_in_one_line(folder, name):
    change, expected = CASES[name]
    change(folder)
    with pytest.raises((ValueError, OSError), match=expected) as info: load_lm(folder)
    message = str(info.value)
    assert str(folder) in message and "\n" not in message and len(message) < 700


SOUND = {"as it is": lambda folder: None, "pickle": as_bin, "shards": sharded,
         "names without the prefix": weights(lambda name, weight: (name.removeprefix("model."), weight)),
         "own code beside a known model": config(auto_map={"AutoModelForCausalLM": "evil.M", "AutoConfig": "evil.C"})}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_folder_is_loaded_with_its_own_weights(sound, folder, name):
    SOUND[name](folder)
    assert load_lm(folder).model.lm_head.weight.equal(load_file(sound / "model.safetensors")["lm_head.weight"])


def test_a_shared_head_is_not_missing_and_old_masks_are_not_left_over(folder):
    model = tiny_model("qwen2")
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["model.layers.0.attn.masked_bias"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load_lm(folder).head.weight.equal(model.lm_head.weight)


def test_a_panic_of_a_reader_is_the_fault_of_the_file_but_an_interrupt_is_not(folder):
    class Loader:
        def __init__(self, error): self.error = error
        def from_pretrained(self, *_, **__): raise self.error
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ValueError, match="PanicException: index out of range"):
        from_pretrained(Loader(panic("index out of range")), str(folder))
    with pytest.raises(KeyboardInterrupt): from_pretrained(Loader(KeyboardInterrupt()), str(folder))


def test_code_beside_a_model_is_never_run_and_nobody_is_asked(folder, monkeypatch):
    config(model_type="nix", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError): load_lm(folder)
    assert not (folder / "ran").exists()


def test_the_command_ends_with_status_2_and_one_line(folder, tmp_path, capsys):
    cut("model.safetensors")(folder)
    (tmp_path / "f.jsonl").write_text('{"word": "saw", "activation": 1}\n{"word": "cat", "activation": 0}\n')
    assert main(["label", str(tmp_path / "f.jsonl"), "--lm", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"tokenlabel: error: cannot load {folder / 'model.safetensors'}: it is cut")


# --- in memory ----------------------------------------------------------------------------------------------------------


def test_a_head_of_another_size_than_the_embedding_is_refused():
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(32, 300, bias=False)
    with pytest.raises(ValueError, match="output layer has 300 rows and its embedding 320"):
        load_lm(model, tokenizer=tiny_tokenizer(True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_in_memory_with_weights_that_are_not_finite_is_refused(value):
    model = tiny_model("llama")
    model.model.norm.weight.data[7] = value
    with pytest.raises(ValueError, match="not finite.*model.norm.weight"): load_lm(model, tokenizer=tiny_tokenizer(True))


def test_integers_in_memory_are_refused():
    model = tiny_model("llama").requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="torch.int8 in model.layers.0.mlp.up_proj.weight: it is quantized"):
        load_lm(model, tokenizer=tiny_tokenizer(True))


def test_a_sum_that_overflows_is_not_mistaken_for_weights_that_are_not_finite():
    model = tiny_model("llama").half()
    model.lm_head.weight.data.fill_(60_000)
    assert weights_fault(model) is None


class PeftModel(torch.nn.Module):
    "A wrapper with the interface of PEFT's."
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def get_base_model(self): return self.inner


def test_a_peft_model_is_refused_with_the_hint_that_works():
    model = PeftModel(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"PeftModel is a model in a wrapper; .*get_base_model\(\)"):
        load_lm(model, tokenizer=tiny_tokenizer(True))
    load_lm(model.get_base_model(), tokenizer=tiny_tokenizer(True))


def test_a_tokenizer_that_cannot_read_is_refused_in_one_line():
    nothing = Tokenizer(models.WordLevel({"cat": 0}, unk_token="[UNK]"))
    nothing.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="the tokenizer of LlamaForCausalLM cannot read a text: .*UNK") as info:
        load_lm(tiny_model("llama"), tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=nothing))
    assert "\n" not in str(info.value)
    with pytest.raises(ValueError, match="has no tokens"):
        load_lm(tiny_model("llama"), tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))


def test_a_word_that_a_tokenizer_cannot_read_is_named():
    letters = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0), ("\n", -3.0), ("c", -4.0), ("d", -5.0), ("e", -6.0)]))
    lm = load_lm(tiny_model("llama"), tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=letters))
    with pytest.raises(ValueError, match="cannot read '日': .*unk_id"): lm.encode("日")
