"""Running text by word type: the table of types, the split by text, and labels that come from them."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel.by_type import choose_view, explained, split_texts, text_tokens, type_table, word_table
from tokenlabel.detect import context_gains, word_gains
from tokenlabel.feature import Feature
from tokenlabel.label import begin, label_feature, text_gains
from tokenlabel.many import label_folder, read_folder, result_row
from tokenlabel.result import LabelResult
from tokenlabel.settings import Settings

TEXTS = ["the cat sat.", "a red cat ran", "the cat and a dog", "a dog is here", "a house", "the red car", "is it here", "it ran"]
SPANS = [[(4, 7, 1.0)], [(6, 9, 0.3)], [(4, 7, 0.8), (14, 17, 0.2)], [(2, 5, 0.1)], [], [], [], []]
CATS = Feature.from_texts("cats", TEXTS, SPANS)


def run(feature=CATS, **options) -> LabelResult:
    return label_feature(feature, make_tiny_lm("llama"), **(dict(steps=4, restarts=2, proposals=4, progress=False) | options))


def test_each_word_has_the_largest_activation_on_its_characters():
    words = word_table(Feature.from_texts("f", ["ab cd e"], [[(0, 1, 0.2), (1, 4, 0.9)]]))
    assert words.word.tolist() == ["ab", "cd", "e"] and words.activation.tolist() == [0.9, 0.9, 0.0] and words.start.tolist() == [0, 3, 6]


def test_a_weak_activation_is_no_evidence_that_a_type_is_inactive():
    types = type_table(word_table(Feature.from_texts("f", ["on on off", "weak off on"], [[(0, 2, 1.0), (3, 5, 1.0)], [(0, 4, 0.01), (9, 11, 1.0)]])))
    assert types.activation["weak"] == types.activation["on"] == 1.0 and types.activation["off"] == 0.0
    assert types.weight["weak"] < 0.2 < types.weight["off"] < types.weight["on"]


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(len(TEXTS))))
def test_the_table_of_types_ignores_the_order_of_the_texts(order):
    shuffled = Feature.from_texts("cats", [TEXTS[i] for i in order], [SPANS[i] for i in order])
    one, other = (type_table(word_table(feature)).sort_index()[["count", "activation", "weight"]] for feature in (CATS, shuffled))
    pd.testing.assert_frame_equal(one, other)


def test_types_explain_everything_or_nothing():
    always = word_table(Feature.from_texts("f", ["a b"] * 9, [[(0, 1, 1.0)]] * 9))
    half = word_table(Feature.from_texts("f", ["a a"] * 9, [[(0, 1, 1.0)]] * 9))
    assert explained(always) == 1 and abs(explained(half)) < 0.1


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(2, 30), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_of_texts_leaves_both_classes_on_both_sides(active, silent, share, seed):
    out = split_texts(np.array([True] * active + [False] * silent), share, seed)
    for part, size in ((out[:active], active), (out[active:], silent)): assert 1 <= part.sum() <= size - 1


def test_held_out_texts_have_no_part_in_the_types():
    lm = make_tiny_lm("llama")
    tokens = text_tokens(CATS, lm, by_type=True, heldout=0.3, seed=1)
    out = {int(text) for text in tokens.words.text[tokens.words.heldout].unique()}
    assert out and len(out) < len(TEXTS)
    changed = replace(CATS, spans=[[(s.start, s.end, 0.5 + s.activation / 2) for s in spans] if i in out else spans
                                   for i, spans in enumerate(CATS.spans)])
    other = text_tokens(changed, lm, by_type=True, heldout=0.3, seed=1)
    assert other.documents == tokens.documents and other.strings == tokens.strings
    assert torch.equal(other.activation, tokens.activation) and torch.equal(other.weight, tokens.weight)


def test_weights_change_the_objective_as_repeated_words_do():
    from tokenlabel.objective import class_weights
    a = torch.tensor([1.0, 0.0, 0.25])
    on, off = class_weights(a, weight=torch.tensor([2.0, 1.0, 3.0]))
    many = class_weights(torch.tensor([1.0, 1.0, 0.0, 0.25, 0.25, 0.25]))
    for one, all_ in zip((on, off), many): assert torch.allclose(one, torch.stack([all_[:2].sum(), all_[2], all_[3:].sum()]))


def test_the_view_follows_the_data_and_a_view_that_cannot_be_is_refused():
    words, few = Feature.from_words("w", ["cat"], ["car"]), Feature.from_texts("f", ["a cat", "a dog"], [[(2, 5, 1.0)], []])
    assert [choose_view(one, Settings()) for one in (words, few, CATS)] == ["words", "context", "types"]
    assert choose_view(CATS, Settings(discriminator="direct")) == "context"
    with pytest.raises(ValueError, match="view='types' is for running text"): choose_view(words, Settings(view="types"))
    with pytest.raises(ValueError, match="needs the discriminator channel"): choose_view(CATS, Settings(view="types", discriminator="direct"))


@pytest.mark.parametrize("view", ["types", "texts"])
def test_a_label_of_texts_is_scored_on_held_out_texts_and_comes_back_from_disk(view, tmp_path):
    result = run(view=view)
    assert result.settings.view == view and result.feature == CATS and result.verdict in ("labelled", "a token", "no label")
    assert {"detection", "fuzzing", "simulation"} == set(result.scores.score) and 0 < result.words.heldout.mean() < 1
    assert set(result.heldout.label) == {"discrete", "chance"} and result.verdict in repr(result)
    again = LabelResult.load(result.save(tmp_path / "cats"))
    pd.testing.assert_frame_equal(again.words, result.words)
    assert (again.verdict, again.evidence, again.feature.source) == (result.verdict, result.evidence, result.feature.source)


def test_without_held_out_texts_there_are_no_scores():
    result = run(heldout=0.0)
    assert result.scores.empty and result.heldout.empty and not result.words.heldout.any() and result.verdict in ("", "a token")


def test_the_word_that_a_feature_fires_on_is_the_label():
    cat = Feature.from_texts("cat", TEXTS, [[span for span in spans if TEXTS[i][span[0]:span[1]] == "cat"] for i, spans in enumerate(SPANS)])
    result = run(cat)
    assert (result.label, result.verdict) == (" cat", "a token")
    own = result.ranking[result.ranking.label == " cat"].iloc[0]  # its numbers stand beside it
    row = result_row("cat", result)
    assert [row[name] for name in ("label", "loss", "kl", "auroc_train")] == [" cat", own.loss, own.kl, own.auroc_train]
    assert f"accuracy loss {own.accuracy_loss:.3f}, as a soft" in result.headline()


def test_a_word_of_several_tokens_has_no_numbers_of_another_label():
    texts = [text.replace("cat", "catdog") for text in TEXTS]
    spans = [[(text.index("catdog"), text.index("catdog") + 6, 1.0)] if "catdog" in text else [] for text in texts]
    result = run(Feature.from_texts("catdog", texts, spans))
    assert (result.label, result.verdict) == (" catdog", "a token") and " catdog" not in set(result.ranking.label)
    row = result_row("catdog", result)
    assert row["loss"] is row["kl"] is None and np.isnan(result.soft["loss_gap"]) and "accuracy loss as a soft label" in result.headline()


def test_the_weight_of_the_active_class_counts_by_type_too():
    few = replace(CATS, spans=[spans if i < 2 else [] for i, spans in enumerate(SPANS)])
    half, none = (run(few, positive_weight=weight, heldout=0.0).ranking.set_index("label").accuracy_loss for weight in (0.5, None))
    both = half.index.intersection(none.index)
    assert len(both) and not np.allclose(half[both], none[both])


def test_a_search_by_type_reads_all_types_in_each_step():
    search = begin(CATS, make_tiny_lm("llama"), Settings(heldout=0.0))
    assert sorted(search.draw(search.batch_size).example.tolist()) == list(range(len(search.discriminator.tokens.types)))


def test_a_folder_of_results_is_continued_and_other_settings_are_refused(tmp_path):
    lm, options = make_tiny_lm("llama"), dict(steps=3, proposals=2, progress=False)
    features = [replace(CATS, name=name) for name in ("one", "a/b", "<b>")]
    def cut():
        yield from features[:2]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): label_folder(cut(), tmp_path / "out", lm, together=1, **options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/result.json")}
    assert len(before) <= 2
    assert label_folder(features, tmp_path / "out", lm, **options) == {}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "what is there is not computed again"
    assert sorted(result.feature.name for result in read_folder(tmp_path / "out")) == sorted(one.name for one in features)
    with pytest.raises(ValueError, match="other settings"): label_folder(features, tmp_path / "out", lm, **options | dict(steps=4))
    with pytest.raises(ValueError, match="the name 'one' is there twice"): label_folder(features[:1] * 2, tmp_path / "new", lm, **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something other than results"): label_folder(features, tmp_path / "mine", lm, **options)


def test_the_texts_decide_the_ranking_by_type():
    result, lm = run(heldout=0.0), make_tiny_lm("llama")
    texts = word_table(CATS).assign(**{label: gain for label, gain in zip(result.ranking.label, word_gains(lm, list(result.ranking.label), word_table(CATS).word))})
    most, active = texts.groupby("text")[list(result.ranking.label)].max(), texts.groupby("text").activation.max() > 0
    for row in result.ranking.itertuples():
        biased = [np.logaddexp(0, -most[row.label][active] - bias).mean() / 2 + np.logaddexp(0, most[row.label][~active] + bias).mean() / 2
                  for bias in np.linspace(-10, 10, 401)]
        assert row.accuracy_loss == pytest.approx(min(biased), abs=1e-3)
        assert row.loss == pytest.approx(row.accuracy_loss + 0.01 * row.kl, abs=1e-5)
    assert result.ranking.loss.is_monotonic_increasing


def test_in_context_both_sides_have_a_text_that_counts_as_active():
    feature = Feature.from_texts("f", [f"the {word} ran" for word in "cat dog cow pig car mat".split()], [[(4, 7, a)] for a in (1, 1, 0.1, 0.1, 0.1, 0.1)])
    for seed in range(5):
        tokens = text_tokens(feature, make_tiny_lm("llama"), by_type=False, heldout=0.5, seed=seed)
        assert [float(tokens.activation[tokens.heldout == side].max()) for side in (False, True)] == [1, 1]


def test_the_scores_of_a_label_in_context_read_no_text_without_a_label_again(monkeypatch):
    from tokenlabel import channel
    search, again = begin(CATS, make_tiny_lm("llama"), Settings(view="texts", heldout=0.5)), []
    monkeypatch.setattr(channel, "marginal_log_probs", lambda *args, **how: again.append(args))
    gains = text_gains(search.discriminator, [" cat"])
    monkeypatch.undo()
    wanted = context_gains(search.discriminator.lm, [" cat"], CATS.texts, word_table(CATS), search.discriminator.prompts)
    assert not again and np.allclose(gains, wanted, atol=1e-5)
