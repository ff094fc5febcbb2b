"Scores of a label: values, intervals, chance."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn import metrics

from tokenlabel.score import METRICS, auroc, chance, heldout_table, score


def binormal(n_active, n_inactive, shift, seed, threshold=0.0):
    "Logits with unit normal noise, the active ones `shift` higher."
    rng = np.random.default_rng(seed)
    activation = np.repeat([1.0, 0.0], [n_active, n_inactive])
    return rng.normal(size=activation.size) + shift * activation - threshold, activation


# few distinct logits, so that ties are common
examples = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({active for _, active in rows}) == 2)


@given(examples)
@settings(max_examples=100, deadline=None)
def test_values_equal_sklearn(rows):
    z, active = np.array([r[0] for r in rows], dtype=float), np.array([r[1] for r in rows])
    fires, value = z > 0, score(z, active, n_bootstrap=1).set_index("metric").value
    assert value["auroc"] == pytest.approx(metrics.roc_auc_score(active, z))
    assert value["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(active, fires))
    assert value["f1"] == pytest.approx(metrics.f1_score(active, fires))
    assert value["accuracy_active"] == pytest.approx(metrics.recall_score(active, fires))
    assert value["accuracy_inactive"] == pytest.approx(metrics.recall_score(active, fires, pos_label=0))


@given(examples)
@settings(max_examples=50, deadline=None)
def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_half(rows):
    a = [z for z, active in rows if active]
    b = [z for z, active in rows if not active]
    pairs = [(x > y) + (x == y) / 2 for x in a for y in b]
    assert auroc([z for z, _ in rows], [active for _, active in rows]) == pytest.approx(np.mean(pairs))


@given(examples, st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_auroc_of_many_labels_at_once_is_that_of_each(rows, seed):
    active = [active for _, active in rows]
    z = np.random.default_rng(seed).integers(-3, 4, (2, 3, len(rows)))
    assert auroc(z, active).tolist() == [[auroc(row, active) for row in part] for part in z]


@given(examples, st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_every_resample_has_both_classes(rows, seed):
    z, active = np.array([r[0] for r in rows], dtype=float), np.array([r[1] for r in rows])
    groups = [i // 3 for i in range(len(rows))]                       # types of mixed activation among them
    table = score(z, active, groups=groups, n_bootstrap=50, seed=seed)
    assert np.isfinite(table[["value", "low", "high"]].to_numpy()).all()
    assert ((0 <= table.low) & (table.low <= table.high) & (table.high <= 1)).all()


def test_active_from_one_half_and_fires_above_zero():
    table = score([0.0, 1e-9, -1.0], [0.5, 1.0, 0.49], n_bootstrap=1).set_index("metric").value
    assert table["accuracy_active"] == 0.5 and table["accuracy_inactive"] == 1.0


def test_auroc_ignores_the_bias_and_decisions_do_not():
    z, activation = binormal(40, 40, 2.0, seed=0)
    moved = score(z - 9, activation, n_bootstrap=1).set_index("metric").value
    assert auroc(z - 9, activation) == auroc(z, activation) == pytest.approx(moved["auroc"])
    assert moved["accuracy_active"] == 0 and moved["f1"] == 0 and moved["balanced_accuracy"] == 0.5


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # Two unit normals a shift s apart have AUROC Phi(s / sqrt 2) and accuracy Phi(s / 2) in each class.
    # The percentile bootstrap covers slightly less than its level on few examples: .93 with 50 in each class.
    truth = {"auroc": 0.8555, "accuracy_active": 0.7734, "accuracy_inactive": 0.7734, "balanced_accuracy": 0.7734}
    inside = pd.Series(0, index=list(truth))
    for seed in range(200):
        z, activation = binormal(50, 50, 1.5, seed, threshold=0.75)
        table = score(z, activation, n_bootstrap=200, seed=seed).set_index("metric")
        for name, value in truth.items(): inside[name] += table.low[name] <= value <= table.high[name]
    assert ((inside >= 0.86 * 200) & (inside <= 0.99 * 200)).all(), inside


def test_copies_of_an_example_are_no_evidence_when_grouped():
    z, activation = binormal(30, 30, 1.0, seed=3)
    once, ten = score(z, activation), np.repeat(np.arange(60), 10)
    grouped, naive = score(z[ten], activation[ten], groups=ten), score(z[ten], activation[ten])
    np.testing.assert_allclose(grouped[["low", "high"]], once[["low", "high"]], atol=1e-12)
    assert ((grouped.high - grouped.low) > 2 * (naive.high - naive.low)).all()


def test_groups_may_have_any_names():
    z, activation = binormal(20, 20, 1.0, seed=4)
    numbers = np.arange(40) // 2
    names = [f"word {n}" for n in numbers]
    pd.testing.assert_frame_equal(score(z, activation, groups=numbers), score(z, activation, groups=names))


def test_wider_level_wider_interval():
    z, activation = binormal(30, 30, 1.0, seed=5)
    narrow, wide = score(z, activation, level=0.5), score(z, activation, level=0.99)
    assert ((wide.low < narrow.low) & (narrow.high < wide.high)).all()


def test_same_seed_same_table_and_the_global_generator_is_left_alone():
    z, activation = binormal(30, 30, 1.0, seed=6)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first, second = score(z, activation, seed=1), score(z, activation, seed=1)
    assert (before == np.random.get_state()[1]).all()
    pd.testing.assert_frame_equal(first, second)
    assert not first.equals(score(z, activation, seed=2))


def test_more_samples_than_fit_in_one_part_of_memory():
    z, activation = binormal(30, 30, 1.0, seed=7)
    for once, parts in ((score(z, activation), score(z, activation, n_bootstrap=70_000)),
                        (chance(activation), chance(activation, n_samples=70_000))):
        pd.testing.assert_series_equal(once.value, parts.value)
        np.testing.assert_allclose(once[["low", "high"]], parts[["low", "high"]], atol=0.05)


def test_chance_is_what_random_scorers_get():
    activation = np.repeat([1.0, 0.0], [30, 90])
    table, rng = chance(activation).set_index("metric"), np.random.default_rng(0)
    got = pd.DataFrame([score(rng.normal(size=120), activation, n_bootstrap=1).value.tolist() for _ in range(400)],
                       columns=METRICS)
    np.testing.assert_allclose(got.mean(), table.value[list(METRICS)], atol=0.02)
    inside = ((got >= table.low[list(METRICS)]) & (got <= table.high[list(METRICS)])).mean()
    assert (inside > 0.9).all(), inside


def test_chance_is_wider_where_examples_share_a_type():
    activation = np.repeat([1.0, 0.0], 60)
    alone, shared = chance(activation), chance(activation, groups=np.arange(120) // 6)
    assert ((shared.high - shared.low) > 1.5 * (alone.high - alone.low)).all()


def test_heldout_table_is_tidy_and_made_of_its_parts():
    z, activation = binormal(30, 30, 2.0, seed=8)
    groups = np.arange(60) // 2
    table = heldout_table(z, z / 2, activation, groups, seed=3)
    assert list(table.columns) == ["label", "metric", "value", "low", "high"] and list(table.index) == list(range(15))
    parts = {name: part.drop(columns="label").reset_index(drop=True) for name, part in table.groupby("label")}
    pd.testing.assert_frame_equal(parts["discrete"], score(z, activation, groups=groups, seed=3))
    pd.testing.assert_frame_equal(parts["chance"], chance(activation, groups=groups, seed=3))
    pd.testing.assert_frame_equal(parts["soft"], parts["discrete"])          # halving z changes no order and no sign


def test_tensors_are_taken_as_they_are():
    z, activation = binormal(20, 20, 1.0, seed=9)
    pd.testing.assert_frame_equal(score(torch.from_numpy(z), torch.from_numpy(activation)), score(z, activation))


@pytest.mark.parametrize("z, activation, options, message", [
    ([1, 2], [1, 1], {}, "of 2 examples 2 are active"),
    ([1, 2], [0.2, 0], {}, "of 2 examples 0 are active"),
    ([], [], {}, "of 0 examples"),
    ([1, 2, 3], [1, 0], {}, "each of the 2 examples"),
    ([], [1, 0], {}, "each of the 2 examples"),
    ([[1, 2]], [1, 0], {}, "a vector of 2 values"),
    ([1, np.nan], [1, 0], {}, "example 1 it is nan"),
    ([1, np.inf], [1, 0], {}, "example 1 it is inf"),
    ([1, 2], [1, np.nan], {}, "NaN at example 1"),
    ([1, 2], [1, 5], {}, "lie in"),
    ([[1, 2]], [[1, 0]], {}, "one value per example"),
    ([1, 2], [1, 0], {"groups": ["a"]}, "it has 1"),
    ([1, 2], [1, 0], {"n_bootstrap": 0}, "at least one resample"),
    ([1, 2], [1, 0], {"level": 95}, "between 0 and 1"),
])
def test_bad_input_is_refused_with_the_reason(z, activation, options, message):
    with pytest.raises(ValueError, match=message): score(z, activation, **options)
