"""The search: schedule, draws, the one step for any number of rows and features, and when to stop."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rank import ACTIVE, FEATURES, INACTIVE, KINDS, SENTENCES, make

from tokenlabel.channel import channel
from tokenlabel.feature import Feature
from tokenlabel.objective import class_weights, objective
from tokenlabel.prompts import Question
from tokenlabel.search import (NUMBERS, Search, draw_balanced, draw_groups, has_collapsed, initial_v, make_discriminator,
                               replace_slots, round_trips, schedule, step, top_first_order, top_labels)
from tokenlabel.settings import Settings
from tokenlabel.softlabel import embed_softlabel, log_softlabel
from tokenlabel.tokenize import tokenize

few = settings(max_examples=60, deadline=None)
LOSSES = ("loss", "accuracy_loss", "entropy", "kl", "discrete_accuracy_loss", "accuracy_active", "accuracy_inactive")


def random(seed: int = 0) -> torch.Generator: return torch.Generator().manual_seed(seed)


def same_rows(rows, others, abs=2e-3):
    "Whether two parts of a trace are equal up to rounding."
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys() and row["tokens"][0] == other["tokens"][0]
        for name in ("step", "restart", "temperature", "entropy_weight"): assert row[name] == other[name]
        for name in LOSSES: assert row[name] == pytest.approx(other[name], abs=abs, nan_ok=True), name
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-3)


def same_search(one, other):
    "Whether two searches are in the same state. Adam lets rounding errors grow, but a step moves v by up to 0.5."
    assert one.done == other.done and torch.equal(one.generator.get_state(), other.generator.get_state())
    assert (one.v - other.v).abs().max() < 1e-2
    shared = one.candidates.items() & other.candidates.items()  # a label may take the place of one that is as good
    assert len(shared) >= 0.98 * max(len(one.candidates), len(other.candidates))


# --- schedule and start -----------------------------------------------------------------------------------------------


@given(st.integers(2, 300), st.floats(0.1, 10), st.floats(0.01, 1), st.floats(0, 1))
@few
def test_the_schedule_goes_from_its_first_values_to_its_last_and_never_back(steps, first, share, start):
    options = Settings(steps=steps, temperature=(first, first * share), entropy_schedule=(start, 1.0))
    points = [schedule(step, options) for step in range(steps)]
    assert points[0] == pytest.approx((first, start)) and points[-1] == pytest.approx((first * share, 1))
    for (t, w), (next_t, next_w) in zip(points, points[1:]): assert next_t <= t * (1 + 1e-12) and next_w >= w
    ratios = [b[0] / a[0] for a, b in zip(points, points[1:])]
    assert ratios == pytest.approx([share ** (1 / (steps - 1))] * (steps - 1))  # the same factor at each step


def test_a_schedule_of_one_step_is_its_beginning():
    assert schedule(0, Settings(steps=1)) == (1.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_a_share_of_the_prior_given_the_slots_before_and_noise(kind):
    one = make(kind)
    lm = one.lm
    v = initial_v(one, Settings(restarts=2, label_tokens=2, init_std=0.0, prior_weight=0.5), random())
    assert v.shape == (2, 2, len(lm.embedding)) and torch.allclose(v[0], v[1], atol=1e-4)
    with torch.no_grad():
        label = embed_softlabel(log_softlabel(v[:, :1], 1.0, lm.admissible), lm)
        for found, prior in (v[0, 0], one.label_prior), (v[0, 1], one.next_label_prior(label)[0]):
            found, prior = found[lm.admissible], prior[lm.admissible]
            near = prior > prior.max() - 50
            assert torch.allclose((found - found.max())[near], 0.5 * (prior - prior.max())[near], atol=1e-4)
    noise = initial_v(one, Settings(restarts=8, init_std=2.0, prior_weight=0.0), random())
    assert noise.mean().abs() < 0.1 and noise.std() == pytest.approx(2, abs=0.1)


# --- draws ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(0, 30), st.data())
@few
def test_a_draw_has_its_size_and_is_as_balanced_as_possible(n_active, n_inactive, data):
    total = n_active + n_inactive
    if total == 0: return
    size, seed = data.draw(st.integers(1, total)), data.draw(st.integers(0, 999))
    numbers = torch.randperm(100, generator=random(seed))[:total]
    active, inactive = numbers[:n_active], numbers[n_active:]
    drawn = draw_balanced(active, inactive, size, random(seed))
    assert len(drawn) == len(set(drawn)) == size and drawn == sorted(drawn) and set(drawn) <= set(numbers.tolist())
    possible = range(max(0, size - n_inactive), min(n_active, size) + 1)
    assert len(set(drawn) & set(active.tolist())) == min(possible, key=lambda n: (abs(n - size / 2), n))
    assert drawn == draw_balanced(active, inactive, size, random(seed))


def test_in_the_long_run_each_number_of_a_group_is_drawn_equally_often():
    generator, counts = random(), np.zeros(20)
    for _ in range(1000): counts[draw_balanced(torch.arange(5), torch.arange(5, 20), 6, generator)] += 1
    assert np.abs(counts[:5] / 600 - 1).max() < 0.15 and np.abs(counts[5:] / 200 - 1).max() < 0.25


@pytest.mark.parametrize("mode, kind", [(mode, kind) for mode in FEATURES for kind in KINDS])
def test_nothing_held_out_is_drawn_and_active_draws_have_an_active_example(mode, kind):
    one = make(kind, mode)
    active, inactive = draw_groups(one, balanced=True)
    everything, rest = draw_groups(one, balanced=False)
    train, fires = ~one.tokens.heldout, one.tokens.activation >= 0.5
    expected = {draw for draw in one.draws.tolist() if (fires & train)[one.draws == draw].any()}
    assert set(active.tolist()) == expected and not expected & set(inactive.tolist()) and not len(rest)
    assert sorted(active.tolist() + inactive.tolist()) == everything.tolist() == one.draws[train].unique().tolist()


def test_if_all_texts_are_active_those_with_something_inactive_are_the_other_group():
    lm, animals = make_tiny_lm("llama"), ACTIVE + "ox hen pig ant bee elk emu fox owl rat".split()
    texts = animals + ["the cat sat on the mat."]
    spans = [[(0, len(word), 1.0)] for word in animals] + [[(4, 7, 1.0)]]
    one = channel(lm, tokenize(Feature.from_texts("animals", texts, spans), lm))
    active, inactive = draw_groups(one, True)
    assert inactive.tolist() == [18] and active.tolist() == list(range(18))
    search = Search(one, Settings(batch_size=2, restarts=1))
    for _ in range(3): assert math.isfinite(search.step()[0]["loss"])


def test_without_balance_examples_are_drawn_as_they_come():
    lm = make_tiny_lm("llama")
    one, share = channel(lm, tokenize(Feature.from_words("cats", ["cat"], ACTIVE[1:] + INACTIVE), lm)), {}
    for weight in (0.5, None):
        search = Search(one, Settings(positive_weight=weight, batch_size=4))
        drawn = [draw_balanced(search.active, search.inactive, 4, search.generator) for _ in range(400)]
        share[weight] = np.mean([one.tokens.activation.argmax().item() in numbers for numbers in drawn])
    assert share[0.5] == 1 and share[None] == pytest.approx(4 / 16, abs=0.08)
    Search(one, Settings(positive_weight=None, batch_size=2, restarts=1)).step()  # both may be inactive


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, T", [("channel", 1), ("channel", 2), ("direct", 1)])
def test_a_step_is_one_of_adam_on_the_objective(kind, T):
    one, lr = make(kind), 0.3
    lm, tokens = one.lm, one.tokens
    options = Settings(entropy_weight=0.5, kl_weight=0.1, positive_weight=0.4, label_tokens=T, steps=4, lr=lr,
                       temperature=(2.0, 0.5), batch_size=99)
    search = Search(one, options)
    v, train = search.v.detach().clone().requires_grad_(), ~tokens.heldout
    adam = torch.optim.Adam([v], lr=lr)
    on, off = class_weights(tokens.activation[train], 0.4, one.needs_scale)
    for step in range(4):
        tau, share = 2.0 * 0.25 ** (step / 3), step / 3
        log_p = log_softlabel(v, tau, lm.admissible)
        batch = one.batch(one.draws[train].unique())
        z, prior = one.read(embed_softlabel(log_p, lm), batch, step)
        losses = objective(z[:, train[batch.example]], on, off, log_p, prior,
                           search.weights._replace(entropy=0.5 * share), one.needs_scale)
        adam.zero_grad()
        losses.total.sum().backward()
        adam.step()
        for row, *numbers in zip(search.step(), *losses[:4]):
            assert [row[name] for name in NUMBERS[:4]] == pytest.approx([x.item() for x in numbers], abs=1e-4)
        assert torch.allclose(search.log_p(tau), log_softlabel(v, tau, lm.admissible), rtol=1e-3, atol=1e-2)


def test_without_calibration_the_loss_is_that_of_the_logits_themselves():
    one = make(heldout=0)
    search = Search(one, Settings(calibrated=False, batch_size=16, restarts=1))
    z = one.read(embed_softlabel(search.log_p(1.0), one.lm), one.batch(), 0)[0]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z[0], one.tokens.activation)  # as many of both classes
    [row] = search.step()
    assert row["accuracy_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert row["accuracy_active"] == ((z > 0)[0] & (one.tokens.activation == 1)).sum().item() / 8


@pytest.mark.parametrize("kind, T", [("channel", 1), ("channel", 2), ("direct", 1), ("direct", 2)])
def test_the_discrete_loss_is_that_of_the_most_probable_label(kind, T):
    one = make(kind)

    def first_step(peak):
        search = Search(one, Settings(label_tokens=T, steps=3))
        with torch.no_grad(): search.v[0, :, int(one.lm.admissible.nonzero()[40])] += peak
        return search.step()

    (sure, wide), (unsure, same) = first_step(300.0), first_step(2.0)
    assert sure["discrete_accuracy_loss"] == pytest.approx(sure["accuracy_loss"], abs=1e-5)
    assert wide == same and abs(wide["discrete_accuracy_loss"] - wide["accuracy_loss"]) > 1e-5
    assert unsure["accuracy_loss"] != pytest.approx(sure["accuracy_loss"], abs=1e-5)
    assert unsure["discrete_accuracy_loss"] == pytest.approx(sure["discrete_accuracy_loss"], abs=1e-5)


def test_the_discrete_loss_is_known_every_fifth_step_and_when_all_restarts_are_sure():
    search = Search(make(), Settings(steps=20, lr=2.0, entropy_weight=20.0))
    rows = [search.step() for _ in range(12)]
    sure = [all(row["probabilities"][0] > 0.9 for row in step) for step in rows]
    assert any(sure) and not all(sure)
    for number, (step, known) in enumerate(zip(rows, sure)):
        for row in step: assert math.isnan(row["discrete_accuracy_loss"]) != (number % 5 == 0 or known)


@pytest.mark.parametrize("kind, mode", [("channel", "words"), ("channel", "texts"), ("direct", "words")])
def test_a_trace_row_says_what_was_before_the_step(kind, mode):
    search = Search(make(kind, mode), Settings(steps=12, restarts=3))
    for number in range(4):
        temperature, share = schedule(number, search.settings)
        p, place = search.log_p(temperature).exp().detach()[:, 0].topk(10)
        for r, row in enumerate(search.step()):
            assert (row["step"], row["restart"], row["temperature"]) == (number, r, temperature)
            assert row["entropy_weight"] == pytest.approx(share * 0.2)
            weights = row["accuracy_loss"], row["entropy_weight"] * row["entropy"], search.discriminator.kl_weight * row["kl"]
            assert row["loss"] == pytest.approx(sum(weights), rel=1e-4)
            assert row["tokens"] == [search.discriminator.lm.show(id) for id in place[r].tolist()]
            assert row["probabilities"] == pytest.approx(p[r].tolist(), abs=1e-5)
            assert 0 <= row["entropy"] <= math.log(300)
            assert 0 <= row["accuracy_active"] <= 1 and 0 <= row["accuracy_inactive"] <= 1


def test_the_objective_falls():
    search = Search(make(), Settings(restarts=3, steps=1000, temperature=(1.0, 1.0), entropy_weight=0.0))
    losses = torch.tensor([[row["loss"] for row in search.step()] for _ in range(15)])
    assert (losses[-1] < losses[0] - 0.05).all()


def test_weight_decay_shrinks_v_where_the_gradient_is_zero():
    search = Search(make(), Settings(lr=0.5, weight_decay=0.1, restarts=1))
    outside = (~search.discriminator.lm.admissible).nonzero()[0]
    before = search.v[0, 0, outside].item()
    search.step()
    assert search.v[0, 0, outside].item() == pytest.approx(before * (1 - 0.5 * 0.1), rel=1e-5)


def test_settings_of_a_search_under_way_can_change():
    one, other = (Search(make(), Settings(steps=10)) for _ in range(2))
    for search in (one, other): search.step()
    new = Settings(steps=10, lr=0.1, entropy_weight=2.0, kl_weight=0.5, temperature=(3.0, 3.0))
    one.configure(new)
    row, same = one.step()[0], other.step()[0]
    assert row["temperature"] == 3 and row["entropy_weight"] == pytest.approx(2 / 9) and row["entropy"] > same["entropy"]
    assert row["loss"] == pytest.approx(row["accuracy_loss"] + row["entropy_weight"] * row["entropy"] + 0.5 * row["kl"], rel=1e-4)
    assert one.optimizer.param_groups[0]["lr"] == 0.1


# --- many rows, many searches -----------------------------------------------------------------------------------------


def test_a_restart_does_not_depend_on_the_others():
    one = make()
    many, alone = Search(one, Settings(restarts=3, steps=8)), Search(one, Settings(restarts=1, steps=8))
    with torch.no_grad(): alone.v.copy_(many.v[[1]])
    for _ in range(8):
        rows, [row] = many.step(), alone.step()
        for name in ("loss", "accuracy_loss", "entropy", "kl"): assert rows[1][name] == pytest.approx(row[name], rel=1e-3)
        assert rows[1]["tokens"][0] == row["tokens"][0] and rows[0]["loss"] != rows[1]["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_weights_of_their_own_are_searches_with_these_weights(kind):
    one, pairs = make(kind), [(0.2, 0.02, 1.0), (0.0, 0.1, 2.0), (0.05, 0.0, 0.5)]
    options = Settings(restarts=3, steps=5)
    together = Search(one, options)
    entropy, kl, accuracy = torch.tensor(pairs).T
    together.weights = together.weights._replace(accuracy=accuracy, entropy=entropy, kl=kl)
    alone = [Search(one, replace(options, restarts=1, entropy_weight=h, kl_weight=kl, accuracy_weight=a)) for h, kl, a in pairs]
    for r, search in enumerate(alone):
        with torch.no_grad(): search.v.copy_(together.v[[r]])
        search.generator.set_state(together.generator.get_state())
    for _ in range(5):
        rows = together.step()
        for r, search in enumerate(alone):
            [row] = search.step()
            for name in LOSSES[:4]: assert rows[r][name] == pytest.approx(row[name], abs=1e-3)
            assert rows[r]["entropy_weight"] == pytest.approx(row["entropy_weight"])
    for r, search in enumerate(alone):
        assert torch.allclose(together.log_p(0.1)[r].exp(), search.log_p(0.1)[0].exp(), atol=1e-3)
        assert {label for label, (_, row) in together.candidates.items() if row == r} <= set(search.candidates)


CASES = [  # kind, mode, steps done before, settings; all in one call of `step`
    ("channel", "words", 0, dict(restarts=2)), ("channel", "texts", 1, dict(restarts=1, seed=3)),
    ("channel", "words", 2, dict(restarts=3, positive_weight=None, batch_size=5, entropy_weight=0.5, temperature=(2.0, 1.0))),
    ("channel", "words", 0, dict(restarts=2, label_tokens=2)), ("channel", "words", 2, dict(label_tokens=2, lr=0.2)),
    ("channel", "words", 1, dict(calibrated=False)), ("direct", "texts", 1, dict(batch_size=6)), ("direct", "words", 0, dict())]


@pytest.mark.parametrize("family, most", [("llama", 1), ("gemma3", 200), ("llama", 10**6)])
def test_a_step_of_several_searches_is_a_step_of_each_alone(family, most):
    ones = {case[:2]: make(*case[:2], family) for case in CASES}

    def begin():
        found = []
        for kind, mode, done, options in CASES:
            search = Search(ones[kind, mode], Settings(discriminator=kind, **dict(steps=9, seed=1) | options))
            for _ in range(done): search.step()
            found.append(search)
        return found

    together, alone = begin(), begin()
    for _ in range(2):
        for rows, search in zip(step(together, most), alone, strict=True): same_rows(rows, search.step())
    for pair in zip(together, alone): same_search(*pair)


def test_searches_with_equal_prompts_share_a_pass(monkeypatch):
    passes = []
    real = channel.__globals__["forward_rows"]
    monkeypatch.setitem(channel.__globals__, "forward_rows", lambda *rest: passes.append(1) or real(*rest))
    searches = [Search(make(), Settings(seed=seed)) for seed in range(4)]
    searches += [Search(make(mode="texts"))]  # the prompts for texts are others
    passes.clear()
    step(searches, most=10**6)
    assert len(passes) == 2 * 2  # with the most probable labels alone
    searches = searches[:4]
    passes.clear()
    step(searches, most=10**6)
    assert len(passes) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_search_and_the_global_generators_are_not_used(kind):
    torch.manual_seed(1)
    before, found = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        search = Search(make(kind), Settings(seed=seed))
        found.append([search.step() for _ in range(3)])
        found.append(search.candidates)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
    repr_of = lambda rows: repr([[{**row} for row in step] for step in rows])
    assert repr_of(found[0]) == repr_of(found[2]) != repr_of(found[4]) and found[1] == found[3] != found[5]


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma"])  # gemma scales its embeddings
def test_the_best_tokens_to_first_order_have_the_lowest_losses_of_a_linear_objective(family):
    lm = make_tiny_lm(family)
    gradient = torch.randn(2, 2, lm.embedding.shape[1], generator=random())
    prior = torch.randn(2, 2, len(lm.embedding), generator=random(1)).log_softmax(-1)
    kl, ids = torch.tensor([0.0, 0.3]), lm.admissible.nonzero()[:, 0]
    loss = (gradient[:, :, None] * lm.embed(ids)).sum(-1) - kl[:, None, None] * prior[..., ids]
    expected = ids[loss.topk(8, largest=False).indices]
    assert torch.equal(top_first_order(gradient, prior, lm, kl[:, None, None]), expected)
    assert torch.equal(top_first_order(gradient, prior, lm, 0.0, k=3)[0], expected[0, :, :3])


@torch.no_grad()
def test_top_labels_are_the_most_probable_pairs():
    log_p = torch.randn(2, 50, generator=random()).mul(3).log_softmax(-1)
    best = (log_p[0][:, None] + log_p[1]).flatten().topk(10)
    p, ids = log_p.exp().topk(10)
    found = top_labels(p.tolist(), ids.tolist())
    assert [a * 50 + b for (a, b), _ in found] == best.indices.tolist()
    assert [q for _, q in found] == pytest.approx(best.values.exp().tolist(), rel=1e-4)


def test_replaced_slots_differ_in_one_token():
    assert replace_slots((1, 2), [[5, 6], [7]]) == [(5, 2), (6, 2), (1, 7)]


def test_a_label_round_trips_if_the_tokenizer_reads_its_text_as_the_same_tokens():
    lm = make_tiny_lm("llama")
    for text in (" the cat", " animals and dog"): assert round_trips(tuple(lm.encode(text)), lm)
    parts = (*lm.encode(" the c"), *lm.encode("at"))
    assert "".join(map(lm.token, parts)) == " the cat" and parts != tuple(lm.encode(" the cat")) and not round_trips(parts, lm)
    assert round_trips((5,), lm)  # half a character, as a label of one token


def test_candidates_keep_the_step_and_restart_that_added_them_first():
    search = Search(make(), Settings(restarts=2))
    search.add([(70,), (80,)], restart=1)
    search.done = 3
    search.add([(80,), (90,)], restart=0)
    search.add([(90,), (99,)])
    assert search.candidates == {(70,): (0, 1), (80,): (0, 1), (90,): (3, 0), (99,): (-1, -1)}
    assert search.counts == {(70,): 1, (80,): 2, (90,): 2, (99,): 1}


@pytest.mark.parametrize("kind, T", [("channel", 1), ("channel", 2), ("direct", 2)])
def test_a_step_adds_its_most_probable_labels_and_those_near_the_first(kind, T):
    search = Search(make(kind), Settings(restarts=2, label_tokens=T))
    p, ids = search.log_p(1.0).exp().detach().topk(10)
    tops = [[label for label, _ in top_labels(*one)] for one in zip(p.tolist(), ids.tolist())]
    search.step()
    for label, (step, restart) in search.candidates.items():
        near = any(sum(a != b for a, b in zip(label, top[0])) <= 1 for top in tops)
        assert step == 0 and restart in (0, 1) and len(label) == T and (near or label in sum(tops, []))
        assert search.discriminator.lm.admissible[list(label)].all()
    assert {label for top in tops for label in top} <= set(search.candidates)
    assert sum(search.counts.values()) == 2 * (10 + 8 * T)


# --- when to stop -----------------------------------------------------------------------------------------------------


def trace_of(*tops: list[tuple[str, float]]) -> list[dict]:
    "A trace from the top token of each restart, step by step."
    return [dict(step=step, restart=r, tokens=[token, "x"], probabilities=[p, 1 - p], accuracy_loss=0.3,
                 discrete_accuracy_loss=0.3 if p > 0.99 else 0.4, accuracy_active=1.0, accuracy_inactive=1.0)
            for step, restarts in enumerate(tops) for r, (token, p) in enumerate(restarts)]


SURE = [("a", 0.995), ("b", 0.999)]


@pytest.mark.parametrize("tops, expected", [
    (5 * [SURE], True),
    (4 * [SURE], False),  # too few steps
    ([], False),
    ([[("c", 0.2), ("c", 0.2)]] + 5 * [SURE], True),
    (5 * [SURE] + [[("a", 0.98), ("b", 0.999)]], False),  # the gap of one restart is too large
    (5 * [SURE] + [[("a", 0.85), ("b", 0.999)]], False),
    (2 * [SURE] + [[("c", 0.999), ("b", 0.999)]] + 2 * [SURE], False),  # one label changed
    (2 * [SURE] + 3 * [SURE[::-1]], False),  # both changed
    (5 * [[("a", 0.999), ("a", 0.999)]], True),  # two restarts may agree
])
def test_restarts_have_collapsed_if_all_are_sure_of_one_label_for_some_steps(tops, expected):
    assert has_collapsed(trace_of(*tops), 2, patience=5) is expected


def test_steps_without_one_of_the_classes_do_not_count():
    rows = trace_of(*5 * [SURE])
    assert has_collapsed(rows, 2) and not has_collapsed([*rows[:-1], rows[-1] | {"accuracy_active": math.nan}], 2)


# --- discriminators ---------------------------------------------------------------------------------------------------


def test_the_settings_name_the_discriminator():
    lm = make_tiny_lm("llama")
    tokens, question = tokenize(FEATURES["words"], lm), Question("Is {word} {label}?", yes="1", no="0")
    assert make_discriminator(lm, tokens).prompts == channel(lm, tokens).prompts
    assert make_discriminator(lm, tokens, Settings(prompts=["A {label}:"])).prompts == ("A {label}:",)
    asked = make_discriminator(lm, tokens, Settings(discriminator="direct", prompts=question))
    assert asked.prompts == question and asked.needs_scale and asked.kl_weight == 0.02
    with pytest.raises(ValueError, match="0 label slots"): make_discriminator(lm, tokens, Settings(prompts=["Examples:"]))
    long = tokenize(Feature.from_texts("long", ["the cat " + "z" * 240, "a house"], [[(4, 7, 1.0)], []]), lm)
    with pytest.raises(ValueError, match="split it"): make_discriminator(lm, long)
