"""The objective: accuracy with a fitted bias and scale, entropy, KL, and their sum."""
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from torch.nn.functional import binary_cross_entropy_with_logits

from tokenlabel.objective import (RowWeights, balanced_bce, calibrate, class_accuracy, class_weights, fit_bias,
                                  kl_divergence, objective)
from tokenlabel.softlabel import entropy, log_softlabel

few = settings(max_examples=40, deadline=None)
LEAST = 0.25  # lower bound of scale * spread
WEIGHTS = RowWeights(1.0, 0.2, 0.03)
V = 24
ADMISSIBLE = torch.arange(V) % 6 != 0
numbers = st.floats(-30, 30, width=32)
examples = st.lists(st.tuples(numbers, st.floats(0, 1, width=32)), min_size=2, max_size=30)


def generator(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def prior(seed: int) -> torch.Tensor:
    "A prior over the admissible tokens, as a prompt has it."
    return log_softlabel(normal(seed, V), 1.0, ADMISSIBLE)


def problem(rows) -> tuple[torch.Tensor, torch.Tensor]:
    "z and activation in double precision, of both classes."
    z, a = torch.tensor(rows, dtype=torch.float64).T
    assume(a.sum() > 0.01 and (1 - a).sum() > 0.01)
    return z, a


def slow_bce(z, a, active: float) -> float:
    "Balanced cross-entropy, one example after the other."
    total_on, total_off, loss = sum(a), sum(1 - x for x in a), 0.0
    for zi, ai in zip(z, a):
        loss += active * ai / total_on * np.logaddexp(0, -zi)
        loss += (1 - active) * (1 - ai) / total_off * np.logaddexp(0, zi)
    return loss


def fit(z, a, positive_weight: float = 0.5, scale: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    "Scale and bias for the weights of these activations."
    return calibrate(z, *class_weights(a, positive_weight, smooth=scale), scale)


def losses_of(z, a, log_p, label_prior, weights=WEIGHTS, positive_weight=0.5, scale=False, calibrated=True):
    "The objective for the weights of these activations."
    on_off = class_weights(a, positive_weight, smooth=scale and calibrated)
    return objective(z, *on_off, log_p, label_prior, weights, scale, calibrated)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@given(examples, st.floats(0.01, 0.99))
@few
def test_bce_equals_a_loop(rows, active):
    z, a = problem(rows)
    assert balanced_bce(z, a, active).item() == pytest.approx(slow_bce(z.tolist(), a.tolist(), active), rel=1e-9)


@given(examples)
@few
def test_with_the_natural_share_it_is_the_cross_entropy_of_textbooks(rows):
    z, a = problem(rows)
    textbook = binary_cross_entropy_with_logits(z, a)
    assert balanced_bce(z, a, a.mean().item()).item() == pytest.approx(textbook.item(), rel=1e-9)


def test_balanced_is_the_mean_of_the_two_classes_means():
    z, a = normal(0, 50), (torch.arange(50) < 7).double()
    on, off = (binary_cross_entropy_with_logits(z[a == x], a[a == x]) for x in (1, 0))
    assert torch.allclose(balanced_bce(z, a), (on + off) / 2)
    assert torch.allclose(balanced_bce(z, a, 0.9), 0.9 * on + 0.1 * off)


@given(examples, st.integers(2, 5), st.booleans())
@few
def test_copies_of_all_examples_of_one_class_change_nothing(rows, copies, which):
    z, a = torch.tensor(rows, dtype=torch.float64).T
    a = a.round()
    assume(0 < a.sum() < len(a))
    many_z = torch.cat([z] + (copies - 1) * [z[a == which]])
    many_a = torch.cat([a] + (copies - 1) * [a[a == which]])
    assert torch.allclose(balanced_bce(many_z, many_a, 0.3), balanced_bce(z, a, 0.3))
    assert torch.allclose(fit_bias(many_z, *class_weights(many_a, 0.3)), fit_bias(z, *class_weights(a, 0.3)), atol=1e-6)


def test_an_activation_between_0_and_1_is_a_unit_of_both_classes():
    # an example of activation .25 counts as 1/4 active and 3/4 inactive example
    z = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    a = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    split_z = torch.cat([z[[0]].repeat(4), z[[1]].repeat(4), z[[2]].repeat(4)])
    split_a = torch.tensor([1.0] * 4 + [0.0] * 4 + [1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(balanced_bce(z, a), balanced_bce(split_z, split_a))
    on, off = class_weights(a, 0.5)
    assert torch.allclose(on, 0.5 * a / 1.25) and torch.allclose(off, 0.5 * (1 - a) / 1.75)


def test_the_class_weights_sum_to_one():
    on, off = class_weights(torch.rand(30, generator=generator(0)), 0.2)
    assert on.sum().item() == pytest.approx(0.2) and off.sum().item() == pytest.approx(0.8)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_class_alone_is_refused(value):
    a = torch.full((5,), value)
    with pytest.raises(ValueError, match="both classes"): balanced_bce(torch.zeros(5), a)
    with pytest.raises(ValueError, match="both classes"): class_weights(a)
    with pytest.raises(ValueError, match="both classes"):
        class_weights(torch.tensor([value, value, 1 - value]), weight=torch.tensor([True, True, False]))


# --- the bias ---------------------------------------------------------------------------------------------------------


@given(examples, st.floats(0.05, 0.95))
@few
def test_no_other_bias_is_better(rows, active):
    z, a = problem(rows)
    bound = (-z.max().item() - 40, -z.min().item() + 40)
    slow = minimize_scalar(lambda b: slow_bce((z + b).tolist(), a.tolist(), active), bounds=bound, method="bounded",
                           options=dict(xatol=1e-9))
    loss = balanced_bce(z + fit_bias(z, *class_weights(a, active)), a, active)
    assert loss.item() <= slow.fun + 1e-7


def test_the_bias_is_where_a_general_optimizer_finds_it():
    for seed in range(5):  # the classes overlap, so the minimum is a sharp one
        z, a = 2 * normal(seed, 60), torch.rand(60, generator=generator(seed), dtype=torch.float64)
        slow = minimize_scalar(lambda b: slow_bce((z + b).tolist(), a.tolist(), 0.3), tol=1e-12)
        assert fit_bias(z, *class_weights(a, 0.3)).item() == pytest.approx(slow.x, abs=1e-5)


def test_the_bias_has_no_gradient():
    assert not fit_bias(normal(0, 2, 10).requires_grad_(), *class_weights((torch.arange(10) < 3).double())).requires_grad


@given(examples, st.floats(-50, 50))
@few
def test_a_constant_added_to_z_changes_no_loss(rows, shift):
    z, a = problem(rows)
    a_loss, b_loss = (balanced_bce(x + fit_bias(x, *class_weights(a)), a) for x in (z, z + shift))
    assert a_loss.item() == pytest.approx(b_loss.item(), abs=1e-8)


def test_the_loss_of_a_constant_z_is_log_2_however_rare_the_feature():
    a = (torch.arange(1000) < 3).float()
    for value in (-17.0, 0.0, 300.0):
        z = torch.full((1000,), value)
        assert balanced_bce(z + fit_bias(z, *class_weights(a)), a).item() == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_logits_stay_finite(dtype, scale):
    z = (scale * normal(1, 3, 40)).to(dtype).requires_grad_()
    a = (torch.arange(40) % 4 == 0).to(dtype)
    log_p = log_softlabel(normal(2, 3, V, dtype=dtype), 1.0, ADMISSIBLE)
    losses = losses_of(z, a, log_p, prior(0).to(dtype))
    losses.total.sum().backward()
    assert all(torch.isfinite(part).all() for part in losses) and torch.isfinite(z.grad).all()
    ideal = scale * (2 * a - 1)  # separates the classes
    assert balanced_bce(ideal + fit_bias(ideal, *class_weights(a)), a) < 1e-6
    assert balanced_bce(-ideal + fit_bias(-ideal, *class_weights(a)), a) == pytest.approx(scale, rel=0.01)  # inverts them


# --- the scale --------------------------------------------------------------------------------------------------------


def slow_smooth_bce(z, a, active: float) -> float:
    "Balanced cross-entropy with Platt's targets, one example after the other."
    n1, n0, loss = sum(a), sum(1 - x for x in a), 0.0
    for zi, ai in zip(z, a):
        for weight, target in ((active * ai / n1, (n1 + 1) / (n1 + 2)), ((1 - active) * (1 - ai) / n0, 1 / (n0 + 2))):
            loss += weight * (target * np.logaddexp(0, -zi) + (1 - target) * np.logaddexp(0, zi))
    return loss


def slow_calibrate(z, a, active: float = 0.5) -> float:
    "The least loss that a general optimizer finds for scale * z + bias, the scale being bounded as it has to be."
    z, middle = z.numpy(), float(z.median())
    found = []
    for size in (z.std(), np.abs(z - middle).mean()):
        function = lambda x: slow_smooth_bce(x[0] * (z - middle) / size + x[1], a.tolist(), active)
        for start in (LEAST * size / z.std(), 1.0, 5.0):
            found.append(minimize(function, [start, 0.0], method="L-BFGS-B", options=dict(ftol=1e-15, gtol=1e-11),
                                  bounds=[(LEAST * size / z.std(), None), (None, None)]).fun)
    return min(found)


def fitted_loss(z, a, active: float = 0.5) -> torch.Tensor:
    scale, bias = fit(z, a, active, scale=True)
    return balanced_bce(scale[..., None] * z + bias[..., None], a, active, smooth=True)


@given(examples, st.floats(0.05, 0.95))
@few
def test_the_smooth_loss_equals_a_loop(rows, active):
    z, a = problem(rows)
    slow = slow_smooth_bce(z.tolist(), a.tolist(), active)
    assert balanced_bce(z, a, active, smooth=True).item() == pytest.approx(slow, rel=1e-9)


@given(examples, st.floats(0.1, 0.9), st.sampled_from([1e-3, 1.0, 1e3]))
@few
def test_no_other_scale_and_bias_are_better(rows, active, size):
    z, a = problem(rows)
    z = size * z
    assume(z.std() > 1e-3 * size)
    assert fitted_loss(z, a, active).item() <= slow_calibrate(z, a, active) + 1e-7


@pytest.mark.parametrize("outlier", [-1e6, -1e3, 1e3, 1e6])
def test_one_outlier_is_no_obstacle(outlier):
    a = (torch.arange(24) < 10).double()
    for apart in (0, 2, 20):
        z = normal(0, 24) + apart * a
        z[3] = outlier
        assert fitted_loss(z, a).item() <= slow_calibrate(z, a) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_size_of_the_margins_does_not_matter(dtype):
    a = (torch.arange(30) < 12).to(dtype)
    z = normal(1, 30, dtype=dtype) + 2 * a
    losses = [fitted_loss(size * z + shift, a).item() for size in (1e-3, 1.0, 1e4) for shift in (0.0, -5 * size)]
    assert losses == pytest.approx(6 * losses[:1], rel=1e-4)
    assert losses[0] < 0.67


def test_classes_that_are_apart_keep_the_scale_finite():
    # two examples in a class: targets 3/4 and 1/4, met at the logits of -log 3 and log 3
    z, a = torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    scale, bias = fit(z, a, scale=True)
    assert (scale * z + bias).tolist() == pytest.approx([-math.log(3)] * 2 + [math.log(3)] * 2, abs=1e-4)


def test_a_constant_z_has_no_scale_and_its_loss_is_log_2():
    a = (torch.arange(20) < 10).float()
    for value in (0.0, 1e-3, -17.3, 1e4):
        z = torch.full((20,), value)
        scale, bias = fit(z, a, scale=True)
        assert scale == 0 and abs(bias) < 1e-6
        assert fitted_loss(z, a).item() == pytest.approx(math.log(2))


def test_a_label_that_ranks_the_wrong_way_has_a_gradient_towards_the_right_one():
    a = (torch.arange(20) < 10).double()
    z = (normal(2, 20) - 3 * a).requires_grad_()
    loss = fitted_loss(z, a)
    loss.backward()
    assert loss > math.log(2) and (z.grad[a == 1] < 0).all() and (z.grad[a == 0] > 0).all()
    assert fit(z, a, scale=True)[0].item() == pytest.approx(LEAST / z.std(correction=0).item())


def test_without_a_scale_it_is_the_bias_alone():
    z, a = 5 * normal(0, 3, 12), torch.rand(12, generator=generator(1)).double()
    scale, bias = fit(z.requires_grad_(), a, 0.3)
    assert (scale == 1).all() and torch.equal(bias, fit_bias(z, *class_weights(a, 0.3))) and not bias.requires_grad


def test_rows_are_calibrated_independently_and_without_gradient():
    a = (torch.arange(15) < 4).double()
    z = (normal(0, 2, 3, 15) * 10 ** normal(3, 2, 3, 1) + a).requires_grad_()
    scale, bias = fit(z, a, 0.4, scale=True)
    assert scale.shape == bias.shape == (2, 3) and not scale.requires_grad and not bias.requires_grad
    for i in range(2):
        for j in range(3):
            alone = fit(z[i, j], a, 0.4, scale=True)
            assert torch.allclose(torch.stack(alone), torch.stack([scale[i, j], bias[i, j]]), rtol=1e-9)


def test_the_gradient_equals_finite_differences_with_scale_and_bias_fitted_anew():
    # the envelope theorem, which holds as long as the loss is the one that was minimized
    to_logits, a = normal(6, V, 30), (torch.arange(30) < 12).double()
    v = normal(8, 2, V).requires_grad_()

    def total(v):
        log_p = log_softlabel(v, 0.7, ADMISSIBLE)
        z = 0.05 * (log_p.exp() @ to_logits + 2 * a)
        return losses_of(z, a, log_p, prior(5), RowWeights(1.0, 0.2, 0.1), 0.3, scale=True)

    assert (total(v).scale > 1).all()
    assert torch.autograd.gradcheck(lambda v: total(v).total, (v,), eps=1e-5, atol=1e-6)


# --- entropy and KL ---------------------------------------------------------------------------------------------------


def test_entropy_and_kl_equal_those_of_torch():
    log_p, log_q = prior(1), prior(2)
    p, q = (torch.distributions.Categorical(logits=x[ADMISSIBLE]) for x in (log_p, log_q))
    assert torch.allclose(kl_divergence(log_p, log_q), torch.distributions.kl_divergence(p, q))
    assert torch.allclose(entropy(log_p), p.entropy())
    assert kl_divergence(log_q, log_q).item() == pytest.approx(0, abs=1e-12)


def test_kl_from_the_mean_log_prior_is_the_mean_of_the_kls_of_the_prompts():
    log_p, priors = torch.stack([prior(9), prior(8)]), torch.stack([prior(s) for s in range(4)])
    slow = [sum(math.exp(p) * (p - q) for row in priors.tolist() for p, q in zip(one, row)) / 4
            for one in log_p.tolist()]
    assert kl_divergence(log_p, priors.mean(0)).tolist() == pytest.approx(slow)


def test_kl_of_one_token_is_its_surprise():
    hard = log_softlabel(torch.where(torch.arange(V) == 7, 0.0, -1e4), 1.0, ADMISSIBLE).double()
    assert kl_divergence(hard, prior(3)).item() == pytest.approx(-prior(3)[7].item())


def test_the_gradient_of_kl_for_v_equals_finite_differences():
    v = normal(5, 2, V).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: kl_divergence(log_softlabel(v, 0.6, ADMISSIBLE), prior(4)), (v,), eps=1e-6, atol=1e-7)
    kl_divergence(log_softlabel(v, 0.6, ADMISSIBLE), prior(4)).sum().backward()
    assert (v.grad[:, ~ADMISSIBLE] == 0).all() and (v.grad[:, ADMISSIBLE] != 0).all()


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0.01, 2))
@few
def test_with_equal_weights_of_entropy_and_kl_the_rest_is_linear_in_p(seed, share, weight):
    # so a mixture costs what its parts cost, and nothing asks for a single token
    equal = RowWeights(accuracy=0.0, entropy=weight, kl=weight)
    a, b = prior(seed), prior(seed + 100)
    mixture = (share * a.exp() + (1 - share) * b.exp()).log().clamp(min=-1e9)
    z, activation = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    of_a, of_b, of_mixture = (losses_of(z, activation, x[None], prior(1000), equal).total.item()
                              for x in (a, b, mixture))
    assert of_mixture == pytest.approx(share * of_a + (1 - share) * of_b, abs=1e-9)


# --- the sum ----------------------------------------------------------------------------------------------------------


def test_the_objective_is_the_weighted_sum_of_its_parts():
    z, a, weights = normal(0, 3, 12), torch.rand(12, generator=generator(1)).double(), RowWeights(2.0, 0.3, 0.07)
    log_p = log_softlabel(normal(1, 3, V), 1.0, ADMISSIBLE)
    losses = losses_of(z, a, log_p, prior(2), weights, 0.2)
    for r in range(3):
        bias = minimize_scalar(lambda b: slow_bce((z[r] + b).tolist(), a.tolist(), 0.2)).x
        accuracy = slow_bce((z[r] + bias).tolist(), a.tolist(), 0.2)
        p, q = log_p[r].exp().tolist(), prior(2).tolist()
        h = -sum(x * math.log(x) for x in p if x)
        kl = sum(x * (math.log(x) - y) for x, y in zip(p, q) if x)
        assert losses.bias[r].item() == pytest.approx(bias, abs=1e-5)
        assert [x[r].item() for x in losses[1:4]] == pytest.approx([accuracy, h, kl])
        assert losses.total[r].item() == pytest.approx(2.0 * accuracy + 0.3 * h + 0.07 * kl)


def test_the_gradient_equals_finite_differences_with_the_bias_fitted_anew():
    to_logits, a = 3 * normal(6, V, 30), torch.rand(30, generator=generator(7), dtype=torch.float64)
    v = normal(8, 2, V).requires_grad_()

    def total(v):
        log_p = log_softlabel(v, 0.7, ADMISSIBLE)
        return losses_of(log_p.exp() @ to_logits, a, log_p, prior(5), RowWeights(1.0, 0.2, 0.1), 0.3).total

    assert torch.autograd.gradcheck(total, (v,), eps=1e-5, atol=1e-6)
    total(v).sum().backward()
    assert (v.grad[:, ADMISSIBLE] != 0).all()


def test_restarts_are_independent():
    z, a = 5 * normal(0, 4, 15), (torch.arange(15) < 4).double()
    log_p = log_softlabel(normal(1, 4, V), 0.5, ADMISSIBLE)
    stacked = losses_of(z, a, log_p, prior(2))
    for r in range(4):
        alone = losses_of(z[[r]], a, log_p[[r]], prior(2))
        for one, many in zip(alone, stacked): assert torch.allclose(one[0], many[r], rtol=1e-12)


def test_accuracy_of_the_classes_is_counted_on_either_side_of_zero():
    z = torch.tensor([[-1.0, 2.0, 3.0, -4.0, 0.0, 5.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -9.0]])
    kind = torch.tensor([1, 1, 1, 0, 0, 0, -1])
    on, off = class_accuracy(z, kind)
    assert on.tolist() == pytest.approx([2 / 3, 1.0]) and off.tolist() == pytest.approx([2 / 3, 0.0])
    on, off = class_accuracy(z, torch.stack([kind, torch.full((7,), 1)]))  # each row has examples of its own
    assert on.tolist() == pytest.approx([2 / 3, 6 / 7]) and off[0] == 2 / 3 and off[1].isnan()


def test_data_as_they_are_give_the_plain_mean_even_of_one_class():
    z, a = normal(3, 7), torch.tensor([1.0, 0, 0, 0, 0, 0, 0.5])
    plain = binary_cross_entropy_with_logits(z, a.double())
    assert torch.isclose(balanced_bce(z, a.double(), None), plain)
    assert torch.isclose(balanced_bce(z, torch.zeros(7).double(), None), torch.nn.functional.softplus(z).mean())


def test_uncalibrated_the_objective_takes_the_logits_as_they_are():
    z, a, log_p = normal(4, 3, 10), (torch.arange(10) < 4).double(), log_softlabel(normal(5, 3, V), 1.0, ADMISSIBLE)
    losses = losses_of(z, a, log_p, prior(1), scale=True, calibrated=False)
    assert torch.equal(losses.accuracy, balanced_bce(z, a)) and (losses.bias == 0).all() and (losses.scale == 1).all()


# --- rows with data and weights of their own -------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("positive_weight", [0.3, None])
def test_absent_examples_change_nothing(scale, positive_weight):
    present = torch.tensor([True, False, True, True, True, False, True, True, True])
    a, z = (torch.arange(9) % 3 == 0).double(), 5 * normal(0, 2, 9)
    on, off = class_weights(a, positive_weight, scale, present)
    assert ((on + off == 0) == ~present).all() and (on + off).sum().item() == pytest.approx(1)
    log_p = log_softlabel(normal(1, 2, V), 0.7, ADMISSIBLE)
    alone = losses_of(z[:, present], a[present], log_p, prior(2), WEIGHTS, positive_weight, scale)
    for padding in (0.0, 1e4, -1e30):
        padded = torch.where(present, z, padding).requires_grad_()
        losses = objective(padded, on, off, log_p, prior(2), WEIGHTS, scale)
        for one, other in zip(losses, alone): assert torch.allclose(one, other, rtol=1e-9)
        losses.total.sum().backward()
        assert (padded.grad[:, ~present] == 0).all() and torch.isfinite(padded.grad).all()


@pytest.mark.parametrize("scale", [False, True])
def test_rows_with_data_and_weights_of_their_own_equal_the_rows_alone(scale):
    z, log_p = 4 * normal(0, 3, 8), log_softlabel(normal(1, 3, 2, V), 0.7, ADMISSIBLE)
    a = torch.rand(3, 8, generator=generator(2), dtype=torch.float64)
    present = torch.arange(8) < torch.tensor([[8], [5], [6]])
    on, off = map(torch.stack, zip(*(class_weights(a[r], 0.4, scale, present[r]) for r in range(3))))
    weights = RowWeights(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 0.2, 0.4]), torch.tensor([0.03, 0.0, 0.1]))
    losses = objective(z, on, off, log_p, prior(3), weights, scale)
    for r in range(3):
        w = RowWeights(*(x[r].item() for x in weights))
        alone = losses_of(z[r, present[r]][None], a[r, present[r]], log_p[[r]], prior(3), w, 0.4, scale)
        for one, other in zip(alone, losses): assert torch.allclose(one[0], other[r], rtol=1e-6)


@pytest.mark.parametrize("scale", [False, True])
def test_the_objective_reads_no_tensor_back(scale):
    # what a CUDA graph needs: with tensors that hold no data, everything that would read one fails
    with torch.device("meta"):
        z, log_p = torch.empty(2, 9), torch.empty(2, 1, V)
        on, off, weights = torch.empty(2, 9), torch.empty(2, 9), RowWeights(torch.empty(2), torch.empty(2), 0.1)
        losses = objective(z, on, off, log_p, torch.empty(V), weights, scale)
        class_accuracy(losses.scale[:, None] * z, torch.empty(2, 9, dtype=torch.long))
    assert losses.total.shape == (2,)
