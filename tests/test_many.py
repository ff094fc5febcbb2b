"""Labelling many features: the same labels as one by one, whatever shares a pass, and whoever is lost on the way."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock, Timeout

import tokenlabel.many as module
from tokenlabel.direct import Question
from tokenlabel.discriminator import channel
from tokenlabel.experiment import Job
from tokenlabel.feature import Feature, tokenize
from tokenlabel.lm import load_lm
from tokenlabel.many import (Query, label_features, label_file, learn_words, read_features, read_prompts,
                             read_together, shared_channel, step_together)
from tokenlabel.descent import Search
from tokenlabel.optimize import label_feature

WORDS = ["cat", "dog", "horse", "house", "car", "red", "book", "animal", "the horse", "things", "mat", "text"]
PROMPTS = ["Examples of {label}:", "the {label} and"]
HOW = dict(prompts=PROMPTS, steps=6, restarts=2, candidates=3, heldout=0.0)


def some_features(count):
    "Features that share words; the active ones differ."
    return [Feature.from_words(f"feature {i}", {word: float((i + j) % 3 == 0) for j, word in enumerate(WORDS)})
            for i in range(count)]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma"])
def lm(request, tiny_lm): return tiny_lm(request.param)


@pytest.fixture(scope="module")
def stored(tiny_lm, tmp_path_factory):
    "A model that other processes can load."
    folder, made = tmp_path_factory.mktemp("models") / "tiny", tiny_lm("llama")
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return load_lm(folder)


def write(path, features):
    rows = [dict(name=one.name, words=one.texts, activations=[spans[0].activation for spans in one.spans])
            for one in features]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_shared_baselines_are_those_of_each_feature(lm):
    known = read_prompts(lm, "words", PROMPTS)
    tokens = [tokenize(feature, lm) for feature in some_features(2)]
    learn_words(known, tokens[0].sequences[:5])
    for one in tokens:
        judge, alone = shared_channel(known, one), channel(lm, one, PROMPTS)
        assert torch.allclose(judge.baseline, alone.baseline, atol=1e-4)
        assert torch.equal(judge.log_prior, alone.log_prior)
    assert len(known.baseline) == len(WORDS)


@pytest.mark.parametrize("label_tokens", [1, 2])
def test_one_pass_gives_each_search_what_a_pass_of_its_own_gives(lm, label_tokens):
    judges = [channel(lm, tokenize(feature, lm), PROMPTS) for feature in some_features(3)]
    torch.manual_seed(0)
    questions = [Query(judge, torch.randn(i + 1, label_tokens, lm.embedding.shape[1]).requires_grad_(),
                       judge.batch(range(4 + 3 * i))) for i, judge in enumerate(judges)]
    for turn in range(2):
        together = read_together(questions, turn)
        alone = [judge.read(label, batch, turn) for judge, label, batch in questions]
        for found, expected in zip(together, alone):
            for one, other in zip(found, expected): assert torch.allclose(one, other, atol=1e-3, rtol=1e-4)
        loss = lambda answers: sum((z ** 2).sum() + prior.clamp(min=-50).sum() for z, prior in answers)
        labels = [question.label for question in questions]
        gradients = [torch.autograd.grad(loss(answers), labels) for answers in (together, alone)]
        for one, other in zip(*gradients): assert (one - other).abs().max() <= 1e-3 * other.abs().max()


def test_steps_do_not_depend_on_how_a_pass_is_divided(lm, monkeypatch):
    traces = []
    for most in (1, 10**6):
        monkeypatch.setattr(module, "MOST", most)
        known = read_prompts(lm, "words", PROMPTS)
        searches = [Search(shared_channel(known, tokenize(feature, lm)), seed=i, restarts=2)
                    for i, feature in enumerate(some_features(3))]
        searches[1].step()  # it is the other prompt's turn
        traces.append([step_together(searches) for _ in range(3)])
    for one, other in zip(*traces):
        for rows, others in zip(one, other):
            assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in others], rel=1e-3)


@pytest.mark.parametrize("together", [1, 2, 5])
def test_labels_are_those_of_one_by_one(lm, together):
    features = some_features(5)
    jobs = [Job(one.name, one, dict(seed=i, restarts=1 + i % 2)) for i, one in enumerate(features)]
    found = dict(label_features(jobs, lm, together=together, **HOW))
    assert found.keys() == set(range(5))
    for i, feature in enumerate(features):
        alone = label_feature(feature, lm, progress=False, **HOW | jobs[i].options)
        assert found[i].label == alone.label
        assert found[i].settings == alone.settings
        assert found[i].ranking.loss[0] == pytest.approx(alone.ranking.loss[0], rel=1e-3)
        assert len(found[i].trace) == len(alone.trace)


def test_features_in_words_and_texts_go_side_by_side(lm):
    text = Feature.from_texts("animals", ["the cat and the dog", "the red house", "a dog", "a car"],
                              [[(4, 7, 1.0), (16, 19, 1.0)], [], [(2, 5, 1.0)], []])
    found = dict(label_features([*some_features(1), text], lm, **HOW))
    assert found[1].label == label_feature(text, lm, progress=False, **HOW).label


@pytest.mark.parametrize("first", [0, 1])
def test_words_and_texts_take_their_own_prompts_in_turn(lm, first):
    "The default prompts of both have a sentence in common, at other places."
    text = Feature.from_texts("animals", ["the cat and the dog", "the red house", "a dog", "a car"],
                              [[(4, 7, 1.0), (16, 19, 1.0)], [], [(2, 5, 1.0)], []])
    features = [some_features(1)[0], text]
    features = features[first:] + features[:first]
    how = HOW | dict(prompts=None, steps=4)
    for i, result in label_features(features, lm, **how):
        alone = label_feature(features[i], lm, progress=False, **how)
        assert result.trace.accuracy_loss.tolist() == pytest.approx(alone.trace.accuracy_loss.tolist(), rel=1e-2)


def test_a_feature_without_both_classes_among_what_is_fitted_does_not_stop_the_others(lm, monkeypatch):
    monkeypatch.setattr(module, "tokenize", lambda feature, *rest: (
        replace(found, activation=torch.ones_like(found.activation)) if feature.name == "bad" else found)
        if (found := tokenize(feature, *rest)) else None)
    good, bad = some_features(2)
    found = dict(label_features([good, replace(bad, name="bad"), good], lm, **HOW))
    assert isinstance(found[1], ValueError) and "are active" in str(found[1]) and found[0].label == found[2].label


def test_a_feature_that_cannot_be_labeled_does_not_stop_the_others(lm):
    long = Feature.from_texts("long", ["the cat " * 300, "a house"], [[(4, 7, 1.0)], []])
    found = dict(label_features([some_features(1)[0], long], lm, **HOW))
    assert isinstance(found[1], ValueError) and "tokens" in str(found[1]) and found[0].label


def test_baselines_that_are_forgotten_are_learned_again(lm, monkeypatch):
    kept = labels(dict(label_features(some_features(4), lm, together=2, **HOW)))
    learn, before = module.learn_words, []
    monkeypatch.setattr(module, "KEPT", 0)
    monkeypatch.setattr(module, "learn_words", lambda known, words: before.append(len(known.baseline)) or learn(known, words))
    assert labels(dict(label_features(some_features(4), lm, together=1, **HOW))) == kept
    assert before.count(0) == 4  # once for each feature, and nothing is known then


def test_a_stream_is_read_as_it_is_needed(lm):
    taken = []
    stream = (taken.append(one.name) or one for one in some_features(6))
    next(label_features(stream, lm, together=2, **HOW))
    assert len(taken) <= 4


def test_mistakes_show_before_anything_is_labeled(lm):
    for wrong in (dict(engine="cluster"), dict(workers=0), dict(together=0), dict(steps=0), dict(nonsense=1),
                  dict(discriminator="oracle"), dict(label_tokens="some"), dict(prompts=["no slot"]),
                  dict(discriminator="direct", prompts=["{label}:"]), dict(label_tokens="auto", steps=0),
                  dict(prompts="a {label}:"), dict(prompts=[]), dict(progress=True), dict(temperature=1.0),
                  dict(engine="processes")):  # the last: made in memory
        with pytest.raises(ValueError): label_features(some_features(1), lm, **wrong)


def labels(found): return {number: result.label for number, result in found.items()}


ASKED = dict(discriminator="direct", prompts=Question("Is {word} {label}?", answer=" ", yes="1", no="0"))
ALONE = [ASKED, dict(label_tokens="auto", heldout=0.5)]


@pytest.mark.parametrize("options", ALONE)
def test_what_shares_nothing_is_labeled_one_by_one(stored, options):
    features = some_features(2)
    alone = [label_feature(feature, stored, progress=False, **HOW | options).label for feature in features]
    assert labels(dict(label_features(features, stored, **HOW | options))) == dict(enumerate(alone))


@pytest.mark.parametrize("wrong", [dict(engine="cluster"), dict(workers=0), dict(engine="processes")])
def test_a_call_that_cannot_work_leaves_no_file(lm, tmp_path, wrong):
    source, out = write(tmp_path / "in.jsonl", some_features(2)), tmp_path / "out.jsonl"
    with pytest.raises(ValueError): label_file(source, out, lm, **HOW | wrong)
    with pytest.raises(FileNotFoundError): label_file(tmp_path / "nope.jsonl", out, lm, **HOW)
    with pytest.raises(ValueError, match="is a folder"): label_file(source, tmp_path, lm, **HOW)
    assert not out.exists() and label_file(source, out, lm, **HOW) == 2


def test_a_file_without_results_takes_other_settings(lm, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("")
    assert label_file(source, out, lm, **HOW) == 0
    write(source, some_features(1))
    assert label_file(source, out, lm, **HOW | dict(steps=4)) == 1
    assert json.loads(out.read_text().splitlines()[0])["settings"]["steps"] == 4


@pytest.mark.parametrize("row, message", [
    (dict(words="abcdefgh", activations=[1, 1, 1, 1, 0, 0, 0, 0]), "words is 'abcdefgh'; give a list"),
    (dict(words=["a"], activations=None), "activations is None; give a list"), (dict(), "texts is None; give a list")])
def test_a_row_without_lists_is_an_error_of_its_own(tmp_path, row, message):
    source = tmp_path / "in.JSONL"
    source.write_text(json.dumps(dict(name="x") | row) + "\n")
    [(_, error)] = read_features(source)
    assert message in str(error)


def test_a_row_of_texts_may_have_empty_words(tmp_path):
    source = tmp_path / "in.parquet"
    rows = [dict(name="t", words=[], activations=[], texts=["a saw is here", "no"], spans=[[[2, 5, 1.0]], []])]
    pq.write_table(pa.Table.from_pylist(rows), source)
    [(_, feature)] = read_features(source)
    assert feature.mode == "texts"


def test_workers_ask_directly_too(stored, quick_starts):
    here, there = (labels(dict(label_features(some_features(2), stored, engine=engine, **HOW | ASKED)))
                   for engine in ("here", "processes"))
    assert here == there


@pytest.mark.parametrize("options", ALONE)
def test_a_file_of_what_shares_nothing_is_not_done_twice(lm, tmp_path, options):
    source, out = write(tmp_path / "in.jsonl", some_features(2)), tmp_path / "out.jsonl"
    assert [label_file(source, out, lm, **HOW | options) for _ in range(2)] == [2, 0]
    assert all("label" in json.loads(line) for line in out.read_text().splitlines()[1:])


def test_workers_give_the_labels_of_this_process(stored, quick_starts):
    features = some_features(5)
    here = dict(label_features(features, stored, **HOW))
    assert labels(dict(label_features(features, stored, engine="processes", together=2, **HOW))) == labels(here)


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost_or_done_twice(stored, monkeypatch, quick_starts):
    opened, original = [], module.start_workers
    monkeypatch.setattr(module, "start_workers", lambda *a: keep(original(*a)))

    def keep(manager):
        enter = manager.__enter__
        class Kept:
            def __enter__(self): team = enter(); opened.extend(team); return team
            def __exit__(self, *error): return manager.__exit__(*error)
        return Kept()

    features, found = some_features(8), []
    for number, result in label_features(features, stored, engine="processes", together=4, **HOW):
        if not found: opened[0].process.send_signal(signal.SIGKILL)
        found.append((number, result))
    assert sorted(number for number, _ in found) == list(range(8))
    assert labels(dict(found)) == labels(dict(label_features(features, stored, **HOW)))
    assert len(opened) == 3


def test_a_job_that_kills_its_workers_is_given_up(stored, monkeypatch, quick_starts):
    monkeypatch.setattr(module, "RETRIES", 1)
    poison = Job("poison", some_features(1)[0], dict(HOW) | dict(steps=_Ends()))
    fine = [Job("fine", feature, HOW) for feature in some_features(3)]
    found = dict(module.run_workers(enumerate([poison, *fine]), lambda: module.process_worker(stored, 1, 1), 1, 3))
    assert isinstance(found[0], RuntimeError) and "2 times" in str(found[0])
    assert all(found[number].label for number in (1, 2, 3))  # those that were lost with it, too


class _Ends:
    "Ends the process that unpickles it."
    def __reduce__(self): return os._exit, (3,)


def test_an_error_in_the_stream_ends_the_run(stored, quick_starts):
    def stream():
        yield from some_features(2)
        raise ValueError("line 3")
    with pytest.raises(ValueError, match="line 3"):
        list(label_features(stream(), stored, engine="processes", together=1, **HOW))


def test_files_of_features(tmp_path):
    features = some_features(2)
    lines = write(tmp_path / "a.jsonl", features)
    table = pa.Table.from_pylist([json.loads(line) for line in lines.read_text().splitlines()])
    pq.write_table(table, tmp_path / "a.parquet")
    named = [(one.name, one) for one in features]
    assert list(read_features(lines)) == named == list(read_features(tmp_path / "a.parquet"))
    text = dict(name="x", texts=["a cat", "b"], spans=[[[2, 5, 1.0]], []])
    (tmp_path / "b.jsonl").write_text(json.dumps(text) + '\n{"name": "y"}\n')
    (_, feature), (name, error) = read_features(tmp_path / "b.jsonl")
    assert feature.mode == "texts" and name == "y" and "b.jsonl, feature 2" in str(error)
    (tmp_path / "c.jsonl").write_text(json.dumps(text) + "\n\n", encoding="utf-8-sig")
    assert len(list(read_features(tmp_path / "c.jsonl"))) == 1
    for wrong in ('[1]', '{"name"', '{"words": ["a"]}', '{"name": ["x"]}', '{"name": "\\ud800"}'):
        (tmp_path / "d.jsonl").write_text(wrong)
        with pytest.raises(ValueError, match="d.jsonl, feature 1"): list(read_features(tmp_path / "d.jsonl"))
    (tmp_path / "e.jsonl").write_bytes(json.dumps(text).encode() + '\n{"name": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="e.jsonl, feature 2"): list(read_features(tmp_path / "e.jsonl"))


@pytest.mark.parametrize("spans", [[[[4, 7, 0.9]], []], [[dict(start=4, end=7, activation=0.9)], []]])
def test_spans_with_fractional_activations_are_read_from_parquet(tmp_path, spans):
    pq.write_table(pa.Table.from_pylist([dict(name="t", texts=["the cat", "a dog"], spans=spans)]), tmp_path / "a.parquet")
    [(_, feature)] = read_features(tmp_path / "a.parquet")
    assert feature == Feature.from_texts("t", ["the cat", "a dog"], [[(4, 7, 0.9)], []])


@pytest.mark.parametrize("spans", [None, [[4, 7]], [[None, 7, 1]], [dict(start=4, end=None, activation=1)]])
def test_a_row_with_spans_that_are_none_is_named(tmp_path, spans):
    row = dict(name="t", texts=["a dog", "the cat"], spans=[[], spans])
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for path in tmp_path.iterdir():
        [(name, error)] = read_features(path)
        assert name == "t" and isinstance(error, ValueError) and f"{path.name}, feature 1: text 1" in str(error)


def test_a_mistake_in_one_job_stops_no_other(lm):
    good, bad = some_features(2)
    found = dict(label_features([Job("good", good, {}), Job("bad", bad, dict(weights={"kl": 1}))], lm, **HOW))
    assert found[0].label and "LossWeights" in str(found[1])


def test_a_dead_feature_gets_a_line_and_stops_nobody(stored, tmp_path):
    source, out = write(tmp_path / "in.jsonl", some_features(4)), tmp_path / "out.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for i in (1, 3): rows[i]["activations"] = [0.0] * len(rows[i]["words"])
    rows.append(dict(name="twice", words=["a", "b", "a"], activations=[1, 0, 0]))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [label_file(source, out, stored, together=2, **HOW) for _ in range(2)] == [5, 0]
    found = {row["name"]: row for row in map(json.loads, out.read_text().splitlines()[1:])}
    assert [("error" in found[row["name"]]) for row in rows] == [False, True, False, True, True]
    assert "feature 2: feature 'x1' has nothing active" in found[rows[1]["name"]]["error"].replace(rows[1]["name"], "x1")


@pytest.mark.parametrize("content", ['{"a": 1}', '{"a": 1}\n{"b"', "notes\n", '{"name": "x"}\n{"name": "y"}\n'])
def test_a_file_that_has_no_results_is_left_as_it_is(stored, tmp_path, content):
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    with pytest.raises(ValueError, match="something else than results"):
        label_file(write(tmp_path / "in.jsonl", some_features(1)), out, stored, **HOW)
    assert out.read_text() == content


def test_names_may_have_any_character(stored, tmp_path):
    odd = [replace(one, name=f"{one.name}\u2028\x85{i}") for i, one in enumerate(some_features(2))]
    source, out = write(tmp_path / "in.jsonl", odd), tmp_path / "out.jsonl"
    assert [label_file(source, out, stored, **HOW) for _ in range(2)] == [2, 0]


def test_a_run_goes_on_where_it_stopped(stored, tmp_path):
    source, out = write(tmp_path / "in.jsonl", some_features(4)), tmp_path / "out.jsonl"
    assert label_file(source, out, stored, **HOW) == 4
    whole = out.read_text().splitlines(keepends=True)
    out.write_text("".join(whole[:3]) + whole[3][:20])  # as after a power cut
    assert label_file(source, out, stored, **HOW) == 2
    rows = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert sorted(row["name"] for row in rows) == [one.name for one in some_features(4)]
    assert {row["name"]: row["label"] for row in rows} == {json.loads(line)["name"]: json.loads(line)["label"]
                                                          for line in whole[1:]}
    out.write_text("".join(whole[:2]) + "no row\n")
    with pytest.raises(ValueError, match="out.jsonl, line 3"): label_file(source, out, stored, **HOW)
    out.write_text("".join(whole) + "half a li")
    before = out.read_text()
    with pytest.raises(ValueError, match="other settings"): label_file(source, out, stored, **HOW | dict(steps=7))
    assert out.read_text() == before  # what is refused is left alone
    with FileLock(f"{out}.lock"), pytest.raises(Timeout): label_file(source, out, stored, **HOW)
    write(source, some_features(1) * 2)
    with pytest.raises(ValueError, match="twice"): label_file(source, tmp_path / "new.jsonl", stored, **HOW)


def test_a_driver_that_is_killed_and_started_again_loses_nothing_and_does_nothing_twice(stored, tmp_path, quick_starts):
    source, out = write(tmp_path / "in.jsonl", some_features(12)), tmp_path / "out.jsonl"
    code = textwrap.dedent(f"""
        import sys; sys.path = {sys.path}
        from tokenlabel.lm import load_lm
        from tokenlabel.many import label_file
        label_file({str(source)!r}, {str(out)!r}, load_lm({stored.model.name_or_path!r}), engine="processes",
                   together=2, **{HOW!r})""")
    driver = subprocess.Popen([sys.executable, "-c", code])
    end = time.time() + 300
    while time.time() < end and driver.poll() is None and (not out.exists() or out.read_text().count("\n") < 4):
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    before = out.read_text().count("\n") - 1
    assert 3 <= before < 12
    assert label_file(source, out, stored, engine="processes", together=2, **HOW) == 12 - before
    names = [json.loads(line)["name"] for line in out.read_text().splitlines()[1:]]
    assert sorted(names) == sorted(one.name for one in some_features(12))


@pytest.fixture(scope="module")
def cluster():
    "A local cluster of Ray."
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokenlabel[ray]'")
    ray.init(num_cpus=2, num_gpus=0, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()


def test_ray_gives_the_labels_of_this_process(cluster, stored):
    features = some_features(5)
    found = dict(label_features(features, stored, engine="ray", together=2, **HOW))
    assert labels(found) == labels(dict(label_features(features, stored, **HOW)))


def test_an_actor_that_is_killed_is_replaced(cluster, stored, monkeypatch):
    actors, original = [], module.start_actor

    def start_actor(*arguments):
        actors.append(original(*arguments))
        return actors[-1]

    monkeypatch.setattr(module, "start_actor", start_actor)
    features, found = some_features(8), []
    for number, result in label_features(features, stored, engine="ray", together=4, **HOW):
        if not found: cluster.kill(actors[0])
        found.append((number, result))
    assert sorted(number for number, _ in found) == list(range(8)) and len(actors) == 3
    assert labels(dict(found)) == labels(dict(label_features(features, stored, **HOW)))


def test_without_ray_the_error_says_how_to_get_it(stored, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'tokenlabel\[ray\]'"):
        label_features(some_features(1), stored, engine="ray")
