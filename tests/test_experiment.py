"""The papermill driver and the cache of results."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from tokenlabel.cli import main
from tokenlabel.experiment import (cached_label, cached_result, check_parameters, code_version, content_hash,
                                   find_experiment, list_experiments, notebook_errors, run_experiment)

KERNEL = {"name": "python3", "display_name": "python3", "language": "python"}
PARAMETERS = '''
seeds: int = 10                    # how many runs
rate: float = .5                   # step size
quick: bool = False                # a small version
names: list[str] = ["a", "b"]      # some words
anything = None                    # no type written
figures: str = "../../figures"     # where the figures go
runs: str = "../../runs"           # where results are kept
'''
DRAW = 'from pathlib import Path\nPath(figures, "plot.svg").write_text(f"new {seeds}")'


@pytest.fixture
def experiment(tmp_path):
    "Writes a notebook whose first cell holds the parameters; says where."
    def write(name, *cells):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (PARAMETERS, *cells)])
        nb.metadata["kernelspec"] = KERNEL
        nb.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nb, tmp_path / name)
        return tmp_path / name
    return write


@pytest.fixture
def folders(tmp_path):
    "A folder of figures with one from before, and a folder for runs that does not exist yet."
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "plot.svg").write_text("old")
    (tmp_path / "figures" / "other.svg").write_text("other")
    return {"figures": tmp_path / "figures", "runs": tmp_path / "runs"}


# finding

def test_experiments_are_found_by_name_and_by_path(experiment):
    assert list_experiments(), "a source checkout has experiments"
    for name, path in list_experiments().items(): assert find_experiment(name) == path and path.is_file()
    notebook = experiment("some.ipynb")
    assert find_experiment(notebook) == find_experiment(str(notebook)) == notebook.resolve()


def test_an_experiment_that_does_not_exist_is_answered_with_those_that_do():
    name = next(iter(list_experiments()))
    with pytest.raises(ValueError, match=f"did you mean '{name}'.*there are: .*{name}"): find_experiment(name + "x")
    with pytest.raises(FileNotFoundError, match="nowhere.ipynb"): find_experiment("nowhere.ipynb")


def test_without_the_source_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("tokenlabel.experiment._package", tmp_path / "site-packages" / "tokenlabel")
    with pytest.raises(FileNotFoundError, match="clone the repository and install from there"): list_experiments()


# parameters

@pytest.mark.parametrize("parameters", [{}, {"seeds": 3}, {"rate": 1}, {"rate": .1, "quick": True}, {"names": []},
                                        {"anything": 3}, {"anything": "text"}])
def test_fitting_parameters_pass(experiment, parameters):
    check_parameters(experiment("some.ipynb"), parameters)


@pytest.mark.parametrize("parameters, message", [
    ({"seed": 3}, r"no parameter 'seed', did you mean 'seeds'\?; it has seeds: int = 10, rate: float = .5"),
    ({"zzz": 3}, r"no parameter 'zzz'; it has seeds: int = 10"),
    ({"seeds": 2.5}, r"'seeds' of some.ipynb must be int, not 2.5"),
    ({"seeds": True}, r"'seeds' of some.ipynb must be int, not True"),
    ({"rate": "fast"}, r"'rate' of some.ipynb must be float, not 'fast'"),
    ({"quick": 1}, r"'quick' of some.ipynb must be bool, not 1"),
    ({"names": "a"}, r"'names' of some.ipynb must be list\[str\], not 'a'"),
])
def test_other_parameters_are_refused(experiment, parameters, message):
    with pytest.raises(ValueError, match=message): check_parameters(experiment("some.ipynb"), parameters)


def test_a_refused_parameter_leaves_no_trace(experiment, folders):
    for parameters in {"seed": 3}, {"figures": "elsewhere"}, {"runs": "elsewhere"}:
        with pytest.raises(ValueError): run_experiment(experiment("some.ipynb"), parameters, **folders)
    assert not folders["runs"].exists()


def test_a_notebook_must_take_the_folder_of_its_figures(tmp_path, folders):
    nbformat.write(nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL}), tmp_path / "bare.ipynb")
    with pytest.raises(ValueError, match="bare.ipynb has no parameter 'figures'; it has none"):
        run_experiment(tmp_path / "bare.ipynb", {}, **folders)


# running: each of these starts a kernel

def test_a_run_that_succeeds_replaces_its_figures(experiment, folders, tmp_path):
    (tmp_path / "beside.txt").write_text("")
    notebook = experiment("good.ipynb", DRAW, 'import os, sys\nPath(figures, "sub").mkdir()',
                          'Path(figures, "sub", "b.svg").touch()',
                          'assert os.path.exists("beside.txt")\nprint(sys.executable, runs)')
    before = notebook.read_bytes()
    executed = run_experiment(notebook, {"seeds": 3}, progress=False, **folders)
    files = [path for path in folders["figures"].rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"other.svg", "plot.svg", "b.svg"} and len(files) == 3
    assert (folders["figures"] / "sub" / "b.svg").exists()
    assert (folders["figures"] / "plot.svg").read_text() == "new 3"
    assert list(folders["runs"].iterdir()) == [executed] and executed.name.startswith("good-")
    printed = nbformat.read(executed, as_version=4).cells[-1].outputs[0].text
    assert printed == f"{sys.executable} {folders['runs'].resolve()}\n"
    assert notebook.read_bytes() == before


def test_a_run_that_fails_leaves_the_figures_and_says_where(experiment, folders, capsys):
    notebook = experiment("bad.ipynb", DRAW, "before = 1\nratio = before / 0", "never = 2")
    status = main(["reproduce", str(notebook), "--seeds", "3", *(f"--{name}={path}" for name, path in folders.items())])
    error = capsys.readouterr().err
    assert status == 1
    for part in "bad.ipynb failed", "ratio = before / 0", "ZeroDivisionError: division by zero": assert part in error
    assert "never" not in error
    figures = {path.name: path.read_text() for path in folders["figures"].iterdir()}
    assert figures == {"plot.svg": "old", "other.svg": "other"}
    [kept] = folders["runs"].iterdir()
    assert kept.name.startswith("bad-") and kept.name.endswith("-failed.ipynb") and str(kept) in error
    assert nbformat.read(kept, as_version=4).cells[-1].source == "never = 2"


def test_an_error_in_a_widget_fails_the_run(experiment, folders):
    notebook = experiment("widget.ipynb", DRAW, "from ipywidgets import Button, Output",
                          "button, out = Button(), Output()\n@out.capture()\ndef pressed(_): {}['key']",
                          "button.on_click(pressed)\nbutton.click()")
    with pytest.raises(RuntimeError, match="did not stop it:\nwidget: KeyError: 'key'"):
        run_experiment(notebook, {}, progress=False, **folders)
    assert (folders["figures"] / "plot.svg").read_text() == "old"


def test_a_traceback_in_a_stream_counts_as_an_error():
    def executed(text):
        output = nbformat.v4.new_output("stream", name="stderr", text=text)
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("Traceback (most recent call last)"),
                                               nbformat.v4.new_code_cell("x", outputs=[output])])
    assert notebook_errors(executed("a warning")) == []
    traceback = "Traceback (most recent call last):\n  ...\nOSError: no\n"
    assert notebook_errors(executed(traceback)) == ["cell: OSError: no"]


# the cache

@dataclass
class Result:
    value: float
    interrupted: bool = False

    def save(self, folder):
        folder.mkdir()
        (folder / "value.json").write_text(json.dumps(self.value))

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


def test_a_result_is_computed_once(compute, tmp_path):
    for _ in range(3): assert cached_result(compute, {"seed": 0}, tmp_path, Result.load) == Result(.1)
    assert compute.count == 1
    cached_result(compute, {"seed": 1}, tmp_path, Result.load)
    assert compute.count == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_broken_entry_is_computed_again(compute, tmp_path):
    cached_result(compute, {}, tmp_path, Result.load)
    [entry] = (tmp_path / "cache").iterdir()
    (entry / "value.json").write_text("0.")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert cached_result(compute, {}, tmp_path, Result.load) == Result(.1)
    assert compute.count == 2
    assert cached_result(compute, {}, tmp_path, Result.load) == Result(.1)
    assert compute.count == 2


def test_other_code_means_another_result(compute, tmp_path, monkeypatch):
    cached_result(compute, {}, tmp_path, Result.load)
    monkeypatch.setattr("tokenlabel.experiment.code_version", lambda: "other")
    cached_result(compute, {}, tmp_path, Result.load)
    assert compute.count == 2


def test_an_interrupted_result_is_not_kept(tmp_path):
    assert cached_result(lambda: Result(.1, interrupted=True), {}, tmp_path, Result.load).interrupted
    assert not (tmp_path / "cache").exists()


def test_a_result_that_cannot_be_saved_leaves_nothing(tmp_path):
    class Unsaved(Result):
        def save(self, folder):
            folder.mkdir()
            raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"): cached_result(lambda: Unsaved(.1), {}, tmp_path, Result.load)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_result_that_another_process_wrote_meanwhile_is_used(compute, tmp_path):
    def slow():
        cached_result(compute, {}, tmp_path, Result.load)
        return Result(.2)
    assert cached_result(slow, {}, tmp_path, Result.load) == Result(.1)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_hash_follows_content():
    @dataclass(frozen=True)
    class Weights:
        kl: float
    def model(fingerprint): return SimpleNamespace(fingerprint=fingerprint, dtype="float32", device="cpu")
    assert content_hash({"a": Weights(.1), "b": model("x")}) == content_hash({"b": model("x"), "a": Weights(.1)})
    values = [Weights(.1), Weights(.2), model("x"), model("y"), 0, "0", None]
    assert len({content_hash({"a": value}) for value in values}) == len(values)
    with pytest.raises(TypeError, match="cannot hash"): content_hash({"a": object()})


def test_the_code_version_ignores_comments_and_drawing(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenlabel.experiment._package", tmp_path)
    versions = []
    for numeric, drawing in [("x = 1", ""), ("x = 1   # why", "import this"), ("x = 2", "import this")]:
        (tmp_path / "objective.py").write_text(numeric)
        (tmp_path / "plot.py").write_text(drawing)
        versions.append(code_version())
    assert versions[0] == versions[1] != versions[2]


def test_a_labeled_feature_is_kept_by_feature_model_and_options(tmp_path, monkeypatch):
    from tokenlabel.feature import Feature
    calls = []
    def label_feature(feature, lm, *, progress, **options):
        calls.append(options)
        return Result(len(calls))
    monkeypatch.setitem(sys.modules, "tokenlabel.optimize",
                        SimpleNamespace(label_feature=label_feature, LabelResult=Result))
    def model(fingerprint): return SimpleNamespace(fingerprint=fingerprint, dtype="float32", device="cpu")
    tools = Feature.from_words("tools", ["saw", "drill"], ["apple", "cat"])
    fewer = Feature.from_words("tools", ["saw"], ["apple", "cat"])
    def label(feature, fingerprint, **options):
        return cached_label(feature, model(fingerprint), runs=str(tmp_path), **options).value
    assert [label(tools, "x", seed=0), label(tools, "x", seed=0, progress=False)] == [1, 1]
    assert [label(tools, "x", seed=1), label(tools, "y", seed=0), label(fewer, "x", seed=0)] == [2, 3, 4]
    assert calls[0] == {"seed": 0}


# the experiments themselves

def test_the_animals_experiment_runs_and_draws_its_figures(tmp_path):
    executed = run_experiment("animals", {"quick": True, "steps": 12, "restarts": 2}, figures=tmp_path / "figures",
                              runs=tmp_path / "runs", progress=False)
    assert executed.parent == tmp_path / "runs" and notebook_errors(nbformat.read(executed, as_version=4)) == []
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    figures = {f"animals_{mode}{part}" for mode in ("words", "texts")
               for part in ("", "_losses", "_tokens", "_plane", "_accuracy", "_heldout")}
    assert drawn == {f"{name}.{kind}" for name in figures for kind in ("pdf", "png")} | {"animals.csv"}
    kept = list((tmp_path / "runs" / "cache").iterdir())
    assert len(kept) == 2, "one seed in two modes"
