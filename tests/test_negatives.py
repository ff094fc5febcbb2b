"""Hard negatives: the words that a label reaches, and the feature with them."""
import pytest
import torch
from conftest import make_tiny_lm

from tokenlabel.channel import channel
from tokenlabel.feature import Feature
from tokenlabel.negatives import harden, reach
from tokenlabel.tokenize import tokenize

WORDS = Feature.from_words("cats", "cat dog horse cow".split(), "car house book red lamp tree".split())
POOL = "sheep goat mouse bird stone river".split()


def logits(label: str, words: list[str]) -> dict[str, float]:
    "Logits of words, each in a feature of its own beside one other word."
    lm, found = make_tiny_lm("llama"), {}
    for word in words:
        other = "seven" if word != "seven" else "eight"
        discriminator = channel(lm, tokenize(Feature.from_words("one", [word], [other]), lm))
        found[word] = float(discriminator.token_logits(torch.tensor([lm.encode(label)]), discriminator.batch())[0, 0])
    return found


def test_reach_is_the_logit_of_each_word_largest_first():
    label = make_tiny_lm("llama").token(70)
    found, expected = reach(label, POOL, make_tiny_lm("llama")), logits(label, POOL)
    assert found == pytest.approx(expected, abs=1e-3)
    assert list(found) == sorted(POOL, key=expected.get, reverse=True)


def test_the_hardest_words_of_the_pool_replace_the_easiest_negatives():
    lm = make_tiny_lm("llama")
    label = lm.token(70)
    hard = harden(WORDS, label, POOL, lm, count=2)
    inactive = "car house book red lamp tree".split()
    easy = sorted(inactive, key=logits(label, inactive).get)[:2]
    new = sorted(POOL, key=logits(label, POOL).get)[-2:]
    assert set(hard.texts) == (set(WORDS.texts) - set(easy)) | set(new)
    fires = {word for word, [span] in zip(hard.texts, hard.spans) if span.activation}
    assert fires == {"cat", "dog", "horse", "cow"} and hard.name == "cats"
    assert len(set(harden(WORDS, label, POOL, lm).texts) & set(POOL)) == 3  # half of the inactive ones


def test_bad_arguments_are_refused():
    lm = make_tiny_lm("llama")
    with pytest.raises(ValueError, match="active in cats: cat"): harden(WORDS, " a", [*POOL, "cat"], lm)
    with pytest.raises(ValueError, match="count=7: cats has 6 inactive words"): harden(WORDS, " a", POOL, lm, count=7)
    with pytest.raises(ValueError, match="and the pool 1 new ones"): harden(WORDS, " a", ["car", "sheep"], lm)
    texts = Feature.from_texts("cats", ["the cat sat.", "no book."], [[(4, 7, 1.0)], []])
    with pytest.raises(ValueError, match="has texts"): harden(texts, " a", POOL, lm)
    with pytest.raises(ValueError, match="the pool 1 new ones"): harden(WORDS, " a", ["Xx", "xX", "xx"], lm, count=2)
    for pool, message in ("abc", "is the string 'abc'"), ([], "is empty"):
        with pytest.raises(ValueError, match=message): harden(WORDS, " a", pool, lm)
        with pytest.raises(ValueError, match=message): reach(" a", pool, lm)
    with pytest.raises(ValueError, match="the label is ''"): reach("", POOL, lm)


def test_words_of_a_pool_are_taken_without_white_space():
    lm = make_tiny_lm("llama")
    assert reach(" cat", [" dog\n", "dog", "red"], lm).keys() == {"dog", "red"}
    assert reach(" cat", ["dog"], lm).keys() == {"dog"}


def test_a_pool_may_hold_the_word_that_is_inactive_by_default():
    assert len(reach(" cat", ["a", "aa", "the"], make_tiny_lm("llama"))) == 3


def test_a_word_of_a_pool_is_the_same_word_in_any_case():
    feature = Feature.from_words("f", ["cat", "dog"], ["car", "red", "mat"])
    with pytest.raises(ValueError, match="active in f: DOG"): harden(feature, " the", ["DOG", "text"], make_tiny_lm("llama"))
    with pytest.raises(ValueError, match="the pool 0 new ones"): harden(feature, " the", ["Car"], make_tiny_lm("llama"))
