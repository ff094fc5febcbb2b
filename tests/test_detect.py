"""Scores of labels on texts: detection, fuzzing, simulation, and the verdict."""
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel.by_type import word_table
from tokenlabel.channel import Channel, ChannelBatch, MarginalCache
from tokenlabel.detect import (
    best_word, by_decile, context_gains, find_verdict, fit_threshold, fuzz_table, one_token, score_explanation, score_gains, word_gains)
from tokenlabel.feature import Feature
from tokenlabel.forward import pack

PROMPTS = ("Examples of {label}:", "A list of {label}:")


def made(texts=40, hit=1.0, seed=0, words=("cat", "dog", "car")):
    "Texts of three words each, half of them active on a word of their own; gains that know it to the share `hit`."
    rng, rows = np.random.default_rng(seed), []
    for text in range(texts):
        for place, word in enumerate(words):
            active = text % 2 == 0 and place == text // 2 % 3
            gain = rng.normal() + 4 * (active and rng.random() < hit)
            rows.append((text, 4 * place, 4 * place + 3, word, word, float(active) * (0.2 + 0.8 * rng.random()), text % 4 > 1, gain))
    return pd.DataFrame(rows, columns=["text", "start", "end", "word", "type", "activation", "heldout", "gain"])


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.lists(st.floats(6, 9), min_size=2, max_size=20))
def test_a_threshold_lies_between_the_classes_or_among_the_silent(silent, active):
    cut = fit_threshold(np.array(silent + active), np.array([False] * len(silent) + [True] * len(active)))
    assert min(silent) <= cut <= min(active)


def test_a_threshold_needs_both_classes():
    with pytest.raises(ValueError, match="active and silent texts"): fit_threshold(np.arange(3.0), np.ones(3, bool))


def test_gains_by_type_are_those_of_the_channel():
    lm = make_tiny_lm("llama")
    read, words = MarginalCache(lm, PROMPTS), ["cat", "dog", "car"]
    ids = [lm.encode(" " + word)[0] for word in words]
    every = torch.arange(3)
    channel = Channel(lm, None, read.prompts, read([(id,) for id in ids]), read.prompts[0].label_prior)
    wanted, _ = channel.read(lm.embed(torch.tensor([lm.encode(" animal")])), ChannelBatch(pack([(id,) for id in ids]), every, every, every))
    assert np.allclose(word_gains(lm, [" animal"], words, PROMPTS), wanted.detach().numpy(), atol=1e-5)
    assert np.allclose(word_gains(lm, [" animal"], ["cat", "cat"], PROMPTS)[0, 0], word_gains(lm, [" animal"], ["cat", "cat"], PROMPTS)[0, 1])


def test_gains_in_context_do_not_depend_on_the_other_texts():
    lm = make_tiny_lm("llama")
    one, two = Feature.from_texts("f", ["the cat ran", "a dog"], [[(4, 7, 1)], []]), Feature.from_texts("f", ["the cat ran"], [[(4, 7, 1)]])
    together, alone = (context_gains(lm, [" animal"], f.texts, word_table(f), PROMPTS) for f in (one, two))
    assert np.allclose(together[:, :3], alone, atol=1e-4)


def test_each_active_text_is_shown_with_as_many_wrong_words_as_right_ones():
    words = made()
    table = fuzz_table(words)
    assert table.groupby("text").right.agg(["sum", "size"]).eq([1, 2]).all(axis=None) and (table.text % 2 == 0).all()
    pd.testing.assert_frame_equal(table, fuzz_table(words))


def value(scores, score, metric): return scores[(scores.score == score) & (scores.metric == metric)].value.iloc[0]


def test_good_gains_score_high_and_noise_scores_at_chance():
    good, noise = score_gains(made(200)), score_gains(made(200, hit=0.0))
    assert value(good, "detection", "auroc") > 0.9 < value(good, "fuzzing", "auroc") and value(good, "simulation", "correlation") > 0.6
    assert abs(value(noise, "detection", "auroc") - 0.5) < 0.15 and abs(value(noise, "simulation", "correlation")) < 0.15
    assert ((good.low <= good.value) & (good.value <= good.high)).all()


def test_the_threshold_comes_from_texts_that_are_not_scored():
    words = made(200)
    shifted = words.assign(gain=words.gain + 100 * words.heldout)  # all held-out texts look active
    scores = score_gains(shifted)
    assert value(scores, "detection", "accuracy_inactive") == 0 and value(scores, "detection", "auroc") == value(score_gains(words), "detection", "auroc")


def test_deciles_are_sorted_by_activation_and_hold_all_active_texts():
    table = by_decile(made(400))
    assert table.texts.sum() == 100 and table.index.tolist() == list(range(1, 11)) and table.activation.is_monotonic_decreasing


def test_the_three_verdicts():
    good = made(200)
    assert find_verdict(good, score_gains(good))[0] == "labelled"
    noise = made(200, hit=0.0)
    assert find_verdict(noise, score_gains(noise))[0] == "no label"
    cat = good.assign(activation=(good.type == "cat") * 0.5 * (good.text % 2 == 0), type=good.type.where(good.text % 2 == 0, "car"))
    cat = cat.assign(type=cat.type.where(~((cat.word == "cat") & (cat.text % 2 == 1)), "car"))
    assert one_token(cat) == "cat" and find_verdict(cat, score_gains(cat))[0] == "a token" and best_word(cat) == ("cat", 1.0)


def test_explanations_that_cannot_be_scored_are_refused():
    lm, words = make_tiny_lm("llama"), Feature.from_words("w", ["cat"], ["car"])
    texts = Feature.from_texts("f", ["a cat", "a dog", "a car", "red"], [[(2, 5, 1.0)], [(2, 5, 1.0)], [], []])
    with pytest.raises(ValueError, match="is a list of words"): score_explanation(words, "animals", lm)
    with pytest.raises(ValueError, match="empty"): score_explanation(texts, " ", lm)
    assert len(score_explanation(texts, "animals that live in a house", lm, heldout=0.5)) == 11


def test_labels_of_several_lengths_have_the_gains_that_each_has_alone():
    lm, labels = make_tiny_lm("llama"), [" animal", " a red house", " car"]
    together = word_gains(lm, labels, ["cat", "dog", "cat"], PROMPTS)
    for label, row in zip(labels, together): assert np.allclose(word_gains(lm, [label], ["cat", "dog", "cat"], PROMPTS)[0], row, atol=1e-4)


def test_a_word_without_tokens_gains_nothing(monkeypatch):
    lm = make_tiny_lm("llama")
    encode = lm.encode
    monkeypatch.setattr(lm, "encode", lambda text: [] if text == " dog" else encode(text))
    assert word_gains(lm, [" animal"], ["cat", "dog"], PROMPTS)[0, 1] == 0


def test_texts_of_one_word_have_no_fuzzing_score():
    scores = score_gains(made(words=("cat",)))
    assert set(scores.score) == {"detection", "simulation"}


@pytest.mark.parametrize("context", [False, True])
def test_an_explanation_that_the_model_cannot_read_says_so(context):
    lm = make_tiny_lm("gpt2")
    feature = Feature.from_texts("f", ["the cat ran", "a dog sat"] * 3, [[(4, 7, 1)], []] * 3)
    with pytest.raises(ValueError, match=r"the label has \d+ tokens, and .* takes \d+ here; give a shorter one"):
        score_explanation(feature, "cats and dogs " * 200, lm, heldout=0.5, context=context)
    if context:
        long = Feature.from_texts("f", ["the cat ran " * 100, "a dog sat"] * 3, [[(4, 7, 1)], []] * 3)
        with pytest.raises(ValueError, match=r"text 0 has \d+ tokens and .* takes \d+ here; split it"):
            score_explanation(long, "cats", lm, heldout=0.5, context=True)


def test_a_share_of_nothing_or_of_everything_cannot_be_held_out():
    feature = Feature.from_texts("f", ["the cat ran", "a dog sat"] * 3, [[(4, 7, 1)], []] * 3)
    for share in (0, 1, -1):
        with pytest.raises(ValueError, match="is not between 0 and 1"): score_explanation(feature, "cats", make_tiny_lm("llama"), heldout=share)
