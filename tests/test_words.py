import time

import pytest
from hypothesis import example, given, settings, strategies as st

from tokenlabel.words import VISIBLE, check_text, excerpt, printable, split_words, trim, word_type

quick = settings(max_examples=200, deadline=None)


def kinds(text): return [kind for *_, kind in split_words(text)]


@pytest.mark.parametrize("text, expected", [
    ("Straße?! It's 3.5, 我们。", ["strasse", "?!", "it's", "3.5", ",", "我", "们", "。"]),
    ("हिन्दी cafe\u0301s", ["हिन्दी", "caf\u00e9s"]),  # marks belong to their letters
    ("I ❤\ufe0flove", ["i", "❤\ufe0f", "love"]),
    ("Rind\u00adfleisch\u00adgesetz", ["rindfleischgesetz"]),
    ("a\u2060b \ufeffc", ["ab", "c"]),
    ("one\u200btwo", ["one", "two"]),  # a zero-width space parts words
    ("צה״ל צה\"ל ג׳ירפה צ'יפס", ["צה״ל", "צה\"ל", "ג׳ירפה", "צ'יפס"]),
    ("コーヒー ｺｰﾋｰ らーめん 人々", ["コーヒー", "ｺｰﾋｰ", "らー", "め", "ん", "人々"]),
    ("👨\u200d👩\u200d👧\u200d👦👩🏽\u200d💻🏳\ufe0f\u200d🌈", ["👨\u200d👩\u200d👧\u200d👦", "👩🏽\u200d💻", "🏳\ufe0f\u200d🌈"]),
    ("👍🏿🍎🚗 🇩🇪🇫🇷🇮 1\ufe0f\u20e3#\ufe0f\u20e3", ["👍🏿", "🍎", "🚗", "🇩🇪", "🇫🇷", "🇮", "1\ufe0f\u20e3", "#\ufe0f\u20e3"]),
    ("می\u200cخواهم", ["می\u200cخواهم"]),
    ("(saw) ... 'x'", ["(", "saw", ")", "...", "'", "x", "'"]),
    (" \u200d \u00ad\ufeff \x00", []),
])
def test_words_are_what_a_reader_sees_as_one(text, expected): assert kinds(text) == expected


@quick
@example("0\u0301 \u0301 🇩🇪🇫\u200d\u200b")
@given(st.text(max_size=40))
def test_all_that_is_visible_is_in_one_word(text):
    words = split_words(text)
    assert all(a[1] <= b[0] for a, b in zip(words, words[1:])) and all(VISIBLE.search(text, s, e) for s, e, _ in words)
    assert {m.start() for m in VISIBLE.finditer(text)} == {i for s, e, _ in words for i in range(s, e) if VISIBLE.match(text[i])}


@quick
@given(st.text(max_size=40))
def test_trimming_twice_is_trimming_once(text):
    assert trim(trim(text)) == trim(text) and bool(trim(text)) == bool(VISIBLE.search(text))


def test_composed_and_decomposed_words_have_one_type():
    assert word_type("CAFE\u0301") == word_type("caf\u00e9") == word_type("caf\u00ade\u0301") == "caf\u00e9"
    assert word_type("Straße") == word_type("STRASSE")


@pytest.mark.parametrize("text", ["", " \t\n", "\u00ad", "\u200b\u200c\u200d", "\ufeff", "\u2060", "\u3164", "\u115f", "\u2800",
                                  "\ufe0f", "\x1b", "\u202e", "\U000e0041", "\u034f"])
def test_a_text_of_nothing_visible_is_empty(text):
    with pytest.raises(ValueError, match="is empty, it has no visible character") as error: check_text(text)
    assert str(error.value).isprintable()


def test_messages_quote_the_beginning_of_any_value():
    nested = []
    for _ in range(100_000): nested = [nested]
    for value in ("x" * 10**6, ["x" * 10**6] * 10**4, {"k" * 10**6: 1}, nested, "\x1b" * 99, b"x" * 10**6, list(range(10**6))):
        assert len(excerpt(value)) < 250 and excerpt(value).isprintable()


def test_a_terminal_gets_no_control_characters():
    assert printable("a\x1b[2Jb\x9bc\u202ed\u2028e\rf\n") == r"a\x1b[2Jb\x9bc\u202ed\u2028e\rf⏎"
    assert printable("é 👨\u200d👩 נ\u200fa") == "é 👨\u200d👩 נ\u200fa"


@pytest.mark.parametrize("part", ["word ", "a", "\u0301", "🇩", "👩\u200d", "a\u00ad", "...", "我", "\u200b", "a'", "1,"])
def test_splitting_is_linear(part):
    def seconds(n):
        start = time.process_time()
        split_words(part * n)
        return time.process_time() - start
    seconds(100)
    assert seconds(40_000) < 40 * min(seconds(4_000) for _ in range(3)) + 0.01
