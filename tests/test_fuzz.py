"""Random damage to all that users hand in. Each input ends in a right answer or in one clear line.

`make fuzz` tries more: FUZZ is the number of inputs of each kind, SEED another draw."""
import json
import os
import re
import shutil
import unicodedata
from pathlib import Path
from random import Random

import pytest

from tokenlabel import exhaustive, many, paper, result
from tokenlabel.cli import main
from tokenlabel.feature import Feature
from tokenlabel.label import label_feature
from tokenlabel.settings import Settings

COUNT, SEED = int(os.environ.get("FUZZ", 30)), int(os.environ.get("SEED", 0))
QUICK = ["--steps", "1", "--restarts", "1", "--candidates", "2", "--proposals", "0", "--heldout", "0", "--prompts", "('the {label}:',)"]
ODD = ["\ufeff", "\u200b", "\u00ad", "\u200d", "e\u0301", "\x1b[31m", "\x00", "\r", "\t", "Ġ", "▁", "[" * 50, "{" * 50, "NaN", "1e999", "true", "null",
       "-1", "0.5", '"', "\\", "\\ud800", ",", "\n", "動物", "<|endoftext|>", "a" * 3000, " "]


def damage(content: bytes, random: Random) -> bytes:
    "The content with one to three random changes."
    for _ in range(random.randint(1, 3)):
        at, to = sorted(random.randint(0, len(content)) for _ in range(2))
        to = min(to, at + random.choice([1, 3, 30, 300]))
        match random.randrange(7):
            case 0: content = content[:at] + content[to:]
            case 1: content = content[:at]
            case 2: content = content[:at] + content[at:to] * 2 + content[to:]
            case 3: content = content[:at] + random.choice(ODD).encode() + content[at:]
            case 4: content = content[:at] + bytes([random.randrange(256)]) + content[at + 1:]
            case 5:
                random.shuffle(lines := content.splitlines(True))
                content = b"".join(lines)
            case 6: content = re.sub(rb"\d+(\.\d+)?", lambda m: random.choice([m[0], b"1e400", b"-3", b"1"]), content)
    return content


def answer(capsys, arguments: list) -> int:
    "The status of the command line; an error has to be one short line without control characters."
    status = main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if not re.search(r"it/s|step|\d%\|", line)]
    assert status in (0, 2)
    if status == 2:
        [line] = [line for line in errors if line.startswith("tokenlabel: error: ")]
        assert len(line) < 700, line
        assert not [c for c in line if unicodedata.category(c) == "Cc"], ascii(line)
    return status


FEATURES = {
    "words.jsonl": "".join(json.dumps({"word": word, "activation": float(i < 6)}) + "\n" for i, word in enumerate(
        "cat dog horse lion bear wolf car house tree river stone lamp".split())),
    "texts.jsonl": "".join(json.dumps({"text": f"The {word} is here, and a house.", "spans": [[4, 4 + len(word), .9]]}) + "\n"
                           for word in "cat dog horse lion bear wolf".split()),
    "words.csv": "word,activation\n" + "".join(f"{word},{int(i < 6)}\n" for i, word in enumerate(
        "cat dog horse lion bear wolf car house tree river stone lamp".split())),
    "words.tsv": "word\tactivation\n" + "".join(f"{word}\t{int(i < 6)}\n" for i, word in enumerate(
        "cat dog horse lion bear wolf car house tree river stone lamp".split())),
    "latent.json": json.dumps({"modelId": "gpt2", "layer": "3-res", "index": "7", "activations": [
        {"tokens": ["<|endoftext|>", "The", " cat", " sat", " on", " the", f" mat{i}"], "values": [0, 0, 3.5 + i, 0, 0, 0, 0]}
        for i in range(5)]}, indent=1),
}


@pytest.fixture
def command(stored, monkeypatch, tmp_path, capsys):
    "`tokenlabel label` with a tiny model that is loaded once, and the result that the command saves."
    monkeypatch.setattr("tokenlabel.lm.load_lm", lambda *a, **k: stored)
    monkeypatch.chdir(tmp_path)

    def label(path: Path):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if answer(capsys, ["label", path, "--out", tmp_path / "out", *QUICK]): return assert_nothing_is_left(tmp_path)
        return result.LabelResult.load(tmp_path / "out")
    return label


def assert_nothing_is_left(folder): assert not (folder / "out").exists() and not list(folder.glob(".*"))


def plain(word: str) -> str: return unicodedata.normalize("NFC", re.sub(r"[\s\ufeff\u200b-\u200f\u00ad]", "", word)).casefold()


@pytest.mark.parametrize("name", FEATURES)
def test_a_damaged_feature_file_is_read_rightly_or_refused(name, command, tmp_path):
    random, whole = Random(f"{SEED} {name}"), FEATURES[name].encode()
    assert command(write(tmp_path / name, whole))
    for _ in range(COUNT):
        content = damage(whole, random)
        found = command(write(tmp_path / name, content))
        if found is None or name != "words.jsonl": continue
        given = [json.loads(line.strip("\ufeff \t\r")) for line in content.decode("utf-8-sig").split("\n") if line.strip("\ufeff \t\r")]
        expected = {plain(record["word"]): record["activation"] for record in given}
        assert {plain(text): spans[0].activation for text, spans in zip(found.feature.texts, found.feature.spans)} == expected


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def saved(tiny_lm, tmp_path_factory) -> dict:
    "A saved object of each kind: its files, and the function that reads them."
    folder, lm = tmp_path_factory.mktemp("saved"), tiny_lm("llama")
    feature = Feature.from_words("animals", "cat dog horse lion".split(), "car house tree river".split())
    how = Settings(steps=2, restarts=1, candidates=3, proposals=0, heldout=0.5, prompts=("the {label}:",))
    found = label_feature(feature, lm, how, progress=False)
    found.save(folder / "result")
    exhaustive.oracle(feature, lm, how, top=2, labels=4, progress=False).save(folder / "oracle")
    source = write(folder / "in.jsonl", json.dumps(dict(name="a", words=list(feature.texts), activations=[1.] * 4 + [0.] * 4)).encode())
    (folder / "results").mkdir()
    many.label_file(source, folder / "results" / "out.jsonl", lm, how, progress=False)
    shutil.copytree(Path(paper.__file__).parents[1] / "figures", folder / "verdicts", ignore=lambda _, names: [
        name for name in names if name.removesuffix(".json") not in paper.PAPER])
    return {"result": (folder / "result", result.LabelResult.load), "oracle": (folder / "oracle", exhaustive.Oracle.load),
            "verdicts": (folder / "verdicts", paper.load_verdicts),
            "results": (folder / "results", lambda folder: many.read_results(folder / "out.jsonl"))}


@pytest.mark.parametrize("kind", ["result", "oracle", "verdicts", "results"])
def test_a_damaged_saved_file_is_refused_or_means_the_same(kind, saved, tmp_path):
    random, (source, load) = Random(f"{SEED} {kind}"), saved[kind]
    expected, files = repr(load(source)), sorted(path for path in source.iterdir() if path.suffix != ".lock")
    for n in range(3 * COUNT):
        shutil.copytree(source, folder := tmp_path / str(n))
        path = random.choice(files)
        write(folder / path.name, damage(path.read_bytes(), random))
        try: found = load(folder)
        except ValueError as error: assert path.name in str(error) or folder.name in str(error)
        else:
            if kind != "results": assert repr(found) == expected
            else: assert all(repr(row) in expected for row in found[1])  # whole rows may be missing, and are done again
        shutil.rmtree(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_damaged_model_folder_works_or_is_refused(file, tiny_folder, tmp_path, capsys):
    random, feature = Random(f"{SEED} {file}"), write(tmp_path / "words.jsonl", FEATURES["words.jsonl"].encode())
    for n in range(max(COUNT // 6, 1)):
        shutil.copytree(tiny_folder, folder := tmp_path / f"model {n}")
        content = (folder / file).read_bytes()
        head = 8 + int.from_bytes(content[:8], "little") if file == "model.safetensors" else len(content)
        changed = damage(content[:head], random) + content[head:]  # no loader can see that a single weight is another one
        write(folder / file, changed)
        answer(capsys, ["label", feature, "--lm", folder, "--out", tmp_path / "out", *QUICK])
        for left in folder, tmp_path / "out": shutil.rmtree(left, ignore_errors=True)
