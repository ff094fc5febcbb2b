"""The check before a run: its decision, the labels it tries, and what it refuses; on tiny random models."""
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_tiny_lm

from tokenlabel.channel import channel
from tokenlabel.direct import direct
from tokenlabel.evaluator import check_evaluator, decide, sample_documents, spellings
from tokenlabel.feature import ACTIVE, Feature
from tokenlabel.rank import rank_labels
from tokenlabel.tokenize import tokenize

WORDS = [a + b + c for a in "bcdfg" for b in "aeiou" for c in "lmnr"]  # 100 made-up words
LABELS = ["a", "b", "c"]  # single tokens of every tokenizer
MAKE = {"channel": channel, "direct": direct}


def feature_of(lm, make=channel, word="a", size=40) -> Feature:
    "A feature that fires on the half of the words to which a label gives the highest logit: it is the right one."
    plain = Feature.from_words("plain", WORDS[:1], WORDS[1:size])
    discriminator = make(lm, tokenize(plain, lm))
    z = torch.cat([discriminator.token_logits(torch.tensor([[spellings(word, lm)[0]]]), b) for b in discriminator.batches()], 1)[0]
    high = set(z.topk(size // 2).indices.tolist())
    return Feature.from_words("made", [w for i, w in enumerate(plain.texts) if i in high],
                              [w for i, w in enumerate(plain.texts) if i not in high])


def row(label, right, loss, auroc, low) -> dict:
    return dict(label=label, is_right=right, loss=loss, accuracy_loss=1 - auroc, auroc=auroc, low=low, high=1.0)


@pytest.fixture
def llama(tiny_lm): return tiny_lm("llama")


# --- the decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auroc, low, verdict", [
    (0.8, 0.71, "can"), (0.79, 0.71, "cannot"), (0.99, 0.7, "cannot"), (0.5, 0.3, "cannot")])
def test_a_label_passes_with_its_auroc_and_with_the_lower_end_of_its_interval(auroc, low, verdict):
    table = pd.DataFrame([row(" cat", True, 0.1, auroc, low), row(" pet", False, 0.123, 0.5, 0.4)])
    assert decide(table)[0] == verdict
    assert verdict == "cannot" or "' pet' comes next with 0.123" in decide(table)[1]


def test_a_better_wrong_label_is_named_only_if_the_evaluator_knows_the_right_one():
    wrong = row(" animal", False, 0.1, 0.99, 0.95)
    verdict, sentence = decide(pd.DataFrame([wrong, row(" mammal", True, 0.2, 0.9, 0.8)]))
    assert verdict == "prefers another" and "' animal'" in sentence and "' mammal'" in sentence
    assert decide(pd.DataFrame([wrong, row(" mammal", True, 0.2, 0.6, 0.5)]))[0] == "cannot"


def test_the_sentence_says_whether_the_fit_or_the_kl_decided():
    right = row(" mammal", True, 0.2, 0.9, 0.8)
    assert "fits better" in decide(pd.DataFrame([row(" animal", False, 0.1, 0.99, 0.95), right]))[1]
    assert "expects it more" in decide(pd.DataFrame([row(" animal", False, 0.1, 0.85, 0.75), right]))[1]


def test_the_right_label_with_the_lowest_loss_counts_not_the_one_with_the_best_auroc():
    table = pd.DataFrame([row(" mammals", True, 0.1, 0.6, 0.5), row("Mammal", True, 0.2, 0.99, 0.9)])
    assert decide(table)[0] == "cannot"


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discriminator", MAKE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_label_that_made_the_feature_never_gives_cannot(family, discriminator):
    lm = make_tiny_lm(family)
    check = check_evaluator(feature_of(lm, MAKE[discriminator]), lm, ["a"], discriminator=discriminator,
                            kl_weight=0, stop_weight=0, distractors=[])
    made = check.table[check.table.label == lm.token(spellings("a", lm)[0])].iloc[0]
    assert made.auroc == made.low == 1 and made.is_right
    assert check.verdict != "cannot"  # with random weights another label may happen to have a lower loss


@pytest.mark.parametrize("discriminator", MAKE)
def test_a_feature_without_a_rule_cannot(llama, discriminator):
    chance = Feature.from_words("chance", WORDS[:60:2], WORDS[1:60:2])
    check = check_evaluator(chance, llama, ["a"], discriminator=discriminator)
    assert check.verdict == "cannot" and check.table.auroc[check.table.is_right].max() < 0.8


def test_the_label_that_made_the_feature_is_preferred_to_one_handed_in(llama):
    feature = feature_of(llama)
    check = check_evaluator(feature, llama, ["e"], kl_weight=0, stop_weight=0, distractors=["a"])
    assert check.table.label[0].strip().casefold() == "a" and not check.table.is_right[0]


def test_losses_are_those_of_the_ranking_and_sorted(llama):
    feature = feature_of(llama)
    check = check_evaluator(feature, llama, LABELS)
    assert check.table.loss.is_monotonic_increasing
    ids = [id for [id] in map(llama.encode, check.table.label)]
    ranking, _ = rank_labels(channel(llama, tokenize(feature, llama)), ids)
    mine = check.table.set_index("label").loc[ranking.label]
    for name, other in (("loss", "loss"), ("kl", "kl"), ("accuracy_loss", "accuracy_loss"), ("auroc", "auroc_train")):
        assert mine[name].to_numpy() == pytest.approx(ranking[other].to_numpy(), abs=1e-5)
    assert ((check.table.low <= check.table.auroc) & (check.table.auroc <= check.table.high)).all()


def test_a_distractor_that_is_a_right_label_is_a_right_label(llama):
    table = check_evaluator(feature_of(llama), llama, ["a"], distractors=["A", "b"]).table
    right = table.label.str.strip().str.casefold() == "a"
    assert right.any() and (table.is_right == right).all() and table.token.is_unique


@pytest.mark.parametrize("mode", ["words", "texts"])
def test_few_labels_are_scored_on_all_of_the_sample(llama, mode, monkeypatch):
    sizes, real = [], rank_labels

    def count(discriminator, labels, settings):
        sizes.append(len(labels))
        return real(discriminator, labels, settings)

    monkeypatch.setattr("tokenlabel.evaluator.rank_labels", count)
    table = check_evaluator(feature_of(llama) if mode == "words" else TEXTS, llama, LABELS).table
    assert sizes == [len(table)] == [6] and table.is_right.sum() == 3


def test_an_unweighted_loss_on_a_balanced_sample_keeps_the_share_of_the_whole_feature(llama):
    feature = Feature.from_words("rare", WORDS[:10], WORDS[10:])
    one = check_evaluator(feature, llama, ["a"], positive_weight=None, most=20)
    same = check_evaluator(feature, llama, ["a"], positive_weight=0.1, most=20)
    pd.testing.assert_frame_equal(one.table, same.table)


TEXTS = Feature.from_texts("animals", ["the cat sat on the mat.", "a dog and a horse ran.", "the house is red.",
                                       "no book is here."], [[(4, 7, 1)], [(2, 5, 1), (12, 17, 1)], [], []])


@pytest.mark.parametrize("discriminator", MAKE)
def test_running_text_works(llama, discriminator):
    check = check_evaluator(TEXTS, llama, ["a"], discriminator=discriminator)
    assert check.table.loss.notna().all() and check.table.auroc.between(0, 1).all()


# --- the sample -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [2, 7, 20, 60])
def test_a_sample_is_seeded_and_half_active_as_far_as_possible(most):
    feature = Feature.from_words("few", WORDS[:15], WORDS[15:])
    sample = sample_documents(feature, most, seed=3)
    active = sum(spans[0].activation >= ACTIVE for spans in sample.spans)
    assert len(sample.texts) == most and active == min(most // 2, 15)
    assert set(zip(sample.texts, sample.spans)) <= set(zip(feature.texts, feature.spans))
    assert sample == sample_documents(feature, most, seed=3) != sample_documents(feature, most, seed=4)


def test_a_small_feature_is_used_as_it_is():
    feature = Feature.from_words("few", WORDS[:3], WORDS[3:9])
    assert sample_documents(feature, 9, seed=0) is feature


def test_the_same_seed_gives_the_same_check(llama):
    a, b = (check_evaluator(feature_of(llama), llama, ["a"], most=20, seed=5) for _ in range(2))
    pd.testing.assert_frame_equal(a.table, b.table, check_exact=True)
    assert a.sentence == b.sentence


# --- spellings, errors, display ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_spellings_are_single_tokens_that_read_as_the_word(family):
    lm = make_tiny_lm(family)
    found = [lm.token(id) for id in spellings(" a ", lm)]
    assert {"a", "A"} <= set(found) <= {"a", "A", " a", " A"} and len(set(found)) == len(found)
    assert spellings("zebra", lm) == []


def test_a_label_of_several_tokens_is_named_and_left_out(llama):
    check = check_evaluator(feature_of(llama), llama, ["zebra", "a"])
    assert check.left_out == ("zebra",)
    for shown in (repr(check), check._repr_html_()): assert "zebra" in shown and "made" in shown
    assert check.sentence in repr(check)


@pytest.mark.parametrize("labels, options, message", [
    ([], {}, "list of one word"), ("animal", {}, "list of one word"), (["a", " "], {}, "list of one word"),
    (["zebra", "okapi"], {}, "'zebra', 'okapi' is a single token"),
    (["a"], dict(discriminator="oracle"), "discriminator='oracle'"), (["a"], dict(most=1), "most=1"),
    (["a"], dict(prompts=[]), "prompts")])
def test_bad_arguments_are_refused(llama, labels, options, message):
    with pytest.raises(ValueError, match=message):
        check_evaluator(Feature.from_words("few", WORDS[:3], WORDS[3:9]), llama, labels, **options)
