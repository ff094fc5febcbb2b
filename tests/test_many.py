"""Many features: the same labels as one by one, whatever shares a pass, and nothing lost when a process ends."""
import gc
import json
import resource
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path
from random import Random

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pandas as pd
import pytest
import torch
from filelock import FileLock, Timeout

from tokenlabel.cache import cache_entry
from tokenlabel.feature import Feature
from tokenlabel.label import label_feature
from tokenlabel.many import (Job, choose_layout, label_all, label_features, label_file, label_folder, label_jobs, load_again,
                             read_folder, read_results, read_rows, write_row)
from tokenlabel.prompts import Question
from tokenlabel.settings import Settings
from tokenlabel.workers import available_cpus

WORDS = ["cat", "dog", "horse", "house", "car", "red", "book", "animal", "the horse", "things", "mat", "text"]
HOW = Settings(prompts=["Examples of {label}:", "the {label} and"], steps=6, candidates=3, heldout=0)
ASKED = replace(HOW, discriminator="direct", prompts=Question("Is {word} {label}?", answer=" ", yes="1", no="0"))
AUTO = replace(HOW, label_tokens="auto", heldout=0.5)
TEXT = Feature.from_texts("animals", ["the cat and the dog", "the red house", "a dog", "a car"],
                          [[(4, 7, 1.0), (16, 19, 1.0)], [], [(2, 5, 1.0)], []])


def some_features(count):
    "Features that share words; the active ones differ."
    return [Feature.from_words(f"feature {i}", {word: float((i + j) % 3 == 0) for j, word in enumerate(WORDS)})
            for i in range(count)]


def write(path, features):
    rows = [dict(name=one.name, words=one.texts, activations=[spans[0].activation for spans in one.spans])
            for one in features]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labels(found): return {number: result.label for number, result in found.items()}


def alone(feature, lm, settings=HOW): return label_feature(feature, lm, settings, progress=False)


def rows_of(out): return [json.loads(line) for line in out.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def lm(tiny_lm): return tiny_lm("llama")


# in one process

@pytest.mark.parametrize("together", [1, 2, 5])
def test_labels_are_those_of_one_by_one(lm, together):
    jobs = [Job(one.name, one, replace(HOW, seed=i, restarts=1 + i % 2)) for i, one in enumerate(some_features(5))]
    found = dict(label_features(jobs, lm, together=together))
    assert found.keys() == set(range(5))
    for i, job in enumerate(jobs):
        one = alone(job.feature, lm, job.settings)
        assert (found[i].label, found[i].settings, len(found[i].trace)) == (one.label, one.settings, len(one.trace))
        assert found[i].ranking.loss[0] == pytest.approx(one.ranking.loss[0], rel=1e-3)


def test_features_of_all_kinds_go_side_by_side(lm):
    feature, other = some_features(2)
    kinds = [HOW, replace(HOW, prompts=None, steps=4), ASKED, replace(HOW, label_tokens=2)]
    jobs = [Job("words", feature, settings) for settings in kinds] + [Job("text", TEXT, settings) for settings in kinds[:2]]
    found = dict(label_features([*jobs, other], lm, HOW))
    assert labels(found) == {i: alone(one.feature, lm, one.settings).label for i, one in enumerate(jobs)} | {
        len(jobs): alone(other, lm).label}


@pytest.mark.parametrize("first", [0, 1])
def test_words_and_texts_take_their_own_prompts_in_turn(lm, first):
    "The default prompts of both have a sentence in common, at other places."
    features = [some_features(1)[0], TEXT]
    features, how = features[first:] + features[:first], replace(HOW, prompts=None, steps=4)
    for i, result in label_features(features, lm, how):
        assert result.trace.accuracy_loss.tolist() == pytest.approx(alone(features[i], lm, how).trace.accuracy_loss.tolist(),
                                                                    rel=1e-2)


def test_a_feature_that_cannot_be_labeled_does_not_stop_the_others(lm):
    long = Feature.from_texts("long", ["the cat " * 300, "a house"], [[(4, 7, 1.0)], []])
    few = Feature.from_words("few", {"cat": 1.0, "dog": 0.0})
    good = some_features(1)[0]
    found = dict(label_features([good, long, Job("few", few, replace(HOW, heldout=0.3)), good], lm, HOW))
    assert isinstance(found[1], ValueError) and "split it" in str(found[1])
    assert isinstance(found[2], ValueError) and "2 active word types" in str(found[2])
    assert found[0].label == found[3].label == alone(good, lm).label


def test_a_stream_is_read_as_it_is_needed(lm):
    taken = []
    stream = (taken.append(one.name) or one for one in some_features(6))
    next(label_features(stream, lm, HOW, together=2))
    assert len(taken) <= 4


def test_notes_tell_how_each_job_gets_on(lm):
    news = [news for news in label_jobs(enumerate([Job("a", some_features(1)[0], HOW)]), lm)]
    assert all(isinstance(one[0], str) for one in news[:-1]) and news[-1][0].label
    assert len(news) - 1 == news[-1][0].trace.step.nunique()


def test_mistakes_show_before_anything_is_labeled(lm):
    for wrong in (dict(engine="cluster"), dict(workers=0), dict(together=0), dict(steps=0), dict(nonsense=1),
                  dict(discriminator="oracle"), dict(prompts=["no slot"]), dict(settings=3),
                  dict(engine="processes")):  # the last: made in memory
        with pytest.raises(ValueError): label_features(some_features(1), lm, **wrong)


# in several processes

def test_workers_give_the_labels_of_this_process(stored, quick_starts):
    features = some_features(4)
    jobs = [Job(one.name, one, HOW if i else ASKED) for i, one in enumerate(features)]
    here = dict(label_features(jobs, stored))
    there = dict(label_features(jobs, stored, engine="processes", workers=2, threads=1, together=2))
    assert labels(there) == labels(here)


def test_an_error_in_a_worker_is_named(stored, quick_starts):
    with pytest.raises(RuntimeError, match="^feature 0, odd failed: TypeError") as error:
        list(label_features([some_features(1)[0], Job("odd", 7, HOW)], stored, HOW, engine="processes", workers=1))
    assert "many.py" in error.value.__notes__[0], "the traceback of the worker"


def test_a_model_that_was_changed_in_memory_is_not_replaced_by_the_one_on_disk(stored):
    with pytest.raises(ValueError, match="does not hold the language model that is in memory"):
        load_again(stored.model.name_or_path, "tiny", "another fingerprint", torch.float32, "cpu", torch.get_num_threads())


def test_the_layout_follows_the_rule(stored, lm):
    cpus = available_cpus()
    assert choose_layout(stored, 1, working_memory=0)[:2] == (1, cpus)
    assert choose_layout(stored, cpus, working_memory=0)[:2] == choose_layout(stored, 99, working_memory=0)[:2] == (cpus, 1)
    assert choose_layout(stored, 99, working_memory=1e15)[:2] == (1, cpus)
    assert choose_layout(stored, 99, workers=3)[:2] == (3, max(1, cpus // 3))
    assert choose_layout(stored, 99, threads=2 * cpus)[:2] == (1, 2 * cpus)
    assert choose_layout(lm, 99)[0] == 1
    for wrong in {"workers": 0}, {"threads": -1}:
        with pytest.raises(ValueError, match="is less than 1"): choose_layout(stored, 1, **wrong)


# label_all

def some_jobs(number):
    feature = some_features(1)[0]
    return [Job(f"seed {seed}", feature, replace(HOW, steps=3, seed=seed)) for seed in range(number)]


def same(a, b):
    "Equal but for the last bits of a sum, in which two processes may differ."
    for one, other in (a.trace, b.trace), (a.ranking, b.ranking), (a.heldout, b.heldout):
        pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)
    return (a.label, a.soft["label"], a.settings, a.threads) == (b.label, b.soft["label"], b.settings, b.threads)


def entries(runs): return [path for path in (Path(runs) / "cache").glob("[!.]*")]


def test_runs_in_workers_are_those_of_one_process_and_are_kept(stored, tmp_path, capsys, quick_starts):
    jobs = some_jobs(3)
    results = label_all(jobs, stored, runs=tmp_path, workers=2, threads=1)
    first, *lines = filter(None, capsys.readouterr().out.splitlines())
    assert first.startswith("3 of 3 jobs to do, at the same time: 2, threads of each: 1")
    assert sorted(line.split(":")[0] for line in lines) == ["seed 0", "seed 1", "seed 2"]
    assert [line.partition("(")[2][:11] for line in lines] == ["1 of 3 done", "2 of 3 done", "3 of 3 done"]
    assert [result.settings.seed for result in results] == [0, 1, 2]
    here = label_all(jobs, stored, runs=tmp_path / "here", workers=1, threads=1)
    assert all(map(same, results, here))
    again = label_all(jobs[::-1], stored, runs=tmp_path)
    assert all(map(same, results[::-1], again)) and again[0].seconds == results[2].seconds
    more = some_jobs(4)
    label_all(more, stored, runs=tmp_path, workers=1)
    assert "1 of 4 jobs to do" in (out := capsys.readouterr().out) and "(4 of 4 done)" in out
    label_all([*more, *more], stored, runs=tmp_path / "quiet", workers=1, progress=False)
    assert capsys.readouterr() == ("", "") and len(entries(tmp_path / "quiet")) == 4


def test_a_job_that_fails_stops_the_others_and_what_is_finished_is_kept(stored, tmp_path):
    good, other = some_jobs(2)
    bad = Job("the bad one", Feature.from_words("few", {"cat": 1.0, "dog": 0.0}), replace(HOW, heldout=0.3))
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="^the bad one failed: ValueError: "):
        label_all([good, bad, other], stored, runs=tmp_path, workers=1, threads=before + 1, progress=False)
    assert len(entries(tmp_path)) == 1 and torch.get_num_threads() == before


def test_a_model_made_in_memory_is_used_in_this_process(lm, tmp_path, capsys):
    assert len(label_all(some_jobs(2), lm, runs=tmp_path, workers=2)) == 2
    assert "at the same time: 1" in (said := capsys.readouterr().out) and "made in memory" in said


def test_a_call_that_cannot_work_leaves_nothing(stored, tmp_path):
    for wrong in {"workers": 0}, {"threads": -1}:
        with pytest.raises(ValueError, match="is less than 1"): label_all(some_jobs(1), stored, runs=tmp_path, **wrong)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give a folder"):
        label_all(some_jobs(1), stored, runs=tmp_path / "file" / "runs")


SCRIPT = """
import sys
from tokenlabel import Feature, Settings, load_lm
from tokenlabel.many import Job, label_all
feature = Feature.from_words("feature 0", {words})
jobs = [Job(f"seed {{seed}}", feature, Settings(prompts={prompts}, steps=steps, candidates=3, heldout=0, seed=seed))
        for seed, steps in enumerate([3, 200_000, 200_000])]
label_all(jobs, load_lm(sys.argv[1]), runs=sys.argv[2], workers=2, threads=1)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_keeps_what_is_finished(how, stored, tmp_path):
    words = {word: float(j % 3 == 0) for j, word in enumerate(WORDS)}
    (tmp_path / "script.py").write_text(SCRIPT.format(words=words, prompts=list(HOW.prompts)))
    script = subprocess.Popen([sys.executable, tmp_path / "script.py", stored.model.name_or_path, tmp_path], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 300
        while not entries(tmp_path):  # the first run is done, two are under way
            assert time.monotonic() < end and script.poll() is None, "waited in vain"
            time.sleep(.05)
        script.send_signal(how)
        _, err = script.communicate(timeout=60)
    finally: script.kill()
    assert err.strip().splitlines()[-1:] == (["KeyboardInterrupt"] if how == signal.SIGINT else []), err
    [job] = some_jobs(1)
    assert entries(tmp_path) == [cache_entry(dict(feature=job.feature, lm=stored, settings=job.settings), tmp_path)]


# files

def test_files_of_features(tmp_path):
    features = some_features(2)
    lines = write(tmp_path / "a.jsonl", features)
    table = pa.Table.from_pylist([json.loads(line) for line in lines.read_text().splitlines()])
    pq.write_table(table, tmp_path / "a.parquet")
    named = [(one.name, one) for one in features]
    assert list(read_rows(lines)) == named == list(read_rows(tmp_path / "a.parquet"))
    text = dict(name="x", texts=["a cat", "b"], spans=[[[2, 5, 1.0]], []])
    (tmp_path / "b.jsonl").write_text(json.dumps(text) + '\n{"name": "y"}\n')
    (_, feature), (name, error) = read_rows(tmp_path / "b.jsonl")
    assert feature.mode == "texts" and name == "y" and "b.jsonl, feature 2" in str(error)
    (tmp_path / "c.jsonl").write_text(json.dumps(text) + "\n\n", encoding="utf-8-sig")
    assert len(list(read_rows(tmp_path / "c.jsonl"))) == 1
    for wrong in ('[1]', '{"name"', '{"words": ["a"]}', '{"name": ["x"]}', '{"name": "\\ud800"}'):
        (tmp_path / "d.jsonl").write_text(wrong)
        with pytest.raises(ValueError, match="d.jsonl, feature 1"): list(read_rows(tmp_path / "d.jsonl"))
    (tmp_path / "e.jsonl").write_bytes(json.dumps(text).encode() + '\n{"name": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="e.jsonl, feature 2"): list(read_rows(tmp_path / "e.jsonl"))


@pytest.mark.parametrize("row, message", [
    (dict(words="abcdefgh", activations=[1, 1, 1, 1, 0, 0, 0, 0]), "words is 'abcdefgh'; give a list"),
    (dict(words=["a"], activations=None), "activations is None; give a list"), (dict(), "texts is None; give a list")])
def test_a_row_without_lists_is_an_error_of_its_own(tmp_path, row, message):
    source = tmp_path / "in.JSONL"
    source.write_text(json.dumps(dict(name="x") | row) + "\n")
    [(_, error)] = read_rows(source)
    assert message in str(error)


def test_a_row_of_texts_may_have_empty_words(tmp_path):
    rows = [dict(name="t", words=[], activations=[], texts=["a saw is here", "no"], spans=[[[2, 5, 1.0]], []])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    [(_, feature)] = read_rows(tmp_path / "in.parquet")
    assert feature.mode == "texts"


@pytest.mark.parametrize("spans", [[[[4, 7, 0.9]], []], [[dict(start=4, end=7, activation=0.9)], []]])
def test_spans_with_fractional_activations_are_read_from_parquet(tmp_path, spans):
    pq.write_table(pa.Table.from_pylist([dict(name="t", texts=["the cat", "a dog"], spans=spans)]), tmp_path / "a.parquet")
    [(_, feature)] = read_rows(tmp_path / "a.parquet")
    assert feature == Feature.from_texts("t", ["the cat", "a dog"], [[(4, 7, 0.9)], []])


@pytest.mark.parametrize("spans", [None, [[4, 7]], [[None, 7, 1]], [dict(start=4, end=None, activation=1)]])
def test_a_row_with_spans_that_are_none_is_named(tmp_path, spans):
    row = dict(name="t", texts=["a dog", "the cat"], spans=[[], spans])
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for path in tmp_path.iterdir():
        [(name, error)] = read_rows(path)
        assert name == "t" and isinstance(error, ValueError) and f"{path.name}, feature 1: text 1" in str(error)


@pytest.mark.parametrize("line, why", [('{"name": "x", "name": "y"}', "twice"), ("[" * 100_000, "nested"), ('{"name": "x"} 7', "more follows"),
                                       (r'{"name": "\u001b[31m"}', "control character")])
def test_a_line_that_is_no_row_is_one_clear_error(tmp_path, line, why):
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(ValueError, match=f"in.jsonl, feature 1: .*{why}") as error: list(read_rows(tmp_path / "in.jsonl"))
    assert len(str(error.value)) < 200
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        del error
        gc.collect()
    assert not said  # the file is closed


# from file to file

@pytest.mark.parametrize("wrong", [dict(engine="cluster"), dict(workers=0), dict(engine="processes"), dict(steps=0)])
def test_a_call_that_cannot_work_leaves_no_file(lm, tmp_path, wrong):
    source, out = write(tmp_path / "in.jsonl", some_features(1)), tmp_path / "out.jsonl"
    with pytest.raises(ValueError): label_file(source, out, lm, HOW, **wrong)
    with pytest.raises(FileNotFoundError): label_file(tmp_path / "nope.jsonl", out, lm, HOW)
    with pytest.raises(ValueError, match="is a folder"): label_file(source, tmp_path, lm, HOW)
    assert not out.exists()


def test_a_file_without_results_takes_other_settings(stored, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("")
    assert label_file(source, out, stored, HOW) == 0
    write(source, some_features(1))
    assert label_file(source, out, stored, HOW, steps=4) == 1
    assert json.loads(out.read_text().splitlines()[0])["settings"]["steps"] == 4


@pytest.mark.parametrize("settings", [HOW, ASKED, AUTO])
def test_a_file_is_not_done_twice(stored, tmp_path, settings, capsys):
    source, out = write(tmp_path / "in.jsonl", some_features(2)), tmp_path / "out.jsonl"
    assert [label_file(source, out, stored, settings) for _ in range(2)] == [2, 0]
    assert [row["label"] for row in rows_of(out)] == [alone(one, stored, settings).label for one in some_features(2)]
    assert {"(1 done)", "(2 done)"} <= {line[-8:] for line in capsys.readouterr().out.splitlines()}


def test_a_dead_feature_gets_a_line_and_stops_no_other(stored, tmp_path):
    source, out = write(tmp_path / "in.jsonl", some_features(4)), tmp_path / "out.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for i in (1, 3): rows[i]["activations"] = [0.0] * len(rows[i]["words"])
    rows.append(dict(name="twice", words=["a", "b", "a"], activations=[1, 0, 0]))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [label_file(source, out, stored, HOW, together=2) for _ in range(2)] == [5, 0]
    found = {row["name"]: row for row in rows_of(out)}
    assert [("error" in found[row["name"]]) for row in rows] == [False, True, False, True, True]
    assert "feature 2: feature 'feature 1' has nothing active" in found["feature 1"]["error"]


@pytest.mark.parametrize("content", ['{"a": 1}', '{"a": 1}\n{"b"', "notes\n", '{"name": "x"}\n{"name": "y"}\n'])
def test_a_file_that_has_no_results_is_left_as_it_is(stored, tmp_path, content):
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    with pytest.raises(ValueError, match="something other than results"):
        label_file(write(tmp_path / "in.jsonl", some_features(1)), out, stored, HOW)
    assert out.read_text() == content


@pytest.mark.parametrize("seed", range(20))
def test_a_line_altered_anywhere_is_refused_and_named(tmp_path, seed):
    random, out = Random(seed), tmp_path / "out.jsonl"
    head = dict(lm="a", dtype="b", settings={})
    lines = [write_row(head), *(write_row(dict(name=f"動 {i}", label=" cats", loss=.1 * i), head) for i in range(4))]
    out.write_text("".join(lines), encoding="utf-8")
    assert [row["name"] for row in read_results(out)[1]] == [f"動 {i}" for i in range(4)]
    content = bytearray(out.read_bytes())
    content[(place := random.randrange(len(lines[0].encode()), len(content) - 1))] ^= 1 << random.randrange(8)
    out.write_bytes(content)
    number = 1 + bytes(content[:place]).count(b"\n")
    with pytest.raises(ValueError, match=f"out.jsonl, line {number}|out.jsonl, line {number - 1}"): read_results(out)


def test_rows_of_other_settings_and_rows_that_are_there_twice_are_refused(tmp_path):
    out, heads = tmp_path / "out.jsonl", [dict(lm="a", dtype="b", settings=dict(seed=seed)) for seed in (0, 1)]
    one, other = ([write_row(head), write_row(dict(name="x", label=" cats"), head)] for head in heads)
    for lines, why in (one + other[1:], "line 3: this line was altered, or belongs to results of other settings"), (one + other, "line 3"), \
                      (one + one[1:], "line 3: the feature 'x' is there twice"):
        out.write_text("".join(lines))
        with pytest.raises(ValueError, match=why): read_results(out)


def test_a_disk_that_is_full_costs_one_row(stored, tmp_path):
    source, out = write(tmp_path / "in.jsonl", some_features(3)), tmp_path / "out.jsonl"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limit[1]))
        with pytest.raises(OSError): label_file(source, out, stored, HOW)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    cut = out.read_bytes()
    assert len(cut) == 1500 and not cut.endswith(b"\n")
    assert label_file(source, out, stored, HOW) == 3 - (cut.count(b"\n") - 1)
    assert len(read_results(out)[1]) == 3


def test_names_may_have_any_character(stored, tmp_path):
    odd = [replace(one, name=f"{one.name}\u00a0 動 \\n \"{i}\" {{}}") for i, one in enumerate(some_features(2))]
    source, out = write(tmp_path / "in.jsonl", odd), tmp_path / "out.jsonl"
    assert [label_file(source, out, stored, HOW) for _ in range(2)] == [2, 0]


def test_a_run_goes_on_where_it_stopped(stored, tmp_path):
    source, out = write(tmp_path / "in.jsonl", some_features(4)), tmp_path / "out.jsonl"
    assert label_file(source, out, stored, HOW) == 4
    whole = out.read_text().splitlines(keepends=True)
    before = {row["name"]: row["label"] for row in rows_of(out)}
    out.write_text("".join(whole[:3]) + whole[3][:20])  # as after a power cut
    assert label_file(source, out, stored, HOW) == 2
    assert len(rows_of(out)) == 4 and {row["name"]: row["label"] for row in rows_of(out)} == before
    out.write_text("".join(whole[:2]) + "no row\n")
    with pytest.raises(ValueError, match="out.jsonl, line 3"): label_file(source, out, stored, HOW)
    out.write_text("".join(whole) + "half a li")
    content = out.read_text()
    with pytest.raises(ValueError, match="other settings"): label_file(source, out, stored, HOW, steps=7)
    assert out.read_text() == content  # what is refused is left alone
    with FileLock(f"{out}.lock"), pytest.raises(Timeout): label_file(source, out, stored, HOW)
    write(source, some_features(1) * 2)
    with pytest.raises(ValueError, match="twice"): label_file(source, tmp_path / "new.jsonl", stored, HOW)


def test_a_driver_that_is_killed_and_started_again_loses_nothing_and_does_nothing_twice(stored, tmp_path, quick_starts):
    source, out = write(tmp_path / "in.jsonl", some_features(12)), tmp_path / "out.jsonl"
    code = textwrap.dedent(f"""
        import sys; sys.path = {sys.path}
        from tokenlabel import Settings, load_lm
        from tokenlabel.many import label_file
        label_file({str(source)!r}, {str(out)!r}, load_lm({stored.model.name_or_path!r}), Settings.from_plain({HOW.plain()!r}),
                   engine="processes", workers=2, together=2, progress=False)""")
    driver = subprocess.Popen([sys.executable, "-c", code])
    end = time.time() + 300
    while time.time() < end and driver.poll() is None and (not out.exists() or out.read_text().count("\n") < 4):
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    before = out.read_text().count("\n") - 1
    assert 3 <= before < 12
    assert label_file(source, out, stored, HOW, engine="processes", workers=2, together=2) == 12 - before
    assert sorted(row["name"] for row in rows_of(out)) == sorted(one.name for one in some_features(12))


# Ray

@pytest.fixture(scope="module")
def cluster():
    "A local cluster of Ray."
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokenlabel[ray]'")
    ray.init(num_cpus=2, num_gpus=0, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()


def test_ray_gives_the_labels_of_this_process(cluster, stored):
    features = some_features(5)
    found = dict(label_features(features, stored, HOW, engine="ray", together=2))
    assert labels(found) == labels(dict(label_features(features, stored, HOW)))


def test_an_actor_that_is_lost_is_replaced(cluster, stored):
    features, found = some_features(8), []
    for number, result in label_features(features, stored, HOW, engine="ray", workers=1, together=4):
        if not found:
            [actor] = [one for one in psutil.process_iter(["cmdline"]) if "ray::Caller" in " ".join(one.info["cmdline"] or ())]
            actor.kill()
        found.append((number, result))
    assert sorted(number for number, _ in found) == list(range(8))
    assert labels(dict(found)) == labels(dict(label_features(features, stored, HOW)))


def test_a_node_that_is_lost_costs_no_feature(cluster, stored, monkeypatch):
    from ray.cluster_utils import Cluster
    cluster.shutdown()
    monkeypatch.setattr("tokenlabel.workers.ROOM", 30)
    nodes = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0))
    first, _ = (nodes.add_node(num_cpus=1) for _ in range(2))
    try:
        cluster.init(address=nodes.address, log_to_driver=False)
        features, found = some_features(8), []
        for number, result in label_features(features, stored, HOW, engine="ray", workers=2, together=2):
            if not found: nodes.remove_node(first, allow_graceful=False)
            found.append((number, result))
        assert sorted(number for number, _ in found) == list(range(8))
        assert labels(dict(found)) == labels(dict(label_features(features, stored, HOW)))
    finally:
        cluster.shutdown()
        nodes.shutdown()


def test_without_ray_the_error_says_how_to_get_it(stored, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'tokenlabel\[ray\]'"):
        label_features(some_features(1), stored, engine="ray")


def test_arguments_of_other_kinds_are_refused_before_anything_is_written(tiny_lm, tmp_path):
    lm, feature = tiny_lm("llama"), some_features(1)[0]
    for call, message in [(lambda: label_features([feature], feature), "the language model is a Feature; make one with load_lm"),
                          (lambda: label_features(feature, lm), "features has to be a list, got Feature"),
                          (lambda: list(label_features(["a"], lm)), "the feature is a str; make one with"),
                          (lambda: label_folder(feature, tmp_path / "out", lm), "features has to be a list"),
                          (lambda: label_file(write(tmp_path / "f.jsonl", [feature]), tmp_path / "out", feature), "the language model is")]:
        with pytest.raises(TypeError, match=message): call()
    assert not (tmp_path / "out").exists()


def test_a_feature_with_the_name_of_an_output_has_a_folder_of_its_own(tiny_lm, tmp_path):
    names = ["settings.json", "explanations", "page.html"]
    label_folder([replace(some_features(1)[0], name=name) for name in names], tmp_path / "out", tiny_lm("llama"), HOW, progress=False)
    assert {result.feature.name for result in read_folder(tmp_path / "out")} == {*names}
    assert not {*names} & {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
