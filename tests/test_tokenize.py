import re
import unicodedata
import warnings

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_model, tiny_tokenizer
from hypothesis import assume, given, strategies as st
from test_feature import quick, text_features, visible, word_features
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from tokenlabel.feature import Feature, split_words, word_types
from tokenlabel.lm import load_lm
from tokenlabel.tokenize import token_ranges, tokenize


def test_words_of_one_type_stay_on_one_side(lm):
    feature = Feature.from_words("days", ["Monday", "MONDAY", "Friday", "friday"], ["May", "may", "June", "July"])
    data = tokenize(feature, lm, feature.heldout_types(share=0.5, seed=0))
    sides = {kind: {bool(h) for k, h in zip(data.types, data.heldout) if k == kind} for kind in data.types}
    assert set(data.types) == {"monday", "friday", "may", "june", "july"}
    assert all(len(side) == 1 for side in sides.values()) and {True} in sides.values() and {False} in sides.values()


def check_layout(data, lm):
    flat = [data.documents[s][p] for s, p in zip(data.token_document, data.token_position)]
    assert flat == [token for ids in data.documents for token in ids]
    assert sorted(set(data.token_example.tolist())) == list(range(len(data.activation)))
    assert len(data.types) == len(data.strings) == len(data.activation) == len(data.heldout)
    assert data.token_example.dtype == data.token_document.dtype == data.token_position.dtype == torch.long
    assert data.activation.dtype == torch.float32 and data.heldout.dtype == torch.bool


def test_the_document_of_an_example_is_that_of_its_tokens(tiny_lm):
    texts = ["a saw, a cat", "the dog", "saw it"]
    data = tokenize(Feature.from_texts("f", texts, [[(2, 5, 1.0)], [], [(0, 3, 1.0)]]), tiny_lm("gpt2"))
    assert (data.example_document[data.token_example] == data.token_document).all()
    assert data.example_document.dtype == torch.long and len(data.example_document) == len(data.activation)


@quick
@given(word_features())
def test_an_isolated_word_is_one_example(tiny_lm, feature):
    lm = tiny_lm("llama")
    data = tokenize(feature, lm)
    check_layout(data, lm)
    assert data.strings == feature.texts and (data.token_example == data.token_document).all()
    assert data.activation.tolist() == [np.float32(spans[0].activation) for spans in feature.spans]
    assert [lm.tokenizer.decode(ids) for ids in data.documents] == [" " + word for word in feature.texts]


@quick
@given(text_features(), st.integers(0, 3))
def test_examples_are_runs_of_tokens_and_a_type_is_on_one_side(tiny_lm, feature, seed):
    lm = tiny_lm("gpt2")
    types = word_types(feature)
    heldout = frozenset(list(types)[seed::2])
    try:
        data = tokenize(feature, lm, heldout)
    except ValueError as e:
        assert "cuts through the token" in str(e)
        return
    check_layout(data, lm)
    assert [lm.tokenizer.decode(ids) for ids in data.documents] == [" " + text for text in feature.texts]
    assert ((data.token_example.diff() == 0) | (data.token_example.diff() == 1)).all() and data.token_example[0] == 0
    examples = range(len(data.activation))
    assert all(len(data.token_document[data.token_example == e].unique()) == 1 for e in examples), "no example spans two texts"
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
        for start, end, _ in split_words(text):
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


def test_tokens_of_a_text_rejoin_to_the_text(lm, sentences):
    data = tokenize(sentences, lm)
    check_layout(data, lm)
    for ids, text in zip(data.documents, sentences.texts):
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
    # all tokens of a word are one example, so are the digits of a number with the space before them; each Chinese character
    # is one of its own
    assert [data.strings[data.types.index(kind)] for kind in ("hippopotamus", "24")] == ["·hippopotamus", "·24"]
    assert (data.token_example == data.types.index("hippopotamus")).sum() > 1
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
    assert [unicodedata.normalize("NFC", kind) for kind in data.types] == ["the", "việt", "is"]  # one example each


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


# --- words that the model reads alike ----------------------------------------------------------------------------------

ENGLISH = ["apple", "pear", "fig", "table", "chair", "lamp"]


def english_lm(kind):
    "A tiny model whose tokenizer knows six English words and the letters; everything else is its unknown token."
    pieces = ["[UNK]", *ENGLISH, *"abcdefghijklmnopqrstuvwxyz"]
    match kind:
        case "wordpiece": base = Tokenizer(models.WordPiece({p: i for i, p in enumerate(
            [*pieces, *(f"##{letter}" for letter in pieces[7:])])}, unk_token="[UNK]"))
        case "unigram": base = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
        case "wordlevel": base = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
        case "bpe": base = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token=None))  # no token at all
    base.normalizer = normalizers.BertNormalizer(lowercase=True)  # also sets Chinese characters apart
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=base, **({"unk_token": "[UNK]"} if kind != "bpe" else {}))
    return load_lm(tiny_model("llama"), tokenizer=tokenizer)


KINDS = ["wordpiece", "unigram", "wordlevel", "bpe"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_of_unknown_words_only_is_refused(kind):
    feature = Feature.from_words("f", ["日本", "中国", "한국", "Ελλάς"], ["🍎", "ж", "ש", "ไทย"])
    with pytest.raises(ValueError, match="LlamaForCausalLM reads these active and inactive words alike: '日本'") as info:
        tokenize(feature, english_lm(kind))
    assert "is left" in str(info.value) and "\n" not in str(info.value) and len(str(info.value)) < 400


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_the_model_reads_alike_are_named_and_left_out_of_both_classes(kind):
    lm = english_lm(kind)
    feature = Feature.from_words("f", ["apple", "pear", "日本", "fig"], {"table": 0.0, "🍎": 0.2, "PEAR": 0.0, "chair": 0.0})
    types = frozenset({"pear", "fig"})
    with pytest.warns(UserWarning, match="'pear' = 'PEAR'") as said: data = tokenize(feature, lm, types)
    assert "'日本' = '🍎'" in str(said[0].message)
    assert "4 of 8 words are left out" in str(said[0].message) and "\n" not in str(said[0].message)
    assert data.strings == data.feature.texts == ("apple", "fig", "table", "chair")
    assert data.heldout.tolist() == [False, True, False, False] and len(data.documents) == 4
    check_layout(data, lm)


def test_words_of_one_class_may_be_read_alike():
    lm = english_lm("wordpiece")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = tokenize(Feature.from_words("f", ["日本", "中国", "Apple", "apple"], ["table", "lamp"]), lm)
    assert len(data.documents) == 6


def test_a_class_without_a_readable_word_is_refused():
    with pytest.raises(ValueError, match="'Apple' = 'apple'. No active word is left"):
        tokenize(Feature.from_words("f", ["Apple"], ["apple", "table"]), english_lm("wordpiece"))


def test_a_text_without_tokens_is_named():
    with pytest.raises(ValueError, match="text 1 .'日本'.: has no tokens of LlamaForCausalLM"):
        tokenize(Feature.from_texts("f", ["apple pear", "日本"], [[(0, 5, 1.0)], []]), english_lm("bpe"))


def test_the_default_model_tells_all_words_apart(lm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(Feature.from_words("f", ["日本", "中国", "Apple", "ЖUK"], ["🍎", "ж", "apple", "жuk"]), lm)


# --- long texts -------------------------------------------------------------------------------------------------------

def test_a_text_that_the_model_cannot_take_is_refused_before_the_work(tiny_lm):
    feature = Feature.from_texts("long", ["the cat and " * 4000], [[(4, 7, 1.0)]])
    with pytest.raises(ValueError, match="tokens and .* takes 256; split it"): tokenize(feature, tiny_lm("llama"))


def test_a_family_emoji_is_one_example(tiny_lm):
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
    tokens = tokenize(Feature.from_texts("family", [f"a {family} b", "a b"], [[(2, 2 + len(family), 1.0)], []]), tiny_lm("llama"))
    assert [kind for kind, a in zip(tokens.types, tokens.activation) if a] == [family]
