"""Running notebooks: parameters, figures, failures, several side by side."""
import json
import signal
import sys
import time

import nbformat
import pytest

from tokenlabel.cli import main
from tokenlabel.notebooks import (ExperimentError, check_parameters, find_experiment, list_experiments, notebook_errors,
                                  run_experiment, run_experiments)
from tokenlabel.workers import available_cpus

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
    assert list_experiments(), "the package has experiments"
    for name, path in list_experiments().items(): assert find_experiment(name) == path and path.is_file()
    notebook = experiment("some.ipynb")
    assert find_experiment(notebook) == find_experiment(str(notebook)) == notebook.resolve()


def test_an_experiment_that_does_not_exist_is_answered_with_those_that_do():
    name = next(iter(list_experiments()))
    with pytest.raises(ValueError, match=f"did you mean '{name}'.*there are: .*{name}"): find_experiment(name + "x")
    with pytest.raises(FileNotFoundError, match="nowhere.ipynb"): find_experiment("nowhere.ipynb")


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


@pytest.mark.skipif(available_cpus() < 2, reason="there is one processor")
def test_notebooks_go_side_by_side_each_on_its_own_processors(experiment, folders, capfd):
    # each waits until the other one has come as far, so neither ends unless both run at the same time
    meet = """
import os, time
from pathlib import Path
Path(figures, f"{name}.svg").write_text(repr(sorted(os.sched_getaffinity(0))))
Path(runs, name).touch()
while len(list(Path(runs).glob("[ab]"))) < 2: time.sleep(.05)
print("met")"""
    paths = [experiment(f"meet_{name}.ipynb", f"name = {name!r}", meet) for name in "ab"]
    executed = dict(run_experiments(paths, {"seeds": 2}, **folders, at_once=2))
    assert set(executed) == set(paths) and all(path.exists() for path in executed.values())
    one, other = (set(json.loads((folders["figures"] / f"{name}.svg").read_text())) for name in "ab")
    assert one and other and not one & other
    assert {"meet_a: met", "meet_b: met"} <= set(capfd.readouterr().out.splitlines())


@pytest.mark.skipif(available_cpus() < 2, reason="there is one processor")
def test_a_notebook_that_fails_ends_those_beside_it(experiment, folders):
    slow = experiment("slow.ipynb", "import time; time.sleep(600)")
    fails = experiment("fails.ipynb", "1 / 0")
    start = time.perf_counter()
    with pytest.raises(ExperimentError, match="ZeroDivisionError"):
        list(run_experiments([slow, fails], {}, **folders, at_once=2))
    assert time.perf_counter() - start < 300
    assert not list(folders["runs"].glob(".*")) and (folders["figures"] / "plot.svg").read_text() == "old"


def test_an_error_in_a_widget_fails_the_run(experiment, folders):
    notebook = experiment("widget.ipynb", DRAW, "from ipywidgets import Button, Output",
                          "button, out = Button(), Output()\n@out.capture()\ndef pressed(_): {}['key']",
                          "button.on_click(pressed)\nbutton.click()")
    with pytest.raises(ExperimentError, match="did not stop it:\nwidget: KeyError: 'key'"):
        again_if_it_hangs(lambda: run_experiment(notebook, {}, progress=False, **folders))
    assert (folders["figures"] / "plot.svg").read_text() == "old"


def again_if_it_hangs(call):
    "nbclient sometimes misses that a cell with an output widget has ended (its issue 312)."
    def late(*_): raise TimeoutError("no end after half a minute")
    before = signal.signal(signal.SIGALRM, late)
    try:
        for last in False, False, True:
            signal.alarm(30)
            try: return call()
            except TimeoutError:
                if last: raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_traceback_in_a_stream_counts_as_an_error():
    def executed(text):
        output = nbformat.v4.new_output("stream", name="stderr", text=text)
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("Traceback (most recent call last)"),
                                               nbformat.v4.new_code_cell("x", outputs=[output])])
    assert notebook_errors(executed("a warning")) == []
    traceback = "Traceback (most recent call last):\n  ...\nOSError: no\n"
    assert notebook_errors(executed(traceback)) == ["cell: OSError: no"]
