import json
import re
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, example, given, settings, strategies as st

from tokenlabel.cache import content_hash
from tokenlabel.feature import Feature, Span, active_documents, occurrences, word_types
from tokenlabel.words import VISIBLE, plain_word, spelling, split_words, trim

quick = settings(max_examples=60, deadline=None)
activations = st.floats(0, 1)
visible = st.text(min_size=1, max_size=30).filter(VISIBLE.search).filter(lambda s: plain_word(s) == s)


@st.composite
def word_features(draw):
    words = draw(st.lists(visible.map(trim), min_size=2, max_size=12, unique_by=spelling))
    values = draw(st.lists(activations, min_size=len(words), max_size=len(words)))
    assume(any(v >= 0.5 for v in values) and any(v < 0.5 for v in values))
    return Feature.from_words("f", dict(zip(words, values)))


@st.composite
def span_lists(draw, text):
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6, unique=True)))
    pairs = draw(st.sampled_from([list(zip(cuts[::2], cuts[1::2])), list(zip(cuts, cuts[1:]))]))
    return [(s, e, draw(activations)) for s, e in pairs if VISIBLE.search(text, s, e)]


@st.composite
def text_features(draw):
    texts = draw(st.lists(visible, max_size=5))
    spans = [draw(span_lists(text)) for text in texts]
    # at least one active and one inactive word, whatever the rest is
    return Feature.from_texts("f", [*texts, "a saw"], [*spans, [(2, 5, 1.0)]])


@quick
@given(word_features() | text_features())
def test_jsonl_round_trip(tmp_path_factory, feature):
    path = tmp_path_factory.mktemp("jsonl") / "f.jsonl"
    assert feature.to_jsonl(path) == path
    assert Feature.from_jsonl(path) == feature
    assert [p.name for p in path.parent.iterdir()] == ["f.jsonl"]


def test_a_file_may_have_blank_lines_windows_line_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "tools.jsonl"
    path.write_bytes('\ufeff{"word": "saw", "activation": 1}\r\n\r\n{"word": "über", "activation": 0.25}\r\n'.encode())
    feature = Feature.from_jsonl(path)
    assert feature == Feature.from_words("tools", ["saw"], {"über": 0.25})
    assert Feature.from_jsonl(path, name="other").name == "other"


@quick
@given(st.data(), text_features())
def test_the_order_of_spans_does_not_matter(data, feature):
    shuffled = [data.draw(st.permutations(spans)) for spans in feature.spans]
    assert Feature.from_texts("f", feature.texts, shuffled) == feature


def test_words_are_trimmed_and_agreeing_duplicates_merged():
    feature = Feature.from_words("f", ["saw", " saw ", "axe"], {"tree": 0, "Saw": 0.1})
    assert feature.texts == ("saw", "axe", "tree", "Saw")
    assert feature.spans[3] == (Span(0, 3, 0.1),)
    assert feature.isolated


@pytest.mark.parametrize("active, inactive, message", [
    (["saw", "axe"], ["tree", "saw"], r"word 3 \('saw'\): 'saw' has activation 0 here and 1 at word 0"),
    ({"saw": 0.7}, {"saw ": 0.2}, r"'saw' has activation 0.2 here and 0.7"),
    (["saw", " "], ["tree"], r"word 1 \(' '\): ' ' is empty"),
    (["saw", 3], ["tree"], r"word 1 .*expected a string, got 3"),
    (["saw"], [], "nothing inactive"),
    ([], ["saw"], "nothing active"),
    ({"saw": 0.4}, ["tree"], "nothing active"),
    ({"saw": float("nan")}, ["tree"], r"word 0 \('saw'\): activation nan is not in \[0, 1\]; scale"),
    ({"saw": float("inf")}, ["tree"], "activation inf is not in .* fires from 0.5 on"),
    ({"saw": 7.5}, ["tree"], "activation 7.5 is not in .* fires from 0.5 on"),
    ({"saw": -0.1}, ["tree"], "activation -0.1 is not in"),
    ({"saw": "1"}, ["tree"], "activation '1' is not a number"),
    ({"saw": None}, ["tree"], "activation None is not a number"),
    (["saw", "\ud800"], ["tree"], "lone surrogate"),
])
def test_wrong_words_are_refused(active, inactive, message):
    with pytest.raises(ValueError, match=message):
        Feature.from_words("f", active, inactive)


@pytest.mark.parametrize("arguments, message", [
    (("saw", ["tree"]), "active has to be a list, got str 'saw'"),
    ((["saw"], "tree"), "inactive has to be a list, got str 'tree'"),
    ((["saw"], b"tree"), "inactive has to be a list, got bytes"),
    ((3,), "active has to be a list, got int 3"),
    ((pd.DataFrame({"word": ["saw", "tree"], "activation": [1, 0]}),), "DataFrame; give one of its columns"),
])
def test_what_is_no_list_of_words_is_refused_by_name(arguments, message):
    with pytest.raises(TypeError, match=message): Feature.from_words("f", *arguments)


def test_what_is_no_list_of_texts_is_refused_by_name():
    with pytest.raises(TypeError, match="texts has to be a list, got str 'saw'"): Feature.from_texts("f", "saw", [[]])
    with pytest.raises(TypeError, match="spans has to be a list, got NoneType"): Feature.from_texts("f", ["saw"], None)
    with pytest.raises(TypeError, match="offsets has to be a list"): Feature.from_tokens("f", ["a saw"], 3, [[0.0]], 1.0)
    with pytest.raises(ValueError, match="the feature's name: expected a string"): Feature.from_texts(["saw"], ["saw"], [[]])


def test_a_series_is_a_list_of_words_or_a_mapping():
    expected = Feature.from_words("f", ["saw", "axe"], {"tree": 0.25, "sun": 0})
    numbers = pd.Series([0.25, 0], index=["tree", "sun"])
    assert Feature.from_words("f", pd.Series(["saw", "axe"]), numbers) == expected
    assert Feature.from_words("f", pd.Series(["saw", "axe"], dtype=object), numbers.astype("Float64")) == expected
    truths = pd.Series([True, True, False], index=["saw", "axe", "tree"])
    assert Feature.from_words("f", truths) == Feature.from_words("f", ["saw", "axe"], ["tree"])
    with pytest.raises(ValueError, match=r"word 1 \(nan\): expected a string"):
        Feature.from_words("f", pd.Series(["saw", None]), ["tree"])
    with pytest.raises(ValueError, match=r"word 0 \(0\): expected a string, got 0"):
        Feature.from_words("f", pd.Series([1.0, 0.0]))  # its index is no list of words
    with pytest.raises(ValueError, match="has activation 0 here and 1 at"):
        Feature.from_words("f", pd.Series([1, 0], index=["saw", "saw"]))


@pytest.mark.parametrize("one, zero", [(True, False), (np.True_, np.False_), (np.float32(1), np.int64(0)),
                                       (torch.tensor(1.0), torch.tensor(False)), (np.array(1), np.float64(0))])
def test_truth_values_and_scalars_of_numpy_and_pytorch_are_activations(tmp_path, one, zero):
    words = Feature.from_words("f", {"saw": one}, {"tree": zero})
    assert words == Feature.from_words("f", ["saw"], ["tree"])
    assert all(type(s[0].activation) is float for s in words.spans)
    texts = Feature.from_texts("f", ["a saw"], [[(np.int64(2), np.int32(5), one), (0, 1, zero)]])
    assert texts.spans == ((Span(0, 1, 0.0), Span(2, 5, 1.0)),)
    assert Feature.from_jsonl(texts.to_jsonl(tmp_path / "f.jsonl")) == texts
    assert Feature.from_tokens("f", ["a saw"], [[(0, 1), (2, 5)]], [[zero, one]], 0.5) == \
        Feature.from_texts("f", ["a saw"], [[(2, 5, 1.0)]])


def test_strings_of_numpy_become_strings_of_python():
    words = Feature.from_words("f", np.array(["saw", "axe"]), np.array(["tree"]))
    texts = Feature.from_texts("f", np.array(["a saw"]), [[(2, 5, 1)]])
    assert {type(text) for text in words.texts + texts.texts} == {str}


@pytest.mark.parametrize("spans, message", [
    ([(4, 99, 1)], r"text 1 \('The saw is here\.'\): span \[4, 99\): out of range, the text has 16 characters"),
    ([(-4, 3, 1)], r"span \[-4, 3\): out of range"),
    ([(4, 4, 1)], r"span \[4, 4\): empty"),
    ([(7, 4, 1)], r"span \[7, 4\): empty"),
    ([(3, 4, 1)], r"span \[3, 4\): empty"),
    ([(8, 10, 1), (4, 9, 1)], r"text 1 .*spans \[4, 9\) and \[8, 10\) overlap"),
    ([(4, 7, 1), (4, 7, 1)], "overlap"),
    ([(4, 7, float("nan"))], r"text 1 .*span \[4, 7\): activation nan"),
    ([(4, 7, 3.5)], "activation 3.5 is not in .* fires from 0.5 on"),
    ([(4, 7)], r"span \(4, 7\) is not \(start, end, activation\)"),
    ([(4.0, 7.0, 1)], "whole start and end"),
    ([("a", "b", 1)], "whole start and end"),
    ([4, 7, 1], "span 4 is not"),
])
def test_wrong_spans_are_refused(spans, message):
    with pytest.raises(ValueError, match=message):
        Feature.from_texts("f", ["a tree", "The saw is here."], [[(0, 1, 1.0)], spans])


@pytest.mark.parametrize("texts, spans, message", [
    (["a saw", ""], [[(2, 5, 1)], []], r"text 1 \(''\): '' is empty"),
    (["a saw", " \n"], [[(2, 5, 1)], []], "text 1 .* is empty"),
    (["a saw", 5], [[(2, 5, 1)], []], r"text 1 \(5\): expected a string"),
    (["a saw"], [[(2, 5, 1)], []], "1 texts, but spans for 2"),
    (["a saw"], [[(2, 5, 0.4)]], "nothing active"),
    (["a saw"], [[(0, 5, 1)]], "nothing inactive"),
    ([], [], "nothing active"),
])
def test_wrong_texts_are_refused(texts, spans, message):
    with pytest.raises(ValueError, match=message):
        Feature.from_texts("f", texts, spans)


def test_an_activation_of_many_numbers_is_refused():
    with pytest.raises(ValueError, match="is not a number"): Feature.from_words("f", {"saw": np.array([1.0, 1.0])}, ["tree"])


def test_long_texts_are_quoted_in_part():
    with pytest.raises(ValueError, match=r"text 0 \('x+…'\)") as e:
        Feature.from_texts("f", ["x" * 10_000], [[(3, 2, 1)]])
    assert len(str(e.value)) < 150


@quick
@example("00", 0, -1, 0.0)  # text[0:-1] is not empty
@given(visible, st.integers(-40, 40), st.integers(-40, 40), st.floats())
def test_a_span_is_either_refused_or_as_given(text, start, end, activation):
    right = 0 <= start < end <= len(text) and VISIBLE.search(text, start, end) and 0 <= activation <= 1
    spans = [[(start, end, activation)], [(2, 5, 1.0)]]
    if right:
        assert Feature.from_texts("f", [text, "a saw"], spans).spans[0] == (Span(start, end, activation),)
    else:
        with pytest.raises(ValueError, match="^text 0 "):
            Feature.from_texts("f", [text, "a saw"], spans)


GOOD = ['{"word": "saw", "activation": 1}', '{"word": "tree", "activation": 0}']


@pytest.mark.parametrize("lines, message", [
    ([*GOOD, '{"word": "saw", '], r"f.jsonl: line 3: not JSON, .* at column 17"),
    ([*GOOD, '"saw"'], "line 3: expected an object with word and activation, or with text and spans, got 'saw'"),
    ([*GOOD, '{"word": "axe"}'], r"line 3: expected an object .* got \['word'\]"),
    ([*GOOD, '{"word": "axe", "activation": 1, "note": ""}'], "line 3: expected an object"),
    ([*GOOD, "", '{"word": "saw", "activation": 0.2}'], "line 4: 'saw' has activation 0.2 here and 1 at line 1"),
    ([*GOOD, '{"word": "axe", "activation": NaN}'], "line 3: activation nan is not in"),
    ([*GOOD, '{"word": "axe", "activation": "1"}'], "line 3: activation '1' is not a number"),
    ([*GOOD, '{"word": "", "activation": 1}'], "line 3: '' is empty"),
    ([*GOOD, '{"text": "a saw", "spans": []}'], "line 3: words and texts are mixed"),
    (['{"text": "a saw", "spans": [[2, 5, 1]]}', GOOD[0]], "line 2: words and texts are mixed"),
    (['{"text": "a saw", "spans": [[2, 9, 1]]}'], r"line 1: span \[2, 9\): out of range"),
    (["", '{"text": "a saw", "spans": [[2, 5, 1], [4, 5, 1]]}'], "line 2: spans .* overlap"),
    (['{"text": "a saw", "spans": 5}'], "line 1: expected a list of spans, got 5"),
    (['{"text": "a saw", "spans": [[2, 5]]}'], r"line 1: span \[2, 5\] is not \(start, end, activation\)"),
    (['{"text": null, "spans": []}'], "line 1: expected a string, got None"),
    ([*GOOD, '{"word": "axe", "activation": true}'], "line 3: activation true is not a number; write 1"),
    ([*GOOD, '{"word": "axe", "activation": 0, "activation": 1}'], "line 3: the key 'activation' is there twice"),
    ([*GOOD, '{"word": "axe", "activation": 1e999}'], "line 3: activation inf is not in"),
    ([*GOOD, '{"word": "axe", "activation": %s}' % ("9" * 5000)], "line 3: activation inf is not in"),
    ([*GOOD, '{"word": "\u200b\u00ad", "activation": 1}'], "line 3: .* is empty, it has no visible character"),
    ([*GOOD, '{"word": "sa\u00adw", "activation": 0}'], "line 3: .* has activation 0 here and 1 at line 1"),
    ([*GOOD, "[" * 100_000], "line 3: .* nested too deep"),
    (['{"text": "a saw", "spans": [[true, 5, 1]]}'], r"line 1: span \[True, 5, 1\] is not .* whole start and end"),
    (['{"text": "a saw", "spans": [[2, 5, true]]}'], "line 1: activation true is not a number; write 1"),
    (['{"text": "a 👨\u200d👩 saw", "spans": [[3, 4, 1]]}'], r"line 1: span \[3, 4\): empty, it covers no visible character"),
    (['{"text": "a saw", "spans": %s}' % ([[0] * 9999] * 99)], r"line 1: span \[0, 0, .*\] is not \(start"),
    (GOOD[:1], "f.jsonl: feature 'f' has nothing inactive"),
    ([""], "f.jsonl: the file is empty"),
])
def test_an_error_in_a_file_names_the_line(tmp_path, lines, message):
    (tmp_path / "f.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as error:
        Feature.from_jsonl(tmp_path / "f.jsonl")
    assert len(str(error.value)) < 240 and str(error.value).isprintable()


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(GOOD[0].encode() + b"\n" + '{"word": "über", "activation": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^f.jsonl: the file is not in UTF-8 \(line 2, near '.*word\": \"\ufffdber\", .*'\); save it"):
        Feature.from_jsonl(tmp_path / "f.jsonl")


def test_a_script_without_spaces_has_a_word_for_each_character():
    cats = Feature.from_texts("cats", ["我喜欢猫", "猫在这里"], [[(3, 4, 1.0)], [(0, 1, 1.0)]])
    assert [[active for _, active in document] for document in occurrences(cats)] == [[0, 0, 0, 1], [1, 0, 0, 0]]


@quick
@given(st.integers(2, 30), st.integers(2, 30), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_is_stratified_and_leaves_both_classes_on_both_sides(active, inactive, share, seed):
    words = [[f"a{i}" for i in range(active)], [f"i{i}" for i in range(inactive)]]
    heldout = Feature.from_words("f", *words).heldout_types(share, seed)
    for n, letter in ((active, "a"), (inactive, "i")):
        drawn = sum(kind[0] == letter for kind in heldout)
        assert 1 <= drawn <= n - 1 and abs(drawn - share * n) <= 1
    assert heldout == Feature.from_words("f", *(row[::-1] for row in words)).heldout_types(share, seed)


def test_a_split_needs_two_types_of_each_class():
    with pytest.raises(ValueError, match=r"2 active word types, and there are \['monday'\]"):
        Feature.from_words("f", ["Monday", "MONDAY", "monday"], ["May", "June"]).heldout_types()
    with pytest.raises(ValueError, match="2 inactive word types"):
        Feature.from_words("f", ["Monday", "Friday"], ["June"]).heldout_types()
    for share in (0, 1, 2, float("nan")):
        with pytest.raises(ValueError, match="not between 0 and 1"):
            Feature.from_words("f", ["Monday", "Friday"], ["May", "June"]).heldout_types(share)


def test_documents_of_both_classes_are_found():
    some = Feature.from_texts("f", ["a saw", "a tree"], [[(2, 5, 1.0)], [(2, 6, 0.4)]])
    everywhere = Feature.from_texts("f", ["saw", "a saw", "saws, axe"], [[(0, 3, 1)], [(2, 5, 1)], [(0, 9, 1)]])
    assert active_documents(some) == [True, False] and active_documents(everywhere) == [True, False, True]
    assert active_documents(Feature.from_words("f", ["saw"], ["tree", "sun"])) == [True, False, False]


def test_isolated_tells_the_kinds_apart():
    assert Feature.from_words("f", ["saw"], ["tree"]).isolated
    assert not Feature.from_texts("f", ["a saw"], [[(2, 5, 1)]]).isolated


def test_seeds_make_different_splits():
    feature = Feature.from_words("f", [f"a{i}" for i in range(20)], [f"b{i}" for i in range(20)])
    assert feature.heldout_types(seed=1) == feature.heldout_types(seed=1) != feature.heldout_types(seed=2)


def test_a_type_is_active_if_one_occurrence_is():
    feature = Feature.from_texts("f", ["A saw. We saw it, we SAW."], [[(2, 5, 1.0)]])
    assert word_types(feature) == {"a": False, "saw": True, ".": False, "we": False, "it": False, ",": False}


@pytest.mark.parametrize("offsets, values, threshold, message", [
    ([[(0, 1), (2, 5)]], [[0.0]], 1.0, "text 0 .'a saw'.: 2 tokens, and 1 activations"),
    ([[(0, 1), (2, 5)]], [[0.0, float("nan")]], 1.0, "text 0 .*activation nan is not a finite number"),
    ([[(0, 1), (2, 5)]], [[0.0, 3.0]], 0.0, "threshold 0.0 is not a positive number"),
    ([[(0, 1), (2, 5)]], [], 1.0, "1 texts, offsets for 1 and activations for 0"),
    ([[(0, 1), (2, 5)]], [[0.0, 0.9]], 1.0, "nothing active"),
    ([[(0, 1), (2, 6)]], [[0.0, 3.0]], 1.0, "from 2 to 6, in 5 characters; offsets count characters, not bytes"),
    ([[(0, 1), (-3, 5)]], [[0.0, 3.0]], 1.0, "from -3 to 5"), ([[(0, 1), (5, 2)]], [[0.0, 3.0]], 1.0, "from 5 to 2"),
    ([[(0, 1), (2, 5)]], [["0", "1"]], 1.0, "activation '0' is not a number"),
])
def test_wrong_activations_of_a_network_are_refused(offsets, values, threshold, message):
    with pytest.raises(ValueError, match=message): Feature.from_tokens("f", ["a saw"], offsets, values, threshold)


@pytest.mark.parametrize("name", [None, "", ("t",), "a\ud800"])
def test_a_name_is_a_text(name):
    with pytest.raises(ValueError, match="the feature's name"): Feature.from_words(name, ["saw"], ["sofa"])


@pytest.mark.parametrize("name", ["a\x1b[2J", "two\nlines", "a\u202eb", "a\x9b"])
def test_a_name_has_no_control_characters(name):
    with pytest.raises(ValueError, match="the feature's name: control character") as error:
        Feature.from_words(name, ["saw"], ["sofa"])
    assert str(error.value).isprintable()


def test_no_control_character_of_a_word_or_text_reaches_the_terminal():
    words = Feature.from_words("f", ["sa\x1b[31mw", "a\nb"], ["tr\x9bee", "t\u202eo"])
    texts = Feature.from_texts("f", ["a sa\x1b[31mw\r\x07 b"], [[(2, 9, 1)]])
    for feature in (words, texts):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", str(feature))
    assert r"[sa\x1b[31mw]" in str(words) and "[a⏎b]" in str(words) and r"t\u202eo" in str(words)


def test_words_that_look_the_same_are_one_word():
    same = ["caf\u00e9", "cafe\u0301", "ca\u00adf\u00e9", "\ufeffcaf\u00e9\u200b"]
    assert Feature.from_words("f", same, ["tea"]).texts == ("caf\u00e9", "tea")
    with pytest.raises(ValueError, match="has activation 0 here and 1 at word 0"): Feature.from_words("f", same[:1], same[1:])
    with pytest.raises(ValueError, match="a word is given twice"):
        Feature("f", "words", same[:2], [[(0, len(word), 1.0)] for word in same[:2]])
    assert Feature.from_words("f", ["Donau\u00addampf"], ["Weg"]).texts[0] == "Donau\u00addampf"  # its hyphen stays
    assert len(Feature.from_words("f", ["Turkey", "turkey"], ["tea"]).texts) == 3
    assert len(Feature.from_words("f", ["👨\u200d👩", "👨👩", "می\u200cخواهم", "میخواهم"], ["tea"]).texts) == 5  # they look different


def test_a_word_with_hidden_characters_is_one_word_of_a_text():
    words = {"Donau\u00addampf\u00adschiff", "צה״ל", "コーヒー", "👨\u200d👩\u200d👧\u200d👦", "1\ufe0f\u20e3", "🇩🇪", "می\u200cخواهم"}
    for word in words:
        feature = Feature.from_texts("f", [f"a {word} b"], [[(2, 2 + len(word), 1)]])
        assert [active for _, active in occurrences(feature)[0]] == [False, True, False], ascii(word)


def test_held_out_types_ignore_how_accents_are_encoded():
    feature = Feature.from_texts("f", ["caf\u00e9 tea", "cafe\u0301 mat\u00e9 now"], [[(0, 4, 1)], [(6, 10, 1)]])
    assert word_types(feature) == {"caf\u00e9": True, "tea": False, "mat\u00e9": True, "now": False}


@pytest.mark.parametrize("active, inactive, message", [
    (["Ġapple", "Ġfig"], ["Ġcar", "Ġtree"], "2 of 2 words are in a vocabulary's spelling; give 'apple' for 'Ġapple'"),
    (["▁apple", "▁fig", "nana"], ["car"], "2 of 3 words .* 'fig' for '▁fig'"),
    (["apple", "fig"], ["Ġcar", "Ġtree", "way"], "2 of 3 words .* 'car' for 'Ġcar'"),
    (["##ing", "##ed"], ["car"], "2 of 2 words .* 'ing' for '##ing'"),
    (["cafÃ©", "æĹ¥æľ¬"], ["car"], "2 of 2 words .* 'café' for 'cafÃ©', '日本' for 'æĹ¥æľ¬'"),
    (["app</w>", "fig</w>"], ["car"], "'app' for 'app</w>'"),
])
def test_words_in_a_vocabularys_spelling_are_refused_and_the_words_offered(active, inactive, message):
    with pytest.raises(ValueError, match=message) as error: Feature.from_words("f", active, inactive)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_text_in_a_vocabularys_spelling_is_refused():
    for text in ("TheĠsawĠisĠhere", "▁The▁saw", "ĠThe Ġsaw Ġis"):
        with pytest.raises(ValueError, match="are in a vocabulary's spelling"): Feature.from_texts("f", [text], [[(0, 3, 1)]])


def test_words_with_letters_that_vocabularies_also_use_are_words():
    Feature.from_words("f", ["Ġgantija", "Mnajdra", "Tarxien", "Skorba"], ["Malta"])
    Feature.from_words("f", ["Ġorġ", "Ġużeppi"], ["Paul"])
    Feature.from_words("f", ["stół", "pół", "naïve", "Ãb", "C##", "a@b"], ["#1"])


def test_spans_are_found_in_linear_time():
    def seconds(n):
        text, start = "saw " * n, time.process_time()
        offsets = [(4 * k, 4 * k + 4) for k in range(n)]
        feature = Feature.from_tokens("f", [text], [offsets], [[float(k % 2) for k in range(n)]], 0.5)
        assert len(feature.spans[0]) == n // 2
        return time.process_time() - start
    seconds(100)
    assert min(seconds(20_000) for _ in range(2)) < 50 * min(seconds(2_000) for _ in range(3))


def test_plain_text_shows_the_active_parts_in_brackets():
    feature = Feature.from_texts("tools", ["A saw and\nan axe."], [[(2, 5, 1.0), (13, 16, 0.3)]])
    assert str(feature) == repr(feature) == "tools: 1 texts, 1 of 5 words active\n  A [saw] and⏎an axe."
    words = Feature.from_words("tools", ["saw"], ["tree"])
    assert str(words) == "tools: 1 active and 1 inactive words\n  [saw]  tree"


def test_html_is_escaped_and_colored_by_activation():
    feature = Feature.from_texts("<b>", ["<i> saw & axe"], [[(4, 7, 1.0), (10, 13, 0.5)]])
    html = feature._repr_html_()
    assert "&lt;b&gt;" in html and "&lt;i&gt;" in html and " &amp; " in html and "<i>" not in html
    assert re.search(r"rgba\(\d+, \d+, \d+, 0\.50\)[^>]*>saw<", html)
    assert re.search(r"rgba\(\d+, \d+, \d+, 0\.25\)[^>]*>axe<", html)
    assert not re.search(r"[^-]color:", html)  # the theme's own, be it dark or light


def test_long_features_are_shown_in_part():
    words = Feature.from_words("f", [f"a{i}" for i in range(150)], [f"b{i}" for i in range(150)])
    for view in (str(words), words._repr_html_()):
        assert "... and 220 more" in view and len(re.findall(r"\b[ab]\d+\b", view)) == 80
        assert "a0" in view and "b149" in view
    texts = Feature.from_texts("f", [f"text{i} saw " + "x" * 1000 for i in range(50)], [[(7, 10, 1.0)]] * 50)
    for view in (str(texts), texts._repr_html_()):
        assert "... and 30 more" in view and view.count("text") - view.count("text-align") - view.count("texts") == 20
        assert len(view) < 20_000


def test_features_are_compared_by_content_and_cannot_be_changed():
    one, two = (Feature.from_words("f", ["saw"], ["tree"]) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    with pytest.raises(AttributeError):
        one.name = "g"


def test_a_source_is_shown_on_one_line_and_is_no_content():
    plain, source = Feature.from_words("f", ["saw"], ["tree"]), {"model": "gpt2", "layer": 6, "index": 0,
                                                                 "explanations": ["<b>\x1b[2J\nsaws" + "!" * 500, "axes"]}
    one = replace(plain, source=source)
    assert one == plain and hash(one) == hash(plain) and plain.source == {} and content_hash({"f": one}) == content_hash({"f": plain})
    line = str(one).splitlines()[1]
    assert line.startswith("  from model gpt2, layer 6, index 0; explained as ") and line.endswith(" and 1 more")
    assert len(line) < 200 and line.isprintable() and "&lt;b&gt;" in one._repr_html_() and "from" not in str(plain)


@pytest.mark.parametrize("fields, message", [
    (dict(mode="word"), "mode 'word' is not 'words' or 'texts'"),
    (dict(texts=("saw", "saw")), "a word is given twice"),
    (dict(spans=((Span(0, 2, 1.0),), (Span(0, 4, 0.0),))), "one span, which covers all of it"),
    (dict(texts=("saw ", "tree"), spans=((Span(0, 4, 1.0),), (Span(0, 4, 0.0),))), "a word is trimmed"),
    (dict(texts=(" saw", "tree"), spans=((Span(0, 3, 1.0),), (Span(0, 4, 0.0),))), "a word is trimmed"),
])
def test_the_record_itself_is_checked(fields, message):
    good = dict(name="f", mode="words", texts=("saw", "tree"), spans=((Span(0, 3, 1.0),), (Span(0, 4, 0.0),)))
    Feature(**good)
    if "texts" in fields and "spans" not in fields: fields["spans"] = (good["spans"][0],) * 2
    with pytest.raises(ValueError, match=message):
        Feature(**(good | fields))


def test_the_file_format_is_what_the_documentation_says(tmp_path):
    Feature.from_words("f", ["saw"], {"tree": 0.25}).to_jsonl(tmp_path / "w.jsonl")
    assert [json.loads(line) for line in (tmp_path / "w.jsonl").read_text().splitlines()] == \
        [{"word": "saw", "activation": 1.0}, {"word": "tree", "activation": 0.25}]
    Feature.from_texts("f", ["a säw"], [[(2, 5, 1)]]).to_jsonl(tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_text(encoding="utf-8") == '{"text": "a säw", "spans": [[2, 5, 1.0]]}\n'


def test_only_an_apostrophe_inside_a_word_joins_its_sides():
    text = "She said 'cat' and the dogs' tails don't wag."
    offsets = [match.span() for match in re.finditer(r" ?[A-Za-z]+| ?[^A-Za-z\s]", text)]
    raw = [float(text[a:b].strip() in ("cat", "dogs", "don")) for a, b in offsets]
    feature = Feature.from_tokens("f", [text], [offsets], [raw], 0.5)
    [spans] = feature.spans
    assert [text[span.start:span.end] for span in spans] == ["cat", "dogs", "don't"]
