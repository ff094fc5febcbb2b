import json
import os
import re
import unicodedata

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from hypothesis import assume, example, given, settings, strategies as st
from tokenizers import normalizers

from tokenlabel.feature import Feature, Span, draw_types, occurrences, pieces, token_ranges, tokenize, word_types
from tokenlabel.lm import load_lm

quick = settings(max_examples=60, deadline=None)
activations = st.floats(0, 1)
visible = st.text(min_size=1, max_size=30).filter(lambda s: s.strip())


@st.composite
def word_features(draw):
    words = draw(st.lists(visible.map(str.strip), min_size=2, max_size=12, unique=True))
    values = draw(st.lists(activations, min_size=len(words), max_size=len(words)))
    assume(any(v >= 0.5 for v in values) and any(v < 0.5 for v in values))
    return Feature.from_words("f", dict(zip(words, values)))


@st.composite
def span_lists(draw, text):
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6, unique=True)))
    pairs = draw(st.sampled_from([list(zip(cuts[::2], cuts[1::2])), list(zip(cuts, cuts[1:]))]))
    return [(s, e, draw(activations)) for s, e in pairs if text[s:e].strip()]


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


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    feature = Feature.from_words("f", ["saw"], ["tree"])
    path = feature.to_jsonl(tmp_path / "f.jsonl")
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Feature.from_words("f", ["other"], ["words"]).to_jsonl(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@quick
@given(st.data(), text_features())
def test_the_order_of_spans_does_not_matter(data, feature):
    shuffled = [data.draw(st.permutations(spans)) for spans in feature.spans]
    assert Feature.from_texts("f", feature.texts, shuffled) == feature


def test_words_are_trimmed_and_agreeing_duplicates_merged():
    feature = Feature.from_words("f", ["saw", " saw ", "axe"], {"tree": 0, "Saw": 0.1})
    assert feature.texts == ("saw", "axe", "tree", "Saw")
    assert feature.spans[3] == (Span(0, 3, 0.1),)
    assert feature.mode == "words"


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


def test_a_string_is_no_list_of_words():
    with pytest.raises(TypeError, match="list of words, got the string 'saw'"):
        Feature.from_words("f", "saw", ["tree"])
    with pytest.raises(TypeError, match="list of texts"):
        Feature.from_texts("f", "saw", [[]])


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


def test_long_texts_are_quoted_in_part():
    with pytest.raises(ValueError, match=r"text 0 \('x+…'\)") as e:
        Feature.from_texts("f", ["x" * 10_000], [[(3, 2, 1)]])
    assert len(str(e.value)) < 150


@quick
@example("00", 0, -1, 0.0)  # text[0:-1] is not empty
@given(visible, st.integers(-40, 40), st.integers(-40, 40), st.floats())
def test_a_span_is_either_refused_or_as_given(text, start, end, activation):
    right = 0 <= start < end <= len(text) and text[start:end].strip() and 0 <= activation <= 1
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
    ([*GOOD, '{"word": "axe", "activation": NaN}'], "line 3: activation nan"),
    ([*GOOD, '{"word": "axe", "activation": "1"}'], "line 3: activation '1' is not a number"),
    ([*GOOD, '{"word": "", "activation": 1}'], "line 3: '' is empty"),
    ([*GOOD, '{"text": "a saw", "spans": []}'], "line 3: one of the texts, but the lines before are words"),
    (['{"text": "a saw", "spans": [[2, 5, 1]]}', GOOD[0]], "line 2: one of the words, but the lines before are texts"),
    (['{"text": "a saw", "spans": [[2, 9, 1]]}'], r"line 1: span \[2, 9\): out of range"),
    (["", '{"text": "a saw", "spans": [[2, 5, 1], [4, 5, 1]]}'], "line 2: spans .* overlap"),
    (['{"text": "a saw", "spans": 5}'], "line 1: spans 5 are no list"),
    (['{"text": "a saw", "spans": [[2, 5]]}'], r"line 1: span \[2, 5\] is not \(start, end, activation\)"),
    (['{"text": null, "spans": []}'], "line 1: expected a string, got None"),
    (GOOD[:1], "f.jsonl: feature 'f' has nothing inactive"),
    ([""], "f.jsonl: the file is empty"),
])
def test_an_error_in_a_file_names_the_line(tmp_path, lines, message):
    (tmp_path / "f.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        Feature.from_jsonl(tmp_path / "f.jsonl")


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(GOOD[0].encode() + b"\n" + '{"word": "über", "activation": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        Feature.from_jsonl(tmp_path / "f.jsonl")


def test_pieces_are_words_and_runs_of_punctuation():
    assert [kind for _, _, kind in pieces("Straße?! It's 3.5, 我们。")] == \
        ["strasse", "?!", "it", "'", "s", "3", ".", "5", ",", "我", "们", "。"]
    # marks belong to their letters
    assert [kind for _, _, kind in pieces("हिन्दी cafe\u0301s")] == ["हिन्दी", "cafe\u0301s"]
    assert [kind for _, _, kind in pieces("I ❤\ufe0flove")] == ["i", "❤\ufe0f", "love"]


def test_a_script_without_spaces_has_a_word_for_each_character():
    cats = Feature.from_texts("cats", ["我喜欢猫", "猫在这里"], [[(3, 4, 1.0)], [(0, 1, 1.0)]])
    assert sum(active for _, active in occurrences(cats)) == 2 and len(occurrences(cats)) == 8


@quick
@given(visible)
def test_pieces_cover_all_that_is_visible_once(text):
    assert "".join(text[s:e] for s, e, _ in pieces(text)) == "".join(text.split())


@quick
@given(st.integers(2, 30), st.integers(2, 30), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_is_stratified_and_leaves_both_classes_on_both_sides(active, inactive, share, seed):
    types = {f"a{i}": True for i in range(active)} | {f"i{i}": False for i in range(inactive)}
    heldout = draw_types(types, share, seed)
    for n, letter in ((active, "a"), (inactive, "i")):
        drawn = sum(kind[0] == letter for kind in heldout)
        assert 1 <= drawn <= n - 1 and abs(drawn - share * n) <= 1
    assert heldout == draw_types(dict(reversed(types.items())), share, seed)


def test_a_split_needs_two_types_of_each_class():
    with pytest.raises(ValueError, match=r"2 active word types, and there are \['monday'\]"):
        Feature.from_words("f", ["Monday", "MONDAY", "monday"], ["May", "June"]).heldout_types()
    with pytest.raises(ValueError, match="2 inactive word types"):
        Feature.from_words("f", ["Monday", "Friday"], ["June"]).heldout_types()
    for share in (0, 1, 2, float("nan")):
        with pytest.raises(ValueError, match="not between 0 and 1"):
            Feature.from_words("f", ["Monday", "Friday"], ["May", "June"]).heldout_types(share)


def test_seeds_make_different_splits():
    feature = Feature.from_words("f", [f"a{i}" for i in range(20)], [f"b{i}" for i in range(20)])
    assert feature.heldout_types(seed=1) == feature.heldout_types(seed=1) != feature.heldout_types(seed=2)


def test_a_type_is_active_if_one_occurrence_is():
    feature = Feature.from_texts("f", ["A saw. We saw it, we SAW."], [[(2, 5, 1.0)]])
    assert word_types(feature) == {"a": False, "saw": True, ".": False, "we": False, "it": False, ",": False}


def test_words_of_one_type_stay_on_one_side(lm):
    feature = Feature.from_words("days", ["Monday", "MONDAY", "Friday", "friday"], ["May", "may", "June", "July"])
    data = tokenize(feature, lm, feature.heldout_types(share=0.5, seed=0))
    sides = {kind: {bool(h) for k, h in zip(data.types, data.heldout) if k == kind} for kind in data.types}
    assert set(data.types) == {"monday", "friday", "may", "june", "july"}
    assert all(len(side) == 1 for side in sides.values()) and {True} in sides.values() and {False} in sides.values()


def check_layout(data, lm):
    flat = [data.sequences[s][p] for s, p in zip(data.token_sequence, data.token_position)]
    assert flat == [token for ids in data.sequences for token in ids]
    assert sorted(set(data.token_unit.tolist())) == list(range(len(data.activation)))
    assert len(data.types) == len(data.strings) == len(data.activation) == len(data.heldout)
    assert data.token_unit.dtype == data.token_sequence.dtype == data.token_position.dtype == torch.long
    assert data.activation.dtype == torch.float32 and data.heldout.dtype == torch.bool


@quick
@given(word_features())
def test_a_word_is_one_unit(tiny_lm, feature):
    lm = tiny_lm("llama")
    data = tokenize(feature, lm)
    check_layout(data, lm)
    assert data.strings == feature.texts and (data.token_unit == data.token_sequence).all()
    assert data.activation.tolist() == [np.float32(spans[0].activation) for spans in feature.spans]
    assert [lm.tokenizer.decode(ids) for ids in data.sequences] == [" " + word for word in feature.texts]


@quick
@given(text_features(), st.integers(0, 3))
def test_units_are_runs_of_tokens_and_a_type_is_on_one_side(tiny_lm, feature, seed):
    lm = tiny_lm("gpt2")
    types = word_types(feature)
    heldout = frozenset(list(types)[seed::2])
    try:
        data = tokenize(feature, lm, heldout)
    except ValueError as e:
        assert "cuts through the token" in str(e)
        return
    check_layout(data, lm)
    assert [lm.tokenizer.decode(ids) for ids in data.sequences] == [" " + text for text in feature.texts]
    assert ((data.token_unit.diff() == 0) | (data.token_unit.diff() == 1)).all() and data.token_unit[0] == 0
    units = range(len(data.activation))
    assert all(len(data.token_sequence[data.token_unit == u].unique()) == 1 for u in units), "no unit spans two texts"
    assert set(data.types) <= {*types, ""}
    assert data.heldout.tolist() == [kind in heldout for kind in data.types]
    assert bool((data.activation >= 0.5).any()) and bool((data.activation < 0.5).any())


def test_parts_of_a_contraction_go_together_as_no_two_tokenizers_divide_them_alike(lm):
    text = "I don't like cats."
    offsets = [m.span() for m in re.finditer(r"\w+|[^\w\s]", text)]
    feature = Feature.from_tokens("f", [text], [offsets], [[3.0 * (text[a:b] == "t") for a, b in offsets]], 1.0)
    assert [text[s.start:s.end] for s in feature.spans[0]] == ["don't"]
    tokenize(feature, lm)


@quick
@given(st.lists(visible, min_size=1, max_size=4), st.data(), st.floats(0.01, 100), st.floats(0.1, 10))
def test_a_word_fires_if_one_of_the_networks_tokens_on_it_does(tiny_lm, texts, data, threshold, scale):
    lm = tiny_lm("gpt2")
    texts = [*texts, "a saw"]
    offsets = [token_ranges(text, lm)[1] for text in texts]
    raw = [data.draw(st.lists(st.floats(-1, 200), min_size=len(row), max_size=len(row))) for row in offsets]
    raw[-1] = [0.0 if end <= 1 else threshold for _, end in offsets[-1]]
    feature = Feature.from_tokens("f", texts, offsets, raw, threshold)
    for text, spans, row, values in zip(texts, feature.spans, offsets, raw):
        firing = [pair for pair, x in zip(row, values) if x >= threshold]
        for start, end, _ in pieces(text):
            here = any(a < end and start < b for a, b in firing)
            there = any(s.activation >= 0.5 and s.start < end and start < s.end for s in spans)
            assert there >= here  # words that share a token go together
        for span in spans:
            inside = [x for (a, b), x in zip(row, values) if a < span.end and span.start < b]
            assert span.activation == pytest.approx(min(1, max(inside) / threshold / 2))
    tokenize(feature, lm)  # no token of a model with the same tokenizer is cut
    scaled = Feature.from_tokens("f", texts, offsets, [[scale * x for x in row] for row in raw], scale * threshold)
    for spans, others in zip(feature.spans, scaled.spans):
        assert [s[:2] for s in spans] == [s[:2] for s in others]


@pytest.mark.parametrize("offsets, values, threshold, message", [
    ([[(0, 1), (2, 5)]], [[0.0]], 1.0, "text 0 .'a saw'.: 2 tokens, and 1 activations"),
    ([[(0, 1), (2, 5)]], [[0.0, float("nan")]], 1.0, "text 0 .*activation nan is not a finite number"),
    ([[(0, 1), (2, 5)]], [[0.0, 3.0]], 0.0, "threshold 0.0 is not a positive number"),
    ([[(0, 1), (2, 5)]], [], 1.0, "1 texts, offsets for 1 and activations for 0"),
    ([[(0, 1), (2, 5)]], [[0.0, 0.9]], 1.0, "nothing active"),
    ([[(0, 1), (2, 6)]], [[0.0, 3.0]], 1.0, "from 2 to 6, in 5 characters; offsets count characters, not bytes"),
    ([[(0, 1), (-3, 5)]], [[0.0, 3.0]], 1.0, "from -3 to 5"), ([[(0, 1), (5, 2)]], [[0.0, 3.0]], 1.0, "from 5 to 2"),
    ([[(0, 1), (2, 5)]], [["0", "1"]], 1.0, "activation '0' is not a finite number"),
])
def test_wrong_activations_of_a_network_are_refused(offsets, values, threshold, message):
    with pytest.raises(ValueError, match=message): Feature.from_tokens("f", ["a saw"], offsets, values, threshold)


@pytest.mark.parametrize("name", [None, "", ("t",), "a\ud800"])
def test_a_name_is_a_text(name):
    with pytest.raises(ValueError, match="the feature's name"): Feature.from_words(name, ["saw"], ["sofa"])


def test_a_control_token_in_the_data_is_named(lm):
    [control, *_] = sorted(lm.control)
    word = lm.token(control)
    with pytest.raises(ValueError, match="has the control token"): tokenize(Feature.from_words("f", [word], ["sofa"]), lm)
    with pytest.raises(ValueError, match="has the control token"):
        tokenize(Feature.from_texts("f", [f"a saw {word} here", "no"], [[(2, 5, 1.0)], []]), lm)


@pytest.fixture(scope="module")
def sentences():
    texts = ["The hippopotamus saw 24 dogs.", "Ein Hund; 我们都喜欢狗。", "  No\n\ndog  was there ..."]
    return Feature.from_texts("f", texts, [[(4, 16, 1.0), (21, 23, 0.5), (24, 28, 0.8)], [(4, 8, 1.0), (15, 16, 1.0)],
                                           [(6, 9, 1.0)]])


def test_units_of_a_text_rejoin_to_the_text(lm, sentences):
    data = tokenize(sentences, lm)
    check_layout(data, lm)
    for ids, text in zip(data.sequences, sentences.texts):
        assert lm.tokenizer.decode(ids) == " " + text
        assert list(ids) == lm.encode(" " + text)


def test_tokens_take_the_activation_of_their_span(lm, sentences):
    data = tokenize(sentences, lm, heldout=frozenset({"hippopotamus", "was"}))
    active = {}
    for kind, a in zip(data.types, data.activation.tolist()):
        if a: active.setdefault(kind, set()).add(round(a, 3))
    assert active == {"hippopotamus": {1.0}, "24": {0.5}, "dogs": {0.8}, "hund": {1.0}, "狗": {1.0},
                      "dog": {1.0}}
    for kind, h in zip(data.types, data.heldout): assert bool(h) == (kind in {"hippopotamus", "was"})
    # all tokens of a word are one unit, so are the digits of a number with the space before them; each Chinese character
    # is one of its own
    assert [data.strings[data.types.index(kind)] for kind in ("hippopotamus", "24")] == ["·hippopotamus", "·24"]
    assert (data.token_unit == data.types.index("hippopotamus")).sum() > 1
    chinese = [string for string, kind in zip(data.strings, data.types) if kind and kind in "我们都喜欢狗"]
    assert len(chinese) > 2 and "".join(chinese).strip("·") == "我们都喜欢狗"
    assert {a for k, a in zip(data.types, data.activation.tolist()) if k == ""} == {0.0}


def test_a_word_of_a_script_without_spaces_is_not_on_both_sides_of_the_split(lm):
    texts = ["แมวกินปลา", "แมวนอนหลับ", "หมากินข้าว", "หมานอนหลับ", "ฉันเห็นแมว", "ฉันกินข้าว", "เขาเห็นปลา", "เขานอนหลับ"]
    cats = [[(at, at + 3, 1.0)] if (at := text.find("แมว")) >= 0 else [] for text in texts]
    feature = Feature.from_texts("cat", texts, cats)
    for seed in range(5):
        data = tokenize(feature, lm, feature.heldout_types(0.3, seed))
        string = [text.removeprefix("·") for text in data.strings]
        assert not {s for s, out in zip(string, data.heldout) if out} & {s for s, out in zip(string, data.heldout) if not out}


def test_what_a_tokenizer_composes_is_covered_whole():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    lm = load_lm(tiny_model("llama"), tokenizer=tokenizer)
    for word in ("Việt", "café", "한국", "naïve"):
        text = unicodedata.normalize("NFD", f"the {word} is")
        covered = {i for start, end in token_ranges(text, lm)[1] for i in range(start, end)}
        assert covered >= {i for i, character in enumerate(text) if character != " "}, word
    text = unicodedata.normalize("NFD", "the Việt is")
    data = tokenize(Feature.from_texts("x", [text], [[(0, 3, 1.0)]]), lm)
    assert data.types == ("the", text.split()[1].casefold(), "is")  # one unit each


def test_a_span_that_cuts_a_token_is_refused_with_the_nearest_that_does_not(lm):
    feature = Feature.from_texts("f", ["a saw", "The dogs are here."], [[(2, 5, 1.0)], [(4, 7, 1.0)]])
    with pytest.raises(ValueError) as e:
        tokenize(feature, lm)
    message = str(e.value)
    assert "text 1 ('The dogs are here.')" in message and "span [4, 7) 'dog'" in message
    assert "the token [4, 8) 'dogs'" in message
    near = re.search(r"nearest span that does not is \[(\d+), (\d+)\) 'dogs'", message)
    tokenize(Feature.from_texts("f", feature.texts, [[(2, 5, 1.0)], [(*map(int, near.groups()), 1.0)]]), lm)


@quick
@given(st.data(), st.text("ab the.", min_size=3, max_size=20).filter(str.strip))
def test_the_nearest_span_cuts_no_token(tiny_lm, data, text):
    lm = tiny_lm("gpt2")
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    assume(text[start:end].strip())
    feature = lambda s, e: Feature.from_texts("f", [text, "a saw"], [[(s, e, 1.0)], [(2, 5, 1.0)]])
    try:
        tokenize(feature(start, end), lm)
    except ValueError as error:
        near = re.search(r"nearest span that does not is \[(\d+), (\d+)\)", str(error))
        tokenize(feature(*map(int, near.groups())), lm)


def test_unknown_heldout_types_are_refused(lm):
    with pytest.raises(ValueError, match=r"\['Saw'\] are not among the word types"):
        tokenize(Feature.from_words("f", ["saw"], ["tree"]), lm, heldout=frozenset({"Saw"}))


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
