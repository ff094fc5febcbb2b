"""The soft label: a distribution over admissible tokens, and its embedding."""
import math

import pytest
import torch
from conftest import FAMILIES, MODEL_SIZE, make_tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel.softlabel import embed_softlabel, entropy, log_softlabel, top_tokens

V = 40
ADMISSIBLE = torch.arange(V) % 5 != 0  # 32 of 40
few = settings(max_examples=40, deadline=None)


def random_v(seed: int, *shape: int, spread: float = 3.0, dtype=torch.float32) -> torch.Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_hot(lm, *ids: int, weights=None) -> torch.Tensor:
    "Log-probabilities of a uniform mixture of `ids`, or of one with these weights."
    v = torch.full((len(lm.embedding),), -1e4)
    v[list(ids)] = 0.0 if weights is None else torch.tensor(weights).log()
    return log_softlabel(v, 1.0, lm.admissible)


# --- the distribution -------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), temperature=st.floats(0.05, 20), spread=st.floats(0, 10), restarts=st.integers(1, 4))
@few
def test_p_is_a_distribution_over_the_admissible_tokens(seed, temperature, spread, restarts):
    v = random_v(seed, restarts, V, spread=spread)
    p = log_softlabel(v, temperature, ADMISSIBLE).exp()
    assert p.shape == (restarts, V)
    assert torch.allclose(p.sum(-1), torch.ones(restarts), atol=1e-5)
    assert (p[:, ~ADMISSIBLE] == 0).all()
    slow = (v[:, ADMISSIBLE].double() / temperature).softmax(-1)
    assert torch.allclose(p[:, ADMISSIBLE].double(), slow, atol=1e-5)


def test_the_restarts_are_independent():
    v = random_v(0, 3, 2, V)
    stacked = log_softlabel(v, 0.7, ADMISSIBLE)
    for r in range(3):
        for t in range(2): assert torch.equal(stacked[r, t], log_softlabel(v[r, t], 0.7, ADMISSIBLE))


@given(seed=st.integers(0, 999), shift=st.floats(-1000, 1000), temperature=st.floats(0.1, 10))
@few
def test_a_constant_added_to_v_changes_nothing(seed, shift, temperature):
    v = random_v(seed, V, dtype=torch.float64)
    a, b = (log_softlabel(x, temperature, ADMISSIBLE)[ADMISSIBLE] for x in (v, v + shift))
    assert torch.allclose(a, b, atol=1e-8)


def test_inadmissible_entries_of_v_change_nothing_and_get_no_gradient():
    v, other = random_v(1, V), random_v(1, V)
    other[~ADMISSIBLE] = 1e6
    assert torch.equal(log_softlabel(v, 0.5, ADMISSIBLE), log_softlabel(other, 0.5, ADMISSIBLE))
    v = v.requires_grad_()
    log_p = log_softlabel(v, 0.5, ADMISSIBLE)
    (entropy(log_p) + (log_p.exp() * random_v(2, V)).sum()).backward()
    assert (v.grad[~ADMISSIBLE] == 0).all() and (v.grad[ADMISSIBLE] != 0).all()


def test_gradients_equal_finite_differences():
    v, direction = random_v(3, 2, V, dtype=torch.float64).requires_grad_(), random_v(4, V, dtype=torch.float64)

    def value(v):
        log_p = log_softlabel(v, 0.8, ADMISSIBLE)
        return entropy(log_p) + log_p.exp() @ direction

    assert torch.autograd.gradcheck(value, (v,), eps=1e-6, atol=1e-6)


@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=V, max_size=V), st.floats(1e-3, 1e4))
@few
def test_extreme_values_and_temperatures_stay_finite(values, temperature):
    v = torch.tensor(values, requires_grad=True)
    log_p = log_softlabel(v, temperature, ADMISSIBLE)
    h = entropy(log_p)
    assert torch.isfinite(log_p).all() and torch.isfinite(h)
    (h + (log_p.exp() * torch.arange(V)).sum()).backward()
    assert torch.isfinite(v.grad).all()


@pytest.mark.parametrize("shift", [-1e8, -1e4, 1e4, 1e8])
def test_excluded_tokens_stay_excluded_wherever_v_has_drifted_to(shift):
    # only differences between entries of v mean anything, so a common offset must not bring excluded tokens back
    p = log_softlabel(torch.full((V,), shift), 0.01, ADMISSIBLE).exp()
    assert (p[~ADMISSIBLE] == 0).all()
    assert torch.allclose(p[ADMISSIBLE], torch.tensor(1 / 32))


def test_a_low_temperature_takes_the_largest_entry_and_a_high_one_takes_all():
    v = random_v(5, V)
    best = int(v.masked_fill(~ADMISSIBLE, -math.inf).argmax())
    assert log_softlabel(v, 1e-3, ADMISSIBLE).exp()[best] > 0.999
    flat = log_softlabel(v, 1e5, ADMISSIBLE).exp()[ADMISSIBLE]
    assert torch.allclose(flat, torch.full((32,), 1 / 32), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature .* is not positive"):
        log_softlabel(torch.zeros(V), temperature, ADMISSIBLE)


def test_a_tensor_of_temperatures_gives_each_row_its_own():
    v, temperature = random_v(7, 3, V), torch.tensor([[1.0], [0.3], [0.1]])
    rows = log_softlabel(v, temperature, ADMISSIBLE)
    for r in range(3): assert torch.equal(rows[r], log_softlabel(v[r], temperature[r], ADMISSIBLE))


# --- entropy ----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), temperature=st.floats(0.01, 100), count=st.integers(1, V))
@few
def test_entropy_lies_between_zero_and_the_log_of_the_number_of_admissible_tokens(seed, temperature, count):
    admissible = torch.zeros(V, dtype=torch.bool)
    admissible[torch.randperm(V, generator=torch.Generator().manual_seed(seed))[:count]] = True
    h = entropy(log_softlabel(random_v(seed, 3, V), temperature, admissible))
    assert h.shape == (3,)
    assert (h >= -1e-6).all() and (h <= math.log(count) + 1e-5).all()
    even = entropy(log_softlabel(torch.zeros(V), temperature, admissible))
    assert math.isclose(even, math.log(count), abs_tol=1e-5)


def test_entropy_equals_that_of_torch_and_of_a_loop():
    log_p = log_softlabel(random_v(6, V), 1.3, ADMISSIBLE)
    loop = -sum(p * math.log(p) for p in log_p.double().exp().tolist() if p > 0)
    assert math.isclose(entropy(log_p), loop, rel_tol=1e-5)
    assert math.isclose(entropy(log_p), torch.distributions.Categorical(log_p[ADMISSIBLE].exp()).entropy(),
                        rel_tol=1e-5)


# --- the embedding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_one_hot_label_embeds_as_its_token(family):
    lm = make_tiny_lm(family)
    for id in lm.admissible.nonzero()[::60, 0].tolist():
        e = embed_softlabel(one_hot(lm, id), lm)
        assert torch.equal(e, lm.embed(id))
        assert torch.equal(e, lm.model.get_input_embeddings()(torch.tensor(id)))  # as the model itself embeds it
    assert lm.embed_scale == pytest.approx(math.sqrt(32) if family.startswith("gemma") else 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_embeds_as_the_mean_of_its_tokens(family):
    lm = make_tiny_lm(family)
    a, b, c = lm.admissible.nonzero()[[10, 100, 160], 0].tolist()
    assert torch.allclose(embed_softlabel(one_hot(lm, a, b), lm), (lm.embed(a) + lm.embed(b)) / 2, atol=1e-6)
    weighted = embed_softlabel(one_hot(lm, a, b, c, weights=[0.2, 0.5, 0.3]), lm)
    assert torch.allclose(weighted, 0.2 * lm.embed(a) + 0.5 * lm.embed(b) + 0.3 * lm.embed(c), atol=1e-5)
    # and the mixture over everything, with restarts and label tokens in front
    log_p = log_softlabel(random_v(0, 2, 3, MODEL_SIZE), 1.0, lm.admissible)
    e = embed_softlabel(log_p, lm)
    loop = sum(p * lm.embed(id).double() for id, p in enumerate(log_p[1, 2].double().exp().tolist()))
    assert e.shape == (2, 3, loop.shape[-1]) and e.dtype == lm.dtype
    assert torch.allclose(e[1, 2].double(), loop, atol=1e-5)


def test_top_tokens_are_the_most_probable_ones_in_order():
    lm = make_tiny_lm("llama")
    a, b, c = lm.admissible.nonzero()[[160, 20, 100], 0].tolist()
    top = top_tokens(one_hot(lm, a, b, c, weights=[0.5, 0.3, 0.2]), lm, 2)
    assert [token for token, _ in top] == [lm.show(a), lm.show(b)]
    assert [p for _, p in top] == pytest.approx([0.5, 0.3])
    assert len(top_tokens(one_hot(lm, a), lm, 10**6)) <= MODEL_SIZE
