"""The categories of WordNet: each has a right label that can be said, and the halves share nothing with what they must not."""
import json
from pathlib import Path

import pytest
from test_development import DEVELOPMENT, forms, reported  # noqa: F401: a fixture

STUDIES = Path(__file__).resolve().parents[1] / "nbs/studies"
CATEGORIES = json.loads((STUDIES / "wordnet.json").read_text(encoding="utf-8"))
HALVES = {half: [one for one in CATEGORIES if one["half"] == half] for half in ("development", "test")}


def words(one): return one["active"].split() + one["inactive"].split()


def test_there_are_two_hundred_categories_in_two_halves_with_hard_and_easy_ones():
    assert len(CATEGORIES) >= 200 and sum(map(len, HALVES.values())) == len({one["id"] for one in CATEGORIES})
    for ones in HALVES.values():
        assert len(ones) >= 80 and 0.3 < sum(one["hard"] for one in ones) / len(ones) < 0.7


@pytest.mark.parametrize("one", CATEGORIES, ids=lambda one: one["id"])
def test_a_category_has_enough_words_and_none_of_them_is_a_right_label(one):
    active, inactive = one["active"].split(), one["inactive"].split()
    assert 16 <= len(active) <= 20 and len(inactive) == 40 and len({*active, *inactive}) == len(active + inactive)
    assert one["exact"] and not {*one["exact"]} & {*one["near"]}
    assert not [word for word in active + inactive if forms(word) & {*one["exact"]}]
    assert not {word.casefold() for word in active} & {*one["near"]}  # to name a member is never right


def test_no_word_of_the_development_half_is_reported(reported):  # noqa: F811
    for one in HALVES["development"]:
        assert not [word for word in words(one) if forms(word) & reported] and not {*one["exact"]} & reported


def test_no_default_was_chosen_on_a_word_of_the_test_half():
    used = {word.casefold() for entry in DEVELOPMENT.values() for word in entry["words"].split()}
    labels = {label.casefold() for entry in DEVELOPMENT.values() for label in entry["labels"].split()}
    for one in HALVES["test"]: assert not [word for word in words(one) if forms(word) & used] and not {*one["exact"]} & labels


def test_the_license_of_wordnet_stands_beside_the_extract():
    text = (STUDIES / "wordnet-license.txt").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in text
    assert 'THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS"' in text and "Permission to use, copy, modify and distribute" in text
