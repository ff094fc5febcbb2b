"""The papermill driver, the cache of results, and runs side by side."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from tokenlabel.cli import main
from tokenlabel.experiment import (Call, ExperimentError, Job, Layout, _label_into, _load_again, available_cpus,
                                   available_memory, cached_label, cached_result, check_parameters, code_version,
                                   content_hash, fastest_layout, find_experiment, label_all, list_experiments,
                                   notebook_errors, possible_layouts, processes_in_memory, run_calls, run_experiment,
                                   run_experiments, start_workers)
from tokenlabel.feature import Feature
from tokenlabel.lm import load_lm
from tokenlabel.optimize import label_feature

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
    with pytest.raises(RuntimeError, match="did not stop it:\nwidget: KeyError: 'key'"):
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


@pytest.mark.parametrize("error", [ImportError, MemoryError])
def test_an_entry_is_not_at_fault_if_the_machine_cannot_read_it(error, compute, tmp_path):
    cached_result(compute, {}, tmp_path, Result.load)
    def load(entry): raise error
    with pytest.raises(error): cached_result(compute, {}, tmp_path, load)
    assert cached_result(compute, {}, tmp_path, Result.load) == Result(.1) and compute.count == 1


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
    assert content_hash({"seed": np.int64(3), "ids": np.arange(2)}) == content_hash({"seed": 3, "ids": [0, 1]})
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


# runs side by side: the tests start processes as seldom as they can, since each takes some seconds to import PyTorch

ANIMALS = Feature.from_words("animals", ["cat", "dog", "horse"], ["house", "car", "book"])
FEW = dict(restarts=2, steps=3, candidates=3)


def some_jobs(number, **options):
    return [Job(f"seed {seed}", ANIMALS, FEW | options | {"seed": seed}) for seed in range(number)]


def same(a, b):
    return (a.trace.equals(b.trace) and a.ranking.equals(b.ranking) and a.heldout.equals(b.heldout)
            and (a.label, a.soft, a.settings) == (b.label, b.soft, b.settings))


def children(pid):
    "Process ids of the children of a process, dead ones that nobody waited for included."
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == pid]


def _parent(stat):
    try: return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError: return None   # it has ended meanwhile


def wait_until(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.05)


def entries(runs): return [path for path in (runs / "cache").glob("[!.]*")]


@pytest.fixture(scope="module")
def tiny_folder(tiny_lm, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("models") / "tiny", tiny_lm("llama")
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder): return load_lm(tiny_folder)


def forbid(*_, **__): raise AssertionError("this should not have been called")


def test_runs_in_workers_are_those_of_one_process_and_are_kept(tiny, tmp_path, capsys, monkeypatch):
    jobs, before = some_jobs(3), children(os.getpid())
    results = label_all(jobs, tiny, runs=tmp_path, processes=2, threads=1)
    assert children(os.getpid()) == before
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("3 of 3 runs to do, at the same time: 2, threads of each: 1")
    assert sorted(line.split(":")[0] for line in lines) == ["seed 0", "seed 1", "seed 2"]
    assert [line.partition("(")[2][:11] for line in lines] == ["1 of 3 done", "2 of 3 done", "3 of 3 done"]
    assert [result.settings["seed"] for result in results] == [0, 1, 2]
    monkeypatch.setattr("tokenlabel.experiment.start_workers", forbid)
    here = label_all(jobs, tiny, runs=tmp_path / "here", processes=1, threads=1)
    assert all(map(same, results, here))
    monkeypatch.setattr("tokenlabel.optimize._run", forbid)
    again = label_all(jobs[::-1], tiny, runs=tmp_path)
    assert all(map(same, results[::-1], again)) and again[0].seconds == results[2].seconds
    assert same(cached_label(ANIMALS, tiny, runs=tmp_path, **jobs[1].options), results[1])


def test_a_call_that_fails_and_a_worker_that_is_killed_are_named(tiny, tmp_path, quick_starts):
    def call(name, **options):
        return Call(name, _label_into, dict(feature=ANIMALS, options=FEW | options, entry=tmp_path / "entry"))
    before = children(os.getpid())
    with start_workers(2, 1, tiny) as team:
        with pytest.raises(RuntimeError, match="^the bad one failed: ValueError: lr=-1.0 is not positive") as error:
            list(run_calls(team[:1], [call("the bad one", lr=-1)], forbid))
        assert "_check_settings" in error.value.__notes__[0], "the traceback of the worker"
        with pytest.raises(RuntimeError, match="^the long one: its process was killed by SIGKILL.*use fewer than 1"):
            list(run_calls(team[1:], [call("the long one", steps=100_000)], lambda *_: team[1].process.kill()))
    assert children(os.getpid()) == before and not (tmp_path / "entry").exists()


def test_a_job_that_fails_stops_the_others(tiny, tmp_path):
    good, other = some_jobs(2)
    bad = Job("the bad one", ANIMALS, FEW | {"lr": -1})
    with pytest.raises(RuntimeError, match="^the bad one failed: ValueError: lr=-1.0 is not positive"):
        label_all([good, bad, other], tiny, runs=tmp_path, processes=1, threads=1, progress=False)
    assert len(entries(tmp_path)) == 1


SCRIPT = """
import sys
from tokenlabel import Feature, load_lm
from tokenlabel.experiment import Job, label_all
feature = Feature.from_words("animals", ["cat", "dog", "horse"], ["house", "car", "book"])
jobs = [Job(f"seed {seed}", feature, dict(restarts=2, steps=steps, candidates=3, seed=seed))
        for seed, steps in enumerate([3, 200_000, 200_000])]
label_all(jobs, load_lm(sys.argv[1]), runs=sys.argv[2], processes=2, threads=1)
"""   # without `if __name__ == "__main__"`, which users forget


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_process_that_started_it(how, tiny, tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    script = subprocess.Popen([sys.executable, tmp_path / "script.py", tiny_folder, tmp_path], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: entries(tmp_path))   # the first run is done, two are under way
        workers = children(script.pid)
        assert len(workers) == 2
        script.send_signal(how)
        start = time.monotonic()
        out, err = script.communicate(timeout=20)
    finally: script.kill()
    wait_until(lambda: not any(Path("/proc", str(pid)).exists() for pid in workers), 5)
    assert time.monotonic() - start < 5
    assert err.strip().splitlines()[-1:] == (["KeyboardInterrupt"] if how == signal.SIGINT else []), err
    assert len(entries(tmp_path)) == 1
    if how == signal.SIGINT: return
    jobs = some_jobs(3)   # shorter ones: only the first is the same as that of the script
    monkeypatch.setattr("tokenlabel.experiment.start_workers", forbid)
    finished = label_all(jobs, tiny, runs=tmp_path, processes=1, threads=1, progress=False)
    assert len(entries(tmp_path)) == 3
    anew = label_all(jobs, tiny, runs=tmp_path / "new", processes=1, threads=1, progress=False)
    assert all(map(same, finished, anew)) and finished[0].seconds != anew[0].seconds


def test_an_interrupt_here_is_an_interrupt(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenlabel.optimize.has_collapsed",
                        lambda rows, restarts: rows and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt): label_all(some_jobs(1), tiny, runs=tmp_path, processes=1, progress=False)
    assert not (tmp_path / "cache").exists()


def test_a_model_made_in_memory_is_used_in_this_process(tiny_lm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tokenlabel.experiment.start_workers", forbid)
    jobs, threads = some_jobs(2), torch.get_num_threads()
    assert len(label_all(jobs, tiny_lm("llama"), runs=tmp_path, processes=2)) == 2
    assert "at the same time: 1" in (said := capsys.readouterr().out) and "made in memory" in said
    assert torch.get_num_threads() == threads


def test_a_model_that_was_changed_in_memory_is_not_replaced_by_the_one_on_disk(tiny_folder):
    with pytest.raises(ValueError, match="does not hold the language model that is in memory"):
        _load_again(str(tiny_folder), torch.float32, "tiny", "another fingerprint", torch.get_num_threads())


def test_what_cannot_work_is_refused_before_anything_runs(tiny, tmp_path):
    for wrong, message in [({"step": 3}, "seed 0: .*'step'"), ({"progress": True}, "seed 0: .*'progress'")]:
        with pytest.raises(ValueError, match=message): label_all(some_jobs(1, **wrong), tiny, runs=tmp_path)
    for wrong in {"processes": 0}, {"threads": -1}:
        with pytest.raises(ValueError, match="is less than 1"): label_all(some_jobs(1), tiny, runs=tmp_path, **wrong)
    with pytest.raises(TypeError, match="cannot hash"): label_all(some_jobs(1, prompts={1}), tiny, runs=tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for call in (lambda: label_all(some_jobs(1), tiny, runs=tmp_path / "file" / "runs"),
                 lambda: cached_label(some_jobs(1)[0].feature, tiny, runs=tmp_path / "file" / "runs")):
        with pytest.raises(ValueError, match="file is a file; give a folder"): call()


def test_layouts_fill_the_processors_and_no_more():
    assert possible_layouts(1, 4) == [(1, 1)]
    for cpus, most in [(2, 1), (6, 8), (16, 4), (64, 64)]:
        layouts = possible_layouts(cpus, most)
        assert {(1, 1), (1, cpus), (min(cpus, most), 1)} <= set(layouts)
        assert all(p * n <= cpus and p <= most for p, n in layouts)


def test_the_fastest_layout_depends_on_the_number_of_runs_and_is_measured_once(tiny, tmp_path, monkeypatch):
    measured = []
    def measure(lm, layouts):
        measured.append(layouts)
        speed = {(1, 1): 1.0, (1, 2): 1.5, (2, 1): 1.8}
        return [Layout(*layout, speed[layout]) for layout in layouts]
    monkeypatch.setattr("tokenlabel.experiment.measure_layouts", measure)
    monkeypatch.setattr("tokenlabel.experiment.available_cpus", lambda: 2)
    monkeypatch.setattr("tokenlabel.experiment.processes_in_memory", lambda lm: 8)
    found = [fastest_layout(tiny, jobs, tmp_path) for jobs in (1, 2, 3, 20)]
    # three runs: one after the other 3 / 1.5 = 2 s, in pairs 4 / 1.8 = 2.2 s
    assert [(at.processes, at.threads) for at in found] == [(1, 2), (2, 1), (1, 2), (2, 1)]
    assert len(measured) == 1
    monkeypatch.setattr("tokenlabel.experiment.processes_in_memory", lambda lm: 1)
    assert fastest_layout(tiny, 20, tmp_path).processes == 1 and len(measured) == 2


def test_the_limits_of_a_container_count(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenlabel.experiment._cgroup", tmp_path)
    free, cpus = available_memory(), available_cpus()
    for name, text in ("cpu.max", "max 100000"), ("memory.max", "max"), ("memory.stat", "anon 1000\nfile 9"):
        (tmp_path / name).write_text(text + "\n")
    assert available_cpus() == cpus and available_memory() == pytest.approx(free, rel=.5)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_cpus() == 1 and available_memory() == 4000


def test_at_least_one_process_fits_into_memory(tiny, monkeypatch):
    for free, fit in (0, 1), (4e9, 2), (1e10, 4), (1e11, 32):
        monkeypatch.setattr("tokenlabel.experiment.available_memory", lambda: free)
        assert processes_in_memory(tiny) == fit


def test_whoever_asks_gets_the_rows_of_each_step(tiny, capsys):
    steps = []
    result = label_feature(ANIMALS, tiny, **FEW, progress=steps.append)
    assert [len(rows) for rows in steps] == [2, 2, 2] and capsys.readouterr() == ("", "")
    assert pd.DataFrame([row for rows in steps for row in rows]).equals(result.trace)
    assert result.settings["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("watched", [True, False])
def test_a_bar_is_shown_where_somebody_looks_and_a_line_for_each_run_everywhere(watched, tiny, tmp_path, monkeypatch,
                                                                                capsys):
    monkeypatch.setattr("tokenlabel.experiment._is_watched", lambda: watched)
    label_all(some_jobs(2), tiny, runs=tmp_path, processes=1)
    out, err = capsys.readouterr()
    assert ("6/6" in out) == watched and "(2 of 2 done)" in out and err == ""
    label_all(some_jobs(3), tiny, runs=tmp_path, processes=1)
    assert "1 of 3 runs to do" in (out := capsys.readouterr().out) and "(3 of 3 done)" in out
    label_all(some_jobs(4), tiny, runs=tmp_path, processes=1, progress=False)
    assert capsys.readouterr() == ("", "")
