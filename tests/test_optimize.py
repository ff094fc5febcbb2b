"""The optimizer: schedule, sampling, the search on tiny random models, and what becomes of a result."""
import json
import math
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny_lm, tiny_config, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from scipy.optimize import minimize_scalar
from test_discriminator import naive_logits
from transformers import AutoModelForCausalLM

import tokenlabel.optimize as module
from tokenlabel.direct import Question, direct
from tokenlabel.discriminator import channel, make_batch, label_log_prior
from tokenlabel.feature import Feature, tokenize
from tokenlabel.lm import load_lm
from tokenlabel.objective import LossWeights, objective
from tokenlabel.descent import Search, draw_items, has_collapsed, schedule, spelled, top_labels, top_of_slots
from tokenlabel.optimize import (STARTS, LabelResult, grow, guessed, hard_end, hard_kl, hard_loss, label_feature,
                                 look_size, neighbors, rank_labels, relatives)
from tokenlabel.softlabel import embed_softlabel, log_softlabel

few = settings(max_examples=60, deadline=None)

ACTIVE = "cat dog horse cow sheep goat mouse bird".split()
INACTIVE = "car house book red lamp tree stone river".split()
WORDS = Feature.from_words("animals", ACTIVE, INACTIVE)
SENTENCES = ["the cat sat on the mat.", "a dog and a horse ran.", "the house is red.", "no book is here.",
             "one cow, one goat.", "the mouse saw a bird.", "a lamp and a stone."]


def texts_of(activation) -> Feature:
    "The sentences, with `activation(word)` on each animal in them."
    spans = [[(text.index(word), text.index(word) + len(word), activation(word)) for word in ACTIVE if word in text]
             for text in SENTENCES]
    return Feature.from_texts("animals", SENTENCES, spans)


TEXTS = texts_of(lambda word: 1.0)
FEATURES = {"words": WORDS, "texts": TEXTS}


def run(feature=WORDS, family="llama", seed=0, **options) -> LabelResult:
    "A short search on a tiny model."
    return label_feature(feature, make_tiny_lm(family), seed=seed,
                         **(dict(steps=12, restarts=2, progress=False) | options))


def finite_part(trace) -> np.ndarray:
    "All numbers but those that most steps leave out."
    return trace.drop(columns="hard_accuracy_loss").select_dtypes("number").to_numpy()


@pytest.fixture(scope="module", params=FEATURES)
def result(request) -> LabelResult:
    "One search in each mode, for tests that only look at it."
    return run(FEATURES[request.param])


def interrupt_at(monkeypatch, step: int) -> None:
    "Let Ctrl-C come before this step."
    real = Search.step

    def interrupted(self):
        if self.done == step: raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Search, "step", interrupted)


def same_frame(a: pd.DataFrame, b: pd.DataFrame) -> None: assert_frame_equal(a, b, check_exact=True)


def same_result(a: LabelResult, b: LabelResult) -> None:
    "Equal in all but the time taken."
    for name in ("ranking", "heldout", "trace"): same_frame(getattr(a, name), getattr(b, name))
    for name in ("label", "feature", "soft", "settings", "interrupted"): assert getattr(a, name) == getattr(b, name)


# --- the schedule -----------------------------------------------------------------------------------------------------


@given(st.integers(2, 300), st.floats(0.1, 10), st.floats(0.01, 1), st.floats(0, 1))
@few
def test_the_schedule_goes_from_its_first_values_to_its_last_and_never_back(steps, first, share, start):
    last = first * share
    points = [schedule(step, steps, (first, last), (start, 1.0)) for step in range(steps)]
    assert points[0] == pytest.approx((first, start)) and points[-1] == pytest.approx((last, 1))
    for (t, w), (next_t, next_w) in zip(points, points[1:]):
        assert next_t <= t * (1 + 1e-12) and next_w >= w
    ratios = [b[0] / a[0] for a, b in zip(points, points[1:])]
    assert ratios == pytest.approx([share ** (1 / (steps - 1))] * (steps - 1))  # the same fall at each step


def test_a_schedule_of_one_step_is_its_beginning():
    assert schedule(0, 1, (1.0, 0.1), (0.0, 1.0)) == (1.0, 0.0)


def test_a_constant_schedule_changes_nothing():
    assert {schedule(step, 9, (1.0, 1.0), (1.0, 1.0)) for step in range(9)} == {(1.0, 1.0)}


# --- the paper's own way --------------------------------------------------------------------------------------------


def test_a_direct_search_keeps_its_question_and_comes_back_from_disk(tmp_path):
    question = Question("Is {word} a {label}?", yes="yes", no="no", chat=False)
    result = run(discriminator="direct", prompts=question, steps=4)
    assert Question(**result.settings["prompts"]) == question and result.settings["discriminator"] == "direct"
    same_result(LabelResult.load(result.save(tmp_path / "direct")), replace(
        result, settings=json.loads(json.dumps(result.settings))))


def test_without_calibration_the_loss_is_that_of_the_logits_as_they_are():
    lm = make_tiny_lm("llama")
    judge = channel(lm, tokenize(WORDS, lm))
    search = Search(judge, calibrated=False, batch_size=16, restarts=1)
    log_p = search.log_p(1.0)
    [row] = search.step()
    z = judge.logits(embed_softlabel(log_p, lm), judge.batch(), turn=0)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z[0], judge.tokens.activation.to(z))
    assert row["accuracy_loss"] == pytest.approx(loss.item(), rel=1e-5)  # as many active words as inactive ones


def test_data_as_they_are_are_drawn_as_they_come():
    lm = make_tiny_lm("llama")
    rare = Feature.from_words("cats", ["cat"], ACTIVE[1:] + INACTIVE)
    judge = channel(lm, tokenize(rare, lm))
    cat = judge.tokens.activation.argmax().item()
    drawn = {}
    for active in (0.5, None):
        search = Search(judge, weights=LossWeights(active=active), batch_size=4)
        draws = [draw_items(search.active, search.inactive, 4, search.generator) for _ in range(400)]
        drawn[active] = np.mean([cat in draw for draw in draws])
    assert drawn[0.5] == 1 and drawn[None] == pytest.approx(4 / 16, abs=0.08)
    Search(judge, weights=LossWeights(active=None), batch_size=2, restarts=1).step()  # both may be inactive


def test_a_start_from_noise_alone_has_mean_0_and_the_deviation_that_was_asked_for():
    lm = make_tiny_lm("llama")
    v = Search(channel(lm, tokenize(WORDS, lm)), init=(0.0, 2.0), restarts=8).v.detach()
    assert v.mean().abs() < 0.2 and v.std() == pytest.approx(2, abs=0.2)


def test_weight_decay_shrinks_v_where_the_gradient_is_zero():
    lm = make_tiny_lm("llama")
    search = Search(channel(lm, tokenize(WORDS, lm)), lr=0.5, weight_decay=0.1, restarts=1)
    outside = (~lm.admissible).nonzero()[0]
    before = search.v[0, 0, outside].item()
    search.step()
    assert search.v[0, 0, outside].item() == pytest.approx(before * (1 - 0.5 * 0.1), rel=1e-5)


def test_a_step_looks_through_one_prompt_and_all_turns_together_are_the_mean():
    lm = make_tiny_lm("llama")
    judge = channel(lm, tokenize(TEXTS, lm), ["the {label}:", "a red {label} is", "book of {label}."])
    label, batch = lm.embed(torch.tensor([[5], [9]])), judge.batch()
    turns = torch.stack([judge.logits(label, batch, turn) for turn in range(3)])
    assert torch.allclose(turns.mean(0), judge.logits(label, batch), atol=1e-5)
    assert torch.equal(turns[1], judge.logits(label, batch, turn=4)) and not torch.allclose(turns[0], turns[1], atol=1e-3)


def test_numbers_of_numpy_are_settings_like_any_other(tmp_path):
    result = run(steps=np.int64(3), lr=np.float32(0.5))
    assert LabelResult.load(result.save(tmp_path / "result")).settings["steps"] == 3


# --- drawing sequences ------------------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(0, 30), st.data())
@few
def test_a_draw_has_its_size_and_is_as_balanced_as_can_be(n_active, n_inactive, data):
    total = n_active + n_inactive
    if total == 0: return
    size, seed = data.draw(st.integers(1, total)), data.draw(st.integers(0, 999))
    numbers = torch.randperm(100, generator=torch.Generator().manual_seed(seed))[:total]
    active, inactive = numbers[:n_active], numbers[n_active:]
    drawn = draw_items(active, inactive, size, torch.Generator().manual_seed(seed))
    assert len(drawn) == len(set(drawn)) == size and drawn == sorted(drawn)
    assert set(drawn) <= set(numbers.tolist())
    possible = range(max(0, size - n_inactive), min(n_active, size) + 1)
    assert len(set(drawn) & set(active.tolist())) == min(possible, key=lambda n: (abs(n - size / 2), n))
    assert drawn == draw_items(active, inactive, size, torch.Generator().manual_seed(seed))


def test_in_the_long_run_every_sequence_is_drawn_equally_often():
    generator, counts = torch.Generator().manual_seed(0), np.zeros(20)
    for _ in range(1000): counts[draw_items(torch.arange(5), torch.arange(5, 20), 6, generator)] += 1
    assert np.abs(counts[:5] / 600 - 1).max() < 0.15 and np.abs(counts[5:] / 200 - 1).max() < 0.25


# --- when to stop -----------------------------------------------------------------------------------------------------


def trace_of(*tops: list[tuple[str, float]]) -> list[dict]:
    "A trace from the top token of each restart, step by step."
    return [dict(step=step, restart=r, tokens=[token, "x"], probabilities=[p, 1 - p], accuracy_loss=0.3,
                 hard_accuracy_loss=0.3 if p > 0.99 else 0.4, accuracy_active=1.0, accuracy_inactive=1.0)
            for step, restarts in enumerate(tops) for r, (token, p) in enumerate(restarts)]


SETTLED = [("a", 0.995), ("b", 0.999)]


@pytest.mark.parametrize("tops, expected", [
    (5 * [SETTLED], True),
    (4 * [SETTLED], False),  # not for long enough
    ([], False),
    ([[("c", 0.2), ("c", 0.2)]] + 5 * [SETTLED], True),
    (5 * [SETTLED] + [[("a", 0.98), ("b", 0.999)]], False),  # one is not sure any more
    (2 * [SETTLED] + [[("c", 0.999), ("b", 0.999)]] + 2 * [SETTLED], False),  # one changed its mind
    (2 * [SETTLED] + 3 * [SETTLED[::-1]], False),  # both did
    (5 * [[("a", 0.999), ("a", 0.999)]], True),  # two restarts may agree
])
def test_restarts_have_collapsed_when_all_are_sure_of_one_token_for_a_while(tops, expected):
    assert has_collapsed(trace_of(*tops), 2, patience=5) is expected


def test_steps_that_have_seen_one_class_only_say_nothing_about_that():
    rows = trace_of(*5 * [SETTLED])
    assert has_collapsed(rows, 2) and not has_collapsed([*rows[:-1], rows[-1] | {"accuracy_active": math.nan}], 2)


def test_a_search_ends_when_all_restarts_have_settled():
    result = run(steps=300, lr=2.0, weights=LossWeights(entropy=20.0))
    steps = result.trace.step.nunique()
    assert 10 <= steps < 300 and not result.interrupted
    rows = result.trace.to_dict("records")
    assert has_collapsed(rows, 2) and not has_collapsed(rows[:-2], 2)  # as soon as it can be said
    own = set(result.trace[result.trace.step == steps - 1].tokens.str[0])
    assert own <= set(result.ranking.token)  # what the restarts settled on is ranked


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_trace_has_a_row_for_each_step_and_restart(result):
    trace = result.trace
    assert list(zip(trace.step, trace.restart)) == [(s, r) for s in range(trace.step.nunique()) for r in range(2)]
    for row in trace.itertuples():
        temperature, share = schedule(row.step, 12, (1.0, 0.1), (0.0, 1.0))
        assert (row.temperature, row.entropy_weight) == pytest.approx((temperature, share * 0.2))
        assert row.loss == pytest.approx(row.accuracy_loss + row.entropy_weight * row.entropy
                                         + LossWeights().kl * row.kl, rel=1e-4)
        assert len(row.tokens) == len(row.probabilities) == 10
        assert row.probabilities == sorted(row.probabilities, reverse=True) and sum(row.probabilities) <= 1 + 1e-5
        assert 0 <= row.entropy <= math.log(300) and 0 <= row.accuracy_active <= 1 and 0 <= row.accuracy_inactive <= 1
    assert np.isfinite(finite_part(trace)).all()


def test_the_gap_to_the_most_probable_label_is_known_every_fifth_step_and_whenever_all_are_sure_of_one(result):
    for step, rows in result.trace.groupby("step"):
        due = step % 5 == 0 or (rows.probabilities.str[0] > 0.9).all()
        assert rows.hard_accuracy_loss.notna().all() if due else rows.hard_accuracy_loss.isna().all()


@pytest.mark.parametrize("discriminator", [channel, direct])
@pytest.mark.parametrize("label_tokens", [1, 2])
def test_the_gap_is_between_the_soft_label_and_its_most_probable_one(discriminator, label_tokens):
    lm = make_tiny_lm("llama")
    judge = discriminator(lm, tokenize(WORDS, lm))

    def first_step(peak):
        search = Search(judge, restarts=2, label_tokens=label_tokens, steps=3)
        with torch.no_grad(): search.v[0, :, int(lm.admissible.nonzero()[40])] += peak
        return search.step()

    (sure, wide), (unsure, same) = first_step(300.0), first_step(2.0)
    assert sure["hard_accuracy_loss"] == pytest.approx(sure["accuracy_loss"], abs=1e-5)
    assert wide == same and abs(wide["hard_accuracy_loss"] - wide["accuracy_loss"]) > 1e-5
    assert unsure["accuracy_loss"] != pytest.approx(sure["accuracy_loss"], abs=1e-5)
    assert unsure["hard_accuracy_loss"] == pytest.approx(sure["hard_accuracy_loss"], abs=1e-5)


@pytest.mark.parametrize("mode", FEATURES)
def test_same_seed_same_result_and_another_seed_another(mode):
    one, again, other = (run(FEATURES[mode], seed=seed) for seed in (0, 0, 1))
    same_result(one, again)
    assert not one.trace.loss.equals(other.trace.loss) and not one.heldout.equals(other.heldout)


@pytest.mark.parametrize("mode", FEATURES)
def test_nobody_elses_random_numbers_are_used(mode):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    one = run(FEATURES[mode], steps=3)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    torch.manual_seed(2)
    same_result(one, run(FEATURES[mode], steps=3))


def test_a_restart_does_not_feel_the_others():
    judge = channel(make_tiny_lm("llama"), tokenize(WORDS, make_tiny_lm("llama")))
    many, alone = Search(judge, restarts=3, steps=8), Search(judge, restarts=1, steps=8)
    alone.v.data = many.v.data[[1]].clone()
    for _ in range(8):
        rows, [row] = many.step(), alone.step()
        for name in ("loss", "accuracy_loss", "entropy", "kl"):
            assert rows[1][name] == pytest.approx(row[name], rel=1e-3)
        assert rows[1]["tokens"][0] == row["tokens"][0] and rows[0]["loss"] != rows[1]["loss"]


def test_the_objective_falls():
    judge = channel(make_tiny_lm("llama"), tokenize(WORDS, make_tiny_lm("llama")))
    search = Search(judge, restarts=3, steps=1000, temperature=(1.0, 1.0), weights=LossWeights(entropy=0.0))
    losses = torch.tensor([[row["loss"] for row in search.step()] for _ in range(15)])
    assert (losses[-1] < losses[0] - 0.05).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_label_is_among_the_best_tokens_there_are(family):
    # all 169 tokens that may be a label as the yardstick; a random one has rank 0.5 on average, the best one 0
    lm = make_tiny_lm(family)
    everything, _ = rank_labels(channel(lm, tokenize(WORDS, lm)), lm.admissible.nonzero()[:, 0].tolist(), LossWeights())
    for steps in (4, 40):  # the gradient points to good tokens from the first steps on
        found = run(family=family, steps=steps, restarts=3, heldout=0)
        rank = [(everything.loss < loss - 1e-6).mean() for loss in found.ranking.loss]
        assert found.label == found.ranking.label[0] and rank[0] < 0.01 and np.median(rank) < 0.25, rank


@pytest.mark.parametrize("label_tokens", [1, 2])
def test_a_step_is_one_of_adam_on_the_objective(label_tokens):
    lm = make_tiny_lm("llama")
    tokens = tokenize(WORDS, lm, WORDS.heldout_types(0.3, 0))
    judge, weights = channel(lm, tokens), LossWeights(1.0, 0.5, 0.1, 0.4)
    search = Search(judge, weights=weights, restarts=2, label_tokens=label_tokens, steps=6, lr=0.3,
                    temperature=(2.0, 0.5))
    v = search.v.detach().clone().requires_grad_()
    adam, fit = torch.optim.Adam([v], lr=0.3), ~tokens.heldout
    for step in range(6):
        tau, entropy_weight = 2.0 * 0.25 ** (step / 5), 0.5 * step / 5
        log_p = log_softlabel(v, tau, lm.admissible)
        z, log_prior = judge.read(embed_softlabel(log_p, lm), make_batch(tokens), turn=step)
        losses = objective(z[:, fit], tokens.activation[fit], log_p, log_prior,
                           LossWeights(1.0, entropy_weight, 0.1, 0.4))
        adam.zero_grad()
        losses.total.sum().backward()
        adam.step()
        rows = search.step()
        assert [row["loss"] for row in rows] == pytest.approx(losses.total.tolist(), abs=1e-4)
        assert torch.allclose(search.log_p(tau), log_softlabel(v, tau, lm.admissible), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(entropy=0.0, kl=0.0, end=0.0),
                                     LossWeights(kl=1.0, active=0.2)])
def test_other_weights_work(weights):
    result = run(weights=weights, steps=4)
    assert np.isfinite(result.ranking[["loss", "accuracy_loss", "kl"]].to_numpy()).all()
    expected = (weights.accuracy * result.ranking.accuracy_loss + weights.kl * result.ranking.kl
                + weights.end * result.ranking.end)
    assert np.allclose(result.ranking.loss, expected, atol=1e-5) and result.ranking.loss.is_monotonic_increasing
    assert result.settings["weights"] == dict(accuracy=weights.accuracy, entropy=weights.entropy, kl=weights.kl,
                                              active=weights.active, end=weights.end)


def test_graded_activations_count_as_what_they_are():
    graded = Feature.from_words("size", {"horse": 1.0, "cow": 0.9, "goat": 0.6, "dog": 0.5},
                                {"mouse": 0.1, "bird": 0.2, "cat": 0.4, "car": 0.0})
    result = run(graded, heldout=0.25)
    assert np.isfinite(finite_part(result.trace)).all()
    flat = Feature.from_words("size", ["horse", "cow", "goat", "dog"], ["mouse", "bird", "cat", "car"])
    assert not np.allclose(result.trace.loss[:2], run(flat, heldout=0.25).trace.loss[:2], atol=1e-3)


@pytest.mark.parametrize("mode", FEATURES)
def test_a_model_in_half_precision_works(mode):
    lm = load_lm(tiny_model("llama"), tokenizer=tiny_tokenizer(True), dtype=torch.bfloat16)
    half = label_feature(FEATURES[mode], lm, steps=5, restarts=2, progress=False)
    assert np.isfinite(finite_part(half.trace)).all()
    assert half.trace.loss[:2].tolist() == pytest.approx(run(FEATURES[mode]).trace.loss[:2].tolist(), abs=0.05)


def test_one_word_of_each_class_is_enough():
    result = run(Feature.from_words("cats", ["cat"], ["car"]), heldout=0)
    assert result.label and result.ranking.auroc_fit[0] in (0.0, 0.5, 1.0)


def test_texts_without_any_inactive_text_work():
    texts = Feature.from_texts("animals", SENTENCES[:2] + SENTENCES[4:6], [[(s.start, s.end, 1.0) for s in spans]
                               for spans in TEXTS.spans[:2] + TEXTS.spans[4:6]])
    assert run(texts, heldout=0, batch_size=2).label


def test_texts_that_are_active_all_over_are_no_obstacle():
    # the only inactive tokens are those of the longest text, which a step of two texts mostly does not see
    animals = ACTIVE + "ox hen pig ant bee elk emu fox owl rat".split()
    texts, spans = animals + ["the cat sat on the mat."], [[(0, len(word), 1.0)] for word in animals] + [[(4, 7, 1.0)]]
    assert run(Feature.from_texts("animals", texts, spans), heldout=0, batch_size=2).label


# --- the ranking ------------------------------------------------------------------------------------------------------


def test_the_ranking_is_the_objective_in_order(result):
    ranking, weights = result.ranking, LossWeights()
    assert ranking.loss.is_monotonic_increasing and list(ranking.index) == list(range(len(ranking)))
    assert np.allclose(ranking.loss, hard_loss(ranking.accuracy_loss, ranking.kl, ranking.end, weights), atol=1e-5)
    assert ranking.token_id.is_unique and result.label == ranking.label[0]
    lm = make_tiny_lm("llama")
    for row in ranking.itertuples(): assert (row.label, row.token) == (lm.token(row.token_id), lm.show(row.token_id))
    assert ranking.restart.isin([0, 1]).all() and (ranking.step >= 0).all() and (ranking.step <= 12).all()
    assert result.soft["loss_gap"] == pytest.approx(ranking.loss[0] - weights.end * ranking.end[0] - result.soft["loss"])


def test_the_ranking_equals_a_naive_score_of_each_label_alone(result):
    lm, weights = make_tiny_lm("llama"), LossWeights()
    tokens = tokenize(result.feature, lm, result.feature.heldout_types(0.3, 0))
    judge = channel(lm, tokens)
    a, fit = tokens.activation.double(), ~tokens.heldout
    on, off = a / a[fit].sum(), (1 - a) / (1 - a[fit]).sum()
    for row in [*result.ranking.itertuples()][::5]:
        z = naive_logits(lm, tokens, judge.prompts, lm.embed([row.token_id]))

        def loss(bias): return float(((on * (-z - bias).exp().log1p() + off * (z + bias).exp().log1p()) / 2)[fit].sum())

        accuracy = minimize_scalar(loss).fun
        kl = -float(torch.stack([p.log_prior for p in judge.prompts]).mean(0)[row.token_id])
        end = -float(torch.stack([whole_log_end(lm, p, [row.token_id]) for p in judge.prompts]).mean())
        assert (row.accuracy_loss, row.kl, row.end) == pytest.approx((accuracy, kl, end), abs=1e-4)
        assert row.loss == pytest.approx(weights.accuracy * accuracy + weights.kl * kl + weights.end * end, abs=1e-4)
        for name, units in (("auroc_fit", fit), ("auroc_heldout", ~fit)):
            ordered = (z[units & (a == 1)][:, None] > z[units & (a == 0)]).double().mean()
            assert getattr(row, name) == pytest.approx(ordered.item(), abs=0.02)


@pytest.mark.parametrize("options", [
    dict(),
    dict(steps=20, lr=5.0, temperature=(0.1, 0.01)),  # most probabilities underflow to zero: ties among the top tokens
])
def test_control_tokens_and_padding_are_never_candidates(options):
    config = tiny_config("llama")
    config.vocab_size = 1000  # 300 tokens, 3 of them for control, and 700 rows without a token
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm = load_lm(model, tokenizer=tiny_tokenizer(True))
    excluded = {lm.show(id) for id in (~lm.admissible).nonzero()[:, 0].tolist()}
    # without KL nothing but the mask keeps them out
    result = label_feature(WORDS, lm, weights=LossWeights(kl=0.0), candidates=1000, progress=False, **options)
    assert lm.admissible[result.ranking.token_id.tolist()].all() and not excluded & set(result.ranking.token)
    assert not excluded & set(result.trace.tokens.explode())


def test_no_more_candidates_are_ranked_than_asked_for_the_restarts_own_and_neighbors():
    short, long = (run(candidates=n, steps=20).ranking for n in (3, 40))
    more = 2 + 2 * STARTS  # two restarts, and two rounds of neighbors
    assert 3 <= len(short) <= 3 + more and 40 <= len(long) <= 40 + more
    assert long.loss[0] <= short.loss[0] + 1e-6


@pytest.mark.parametrize("where, kept", [("guesses", "LIKED"), ("expected", "SURPRISING")])
def test_a_label_wins_if_it_is_better_than_all_that_the_descent_has_met(where, kept, monkeypatch):
    lm = make_tiny_lm("llama")
    everything = int(lm.admissible.sum())
    monkeypatch.setattr(module, kept, everything)
    result = run(steps=1, restarts=1, candidates=everything, **dict(guesses=0) | {where: everything})
    judge = channel(lm, tokenize(WORDS, lm, WORDS.heldout_types(0.3, 0)))
    best = rank_labels(judge, lm.admissible.nonzero()[:, 0])[0]
    assert result.label == best.label[0] and set(result.ranking.token_id) == set(best.token_id)
    met = run(steps=1, restarts=1, candidates=everything, guesses=0).ranking
    assert len(met) < everything and (met[["step", "restart"]] >= 0).all(axis=None)
    not_met = ~result.ranking.token_id.isin(met.token_id)
    assert (result.ranking[not_met][["step", "restart"]] == -1).all(axis=None)


def test_expected_labels_take_the_place_of_no_others(monkeypatch):
    monkeypatch.setattr(module, "MOST", 4)
    judge, found = channel(make_tiny_lm("llama"), tokenize(WORDS, make_tiny_lm("llama"))), []
    for count in (0, 200):
        search = Search(judge)
        for _ in range(4): search.step()
        found.append(module.shortlist(search, 3, expected=module.most_expected(judge, count)))
    assert found[1][:len(found[0])] == found[0] and len(found[0]) < len(found[1]) <= len(found[0]) + 3


@pytest.mark.parametrize("feature", [WORDS, texts_of(lambda word: 0.5 + 0.05 * ACTIVE.index(word))])
def test_guesses_are_made_from_the_most_active_words_and_from_none_that_is_held_out(feature, monkeypatch):
    lm, read, types = make_tiny_lm("llama"), [], feature.heldout_types(0.3, 0)
    judge = channel(lm, tokenize(feature, lm, types))
    monkeypatch.setattr(type(lm), "encode_start", lambda self, text: read.append(text) or self.encode(text))
    found = guessed(judge, 5)
    shown = [word for word in ACTIVE if word not in types]
    if feature is not WORDS: shown = [word for word in reversed(shown) if any(word in text for text in SENTENCES)]
    assert set(read) == {f"{', '.join(shown)} and other"} and len(set(found)) == 5
    pairs = guessed(judge, 5, label_tokens=2)
    assert len(pairs) <= 5 and all(len(label) == 2 and spelled(label, lm) for label in pairs)
    monkeypatch.setattr(module, "longest_input", lambda lm: len(lm.encode(f"{', '.join(shown[:2])} and other")))
    guessed(judge, 5)
    assert read[-1] == f"{', '.join(shown[:2])} and other"  # what the model can read
    monkeypatch.setattr(module, "longest_input", lambda lm: 1)
    assert guessed(judge, 5) == []


@pytest.mark.parametrize("label_tokens", [1, 2])
def test_guesses_are_the_likeliest_labels_behind_the_list(label_tokens):
    lm = make_tiny_lm("llama")
    judge, tokens = channel(lm, tokenize(WORDS, lm)), lm.admissible.nonzero()[:, 0].tolist()
    ids = lm.encode_start(f"{', '.join(ACTIVE)} and other")
    expected = lambda label: label_log_prior(lm, lm.model.base_model(torch.tensor([[*ids, *label]])).last_hidden_state[0, -1])
    with torch.no_grad():
        first = expected(()).tolist()
        best = sorted(((id,) for id in tokens), key=lambda label: -first[label[0]])[:9]
        if label_tokens == 2:
            both = {(*label, id): first[label[0]] + p for label in best for id, p in enumerate(expected(label).tolist())}
            best = [label for label in sorted(both, key=lambda label: -both[label])[:9] if spelled(label, lm)]
    assert guessed(judge, 9, label_tokens) == best


@pytest.mark.parametrize("label_tokens", [1, 2, 3])
def test_neighbors_have_one_other_token_and_belong_to_the_same_restart(label_tokens):
    lm = make_tiny_lm("llama")
    search = Search(channel(lm, tokenize(WORDS, lm)), label_tokens=label_tokens)
    label = tuple(lm.encode(" cat sat mat"))[:label_tokens]
    search.meet([label], 1)
    near = neighbors(search, [label])
    assert near
    for other in near:
        assert len(other) == label_tokens and sum(a != b for a, b in zip(label, other)) <= 1
        assert spelled(other, lm) and search.met[other][1] == 1


@pytest.mark.parametrize("label_tokens", [1, 2])
def test_relatives_begin_like_the_label_and_the_most_expected_come_first(label_tokens):
    lm = make_tiny_lm("llama")
    search = Search(channel(lm, tokenize(WORDS, lm)), label_tokens=label_tokens)
    label = tuple(lm.encode(" the animals"))[-label_tokens:]
    search.meet([label], 1)
    found = relatives(search, [label], k=3)
    stem, prior = " animal", search.discriminator.log_prior
    alike = [id for id in prior.argsort(descending=True).tolist() if lm.admissible[id] and lm.token(id).startswith(stem)]
    expected = [(*label[:-1], id) for id in alike if id != label[-1]][:3]
    assert found == [other for other in expected if spelled(other, lm)]
    assert found and all(search.met[other][1] == 1 for other in found)


def test_a_single_letter_is_no_plural(lm):
    search = Search(channel(lm, tokenize(WORDS, lm)))
    label = tuple(lm.encode(" s"))
    search.meet([label], 0)
    found = relatives(search, [label])
    assert found and all(spelled(other, lm).startswith(" s") for other in found)


def test_the_whole_word_is_a_relative_of_its_beginning(lm):
    search = Search(channel(lm, tokenize(WORDS, lm)))
    stem, whole = (tuple(lm.encode(text)) for text in (" mamm", " mammals"))
    search.meet([stem], 0)
    assert whole in relatives(search, [stem])


# --- held-out words ---------------------------------------------------------------------------------------------------


def test_without_held_out_words_there_are_no_held_out_scores():
    for feature in (WORDS, TEXTS):
        result = run(feature, heldout=0, steps=3)
        assert result.heldout.empty and list(result.heldout.columns) == ["label", "metric", "value", "low", "high"]
        assert result.ranking.auroc_heldout.isna().all() and result.ranking.auroc_fit.notna().all()
        assert "held-out" not in repr(result).lower()


def test_held_out_scores_are_a_tidy_table(result):
    table = result.heldout.set_index(["label", "metric"])
    assert list(result.heldout.columns) == ["label", "metric", "value", "low", "high"] and table.index.is_unique
    assert set(table.index.get_level_values(0)) == {"hard", "soft", "chance"}
    assert (table.low <= table.value + 1e-9).all() and (table.value <= table.high + 1e-9).all()
    assert table.value["hard", "auroc"] == pytest.approx(result.ranking.auroc_heldout[0])


def test_the_held_out_words_are_drawn_by_share_and_seed(monkeypatch):
    real, asked = Feature.heldout_types, []

    def heldout_types(self, share, seed):
        asked.append((share, seed))
        return real(self, share, seed)

    monkeypatch.setattr(Feature, "heldout_types", heldout_types)
    run(heldout=0.25, seed=7, steps=1)
    assert asked == [(0.25, 7)]


def only_heldout_differs(one: LabelResult, other: LabelResult) -> None:
    fit = ["token_id", "loss", "accuracy_loss", "kl", "auroc_fit", "step", "restart"]
    same_frame(one.trace, other.trace)
    same_frame(one.ranking[fit], other.ranking[fit])
    assert one.soft == other.soft


def test_the_activation_of_held_out_words_has_no_part_in_the_fit(monkeypatch):
    out = WORDS.heldout_types(0.3, 0)
    assert {word in ACTIVE for word in out} == {True, False}
    swapped = Feature.from_words("animals", [w for w in ACTIVE if w not in out] + [w for w in INACTIVE if w in out],
                                 [w for w in INACTIVE if w not in out] + [w for w in ACTIVE if w in out])
    order = [swapped.texts.index(word) for word in WORDS.texts]  # the same words in the same order
    swapped = Feature("animals", "words", WORDS.texts, tuple(swapped.spans[i] for i in order))
    monkeypatch.setattr(Feature, "heldout_types", lambda self, share, seed: out)
    one, other = run(WORDS), run(swapped)
    only_heldout_differs(one, other)
    assert other.ranking.auroc_heldout.tolist() == pytest.approx((1 - one.ranking.auroc_heldout).tolist())


def test_the_activation_of_held_out_words_in_texts_has_no_part_in_the_fit():
    out = TEXTS.heldout_types(0.3, 0)
    assert out & set(ACTIVE)
    weaker = texts_of(lambda word: 0.6 if word in out else 1.0)  # still active, so held out again
    assert weaker.heldout_types(0.3, 0) == out and weaker != TEXTS
    only_heldout_differs(run(TEXTS), run(weaker))
    stronger = texts_of(lambda word: 1.0 if word in out else 0.6)
    assert not run(stronger).trace.loss.equals(run(TEXTS).trace.loss)  # fitted words have


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FEATURES)
def test_an_interrupted_search_gives_what_it_has(monkeypatch, mode):
    whole = run(FEATURES[mode])
    interrupt_at(monkeypatch, 5)
    result = run(FEATURES[mode])
    assert result.interrupted and not whole.interrupted
    same_frame(result.trace, whole.trace[whole.trace.step < 5])
    assert result.label == result.ranking.label[0] and not result.heldout.empty
    assert (result.ranking.step <= 5).all()
    assert "interrupted" in repr(result) and "interrupted" not in repr(whole)


def test_an_interrupt_in_the_middle_of_a_step_leaves_whole_steps(monkeypatch):
    real, calls = torch.optim.AdamW.step, []

    def adam_step(self, *args):
        real(self, *args)
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", adam_step)
    result = run()
    assert result.interrupted and result.trace.step.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.isfinite(result.ranking.loss).all() and math.isfinite(result.soft["loss"])


def test_an_interrupt_in_the_polish_leaves_what_was_ranked(monkeypatch):
    def neighbors(*args): raise KeyboardInterrupt
    whole = run()
    monkeypatch.setattr(module, "neighbors", neighbors)
    result = run()
    assert result.interrupted and not whole.interrupted and set(result.ranking.token_id) <= set(whole.ranking.token_id)
    assert_frame_equal(result.trace, whole.trace)


def test_an_interrupt_while_labels_grow_leaves_what_was_met(monkeypatch):
    def grow(*args): raise KeyboardInterrupt
    monkeypatch.setattr("tokenlabel.optimize.grow", grow)
    result = run(label_tokens=2)
    assert result.interrupted and len(result.ranking)


def test_labels_grow_from_a_search_with_the_same_settings_and_were_not_met_in_the_trace(monkeypatch):
    seen, grow = [], module.grow
    monkeypatch.setattr("tokenlabel.optimize.grow", lambda short, *rest: (seen.append(short), grow(short, *rest))[1])
    result = run(label_tokens=2, steps=2, lr=0.1, init=(0.0, 0.1), calibrated=False)
    [short] = seen
    assert short.adam.defaults["lr"] == 0.1 and not short.calibrated and short.v.shape[1] == 1
    other = result.ranking[result.ranking.restart == -1]
    assert len(other) and (other.step == -1).all()


def test_where_no_label_grows_there_is_none(monkeypatch):
    monkeypatch.setattr("tokenlabel.optimize.extensions", lambda *args: [])
    lm = make_tiny_lm("llama")
    short = Search(channel(lm, tokenize(WORDS, lm)))
    short.step()
    assert grow(short, 3, 3) == []


def test_an_interrupt_before_the_first_step_is_passed_on(monkeypatch):
    interrupt_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt): run()


def test_an_error_in_a_step_is_passed_on(monkeypatch):
    def step(self): raise RuntimeError("no memory")
    monkeypatch.setattr(Search, "step", step)
    with pytest.raises(RuntimeError, match="no memory"): run()


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [
    ("restarts", 0), ("restarts", -1), ("steps", 0), ("steps", -5), ("candidates", 0), ("guesses", -1),
    ("expected", -1), ("lr", 0.0),
    ("lr", -0.1), ("lr", math.nan), ("batch_size", 1), ("batch_size", 0), ("batch_size", -3), ("temperature", (1.0,)),
    ("temperature", (1.0, 0.5, 0.1)), ("temperature", (0.0, 0.1)), ("temperature", (1.0, -0.1)),
    ("temperature", (math.nan, 0.1)), ("temperature", (1.0, math.nan)), ("heldout", 1.0), ("heldout", -0.1), ("seed", -1), ("seed", 2**64),
    ("heldout", 1.5), ("heldout", math.nan), ("ramp", (1.0,)), ("init", (0.3, 0.3, 1.0)), ("prompts", []), ("prompts", "Examples of {label}:"),
    ("lr", 1e39), ("weight_decay", math.inf), ("weight_decay", -0.1), ("ramp", (0, -1)), ("init", (1e300, 1e300)),
    ("temperature", (1e308, 1.0)), ("temperature", (1.0, 1e-40)), ("weights", dict(kl=0.1)),
])
def test_settings_that_cannot_work_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name): run(**{name: value})


@pytest.mark.parametrize("active", [0.5, None])
def test_data_of_one_class_are_refused_before_anything_is_read(active, monkeypatch):
    monkeypatch.setitem(module.DISCRIMINATORS, "channel", None)  # would be called next
    monkeypatch.setattr(Feature, "heldout_types", lambda *settings: frozenset(ACTIVE))
    with pytest.raises(ValueError, match="units to fit are inactive; give more data"):
        run(WORDS, weights=LossWeights(active=active))


def test_a_look_at_questions_about_a_text_sees_as_many_as_one_at_words():
    lm, ask = make_tiny_lm("llama"), {"words": "{word} {label}?", "texts": "{text} {token} {label}?"}
    looks = {mode: look_size(Search(direct(lm, tokenize(feature, lm), Question(ask[mode], yes="1", no="0"))), 1 / 4)
             for mode, feature in FEATURES.items()}
    assert looks == {"words": 16, "texts": 16}
    assert look_size(Search(channel(lm, tokenize(TEXTS, lm))), 1 / 4) == 2  # whole texts


def test_an_unknown_discriminator_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'oracle'.*channel"): run(discriminator="oracle")


def test_a_bad_prompt_is_refused():
    with pytest.raises(ValueError, match="0 label slots"): run(prompts=["Examples:"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_too_long_for_the_model_is_named(family):
    with pytest.raises(ValueError, match="prompt 'ab cd .* takes 256 tokens"): run(family=family, prompts=["ab cd " * 100 + "{label}:"])


def test_the_soft_kl_of_questions_does_not_depend_on_batches(monkeypatch):
    options = dict(discriminator="direct", prompts=Question("Is {word} {label}?", yes="1", no="0"), label_tokens=2, steps=3)
    soft = run(**options).soft
    for units in 3, 7:
        monkeypatch.setattr("tokenlabel.direct.UNITS", units)
        assert run(**options).soft == pytest.approx(soft, abs=1e-3)


def test_a_result_of_a_question_with_shots_is_the_same_after_loading(tmp_path):
    question = Question("Is {word} {label}?", yes="1", no="0", shots=[["Is red blue?", "no"]])
    made = run(discriminator="direct", prompts=question, steps=3)
    settings = LabelResult.load(made.save(tmp_path / "result")).settings
    assert settings == made.settings and Question(**settings["prompts"]) == question


def test_the_result_says_how_it_was_made():
    result = run(seed=3, steps=4, lr=0.25, prompts=["Some {label}:"], batch_size=6, temperature=(2.0, 0.5))
    expected = dict(discriminator="channel", restarts=2, steps=4, lr=0.25, prompts=["Some {label}:"], batch_size=6,
                    temperature=[2.0, 0.5], heldout=0.3, seed=3, weights=dict(accuracy=1.0, entropy=0.2,
                    kl=LossWeights().kl, active=0.5, end=LossWeights().end))
    assert expected.items() <= result.settings.items() and result.settings["lm"]
    json.dumps(result.settings)
    assert result.seconds > 0


def test_progress_is_shown_on_request_only(capsys):
    run(steps=2)
    assert capsys.readouterr() == ("", "")
    run(steps=2, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "2/2" in err and "loss" in err and "entropy" in err and "KL" in err


# --- save and load ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[LabelResult, LabelResult]:
    "Two different results."
    return run(steps=3), run(TEXTS, steps=3)


def files(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_result_comes_back_as_it_was_saved(result, tmp_path):
    folder = result.save(tmp_path / "some" / "where")
    assert folder == tmp_path / "some" / "where" and [*tmp_path.iterdir()] == [tmp_path / "some"]
    assert [*folder.parent.iterdir()] == [folder]
    back = LabelResult.load(str(folder))
    same_result(back, result)
    assert back.seconds == result.seconds and repr(back) == repr(result)
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".jsonl", ".parquet", ".safetensors"}  # no pickle


def test_interrupted_and_odd_results_come_back_too(monkeypatch, tmp_path):
    odd = Feature.from_words('<b>"odd"</b> & 動物', ["猫", "犬", "línx", "two words"], ['"', "<i>", "$x$", "\\"])
    interrupt_at(monkeypatch, 2)
    result = run(odd, heldout=0)
    back = LabelResult.load(result.save(str(tmp_path / "odd")))
    same_result(back, result)
    assert back.interrupted and back.heldout.empty and repr(back) == repr(result)


def test_saving_again_replaces_the_old_result(saved, tmp_path):
    one, other = saved
    one.save(tmp_path / "result")
    other.save(tmp_path / "result")
    same_result(LabelResult.load(tmp_path / "result"), other)
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_an_empty_folder_is_fine(saved, tmp_path):
    same_result(LabelResult.load(saved[0].save(tmp_path)), saved[0])


@pytest.mark.parametrize("content", [["notes.txt"], ["sub/notes.txt"], ["result.json", "data.csv"]])
def test_a_folder_with_other_things_is_refused_and_left_alone(saved, tmp_path, content):
    folder = tmp_path / "mine"
    for name in content:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    before = files(tmp_path)
    with pytest.raises(ValueError, match="mine"): saved[0].save(folder)
    assert files(tmp_path) == before and [*tmp_path.iterdir()] == [folder]


def test_a_note_beside_a_saved_result_is_not_lost(saved, tmp_path):
    folder = saved[0].save(tmp_path / "result")
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="result"): saved[1].save(folder)
    assert (folder / "notes.txt").read_text() == "precious"
    same_result(LabelResult.load(folder), saved[0])


@pytest.mark.parametrize("place", ["result", "result/below"])
def test_a_file_in_the_place_of_the_folder_is_left_alone(saved, tmp_path, place):
    (tmp_path / "result").write_text("precious")
    with pytest.raises(ValueError, match="result is a file"): saved[0].save(tmp_path / place)
    assert files(tmp_path) == {"result": b"precious"}


def test_a_folder_that_cannot_be_written_or_replaced_is_refused_before_the_search(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="/proc"): module.check_folder(Path("/proc"))  # a mount point
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be replaced"): module.check_folder(Path("."))
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to"): module.check_folder(Path("new/folder"))


def test_a_long_name_of_a_folder_is_no_obstacle(saved, tmp_path):
    same_result(LabelResult.load(saved[0].save(tmp_path / ("名" * 80))), saved[0])


@pytest.mark.parametrize("there", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("where", ["table", "move"])
def test_a_save_that_fails_leaves_things_as_they_were(saved, tmp_path, monkeypatch, there, where):
    one, other = saved
    folder = tmp_path / "result"
    if there: one.save(folder)
    before = files(tmp_path)
    if where == "table":
        real = pd.DataFrame.to_parquet

        def to_parquet(self, path, **options):
            real(self, path, **options)
            if "trace" in str(path): raise OSError("disk full")

        monkeypatch.setattr(pd.DataFrame, "to_parquet", to_parquet)
    else:
        move = module.os.replace

        def replace(source, target):
            if str(target) == str(folder) and "new" in str(source): raise OSError("disk full")
            move(source, target)

        monkeypatch.setattr(module.os, "replace", replace)
    with pytest.raises(OSError, match="disk full"): other.save(folder)
    monkeypatch.undo()
    assert files(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == (["result"] if there else [])
    if there: same_result(LabelResult.load(folder), one)


def test_there_is_nothing_to_load_where_nothing_was_saved(tmp_path):
    with pytest.raises(FileNotFoundError): LabelResult.load(tmp_path / "nothing")


# --- display ----------------------------------------------------------------------------------------------------------


def test_a_result_shows_itself_as_text(result):
    text = repr(result)
    assert text.startswith(f"animals: {result.label!r}") and f"2 restarts, {result.trace.step.nunique()} steps" in text
    for token in result.ranking.token[:5]: assert token in text
    assert f"{result.ranking.loss[0]:.3f}" in text and f"{result.soft['accuracy_loss']:.3f}" in text
    assert "balanced_accuracy" in text and "chance" in text


def test_a_result_shows_itself_as_html_with_a_picture_and_escapes_names():
    import matplotlib.pyplot as plt

    words = Feature.from_words('<script>alert("$x$ & $")</script>', ACTIVE, INACTIVE)
    result = run(words, steps=3)
    open_figures = plt.get_fignums()
    html = result._repr_html_()
    assert plt.get_fignums() == open_figures
    assert '<img src="data:image/png;base64,iVBOR' in html
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert html.count("<table") == 2 and "<th>AUROC held out</th>" in html
    assert "<table" in run(words, steps=3, heldout=0)._repr_html_()


# --- labels of several tokens, and their ends -------------------------------------------------------------------------


def whole_log_prob(lm, prompt, label):
    "Log-probability of a label's tokens behind a prompt's beginning, from one full forward pass."
    ids = torch.tensor([[*prompt.before, *label]])
    logits = lm.model(ids).logits[0].float().masked_fill(~lm.admissible, -1e9).log_softmax(-1)
    return sum(logits[len(prompt.before) - 1 + t, id] for t, id in enumerate(label))


def whole_log_end(lm, prompt, label):
    "Log-probability that a prompt goes on behind a label, from one full forward pass."
    logits = lm.model(torch.tensor([[*prompt.before, *label, *prompt.after]])).logits[0].float()
    return logits[len(prompt.before) + len(label) - 1].log_softmax(-1)[prompt.after[0]]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_the_kl_of_a_long_label_is_minus_its_log_probability_and_its_end_that_of_what_follows(family):
    lm = make_tiny_lm(family)
    judge = channel(lm, tokenize(WORDS, lm))
    labels = lm.admissible.nonzero()[:, 0][torch.randint(100, (7, 3), generator=torch.Generator().manual_seed(0))]
    mean = lambda log_p: torch.stack([torch.stack([-log_p(p, label) for p in judge.prompts]).mean() for label in labels.tolist()])
    expected, end = mean(partial(whole_log_prob, lm)), mean(partial(whole_log_end, lm))
    assert hard_kl(judge, labels).tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert hard_end(judge, labels).tolist() == pytest.approx(end.tolist(), abs=1e-3)
    alone = torch.stack([-whole_log_end(lm, judge.prompts[1], label) for label in labels.tolist()])
    assert hard_end(judge, labels, turn=1).tolist() == pytest.approx(alone.tolist(), abs=1e-3)
    z, log_prior = judge.read(lm.embed(labels), judge.batch())
    assert -log_prior.gather(2, labels[:, :, None]).sum((1, 2)) == pytest.approx(expected, abs=1e-3)
    assert torch.allclose(z, judge.hard_logits(labels, judge.batch()), atol=1e-3)


@torch.no_grad()
def test_the_direct_discriminator_expects_each_token_given_those_before():
    lm = make_tiny_lm("llama")
    judge = direct(lm, tokenize(WORDS, lm))
    labels = torch.tensor([[70, 80, 90], [91, 60, 75]])
    z, log_prior = judge.read(lm.embed(labels), judge.batch())
    assert torch.allclose(z, judge.hard_logits(labels, judge.batch()), atol=1e-4)
    for t in (1, 2):  # `SOME` units are all that there are here
        assert torch.allclose(log_prior[:, t], judge.next_log_prior(lm.embed(labels[:, :t])), atol=1e-3)
    assert torch.allclose(log_prior[:, 0], judge.log_prior.expand(2, -1))


@torch.no_grad()
def test_top_labels_are_the_most_probable_pairs():
    lm = make_tiny_lm("llama")
    log_p = log_softlabel(torch.randn(2, len(lm.embedding), generator=torch.Generator().manual_seed(0)), 0.3, lm.admissible)
    pairs = (log_p[0][:, None] + log_p[1]).flatten()
    best = pairs.topk(10)
    found = top_labels(*map(torch.Tensor.tolist, top_of_slots(log_p, lm)))
    assert [a * len(lm.embedding) + b for (a, b), _ in found] == best.indices.tolist()
    assert [p for _, p in found] == pytest.approx(best.values.exp().tolist(), rel=1e-4)


@pytest.mark.parametrize("discriminator", ["channel", "direct"])
def test_labels_of_two_tokens_read_as_they_are_written(discriminator, tmp_path):
    lm = make_tiny_lm("llama")
    found = label_feature(WORDS, lm, discriminator, label_tokens=2, steps=4, restarts=2, progress=False)
    for row in found.ranking.itertuples():
        assert tuple(lm.encode(row.label)) == row.token_id and len(row.token_id) == 2
    assert found.label == found.ranking.label[0] and found.ranking.loss.is_monotonic_increasing
    assert found.ranking.token_id.is_unique
    again = LabelResult.load(found.save(tmp_path / "two"))
    pd.testing.assert_frame_equal(again.ranking, found.ranking)
    same = label_feature(WORDS, lm, discriminator, label_tokens=2, steps=4, restarts=2, progress=False)
    pd.testing.assert_frame_equal(same.ranking, found.ranking)
    pd.testing.assert_frame_equal(same.trace, found.trace)


def test_a_later_token_feels_what_comes_before_it():
    lm = make_tiny_lm("llama")
    judge = channel(lm, tokenize(WORDS, lm))
    label = lm.embed(torch.tensor([[70, 80], [91, 80]])).requires_grad_()
    _, log_prior = judge.read(label, judge.batch())
    assert not torch.allclose(log_prior[0, 1], log_prior[1, 1])
    log_prior[0, 1, 80].backward()
    assert label.grad[0, 0].abs().max() > 0 and label.grad[0, 1].abs().max() == 0 and label.grad[1].abs().max() == 0


def test_a_stem_is_not_asked_whether_it_ends_there_and_a_whole_label_is(monkeypatch):
    lm, asked = make_tiny_lm("llama"), []
    look = module.best_by_look
    monkeypatch.setattr(module, "best_by_look", lambda search, labels, *rest, **options: (
        asked.append((len(labels[0]), search.weights.end)), look(search, labels, *rest, **options))[1])
    short = Search(channel(lm, tokenize(WORDS, lm)))
    short.step()
    assert all(len(label) == 2 for label in grow(short, 2, 3))
    assert set(asked) == {(1, 0.0), (2, LossWeights().end)}


@pytest.mark.parametrize("first_step", [True, False])
def test_an_interrupt_while_a_longer_label_is_tried_leaves_the_shorter_one(first_step, monkeypatch):
    "Before the second search has anything, and in the middle of it, when it would win by any margin."
    lm, whole = make_tiny_lm("llama"), module.label_feature
    def label(*rest, label_tokens, **options):
        result = whole(*rest, label_tokens=label_tokens, **options)
        if label_tokens == 1: return result
        if first_step: raise KeyboardInterrupt
        return replace(result, interrupted=True)
    monkeypatch.setattr(module, "label_feature", label)
    found, lengths = module.label_length(WORDS, lm, margin=-100.0, steps=3, restarts=2, progress=False)
    assert found.settings["label_tokens"] == 1 and found.interrupted and lengths.index.tolist() == [1]


def test_if_no_longer_label_can_be_had_the_shorter_one_stands(monkeypatch):
    lm, whole = make_tiny_lm("llama"), module.label_feature
    def label(*rest, label_tokens, **options):
        if label_tokens == 2: raise module.NoLabel("no label of 2 tokens was met")
        return whole(*rest, label_tokens=label_tokens, **options)
    monkeypatch.setattr(module, "label_feature", label)
    found, lengths = module.label_length(WORDS, lm, margin=-100.0, steps=3, restarts=2, progress=False)
    assert found.settings["label_tokens"] == 1 and not found.interrupted and lengths.index.tolist() == [1]


def test_the_seconds_of_a_length_are_those_of_all_its_searches(monkeypatch):
    lm, whole, each = make_tiny_lm("llama"), module.label_feature, []
    def label(*rest, **options):
        result = whole(*rest, **options)
        each.append(result.seconds)
        return result
    monkeypatch.setattr(module, "label_feature", label)
    found, _ = module.label_length(WORDS, lm, margin=100.0, steps=3, restarts=2, progress=False)
    assert len(each) == 2 and found.seconds >= sum(each)


def test_a_length_is_refused_like_any_other_search():
    lm = make_tiny_lm("llama")
    with pytest.raises(ValueError, match="steps"): module.label_length(WORDS, lm, steps=0)
    with pytest.raises(ValueError, match="longest=0"): module.label_length(WORDS, lm, longest=0)
    with pytest.raises(ValueError, match="margin=nan"): module.label_length(WORDS, lm, margin=math.nan)
    with pytest.raises(ValueError, match="longest='3'"): module.label_length(WORDS, lm, longest="3")


def test_a_token_is_added_only_if_it_pays_on_held_out_words():
    options = dict(steps=3, restarts=2, progress=False)
    lm = make_tiny_lm("llama")
    never, lengths = module.label_length(WORDS, lm, margin=100.0, **options)
    assert never.settings["label_tokens"] == 1 and lengths.index.tolist() == [1, 2]
    always, lengths = module.label_length(WORDS, lm, margin=-100.0, longest=2, **options)
    assert always.settings["label_tokens"] == 2 and lengths.label.tolist() == [never.label, always.label]
    chosen = label_feature(WORDS, lm, label_tokens="auto", **options)
    assert chosen.label == module.label_length(WORDS, lm, **options)[0].label
    with pytest.raises(ValueError, match="heldout=0 leaves nothing"):
        label_feature(WORDS, lm, label_tokens="auto", heldout=0, **options)
    with pytest.raises(ValueError, match='neither a whole number nor "auto"'):
        label_feature(WORDS, lm, label_tokens="two", **options)


def test_an_error_of_a_callback_is_not_taken_for_a_length_that_cannot_be_reached():
    lm, seen = make_tiny_lm("llama"), []

    def watch(rows):
        seen.extend(rows)
        if len(seen) > 3: raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        label_feature(WORDS, lm, label_tokens="auto", steps=3, restarts=1, progress=watch)


def test_numbers_of_numpy_are_numbers_and_others_are_refused_before_the_search():
    lm, options = make_tiny_lm("llama"), dict(steps=2, heldout=0, progress=False)
    found = label_feature(WORDS, lm, label_tokens=np.int64(1), restarts=np.int32(2), **options)
    assert json.loads(json.dumps(found.settings))["restarts"] == 2
    for name, value in dict(restarts=2.0, batch_size=4.5, candidates=2.5, guesses=1.5, seed="0", steps=None).items():
        with pytest.raises(ValueError, match=f"{name}={value!r} is not a whole number"):
            label_feature(WORDS, lm, **(options | {name: value}))
    for name, value in dict(lr="fast", heldout=None, weight_decay=[], temperature=1.0, ramp=None, init=("a", 1)).items():
        with pytest.raises(ValueError, match=rf"{name}=.* is not a (pair of numbers|number)"):
            label_feature(WORDS, lm, **(options | {name: value}))
    for name, value in dict(heldout="0.3", temperature="12").items():   # which Python would read as numbers
        with pytest.raises(ValueError, match=f"{name}='{value}' is not a"):
            label_feature(WORDS, lm, **(options | {name: value}))
    with pytest.raises(ValueError, match="weights=.* is not a `LossWeights`"):
        label_feature(WORDS, lm, weights={"kl": 1.0}, **options)
    for name, value in dict(lr=math.inf, init=(math.nan, 0.3), temperature=(1, math.inf), ramp=(0, math.nan)).items():
        with pytest.raises(ValueError, match=f"{name}=.* finite"): label_feature(WORDS, lm, **(options | {name: value}))
