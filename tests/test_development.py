"""No word on which the defaults were chosen is a word of what is reported."""
import json
import re
from pathlib import Path

import pytest

from tokenlabel.paper import PAPER

ROOT = Path(__file__).resolve().parents[1]
WORDS = json.loads((ROOT / "nbs/studies/words.json").read_text(encoding="utf-8"))
DEVELOPMENT = WORDS["categories"] | WORDS["languages"] | {"other": dict(words=WORDS["other"], labels="")}


def text_words(text: str) -> set[str]: return set(re.findall(r"\w+", text.casefold()))


def forms(word: str) -> set[str]:
    "A word, its singular and its plural, as far as their endings tell."
    word = word.casefold()
    return {word, word + "s", word + "es", re.sub("y$", "ies", word), re.sub("s$", "", word), re.sub("es$", "", word),
            re.sub("ies$", "y", word)}


@pytest.fixture(scope="module")
def reported() -> set[str]:
    "All words of the experiments, of the kept-apart features, and of the labels that are accepted there."
    found = set()
    for file in (ROOT / "tokenlabel/data").glob("*s/*.txt"): found |= text_words(file.read_text(encoding="utf-8"))
    for file in (ROOT / "tests/features").glob("*.jsonl"):
        found |= {json.loads(line)["word"].casefold() for line in file.read_text(encoding="utf-8").splitlines()}
    for labels in json.loads((ROOT / "tests/features/accepted.json").read_text()).values(): found |= {*map(str.casefold, labels)}
    return found | {label for claim in PAPER.values() for label in claim.labels + claim.right}


def test_the_reported_words_are_those_of_the_experiments(reported):
    for claim in PAPER.values():
        for text in claim.make(0, 24).texts:
            assert not {word for word in text_words(text) if not (re.search(r"\d", word) or forms(word) & reported)}


@pytest.mark.parametrize("name", DEVELOPMENT)
def test_no_word_and_no_label_of_a_development_set_is_reported(name, reported):
    words = DEVELOPMENT[name]["words"].split() + DEVELOPMENT[name]["labels"].split()
    assert len(words) == len(set(words)) and not [word for word in words if forms(word) & reported]


def test_a_word_stands_once_among_the_development_words_of_other_categories():
    other = set(WORDS["other"].split())
    assert not [name for name, entry in WORDS["categories"].items() if other & set(entry["words"].split())]
