"""Processes killed at random moments: nothing is lost, nothing is done twice, nothing half-written is left behind.

These take minutes, so `make fuzz` runs them: a tenth of FUZZ is the number of kills of each kind, SEED another draw."""
import json
import os
import time
from random import Random

import nbformat
import psutil
import pytest
from conftest import Forked, _fork_kernel, _fork_python

from tokenlabel.cli import main
from tokenlabel.lm import load_lm
from tokenlabel.many import label_file, read_results
from tokenlabel.settings import Settings

KILLS, SEED = int(os.environ.get("FUZZ", 0)) // 10, int(os.environ.get("SEED", 0))
pytestmark = pytest.mark.skipif(not KILLS, reason="takes minutes: make fuzz")
HOW = Settings(prompts=("the {label}:",), steps=20, restarts=1, candidates=2, proposals=0, heldout=0)
WORDS = "cat dog horse red book house car lamp".split()
NOTEBOOK = f"""
import json
from pathlib import Path
from tokenlabel import Feature, Settings, load_lm
from tokenlabel.many import Job, label_all
settings, words = Settings.from_plain({HOW.plain()!r}), {WORDS!r}
jobs = [Job(f"job {{i}}", Feature.from_words("x", {{word: float(j % (i + 2) == 0) for j, word in enumerate(words)}}), settings)
        for i in range(4)]
found = label_all(jobs, load_lm(lm), runs=runs, progress=False, workers=1)
for name in "ab": Path(figures, f"{{name}}.json").write_text(json.dumps([result.label for result in found]))
"""


def label_here(source: str, out: str, model: str) -> None:
    "What a killed process was doing: label a file, with two workers that start at once."
    import tokenlabel.workers
    tokenlabel.workers.Popen = _fork_python
    label_file(source, out, load_lm(model), HOW, engine="processes", workers=2, together=2, progress=False)


def reproduce_here(*arguments: str) -> None:
    "What a killed process was doing: execute a notebook, in a kernel that starts at once."
    import jupyter_client.provisioning.local_provisioner as provisioner
    provisioner.launch_kernel = _fork_kernel
    main(list(arguments))


def ended(process: Forked, seconds: float) -> bool:
    "Whether the process ended by itself; kills it after some seconds."
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end: time.sleep(.005)
    done = process.poll() is not None
    process.kill()
    process.wait()
    return done


def wait_for_orphans(marker: str) -> None:
    "Wait until no process works in a folder with this name any more."
    end = time.monotonic() + 60
    while any(marker in " ".join(one.cmdline()) for one in psutil.process_iter() if one.pid != os.getpid() and one.is_running()):
        assert time.monotonic() < end, "a worker outlived the process that started it by a minute"
        time.sleep(.1)


def test_label_file_killed_at_random_moments(stored, tmp_path):
    random, kills, model = Random(SEED), 0, str(stored.model.name_or_path)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    names = [f"feature {i}" for i in range(10)]
    source.write_text("".join(json.dumps(dict(name=name, words=WORDS, activations=[float(j % (i % 5 + 2) == 0) for j in range(8)]))
                              + "\n" for i, name in enumerate(names)))
    start = time.monotonic()
    assert ended(Forked(label_here, str(source), str(out), model), 300)
    whole, seconds = read_results(out)[1], time.monotonic() - start
    assert sorted(row["name"] for row in whole) == sorted(names) and all("label" in row for row in whole)
    while kills < KILLS:
        out.unlink(missing_ok=True)
        while not ended(Forked(label_here, str(source), str(out), model), random.uniform(0, 1.2 * seconds)):
            kills += 1
            rows = read_results(out)[1] if out.exists() else []
            assert len({row["name"] for row in rows}) == len(rows)
            if kills == KILLS:
                assert label_file(source, out, stored, HOW) == 10 - len(rows)
                break
        done = read_results(out)[1]
        assert not [row for row in done if "error" in row]
        assert {row["name"]: row["label"] for row in done} == {row["name"]: row["label"] for row in whole}
    assert {path.name for path in tmp_path.iterdir()} <= {"in.jsonl", "out.jsonl", "out.jsonl.lock"}


def test_reproduce_killed_at_random_moments(stored, tmp_path):
    random, kills = Random(SEED), 0
    cells = [nbformat.v4.new_code_cell(f'figures: str = "figures"  # folder\nruns: str = "runs"  # folder\n'
                                       f'lm: str = {str(stored.model.name_or_path)!r}  # folder', metadata=dict(tags=["parameters"])),
             nbformat.v4.new_code_cell(NOTEBOOK)]
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), tmp_path / "some.ipynb")
    arguments = ["reproduce", str(tmp_path / "some.ipynb"), "--figures", str(tmp_path / "figures"), "--runs", str(tmp_path / "runs")]
    start = time.monotonic()
    assert ended(Forked(reproduce_here, *arguments), 300)
    seconds, figures = time.monotonic() - start, tmp_path / "figures"
    labels = json.loads((figures / "a.json").read_text())
    while kills < KILLS:
        for path in figures.glob("*"): path.unlink()
        for path in tmp_path.glob("runs/cache/*"):
            if random.random() < .5 and path.is_file(): path.unlink()
        while not ended(Forked(reproduce_here, *arguments), random.uniform(0, 1.2 * seconds)):
            kills += 1
            for path in figures.glob("*"): assert json.loads(path.read_text()) == labels  # no half of a figure
            if kills == KILLS: reproduce_here(*arguments)
            if kills >= KILLS: break
        assert sorted(path.name for path in figures.iterdir()) == ["a.json", "b.json"]
        assert all(json.loads(path.read_text()) == labels for path in figures.iterdir())
    end = time.monotonic() + 60
    while left := [path.name for path in (tmp_path / "runs").iterdir() if path.name.startswith(".") or "failed" in path.name]:
        assert time.monotonic() < end, left
        time.sleep(.1)
