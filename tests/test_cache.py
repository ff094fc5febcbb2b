"""Results are computed once and found again by their content."""
import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from tokenlabel.cache import cache_entry, code_version, content_hash, read_entry, write_entry
from tokenlabel.files import write_file


@dataclass
class Result:
    value: float
    interrupted: bool = False

    def save(self, folder): write_file(folder / "value.json", json.dumps(self.value))

    @classmethod
    def load(cls, folder): return cls(json.loads((folder / "value.json").read_text()))


@pytest.fixture
def compute():
    "A function that gives a result and counts its calls."
    def call():
        call.count += 1
        return Result(.1)
    call.count = 0
    return call


def cached(compute, key, runs, load=Result.load):
    "`compute()`, or its result of an earlier call."
    entry = cache_entry(key, runs)
    if read_entry(entry, load) is None: write_entry(entry, compute())
    return load(entry)


def test_a_result_is_computed_once(compute, tmp_path):
    for _ in range(3): assert cached(compute, {"seed": 0}, tmp_path) == Result(.1)
    assert compute.count == 1
    cached(compute, {"seed": 1}, tmp_path)
    assert compute.count == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_broken_entry_is_computed_again(compute, tmp_path):
    cached(compute, {}, tmp_path)
    [entry] = (tmp_path / "cache").iterdir()
    (entry / "value.json").write_text("0.")
    with pytest.warns(UserWarning, match="cannot be read"): assert cached(compute, {}, tmp_path) == Result(.1)
    assert cached(compute, {}, tmp_path) == Result(.1)
    assert compute.count == 2


@pytest.mark.parametrize("error", [ImportError, MemoryError])
def test_an_entry_stays_if_the_machine_is_the_reason_that_it_cannot_be_read(error, compute, tmp_path):
    cached(compute, {}, tmp_path)
    def load(entry): raise error
    with pytest.raises(error): cached(compute, {}, tmp_path, load)
    assert cached(compute, {}, tmp_path) == Result(.1) and compute.count == 1


def test_other_code_means_another_result(compute, tmp_path, monkeypatch):
    cached(compute, {}, tmp_path)
    monkeypatch.setattr("tokenlabel.cache.code_version", lambda: "other")
    cached(compute, {}, tmp_path)
    assert compute.count == 2


def test_a_result_that_cannot_be_saved_leaves_nothing(tmp_path):
    class Unsaved(Result):
        def save(self, folder):
            folder.mkdir()
            raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"): cached(lambda: Unsaved(.1), {}, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_result_of_a_quicker_process_is_used(compute, tmp_path):
    def slow():
        cached(compute, {}, tmp_path)
        return Result(.2)
    assert cached(slow, {}, tmp_path) == Result(.1)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_hash_follows_content():
    @dataclass(frozen=True)
    class Weights:
        kl: float
    def model(fingerprint): return SimpleNamespace(fingerprint=fingerprint, dtype="float32", device="cpu")
    assert content_hash({"a": Weights(.1), "b": model("x")}) == content_hash({"b": model("x"), "a": Weights(.1)})
    values = [Weights(.1), Weights(.2), model("x"), model("y"), 0, "0", None]
    assert len({content_hash({"a": value}) for value in values}) == len(values)
    assert content_hash({"seed": np.int64(3), "ids": np.arange(2)}) == content_hash({"seed": 3, "ids": [0, 1]})
    with pytest.raises(TypeError, match="cannot hash"): content_hash({"a": object()})


def test_the_code_version_ignores_comments_and_drawing(tmp_path):
    versions = []
    for numeric, drawing in [("x = 1", ""), ("x = 1   # why", "import this"), ("x = 2", "import this")]:
        write_file(tmp_path / "objective.py", numeric)
        write_file(tmp_path / "plot.py", drawing)
        code_version.cache_clear()
        versions.append(code_version(tmp_path))
    code_version.cache_clear()
    assert versions[0] == versions[1] != versions[2]
