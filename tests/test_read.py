import json

import pytest

from tokenlabel.feature import Feature
from tokenlabel.read import join_tokens, read_feature, read_features

WINDOWS = [{"tokens": ["<|endoftext|>", " an", " apple", " a", " day"], "values": [90, 0, 31.5, 0, 0.4], "maxValue": 31.5},
           {"tokens": ["<|endoftext|>", " ripe", " figs", "."], "values": [0, 0, 37.2, 0]}]
RECORD = {"modelId": "gpt2-small", "layer": "6-res-jb", "index": "650", "maxActApprox": 37.2, "activations": WINDOWS}


def write(folder, content):
    (folder / "f.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "f.json"


@pytest.mark.parametrize("indent", [None, 2])
def test_neuronpedia_gives_texts_with_graded_activations(tmp_path, indent):
    feature = read_feature(write(tmp_path, json.dumps(RECORD | {"activations": WINDOWS * 3}, indent=indent)))
    assert feature.name == "gpt2-small/6-res-jb/650" and not feature.isolated
    assert feature.texts == ("an apple a day", "ripe figs.")  # each window once, without its start token
    found = {text[a:b]: value for text, spans in zip(feature.texts, feature.spans) for a, b, value in spans}
    assert found == pytest.approx({"apple": 31.5 / 37.2, "day": 0.4 / 37.2, "figs": 1.0})


def test_the_maximum_that_neuronpedia_knows_counts(tmp_path):
    feature = read_feature(write(tmp_path, RECORD | {"activations": WINDOWS[:1] * 9}))
    assert feature.texts == ("an apple a day",) and feature.spans[0][0].activation == pytest.approx(31.5 / 37.2)


def test_a_file_may_have_many_features(tmp_path):
    lines = "\n".join(json.dumps(RECORD | {"index": str(n)}) for n in range(3))
    assert [feature.name.split("/")[-1] for feature in read_features(write(tmp_path, lines))] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="^f.json has 3 features; give a file with one"): read_feature(tmp_path / "f.json")
    windows = [{"modelId": "m", "layer": "l", "index": n, **window} for window in WINDOWS for n in (1, 2)]
    one, two = read_features(write(tmp_path, windows))
    assert one.texts == two.texts == ("an apple a day", "ripe figs.") and one.name == "m/l/1"


def test_words_and_texts_are_read_as_always(tmp_path):
    assert read_feature(write(tmp_path, "word,activation\nsaw,1\ntree,0")) == Feature.from_words("f", ["saw"], ["tree"])


@pytest.mark.parametrize("tokens, text", [
    (["<bos>", "▁an", "▁apple", "s"], "an apples"), (["[CLS]", "an", "app", "##le"], "an apple"),
    (["Ġan", "Ġcaf", "Ã", "©", "âĢĻ", "s"], "an café’s"),
    (["caf", "é", "."], "café."), (["日", "本"], "日本"), ([" an", " Ġ"], "an Ġ"),
    (["</s>", " a", " b"], "a b"), (["<｜begin▁of▁sentence｜>", " a", " b"], "a b")])
def test_tokens_are_joined_to_the_text_that_they_spell(tmp_path, tokens, text):
    window = {"tokens": tokens, "values": [9.0] + [0.0] * (len(tokens) - 2) + [1.0]}
    record = RECORD | {"maxActApprox": 0, "activations": [window]}
    if tokens[0][0] not in "<[": window["values"][0] = 0.0
    assert read_feature(write(tmp_path, record)).texts == (text,)


def test_each_token_has_its_characters():
    assert join_tokens(["Ġe", "Ã", "©", "Ġx"]) == ("eé x", [(0, 1), (1, 2), (1, 2), (2, 4)])
    assert join_tokens([" ", "a", "\n"]) == ("a", [(0, 0), (0, 1), (1, 1)])


@pytest.mark.parametrize("change, message", [
    ({"activations": []}, "has no activation above 0"),
    ({"activations": 3}, "line 1: activations is not a list, it is 3"),
    ({"activations": [3]}, "line 1: window 0: expected an object with tokens and values, got 3"),
    ({"activations": [{"tokens": ["a"], "values": [1, 2]}]}, "window 0: 1 tokens need as many values"),
    ({"activations": [{"tokens": [1], "values": [1]}]}, "window 0: tokens is not a list of strings"),
    ({"activations": [{"tokens": ["a"], "values": [True]}]}, "window 0: activation True is not a number"),
    ({"activations": [{"tokens": ["a"], "values": [float("nan")]}]}, "window 0: activation nan is not a finite number"),
    ({"activations": [{"tokens": ["a"] * 10**5, "values": [1] * 10**5 + ["x"]}]}, "window 0: 100000 tokens need"),
    ({"activations": [{"tokens": ["a", "b"], "values": [-1, 0]}]}, "has no activation above 0"),
    ({"maxActApprox": "high"}, "line 1: activation 'high' is not a number"),
    ({"modelId": "\x1b[2J"}, "the feature's name: control character"),
])
def test_what_is_wrong_in_a_file_of_neuronpedia_is_said(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error: read_feature(write(tmp_path, RECORD | change))
    assert str(error.value).startswith("f.json: ") and len(str(error.value)) < 200 and str(error.value).isprintable()
