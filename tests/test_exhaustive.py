"""The oracle: true bounds, exact ranks, interrupted and continued; and the cost of its work. On tiny random models."""
import json
import warnings
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel.channel import Channel, channel
from tokenlabel.direct import direct
from tokenlabel.exhaustive import (Oracle, accuracy_bound, count_positions, evaluate_all, label_ids, oracle, rank_in,
                                   read_arrays, regret, word_log_probs, write_arrays)
from tokenlabel.feature import Feature
from tokenlabel.files import seal
from tokenlabel.forward import Stage
from tokenlabel.label import begin, label_feature
from tokenlabel.objective import balanced_bce, class_weights, fit_bias
from tokenlabel.rank import rank_labels
from tokenlabel.settings import Settings
from tokenlabel.tokenize import tokenize

ACTIVE = "cat dog horse cow sheep goat mouse bird".split()
WORDS = Feature.from_words("animals", ACTIVE, "car house book red lamp tree stone river".split())
SENTENCES = ["the cat sat on the mat.", "a dog and a horse ran.", "the house is red.", "no book is here.",
             "one cow, one goat.", "the mouse saw a bird.", "a lamp and a stone."]
SPANS = [[(text.index(word), text.index(word) + len(word), 1.0) for word in ACTIVE if word in text] for text in SENTENCES]
TEXTS = Feature.from_texts("animals", SENTENCES, SPANS)
FEATURES = {"words": (WORDS, {}), "context": (TEXTS, dict(view="context")), "types": (TEXTS, dict(view="types"))}
HEAVY = Settings(kl_weight=0.2)  # a random model tells labels apart by their KL more than by anything else


def discriminator_of(feature, family="llama", heldout=0.3, seed=0) -> Channel:
    lm = make_tiny_lm(family)
    return channel(lm, tokenize(feature, lm, feature.heldout_types(heldout, seed) if heldout else frozenset()))


def ask(feature, settings=None, family="llama", **options) -> Oracle:
    return oracle(feature, make_tiny_lm(family), settings, **(dict(progress=False) | options))


@lru_cache
def by_hand(name, settings=Settings(), family="llama") -> pd.DataFrame:
    "The loss of each label, by `rank_labels`."
    feature, view = FEATURES[name]
    search = begin(feature, make_tiny_lm(family), replace(settings, **view))
    ids = search.discriminator.lm.admissible.nonzero()[:, 0].tolist()
    return rank_labels(search.discriminator, ids, search.settings)[0].set_index("token_id")


@pytest.fixture
def small_chunks(monkeypatch):
    "Chunks of 32 labels."
    monkeypatch.setitem(evaluate_all.__kwdefaults__ or {}, "chunk", 32)
    monkeypatch.setattr(evaluate_all, "__defaults__", (32,))


# --- the ranking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma3"))
def test_every_loss_is_that_of_the_label_scored_alone(name, family):
    feature, view = FEATURES[name]
    table = ask(feature, family=family, top=None, **view).ranking.set_index("token_id")
    expected = by_hand(name, family=family)
    assert table.exact.all() and set(table.index) == set(expected.index)
    for column in ("loss", "accuracy_loss", "kl", "stop"):
        np.testing.assert_allclose(table[column], expected[column][table.index], atol=1e-4, rtol=0)
    assert table.loss.is_monotonic_increasing


@pytest.mark.parametrize("settings", [Settings(), HEAVY, Settings(kl_weight=0), Settings(positive_weight=None),
                                      Settings(accuracy_weight=3, positive_weight=0.8)],
                         ids=["default", "heavy KL", "no KL", "unweighted", "positive_weight"])
@pytest.mark.parametrize("name", FEATURES)
def test_the_first_ranks_are_exact_and_no_bound_is_above_the_loss(name, settings):
    feature, view = FEATURES[name]
    expected = by_hand(name, settings)
    for top in (1, 7) if settings == HEAVY else (3,):
        table = ask(feature, replace(settings, **view), top=top).ranking
        first, rest = table[:top], table[top:].set_index("token_id")
        assert first.exact.all()
        np.testing.assert_allclose(first.loss, expected.loss.sort_values()[:top], atol=1e-4, rtol=0)
        assert first.auroc_train.tolist() == pytest.approx(expected.auroc_train[first.token_id].tolist())
        assert first.auroc_heldout.tolist() == pytest.approx(expected.auroc_heldout[first.token_id].tolist(), nan_ok=True)
        assert (rest.loss <= expected.loss[rest.index] + 1e-4).all()
        assert (rest.loss >= first.loss.max() - 1e-4).all()
        np.testing.assert_allclose(rest.loss[rest.exact], expected.loss[rest.index][rest.exact], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["words", "context"])  # types have one token each, and so one stage
def test_bounds_save_work(name, small_chunks):
    feature, view = FEATURES[name]
    with count_positions(make_tiny_lm("llama")) as build: begin(feature, make_tiny_lm("llama"), replace(HEAVY, **view))
    everything, first = (ask(feature, replace(HEAVY, **view), top=top) for top in (None, 1))
    assert first.positions - build.positions < (everything.positions - build.positions) * 2 / 3
    assert not first.ranking.exact.all()


@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.2, None]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_bound_is_below_the_loss_however_the_words_are_completed(seed, positive_weight, binary):
    random = torch.Generator().manual_seed(seed)
    activation = torch.rand(9, generator=random)
    activation[:2] = torch.tensor([0.0, 1.0])
    if binary: activation = activation.round()
    on, off = class_weights(activation, positive_weight)
    z = 4 * torch.randn(50, 9, generator=random)
    known = torch.rand(9, generator=random) < 0.5
    missing = torch.where(known, 0, 6 * torch.rand(9, generator=random))
    bound = accuracy_bound(z, Stage(None, known, missing), on, off)
    complete = z + missing - torch.where(known, 0, 20 * torch.rand(50, 9, generator=random))
    loss = balanced_bce(complete + fit_bias(complete, on, off)[:, None], activation, positive_weight)
    assert (bound <= loss + 1e-5).all()
    whole = accuracy_bound(complete, Stage(None, torch.ones(9, dtype=torch.bool), torch.zeros(9)), on, off)
    torch.testing.assert_close(whole, loss)


@pytest.mark.parametrize("name", ["words", "context"])  # types have one token each, and so one stage
def test_stages_cover_the_training_examples_and_bounds_rise_from_stage_to_stage(name):
    feature, view = FEATURES[name]
    one = begin(feature, make_tiny_lm("llama"), Settings(**view)).discriminator
    train, stages = ~one.tokens.heldout, one.stages()
    assert len(stages) > 2 and stages[-1].known[train].all() and not stages[-1].bound[train].any()
    on, off = class_weights(one.tokens.activation, weight=train)
    ids, z, last = label_ids(40, one), torch.zeros(40, len(train)), torch.zeros(40)
    for stage in stages:
        z[:, stage.batch.example] = one.token_logits(ids[:, None], stage.batch)
        bound = accuracy_bound(z, stage, on, off)
        assert (bound >= last - 1e-4).all()
        last = bound
    assert last.max() > 0.1


def test_held_out_words_cost_nothing():
    half, whole = discriminator_of(WORDS, heldout=0.5), discriminator_of(WORDS, heldout=0)
    sizes = [sum(stage.batch.packing.ids.numel() for stage in one.stages()) for one in (half, whole)]
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize("settings, top", [(Settings(discriminator="direct"), None),
                                           (replace(HEAVY, discriminator="direct"), 2)], ids=["all", "two ranks"])
def test_the_direct_discriminator_on_a_short_list(settings, top):
    lm = make_tiny_lm("llama")
    found = ask(WORDS, settings, labels=12, top=top).ranking[:top]
    one = direct(lm, tokenize(WORDS, lm, WORDS.heldout_types(0.3, 0)))
    expected = rank_labels(one, label_ids(12, one).tolist(), settings)[0][:top]
    assert found.token_id.tolist() == expected.token_id.tolist()
    np.testing.assert_allclose(found.loss, expected.loss, atol=1e-4, rtol=0)


def test_a_list_of_labels_and_the_most_probable_ones():
    one = discriminator_of(WORDS)
    found = ask(WORDS, labels=["a", "t", 70], top=None)
    assert set(found.ranking.token_id) == {one.lm.encode("a")[0], one.lm.encode("t")[0], 70}
    assert set(ask(WORDS, labels=20, top=3).ranking.token_id) == set(one.label_prior.topk(20).indices.tolist())


@pytest.mark.parametrize("options, words", [
    ({"labels": ["no token"]}, "'no token' is not a single token"), ({"labels": [10**6]}, "not a single token"),
    ({"labels": [0]}, "not a single token"), ({"labels": "cat"}, "list of one word"), ({"labels": []}, "list of one word"),
    ({"labels": 0}, "not positive"), ({"top": 0}, "not positive"), ({"discriminator": "none"}, "discriminator='none'"),
    ({"settings": {"kl_weight": 0}}, "is not a Settings object"), ({"kl": 0}, "no setting 'kl'")])
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words): ask(WORDS, **options)


# --- on disk ----------------------------------------------------------------------------------------------------------


def same(a: Oracle, b: Oracle) -> None:
    "Equal in all but the time."
    pd.testing.assert_frame_equal(a.ranking, b.ranking, check_exact=True)
    for name in ("feature", "top", "settings", "prompts", "lm", "dtype"): assert getattr(a, name) == getattr(b, name)


def stop_at(monkeypatch, call: int) -> None:
    "Interrupt the process at this call of the discriminator."
    real, calls = Channel.token_logits, []

    def token_logits(self, *arguments):
        calls.append(1)
        if len(calls) == call: raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Channel, "token_logits", token_logits)


@pytest.mark.parametrize("top, call", [(3, 1), (3, 2), (3, 9), (3, 20), (None, 9), (None, 20)])
def test_interrupted_at_any_moment_it_continues_to_the_same_end(call, top, tmp_path, monkeypatch, small_chunks):
    with count_positions(make_tiny_lm("llama")) as full: whole = ask(WORDS, top=top)
    with monkeypatch.context() as patch:
        stop_at(patch, call)
        with pytest.raises(KeyboardInterrupt): ask(WORDS, top=top, runs=tmp_path)
    with count_positions(make_tiny_lm("llama")) as meter: resumed = ask(WORDS, top=top, runs=tmp_path)
    same(resumed, whole)
    assert meter.positions <= full.positions and (call < 20 or meter.positions < full.positions)
    assert not list((tmp_path / "cache").glob("*progress*"))
    with count_positions(make_tiny_lm("llama")) as meter: same(ask(WORDS, top=top, runs=tmp_path), whole)
    assert meter.positions == 0


def test_a_broken_file_of_an_unfinished_oracle_is_ignored(tmp_path, monkeypatch, small_chunks):
    with monkeypatch.context() as patch:
        stop_at(patch, 20)
        with pytest.raises(KeyboardInterrupt): ask(WORDS, runs=tmp_path)
    [file] = (tmp_path / "cache").iterdir()
    assert read_arrays(file, done=0)["done"] > 0
    file.write_bytes(file.read_bytes()[:200])
    with pytest.warns(UserWarning, match="starting again"): resumed = ask(WORDS, runs=tmp_path)
    same(resumed, ask(WORDS))


def test_an_oracle_by_type_has_the_settings_of_a_search_by_type_and_no_regret(result):
    truth = ask(TEXTS, labels=9)
    assert truth.settings.view == "types" and truth.settings.kl_weight == 0.01
    by_type = replace(result, feature=TEXTS, settings=truth.settings)
    with pytest.raises(ValueError, match="by type counts whole texts"): regret(by_type, truth)


def test_another_question_is_not_answered_from_the_cache(tmp_path):
    ask(WORDS, labels=9, runs=tmp_path)
    for options in ({"settings": HEAVY}, {"labels": 8}, {"seed": 1}, {"heldout": 0}, {"top": 2}):
        with count_positions(make_tiny_lm("llama")) as meter: ask(WORDS, **{"labels": 9, "runs": tmp_path} | options)
        assert meter.positions > 0, options
    with count_positions(make_tiny_lm("llama")) as meter: ask(WORDS, labels=9, runs=tmp_path, steps=7)  # has no effect
    assert meter.positions == 0


def test_an_oracle_comes_back_from_disk_and_shows_itself(tmp_path, monkeypatch):
    found = ask(WORDS, top=3)
    for _ in range(2): same(Oracle.load(found.save(tmp_path / "oracle")), found)
    with monkeypatch.context() as broken:
        broken.setattr(Feature, "to_jsonl", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError): ask(TEXTS, top=1).save(tmp_path / "oracle")
    same(Oracle.load(tmp_path / "oracle"), found)
    assert [path.name for path in tmp_path.iterdir()] == ["oracle"]
    assert repr(found.ranking.label[0]) in repr(found) and "3 ranks are certain" in repr(found)
    assert "1 rank is certain" in repr(replace(found, top=1)) and "pruned" not in repr(ask(WORDS, labels=4, top=None))


@pytest.mark.parametrize("change", [dict(settings=None), *({name: ...} for name in ("top", "lm", "feature", "prompts"))], ids=str)
def test_an_oracle_of_another_version_is_refused(tmp_path, change):
    file = ask(WORDS, top=3).save(tmp_path / "oracle") / "oracle.json"
    found = {name: value for name, value in (json.loads(file.read_text()) | change).items() if value is not ...}
    file.write_text(json.dumps(found))
    (file.parent / "manifest.json").unlink()
    seal(file.parent.rename(tmp_path / "other"), "oracle")
    with pytest.raises(ValueError, match="other is damaged, or another version of tokenlabel wrote it"): Oracle.load(tmp_path / "other")


@pytest.mark.parametrize("files", [["ranking.parquet"], ["oracle.json", "notes.txt"]])  # a saved result; and notes
def test_a_folder_with_other_files_is_refused_and_stays(tmp_path, files):
    for name in files: (tmp_path / name).touch()
    with pytest.raises(ValueError, match="give a new or empty folder"): ask(WORDS, labels=4).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_numbers_of_numpy_are_numbers(tmp_path):
    plain, given = (ask(WORDS, labels=n(12), top=n(2), seed=n(3), runs=tmp_path) for n in (int, np.int64))
    same(plain, given)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("seed", range(30))
def test_arrays_altered_anywhere_are_computed_again_or_unchanged(tmp_path, seed):
    random, file = np.random.default_rng(seed), tmp_path / "state.npz"
    default, state = dict(done=0, loss=np.zeros(0, "f4")), dict(done=3, loss=random.random(50, "f4"))
    write_arrays(file, **state)
    content = bytearray(file.read_bytes())
    if seed % 3 == 0: del content[random.integers(len(content)):]
    else: content[random.integers(len(content))] ^= 1 << int(random.integers(8))
    file.write_bytes(content)
    with warnings.catch_warnings(record=True) as said: found = read_arrays(file, **default)
    assert found["done"] == 0 and said or found["done"] == 3 and (found["loss"] == state["loss"]).all()


# --- many features at once --------------------------------------------------------------------------------------------


def test_word_log_probs_are_the_logits_of_the_channel(tmp_path):
    one = discriminator_of(Feature.from_words("x", ["cat", "dog"], ["an", "the"]), heldout=0)
    assert all(len(ids) == 1 for ids in one.tokens.documents)
    words, labels = torch.tensor([id for [id] in one.tokens.documents]), torch.arange(60, 90)
    for part in (labels[:7], labels):  # the second time, seven rows are known
        with count_positions(one.lm) as meter:
            rows = [word_log_probs(one.lm, prompt, part, words, tmp_path, progress=False) for prompt in one.read_prompts]
        z = (torch.stack(rows) - one.marginal[:, None]).mean(0)
        torch.testing.assert_close(z, one.token_logits(part[:, None], one.batch()), atol=1e-2, rtol=0)
    assert meter.positions == (len(labels) - 7) * sum(1 + len(prompt.after) for prompt in one.read_prompts)
    with count_positions(one.lm) as meter:
        again = word_log_probs(one.lm, one.read_prompts[0], labels.flip(0), words, tmp_path, progress=False)
    assert meter.positions == 0 and torch.equal(again.flip(0), rows[0])


# --- the rank of a result ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return label_feature(WORDS, make_tiny_lm("llama"), steps=3, restarts=1, progress=False)


def test_rank_and_regret(result):
    truth, full = ask(WORDS, top=5), by_hand("words")
    as_if = lambda id: replace(result, ranking=full.loc[[id]].reset_index())
    for id in (*truth.ranking.token_id[:5], full.loss.idxmax()):
        (least, most), true = rank_in(as_if(id), truth), int((full.loss < full.loss[id]).sum())
        assert least <= true <= most and (id == full.loss.idxmax() or least == most)
        assert regret(as_if(id), truth) == pytest.approx(full.loss[id] - full.loss.min(), abs=1e-4)
    best, second = full.loss.nsmallest(2).index
    assert rank_in(as_if(best), truth) == (0, 0) and regret(as_if(best), truth) == pytest.approx(0, abs=1e-4)
    assert rank_in(as_if(second), truth, tie=10.0) == (0, 0)


@pytest.mark.parametrize("options, words", [({"seed": 1}, "seed"), ({"settings": HEAVY}, "kl_weight"),
                                            ({"heldout": 0.2}, "heldout"), ({"labels": ["\x07"]}, "not among")])
def test_a_result_is_not_compared_with_another_oracle(result, options, words):
    with pytest.raises(ValueError, match=words): regret(result, ask(WORDS, **{"labels": 9} | options))
    other = replace(result, feature=Feature.from_words("other", ["cat"], ["dog"]))
    with pytest.raises(ValueError, match="different features"): rank_in(other, ask(WORDS, labels=9))


def test_a_label_of_several_tokens_has_no_rank(result):
    ranking = result.ranking.head(1).astype({"token_id": object})
    ranking.at[0, "token_id"] = (3, 4)
    with pytest.raises(ValueError, match="single tokens, and the result's label has 2"):
        regret(replace(result, ranking=ranking), ask(WORDS, labels=9))


# --- the cost ---------------------------------------------------------------------------------------------------------


def test_positions_are_counted_forward_and_backward():
    one = discriminator_of(WORDS)
    lm, batch = one.lm, one.batch()
    rows, width = batch.packing.ids.shape
    per_label = sum(rows * (1 + len(prompt.after) + width) for prompt in one.read_prompts)
    with count_positions(lm) as meter: one.token_logits(torch.tensor([[70], [80], [90]]), batch)
    assert meter.positions == 3 * per_label
    label = lm.embed([[70]]).requires_grad_()
    with count_positions(lm) as meter: one.read(label, batch)[0].sum().backward()
    assert meter.positions == 2 * per_label
    with count_positions(lm) as meter: lm.model(torch.tensor([[5, 6, 7]]))
    assert meter.positions == 3
    one.token_logits(torch.tensor([[70]]), batch)
    assert meter.positions == 3  # no longer counted
