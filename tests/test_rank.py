"""Losses of discrete labels, and the ranking."""
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_tiny_lm
from pandas.testing import assert_frame_equal
from scipy.optimize import minimize_scalar

from tokenlabel.channel import channel
from tokenlabel.direct import direct
from tokenlabel.feature import Feature
from tokenlabel.rank import discrete_loss, label_nll, rank_labels, score_labels, stop_penalty, train_logits
from tokenlabel.settings import Settings
from tokenlabel.tokenize import tokenize

ACTIVE = "cat dog horse cow sheep goat mouse bird".split()
INACTIVE = "car house book red lamp tree stone river".split()
WORDS = Feature.from_words("animals", ACTIVE, INACTIVE)
SENTENCES = ["the cat sat on the mat.", "a dog and a horse ran.", "the house is red.", "no book is here.",
             "one cow, one goat.", "the mouse saw a bird.", "a lamp and a stone."]
TEXTS = Feature.from_texts("animals", SENTENCES, [[(text.index(word), text.index(word) + len(word), 1.0)
                                                   for word in ACTIVE if word in text] for text in SENTENCES])
FEATURES = {"words": WORDS, "texts": TEXTS}
KINDS = {"channel": channel, "direct": direct}


def make(kind="channel", mode="words", family="llama", heldout=0.3):
    "A discriminator of a tiny model."
    lm, feature = make_tiny_lm(family), FEATURES[mode]
    return KINDS[kind](lm, tokenize(feature, lm, feature.heldout_types(heldout, 0) if heldout else frozenset()))


def some_labels(lm, count: int, length: int = 1) -> torch.Tensor:
    "Random labels, long [count, length]."
    ids = lm.admissible.nonzero()[:, 0]
    return ids[torch.randint(len(ids), (count, length), generator=torch.Generator().manual_seed(0))]


def whole_log_prob(lm, prompt, label) -> torch.Tensor:
    "Log-probability of a label's tokens after the start of a prompt, from one full forward pass."
    logits = lm.model(torch.tensor([[*prompt.before, *label]])).logits[0].float().masked_fill(~lm.admissible, -1e9).log_softmax(-1)
    return sum(logits[len(prompt.before) - 1 + t, id] for t, id in enumerate(label))


def whole_log_stop(lm, prompt, label) -> torch.Tensor:
    "Log-probability that the prompt continues after a label, from one full forward pass."
    logits = lm.model(torch.tensor([[*prompt.before, *label, *prompt.after]])).logits[0].float()
    return logits[len(prompt.before) + len(label) - 1].log_softmax(-1)[prompt.after[0]]


# --- KL and stop penalty ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_nll_and_stop_penalty_equal_those_of_full_forward_passes(family):
    one = make(family=family, heldout=0)
    lm, prompts, labels = one.lm, one.read_prompts, some_labels(one.lm, 7, 3)
    mean = lambda log_p: torch.stack([torch.stack([-log_p(p, label) for p in prompts]).mean() for label in labels.tolist()])
    expected, stop = mean(partial(whole_log_prob, lm)), mean(partial(whole_log_stop, lm))
    assert label_nll(one, labels).tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert torch.allclose(label_nll(one, labels, size=2), label_nll(one, labels), atol=1e-4)
    assert stop_penalty(one, labels).tolist() == pytest.approx(stop.tolist(), abs=1e-3)
    alone = torch.stack([-whole_log_stop(lm, prompts[1], label) for label in labels.tolist()])
    assert stop_penalty(one, labels, prompt_index=1).tolist() == pytest.approx(alone.tolist(), abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_label_of_one_token_each_has_the_same_logits_and_prior(kind):
    one = make(kind, heldout=0)
    labels, batch = some_labels(one.lm, 4, 3), one.batch()
    z, prior = one.read(one.lm.embed(labels), batch)
    assert torch.allclose(z, one.token_logits(labels, batch), atol=1e-3)
    assert torch.allclose(-prior.gather(2, labels[:, :, None]).sum((1, 2)), label_nll(one, labels), atol=1e-3)


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_examples_have_no_part_in_the_fit(kind):
    one = make(kind)
    example, out = torch.arange(len(one.tokens.activation)), one.tokens.heldout
    z = torch.randn(3, len(example), generator=torch.Generator().manual_seed(0))
    accuracy, fitted = train_logits(z, one, Settings(), example)
    other, refitted = train_logits(torch.where(out, 50.0, z), one, Settings(), example)
    assert torch.allclose(accuracy, other) and torch.allclose(fitted[:, ~out], refitted[:, ~out])
    chosen = example.flip(0)[2:]  # any examples in any order
    a, b = train_logits(z[:, chosen], one, Settings(), chosen)
    assert b.shape == (3, len(chosen)) and torch.isfinite(a).all()


# --- the ranking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [Settings(), Settings(entropy_weight=0.0, kl_weight=0.0, stop_weight=0.0),
                                      Settings(kl_weight=1.0, positive_weight=0.2, stop_weight=0.5)])
def test_the_ranking_is_the_objective_in_order(kind, mode, settings):
    one = make(kind, mode)
    labels = some_labels(one.lm, 9)[:, 0].unique().tolist()
    table, z = rank_labels(one, labels, settings)
    kl = one.kl_weight if settings.kl_weight is None else settings.kl_weight
    expected = table.accuracy_loss + kl * table.kl + settings.stop_weight * table.stop
    assert np.allclose(table.loss, expected, atol=1e-5) and table.loss.is_monotonic_increasing
    assert list(table.index) == list(range(len(labels))) and sorted(table.token_id) == labels
    for row in table.itertuples(): assert (row.label, row.token) == (one.lm.token(row.token_id), one.lm.show(row.token_id))
    assert np.allclose(table.kl, -one.label_prior[table.token_id.tolist()], atol=1e-5)
    assert z.shape == (len(labels), len(one.tokens.activation))
    for row in (0, -1):  # the logits are in the order of the table
        alone, z_alone = rank_labels(one, [table.token_id.iloc[row]], settings)
        assert torch.allclose(z_alone[0], z[row], atol=1e-3) and alone.loss[0] == pytest.approx(table.loss.iloc[row], abs=1e-3)


@pytest.mark.parametrize("mode", FEATURES)
def test_the_ranking_equals_a_slow_score_of_each_label_alone(mode):
    one = make(mode=mode)
    a, train = one.tokens.activation.double(), ~one.tokens.heldout
    on, off = a / a[train].sum(), (1 - a) / (1 - a[train]).sum()
    table, _ = rank_labels(one, some_labels(one.lm, 5).unique().tolist())
    for row in table.itertuples():
        with torch.no_grad(): z = one.read(one.lm.embed(torch.tensor([[row.token_id]])), one.batch())[0][0].double()

        def loss(bias): return float(((on * (-z - bias).exp().log1p() + off * (z + bias).exp().log1p()) / 2)[train].sum())

        found = minimize_scalar(loss)
        assert row.accuracy_loss == pytest.approx(found.fun, abs=1e-4)
        out = (on * (-z - found.x).exp().log1p())[~train].sum() / on[~train].sum()
        out = (out + (off * (z + found.x).exp().log1p())[~train].sum() / off[~train].sum()) / 2
        assert row.accuracy_loss_heldout == pytest.approx(out.item(), abs=1e-3)
        for name, chosen in (("auroc_train", train), ("auroc_heldout", ~train)):
            ordered = (z[chosen & (a == 1)][:, None] > z[chosen & (a == 0)]).double().mean()
            assert getattr(row, name) == pytest.approx(ordered.item(), abs=0.02)


def test_labels_of_two_tokens_are_ranked_by_pairs():
    one = make()
    pairs = some_labels(one.lm, 5, 2).tolist()
    table, _ = rank_labels(one, pairs)
    assert sorted(table.token_id) == sorted(map(tuple, pairs))
    assert table.label[0] == "".join(map(one.lm.token, table.token_id[0]))
    assert np.allclose(table.kl, label_nll(one, torch.tensor(table.token_id.tolist())), atol=1e-4)


def test_without_held_out_words_there_are_no_held_out_scores():
    table, _ = rank_labels(make(heldout=0), [70, 80])
    assert table[["accuracy_loss_heldout", "auroc_heldout"]].isna().all(axis=None) and table.auroc_train.notna().all()


def test_the_activation_of_held_out_words_changes_only_the_held_out_scores():
    lm, out = make_tiny_lm("llama"), WORDS.heldout_types(0.3, 0)
    assert {word in ACTIVE for word in out} == {True, False}
    swapped = Feature.from_words("animals", [w for w in ACTIVE if w not in out] + [w for w in INACTIVE if w in out],
                                 [w for w in INACTIVE if w not in out] + [w for w in ACTIVE if w in out])
    order = [swapped.texts.index(word) for word in WORDS.texts]  # the same words in the same order
    swapped = Feature("animals", "words", WORDS.texts, tuple(swapped.spans[i] for i in order))
    labels = some_labels(lm, 6).unique().tolist()
    one, other = (rank_labels(channel(lm, tokenize(feature, lm, out)), labels)[0] for feature in (WORDS, swapped))
    train = ["token_id", "loss", "accuracy_loss", "kl", "stop", "auroc_train"]
    assert_frame_equal(one[train], other[train], check_exact=True)
    assert other.auroc_heldout.tolist() == pytest.approx((1 - one.auroc_heldout).tolist())


def test_a_part_of_the_data_and_one_prompt_are_scored_alone():
    one, settings = make(heldout=0), Settings(kl_weight=0.1)
    labels, part = some_labels(one.lm, 3), one.batch([0, 3, 9, 12])
    scores = score_labels(one, labels, settings, [part], prompt_index=1)
    z = one.token_logits(labels, part, 1)
    accuracy, fitted = train_logits(z, one, settings, part.example)
    assert torch.equal(scores.accuracy, accuracy) and torch.equal(scores.z, fitted) and scores.z.shape == (3, 4)
    assert torch.allclose(scores.stop, stop_penalty(one, labels, 1))
    loss = discrete_loss(*scores[:3], settings)
    assert torch.allclose(loss, scores.accuracy + 0.1 * scores.kl + 0.01 * scores.stop)
