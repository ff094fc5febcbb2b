"""The oracle: true bounds, exact ranks, killed and continued; and its rivals, who pay for all that they ask."""
import gc
import json
import math
import weakref
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import make_tiny_lm, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optimize import TEXTS, WORDS
from tokenizers import Tokenizer

import tokenlabel.search as module
from tokenlabel.direct import direct
from tokenlabel.discriminator import Channel, channel
from tokenlabel.feature import Feature, tokenize
from tokenlabel.lm import load_lm
from tokenlabel.objective import LossWeights, balanced_bce, class_weights, fit_bias
from tokenlabel.optimize import label_feature, rank_labels
from tokenlabel.search import (RIVALS, Meter, Oracle, Stage, Task, accuracy_bound, count_positions, flips, label_ids,
                               make_stages, oracle, plot_races, pmi, race, race_all, race_table, rank_in, read_progress,
                               regret, with_regret, word_table)

FEATURES = {"words": WORDS, "texts": TEXTS}
HEAVY = LossWeights(kl=0.2)  # a random model tells labels apart by their KL more than by anything else


def judge_of(feature, family="llama", heldout=0.3, seed=0) -> Channel:
    lm = make_tiny_lm(family)
    return channel(lm, tokenize(feature, lm, feature.heldout_types(heldout, seed) if heldout else frozenset()))


def ask(feature, family="llama", **options) -> Oracle:
    return oracle(feature, make_tiny_lm(family), **(dict(progress=False) | options))


@lru_cache
def by_hand(feature, family="llama", weights=LossWeights()) -> pd.DataFrame:
    "The loss of each label, by `rank_labels`."
    judge = judge_of(feature, family)
    return rank_labels(judge, judge.lm.admissible.nonzero()[:, 0].tolist(), weights)[0].set_index("token_id")


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma3"))
def test_every_loss_is_that_of_the_label_scored_by_itself(name, family):
    table = ask(FEATURES[name], family, top=None).ranking.set_index("token_id")
    expected = by_hand(FEATURES[name], family)
    assert table.exact.all() and set(table.index) == set(expected.index)
    for column in ("loss", "accuracy_loss", "kl", "end"):
        np.testing.assert_allclose(table[column], expected[column][table.index], atol=1e-4, rtol=0)
    assert table.loss.is_monotonic_increasing


@pytest.mark.parametrize("weights", [LossWeights(), HEAVY, LossWeights(kl=0.0), LossWeights(active=None),
                                     LossWeights(accuracy=3.0, active=0.8)], ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_the_first_ranks_are_exact_and_no_bound_is_above_the_loss(name, weights):
    expected = by_hand(FEATURES[name], weights=weights)
    for top in (1, 7) if weights == HEAVY else (3,):
        table = ask(FEATURES[name], weights=weights, top=top).ranking
        first, rest = table[:top], table[top:].set_index("token_id")
        assert first.exact.all()
        np.testing.assert_allclose(first.loss, expected.loss.sort_values()[:top], atol=1e-4, rtol=0)
        assert first.auroc_fit.tolist() == pytest.approx(expected.auroc_fit[first.token_id].tolist())
        assert first.auroc_heldout.tolist() == pytest.approx(expected.auroc_heldout[first.token_id].tolist())
        assert (rest.loss <= expected.loss[rest.index] + 1e-4).all()
        assert (rest.loss >= first.loss.max() - 1e-4).all()
        np.testing.assert_allclose(rest.loss[rest.exact], expected.loss[rest.index][rest.exact], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FEATURES)
def test_bounds_save_work(name, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    everything = ask(FEATURES[name], weights=HEAVY, top=None)
    first = ask(FEATURES[name], weights=HEAVY, top=1)
    with count_positions(make_tiny_lm("llama")) as build: judge_of(FEATURES[name])
    work, whole = (found.positions - build.positions for found in (first, everything))
    assert work < whole * 2 / 3 and not first.ranking.exact.all()


@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.2, None]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_bound_is_below_the_loss_however_the_words_are_completed(seed, active, binary):
    random = torch.Generator().manual_seed(seed)
    activation = torch.rand(9, generator=random)
    activation[:2] = torch.tensor([0.0, 1.0])
    if binary: activation = activation.round()
    z = 4 * torch.randn(50, 9, generator=random)
    known = torch.rand(9, generator=random) < 0.5
    room = torch.where(known, 0, 6 * torch.rand(9, generator=random))
    bound = accuracy_bound(z, Stage(None, known, room), activation, active)
    complete = z + room - torch.where(known, 0, 20 * torch.rand(50, 9, generator=random))
    loss = balanced_bce(complete + fit_bias(complete, activation, active)[:, None], activation, active)
    assert (bound <= loss + 1e-5).all()
    whole = accuracy_bound(complete, Stage(None, torch.ones(9, dtype=torch.bool), torch.zeros(9)), activation, active)
    torch.testing.assert_close(whole, loss)


@pytest.mark.parametrize("name", FEATURES)
def test_stages_cover_what_is_fitted_and_bounds_rise_from_stage_to_stage(name):
    judge = judge_of(FEATURES[name])
    fit, stages = ~judge.tokens.heldout, make_stages(judge)
    assert len(stages) > 2 and stages[-1].known[fit].all() and not stages[-1].room[fit].any()
    ids = label_ids(40, judge)
    z, last = torch.zeros(40, len(fit)), torch.zeros(40)
    for stage in stages:
        z[:, stage.batch.unit] = judge.hard_logits(ids[:, None], stage.batch)
        seen = Stage(stage.batch, stage.known[fit], stage.room[fit])
        bound = accuracy_bound(z[:, fit], seen, judge.tokens.activation[fit], 0.5)
        assert (bound >= last - 1e-4).all()
        last = bound
    on, off = class_weights(judge.tokens.activation[fit])
    assert last.max() > 0.1 and on.sum() + off.sum() == pytest.approx(1)


def test_words_that_are_held_out_cost_nothing():
    half, all_fit = judge_of(WORDS, heldout=0.5), judge_of(WORDS, heldout=0)
    sizes = [sum(stage.batch.packing.ids.numel() for stage in make_stages(judge)) for judge in (half, all_fit)]
    assert sizes[0] < 0.7 * sizes[1]


def test_the_direct_discriminator_on_a_shortlist():
    lm = make_tiny_lm("llama")
    found = ask(WORDS, discriminator="direct", labels=12, top=None)
    judge = direct(lm, tokenize(WORDS, lm, WORDS.heldout_types(0.3, 0)))
    expected = rank_labels(judge, label_ids(12, judge).tolist())[0]
    assert found.ranking.token_id.tolist() == expected.token_id.tolist()
    np.testing.assert_allclose(found.ranking.loss, expected.loss, atol=1e-4, rtol=0)
    first = ask(WORDS, discriminator="direct", labels=12, top=2, weights=HEAVY)
    expected = rank_labels(judge, label_ids(12, judge).tolist(), HEAVY)[0]
    assert first.ranking.token_id[:2].tolist() == expected.token_id[:2].tolist()


def test_a_shortlist_of_words_and_one_of_the_most_expected():
    judge = judge_of(WORDS)
    found = ask(WORDS, labels=["a", "t", 70], top=None)
    assert set(found.ranking.token_id) == {judge.lm.encode("a")[0], judge.lm.encode("t")[0], 70}
    expected = judge.log_prior.topk(20).indices.tolist()
    assert set(ask(WORDS, labels=20, top=3).ranking.token_id) == set(expected)


@pytest.mark.parametrize("options, words", [
    ({"labels": ["no token"]}, "'no token' is not a single token"), ({"labels": [10**6]}, "not a single token"),
    ({"labels": [0]}, "not a single token"), ({"labels": "cat"}, "list of words"), ({"labels": []}, "empty"),
    ({"labels": 0}, "not positive"), ({"top": 0}, "not positive"), ({"discriminator": "none"}, "no discriminator"),
    ({"weights": {"kl": 0}}, "is not a `LossWeights`")])
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words): ask(WORDS, **options)


# --- on disk ----------------------------------------------------------------------------------------------------------


def same(a: Oracle, b: Oracle) -> None:
    "Equal in all but the time taken."
    pd.testing.assert_frame_equal(a.ranking, b.ranking, check_exact=True)
    assert (a.feature, a.top, a.settings) == (b.feature, b.top, b.settings)


def kill_at(monkeypatch, call: int) -> None:
    "End the process, as it were, at this call of the model."
    real, calls = Channel.hard_logits, []

    def hard_logits(self, *arguments):
        calls.append(1)
        if len(calls) == call: raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Channel, "hard_logits", hard_logits)


@pytest.mark.parametrize("top", [3, None])
@pytest.mark.parametrize("call", [1, 2, 9, 20])
def test_killed_at_any_moment_it_goes_on_to_the_same_end(call, top, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 32)
    whole = ask(WORDS, top=top)
    with monkeypatch.context() as patch:
        kill_at(patch, call)
        with pytest.raises(KeyboardInterrupt): ask(WORDS, top=top, runs=tmp_path)
    [*kept] = (tmp_path / "cache").glob("*") if call > 2 else []
    with count_positions(make_tiny_lm("llama")) as meter: resumed = ask(WORDS, top=top, runs=tmp_path)
    same(resumed, whole)
    with count_positions(make_tiny_lm("llama")) as full: ask(WORDS, top=top)
    assert meter.positions <= full.positions and (call < 20 or meter.positions < full.positions)
    assert len(kept) <= 1 and not list((tmp_path / "cache").glob("*progress*"))
    with count_positions(make_tiny_lm("llama")) as meter: same(ask(WORDS, top=top, runs=tmp_path), whole)
    assert meter.positions == 0


def test_what_an_unfinished_oracle_left_behind_may_be_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 32)
    with monkeypatch.context() as patch:
        kill_at(patch, 20)
        with pytest.raises(KeyboardInterrupt): ask(WORDS, runs=tmp_path)
    [file] = (tmp_path / "cache").iterdir()
    assert read_progress(file, 5).done > 0
    file.write_bytes(file.read_bytes()[:200])
    with pytest.warns(UserWarning, match="starting again"): resumed = ask(WORDS, runs=tmp_path)
    same(resumed, ask(WORDS))


def test_another_question_is_not_answered_from_the_cache(tmp_path):
    ask(WORDS, labels=9, runs=tmp_path)
    for options in ({"weights": HEAVY}, {"labels": 8}, {"seed": 1}, {"heldout": 0}, {"top": 2}):
        with count_positions(make_tiny_lm("llama")) as meter:
            ask(WORDS, **({"labels": 9, "runs": tmp_path} | options))
        assert meter.positions > 0, options


def test_an_oracle_comes_back_from_disk_and_shows_itself(tmp_path, monkeypatch):
    found = ask(WORDS, top=3)
    same(Oracle.load(found.save(tmp_path / "oracle")), found)
    same(Oracle.load(found.save(tmp_path / "oracle")), found)
    with monkeypatch.context() as broken:
        broken.setattr(Feature, "to_jsonl", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError): ask(TEXTS, top=1).save(tmp_path / "oracle")
    same(Oracle.load(tmp_path / "oracle"), found)
    assert [path.name for path in tmp_path.iterdir()] == ["oracle"]
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "ranking.parquet").touch()  # of a saved result, say
    with pytest.raises(ValueError, match="something else than a saved oracle"): found.save(tmp_path / "result")
    assert repr(found.ranking.label[0]) in repr(found) and "3 ranks are certain" in repr(found)
    assert found._repr_html_().count("<tr") == 1 + 3
    assert "1 rank is certain" in repr(replace(found, top=1)) and "are out" not in repr(ask(WORDS, labels=4, top=None))


# --- many features at once ---------------------------------------------------------------------------------------------


def test_a_table_of_words_has_the_logits_of_the_channel(tmp_path):
    feature = Feature.from_words("x", ["cat", "dog"], ["an", "the"])
    judge = judge_of(feature, heldout=0)
    assert all(len(ids) == 1 for ids in judge.tokens.sequences)
    words, labels = torch.tensor([id for [id] in judge.tokens.sequences]), torch.arange(60, 90)
    for part in (labels[:7], labels):  # the second time seven rows are known
        with count_positions(judge.lm) as meter:
            rows = [word_table(judge.lm, prompt, part, words, tmp_path, progress=False) for prompt in judge.prompts]
        z = (torch.stack(rows) - judge.baseline[:, None]).mean(0)
        torch.testing.assert_close(z, judge.hard_logits(part[:, None], judge.batch()), atol=1e-2, rtol=0)
    per_label = sum(1 + len(prompt.after) for prompt in judge.prompts)
    assert meter.positions == (len(labels) - 7) * per_label
    with count_positions(judge.lm) as meter:
        again = word_table(judge.lm, judge.prompts[0], labels.flip(0), words, tmp_path, progress=False)
    assert meter.positions == 0 and torch.equal(again.flip(0), rows[0])


# --- where a label stands ---------------------------------------------------------------------------------------------


def test_rank_and_regret():
    truth = ask(WORDS, top=5)
    result = label_feature(WORDS, make_tiny_lm("llama"), steps=3, restarts=1, progress=False)
    full = by_hand(WORDS)
    for id in (*truth.ranking.token_id[:5], full.loss.idxmax()):
        as_if = replace(result, ranking=full.loc[[id]].reset_index())
        rank, true = rank_in(as_if, truth), int((full.loss < full.loss[id]).sum())
        assert rank.least <= true <= rank.most
        assert id == full.loss.idxmax() or rank.least == rank.most == true
        assert regret(as_if, truth) == pytest.approx(full.loss[id] - full.loss.min(), abs=1e-4)
    best = replace(result, ranking=full.loc[[full.loss.idxmin()]].reset_index())
    assert rank_in(best, truth) == (0, 0) and regret(best, truth) == pytest.approx(0, abs=1e-4)
    second = replace(result, ranking=full.loc[[full.loss.nsmallest(2).index[1]]].reset_index())
    assert rank_in(second, truth, tie=10.0) == (0, 0)
    assert second.rank_in(truth) == rank_in(second, truth) and second.regret(truth) == regret(second, truth)


@pytest.mark.parametrize("options, words", [({"seed": 1}, "seed"), ({"weights": HEAVY}, "weights"),
                                            ({"heldout": 0.2}, "heldout"), ({"labels": ["\x07"]}, "not among")])
def test_a_result_is_not_held_against_an_oracle_of_something_else(options, words):
    result = label_feature(WORDS, make_tiny_lm("llama"), steps=3, restarts=1, progress=False)
    with pytest.raises(ValueError, match=words): regret(result, ask(WORDS, **({"labels": 9} | options)))
    other = replace(result, feature=Feature.from_words("other", ["cat"], ["dog"]))
    with pytest.raises(ValueError, match="different features"): rank_in(other, ask(WORDS, labels=9))


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_positions_are_counted_forward_and_back():
    judge = judge_of(WORDS)
    lm, batch = judge.lm, judge.batch()
    rows, width = batch.packing.ids.shape
    per_label = sum(rows * (1 + len(prompt.after) + width) for prompt in judge.prompts)
    with count_positions(lm) as meter: judge.hard_logits(torch.tensor([[70], [80], [90]]), batch)
    assert meter.positions == 3 * per_label
    label = lm.embed([[70]]).requires_grad_()
    with count_positions(lm) as meter: judge.logits(label, batch).sum().backward()
    assert meter.positions == 2 * per_label
    with count_positions(lm) as meter: lm.model(torch.tensor([[5, 6, 7]]))
    assert meter.positions == 3
    judge.hard_logits(torch.tensor([[70]]), batch)
    assert meter.positions == 3  # no longer counted


# --- the rivals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("rival", RIVALS)
def test_what_a_rival_finds_is_worth_what_it_says_and_paid_for(rival, name):
    judge = judge_of(FEATURES[name])
    with count_positions(judge.lm) as meter: table = race(RIVALS[rival], judge, 2000)
    assert table.loss[:-1].is_monotonic_decreasing and table.loss.is_unique is False  # the last row repeats the best
    assert table.positions.is_monotonic_increasing and table.positions.iloc[0] > 0
    expected = by_hand(FEATURES[name])
    np.testing.assert_allclose(table.loss, expected.loss[table.token_id], atol=1e-4, rtol=0)
    assert judge.lm.admissible[table.token_id.tolist()].all() and meter.positions > table.positions.iloc[-1]


@pytest.mark.parametrize("rival", RIVALS)
def test_a_race_in_bfloat16(rival):
    lm = load_lm(tiny_model("llama"), tokenizer=tiny_tokenizer(True), dtype=torch.bfloat16)
    table = race(RIVALS[rival], channel(lm, tokenize(WORDS, lm)), 300)
    expected = by_hand(WORDS).loss.reindex(table.token_id)
    assert lm.dtype == torch.bfloat16 and np.isfinite(table.loss).all() and expected.notna().all()


@pytest.mark.parametrize("rival", RIVALS)
def test_a_model_is_not_kept_by_a_race(rival):
    lm = load_lm(tiny_model("llama"), tokenizer=tiny_tokenizer(True))
    race(RIVALS[rival], channel(lm, tokenize(WORDS, lm)), 100)
    seen = weakref.ref(lm)
    del lm
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("rival", RIVALS)
def test_the_same_seed_gives_the_same_race(rival):
    judge = judge_of(WORDS)
    a, b = (race(RIVALS[rival], judge, 1000, seed=4) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("rival", ["random", "prior", "explainer"])
def test_a_list_of_labels_goes_on_to_the_best_of_all_if_the_budget_allows(rival):
    table = race(RIVALS[rival], judge_of(WORDS), 10**9)
    assert table.loss.iloc[-1] == pytest.approx(by_hand(WORDS).loss.min(), abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_method_of_this_package_races_as_it_is(seed):
    "One search of the rival ends where `label_feature` does, with the same draws, and is polished like that."
    table = race(RIVALS["token space"], judge_of(WORDS, seed=seed), 1, seed=seed)
    result = label_feature(WORDS, make_tiny_lm("llama"), seed=seed, progress=False)
    assert table.token_id.iloc[-1] == result.ranking.token_id[0]
    assert table.loss.iloc[-1] == pytest.approx(result.ranking.loss[0], abs=1e-4)


def test_a_rival_is_stopped_soon_after_its_budget_is_spent():
    judge = judge_of(WORDS)
    one, small, large = (race(RIVALS["random"], judge, budget).positions.iloc[-1] for budget in (1, 6000, 15_000))
    group = 16 * one  # labels are scored in groups
    assert 6000 <= small < 6000 + group and 15_000 <= large < 15_000 + group


def test_asking_again_is_free_and_a_label_that_is_none_is_refused():
    judge = judge_of(WORDS)
    with count_positions(judge.lm) as meter:
        task = Task(judge, LossWeights(), meter)
        first = task.score(torch.tensor([70, 80]))
        paid = meter.positions
        assert task.score(torch.tensor([80, 70, 80])).tolist() == [first[1], first[0], first[1]]
        assert meter.positions == paid > 0 and len(task.log) == 1
    with pytest.raises(ValueError, match="cannot be labels"): task.score(torch.tensor([0]))


def test_flips_are_the_slope_of_the_loss():
    judge = judge_of(WORDS)
    lm, task = judge.lm, Task(judge, LossWeights(kl=0.1), Meter())
    here, there = torch.tensor(70), torch.tensor([80, 95])

    def again():
        task.generator.manual_seed(0)
        task.turn = 0

    again()
    change = flips(task, here)
    assert change[~lm.admissible].isposinf().all()
    for id in there:
        slope = []
        for share in (-1e-3, 1e-3):
            again()
            slope.append(task.accuracy((1 - share) * lm.embed(here[None]) + share * lm.embed(id[None])).item())
        kl = judge.log_prior[here] - judge.log_prior[id]
        assert (slope[1] - slope[0]) / 2e-3 + 0.1 * kl == pytest.approx((change[id] - change[here]).item(), rel=0.05,
                                                                        abs=2e-3)


def test_pmi_tries_first_what_is_only_in_active_words():
    feature = Feature.from_words("x", ["xb", "xc", "xd", "xe"], ["ob", "oc", "od", "pe"])
    judge = judge_of(feature, heldout=0)
    own = set(judge.lm.encode(" xb")) & set(judge.lm.encode(" xe")) - set(judge.lm.encode(" pe"))
    task = Task(judge, LossWeights(), Meter())
    next(pmi(task))
    assert set(task.losses) <= own and len(task.losses) == 1
    for _ in pmi(task): pass
    assert set(task.losses) <= {id for sequence in judge.tokens.sequences for id in sequence}


def test_another_model_can_explain_and_pays():
    judge, other = judge_of(WORDS), make_tiny_lm("llama", seed=1)
    with count_positions(judge.lm) as meter:
        task = Task(judge, LossWeights(), meter)
        steps = module.explainer(task, other)
        assert meter.positions > 30 and not task.losses  # it has read the examples
        next(steps)
    assert len(task.losses) == 1


def renumbered(model, tokenizer):
    "The same language model, with other numbers for its tokens."
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    order = [*range(3), *reversed(range(3, len(names)))]  # the special tokens stay where they are
    state["model"]["vocab"] = {names[id]: place for place, id in enumerate(order)}
    for part in {model.get_input_embeddings(), model.get_output_embeddings()}:
        part.weight.data[:len(order)] = part.weight.data[order].clone()
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    return load_lm(model, tokenizer=transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special))


@torch.no_grad()
def test_an_explainer_with_another_vocabulary_is_understood_by_what_it_says():
    judge, tried = judge_of(WORDS), []
    for lm in (None, renumbered(tiny_model("llama", 0), tiny_tokenizer(True))):
        task = Task(judge, LossWeights(), Meter())
        task.score = lambda ids: tried.extend(ids.tolist())
        for _ in module.explainer(task, lm): pass
    ours, theirs = tried[:judge.lm.label_count], tried[judge.lm.label_count:]
    assert ours == theirs and sorted(ours) == judge.lm.admissible.nonzero()[:, 0].tolist() != ours


# --- table and figure -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def races() -> pd.DataFrame:
    chosen = {name: RIVALS[name] for name in ("token space", "random", "PMI")}
    few = Feature.from_words("few", ["cat", "dog", "horse"], ["car", "book", "red"])
    table = race_all([WORDS, few], make_tiny_lm("llama"), rivals=chosen, seeds=(0, 1), progress=False)
    return with_regret(table, {("animals", 0): by_hand(WORDS).loss.min()})


def test_races_of_all_features_seeds_and_rivals(races):
    assert len(races.groupby(["feature", "seed", "rival"])) == 2 * 2 * 3
    assert (races.regret >= 0).all()
    unknown = races[(races.feature == "few")].groupby(["feature", "seed"]).regret.min()
    assert (unknown == 0).all()  # against the best of the rivals
    known = races[(races.feature == "animals") & (races.seed == 0)]
    np.testing.assert_allclose(known.regret, known.loss - by_hand(WORDS).loss.min(), atol=1e-4, rtol=0)
    budgets = races[races.rival == "token space"].groupby(["feature", "seed"]).positions.max()
    spent = races[races.rival == "random"].groupby(["feature", "seed"]).positions.max()
    assert (spent >= np.minimum(budgets, 2000)).all()  # 2000: then it has tried most of this small vocabulary


def test_the_table_has_the_end_of_each_race(races):
    table = race_table(races)
    last = races.groupby(["rival", "feature", "seed"]).tail(1)
    for rival, part in last.groupby("rival"):
        assert table["mean regret"][rival] == pytest.approx(part.regret.mean()) and table.races[rival] == 4
        assert table.found[rival] == (part.regret <= 0.01).mean()
    assert table["mean regret"].is_monotonic_increasing


def test_the_figure_draws_means_over_races_and_the_chance_line(races):
    fig = plot_races(races)
    left, right = fig.axes
    assert any(set(line.get_ydata()) == {0.5} for line in right.lines)
    part = races[races.rival == "random"]
    x = part.positions.max()
    expected = part.groupby(["feature", "seed"]).regret.last().mean()
    assert module.at_costs(part, "regret", np.array([x]))[0] == pytest.approx(expected)
    assert math.isnan(module.at_costs(part, "regret", np.array([0]))[0])
    ends = sorted(line.get_ydata()[0] for line in left.lines if line.get_marker() == "o")
    assert ends == pytest.approx(sorted(race_table(races)["mean regret"]))


def test_races_are_kept(tmp_path):
    options = dict(rivals={"random": RIVALS["random"]}, budget=500, runs=tmp_path, progress=False)
    first = race_all([WORDS], make_tiny_lm("llama"), **options)
    judge_of(WORDS)
    with count_positions(make_tiny_lm("llama")) as meter: again = race_all([WORDS], make_tiny_lm("llama"), **options)
    with count_positions(make_tiny_lm("llama")) as build: judge_of(WORDS)
    assert meter.positions == build.positions
    pd.testing.assert_frame_equal(first, again)


def test_numbers_of_numpy_are_numbers(tmp_path):
    plain, given = (ask(WORDS, labels=n(12), top=n(2), seed=n(3), runs=tmp_path) for n in (int, np.int64))
    assert given.ranking.equals(plain.ranking) and len(list((tmp_path / "cache").iterdir())) == 1
    result = label_feature(WORDS, make_tiny_lm("llama"), seed=np.int64(3), steps=2, restarts=1, progress=False)
    assert regret(replace(result, ranking=given.ranking.head(1)), given) == 0
    assert len(race_all([WORDS], make_tiny_lm("llama"), 1, rivals={"prior": RIVALS["prior"]}, seeds=np.arange(1), progress=False))
