"""Worker processes: results, errors, lost workers, and no process left behind."""
import importlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tokenlabel.workers import WorkerDied, available_cpus, available_memory, run_calls, start_worker

FUNCTIONS = """
import os, time
from pathlib import Path

class Ends:
    "Ends the process that unpickles it."
    def __reduce__(self): return os._exit, (3,)

def double(tasks):
    for number, task in tasks.items():
        yield {number: f"doubling {task}"}
        if task == "end": os._exit(3)
        yield {number: 2 * task}

def pids(tasks):
    for number, seconds in tasks.items():
        time.sleep(seconds)
        yield {number: os.getpid()}

def processors(tasks):
    for number in tasks: yield {number: os.sched_getaffinity(0)}

def tidy(tasks):
    [(number, path)] = tasks.items()
    try:
        Path(path, "started").touch()
        yield {number: "started"}
        time.sleep(600)
    finally: Path(path, "tidied").touch()
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    "A module that workers can import."
    (tmp_path / "worker_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("worker_functions", None)
    return importlib.import_module("worker_functions")


def results(calls): return {number: value for number, value in calls if not isinstance(value, str)}


def children(pid):
    "Process ids of the children of a process, with those that have ended and that nobody waited for."
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try: stat = path.read_text()
        except OSError: continue  # it has ended meanwhile
        if int(stat.rpartition(")")[2].split()[1]) == pid: found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.05)
    return value


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = children(os.getpid())
    yield
    assert children(os.getpid()) == before


def test_tasks_get_notes_and_results(functions):
    for workers, together in (1, 1), (1, 3), (2, 2):
        found = list(run_calls(functions.double, enumerate([1, 2, 3]), workers=workers, together=together))
        assert results(found) == {0: 2, 1: 4, 2: 6}
        assert {value for _, value in found if isinstance(value, str)} == {"doubling 1", "doubling 2", "doubling 3"}


def test_workers_are_used_again(functions):
    assert len(set(results(run_calls(functions.pids, enumerate([0] * 4))).values())) == 1
    assert len(set(results(run_calls(functions.pids, enumerate([1, 1]), workers=2)).values())) == 2


def test_tasks_are_taken_as_they_are_needed(functions):
    taken = []
    stream = (taken.append(i) or (i, 0) for i in range(9))
    next(run_calls(functions.pids, stream, together=2))
    assert len(taken) <= 4


def test_an_error_is_named_and_has_the_traceback_of_the_worker(functions):
    with pytest.raises(RuntimeError, match="^None failed: TypeError: unsupported operand") as error:
        list(run_calls(functions.double, enumerate([1, None]), workers=2))
    assert "worker_functions.py" in error.value.__notes__[0]


@pytest.mark.parametrize("poison", ["end", "unpickled"])
def test_a_task_that_ends_its_workers_is_given_up_and_no_other(functions, poison):
    task = functions.Ends() if poison == "unpickled" else "end"
    tasks = [(0, 4), (1, task), (2, 2), (3, 8)]
    found = results(run_calls(functions.double, tasks, together=4, retries=1))
    assert isinstance(found[1], WorkerDied) and "ended with status 3, 2 times" in str(found.pop(1))
    assert found == {0: 8, 2: 4, 3: 16}


def test_a_worker_that_is_killed_is_replaced(functions):
    found = {}
    for number, value in run_calls(functions.pids, enumerate([0, .5, 0, .5]), together=4):
        if not found: os.kill(value, signal.SIGKILL)
        found[number] = value
    assert found.keys() == {0, 1, 2, 3} and len(set(found.values())) == 2


def test_an_error_in_the_stream_ends_all(functions):
    def stream():
        yield 0, 1
        raise ValueError("line 3")
    with pytest.raises(ValueError, match="line 3"): list(run_calls(functions.double, stream()))


def test_workers_import_what_this_process_imports_and_keep_to_their_processors(functions):
    [cpu, *_] = os.sched_getaffinity(0)
    start = partial(start_worker, cpus=[cpu])
    assert results(run_calls(functions.processors, [(0, None)], start)) == {0: {cpu}}


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import worker_functions
from functools import partial
from tokenlabel.workers import run_calls, start_worker
function = getattr(worker_functions, sys.argv[2])
for news in run_calls(function, [(0, sys.argv[1] if sys.argv[2] == "tidy" else 600)], partial(start_worker, tidy=sys.argv[2] == "tidy")):
    print(news)
"""  # without `if __name__ == "__main__"`, which users forget


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("function", ["pids", "tidy"])
def test_no_worker_outlives_its_owner(functions, tmp_path, function, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    script = subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path, function], stderr=subprocess.PIPE, text=True)
    try:
        [worker] = wait_until(lambda: children(script.pid))
        if function == "tidy": wait_until((tmp_path / "started").exists)
        else: time.sleep(.5)
        script.send_signal(how)
        _, err = script.communicate(timeout=20)
    finally: script.kill()
    wait_until(lambda: not Path("/proc", str(worker)).exists(), 10)
    assert (tmp_path / "tidied").exists() == (function == "tidy")
    assert err.strip().splitlines()[-1:] == (["KeyboardInterrupt"] if how == signal.SIGINT else []), err


def test_the_limits_of_a_container_count(tmp_path):
    free, cpus = available_memory(), available_cpus()
    for name, text in ("cpu.max", "max 100000"), ("memory.max", "max"), ("memory.stat", "anon 1000\nfile 9"):
        (tmp_path / name).write_text(text + "\n")
    assert available_cpus(tmp_path) == len(os.sched_getaffinity(0)) >= cpus
    assert available_memory(tmp_path) >= .5 * free
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_cpus(tmp_path) == 1 and available_memory(tmp_path) == 4000
