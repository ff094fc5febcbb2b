import gzip
import json
import warnings

import numpy as np
import pytest
from conftest import tiny_tokenizer
from safetensors.numpy import save_file

from tokenlabel.feature import Feature
from tokenlabel.read import join_tokens, read_features
from tokenlabel.windows import cut_windows

WINDOWS = [{"tokens": ["<|endoftext|>", " an", " apple", " a", " day"], "values": [90, 0, 31.5, 0, 0.4], "maxValue": 31.5},
           {"tokens": ["<|endoftext|>", " ripe", " figs", "."], "values": [0, 0, 37.2, 0]}]
RECORD = {"modelId": "gpt2-small", "layer": "6-res-jb", "index": "650", "maxActApprox": 37.2, "activations": WINDOWS}


def read_feature(path):
    [feature] = read_features(path)
    return feature


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
    windows = [{"modelId": "m", "layer": "l", "index": n, **window} for window in WINDOWS for n in (1, 2)]
    one, two = read_features(write(tmp_path, windows))
    assert one.texts == two.texts == ("an apple a day", "ripe figs.") and one.name == "m/l/1"


def test_words_and_texts_are_read_as_always(tmp_path):
    assert read_feature(write(tmp_path, "word,activation\nsaw,1\ntree,0")) == Feature.from_words("f", ["saw"], ["tree"])


@pytest.mark.parametrize("tokens, text", [
    (["<bos>", "▁an", "▁apple", "s"], "an apples"), (["[CLS]", "an", "app", "##le"], "an apple"),
    (["Ġan", "Ġcaf", "Ã", "©", "âĢĻ", "s"], "an café’s"),
    (["caf", "é", "."], "café."), (["日", "本"], "日本"), ([" an", " Ġ"], "an Ġ"),
    (["▁a", "<0x0A>", "▁b"], "a\n b"), ([" caf", "Ã©", "Ċ", " b"], "café\n b"),
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
    ({"index": None}, "line 1: index is None; an object of Neuronpedia has modelId, layer and index"),
    ({"index": True}, "line 1: index is True; an object"), ({"layer": [1]}, r"line 1: layer is \[1\]; an object"),
    ({"index": 10**20}, r"line 1: index is 1e\+20; an object"), ({"activations": None}, "has no activation above 0"),
    ({"activations": [{"tokens": [" a", "\ud83d"], "values": [1, 0]}]}, r"line 1: window 0: a token has half of a character, '.ud83d'"),
])
def test_what_is_wrong_in_a_file_of_neuronpedia_is_said(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error: read_feature(write(tmp_path, RECORD | change))
    assert str(error.value).startswith("f.json: ") and len(str(error.value)) < 200 and str(error.value).isprintable()


def spans_of(feature):
    "The strings of the spans of each text, with rounded activations."
    return {text: {text[a:b]: round(value, 3) for a, b, value in spans} for text, spans in zip(feature.texts, feature.spans)}


def features(path, left_out=(), **how):
    "All features of a path; each of `left_out` is in the one warning, and without it there is no warning."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = list(read_features(path, **how))
    assert len(seen) == bool(left_out), [str(one.message) for one in seen]
    for part in left_out: assert part in str(seen[0].message) and str(seen[0].message).isprintable()
    return found


def refused(path, **how):
    with pytest.raises(ValueError) as error: list(read_features(path, **how))
    assert len(str(error.value)) < 300 and str(error.value).isprintable()
    return str(error.value)


# Neuronpedia: bulk export

KEY = {"modelId": "gpt2-small", "layer": "6-res-jb", "index": "650"}


def bulk(folder, **kinds):
    for kind, parts in kinds.items():
        (folder / kind).mkdir()
        for n, lines in parts.items():
            (folder / kind / f"batch-{n}.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    return folder


def test_a_bulk_export_is_joined_on_model_layer_and_index(tmp_path):
    other = KEY | {"layer": "7-res-jb"}  # same index
    [one, two] = features(bulk(
        tmp_path, features={0: [KEY | {"maxActApprox": 60.0, "index": 650}, other]},
        explanations={0: [KEY | {"description": "fruit", "typeName": "oai_token-act-pair"}, other | {"description": "x"}]},
        activations={9: [KEY | WINDOWS[0], other | WINDOWS[1]], 10: [KEY | WINDOWS[1]]}))  # windows in two batches
    assert [one.name, two.name] == ["gpt2-small/7-res-jb/650", "gpt2-small/6-res-jb/650"]  # in the order of their ends
    assert two.source == {"model": "gpt2-small", "layer": "6-res-jb", "index": "650", "explanations": ["fruit"]}
    assert two.texts == ("an apple a day", "ripe figs.") and one.texts == ("ripe figs.",)


def test_the_maximum_of_a_bulk_export_counts_unless_a_start_token_has_it(tmp_path):
    for n, (top, value) in enumerate([(60, 37.2 / 60), (90.2, 1.0)]):  # 90 is on <|endoftext|>
        (tmp_path / str(n)).mkdir()
        [feature] = features(bulk(tmp_path / str(n), features={0: [KEY | {"maxActApprox": top}]},
                                  activations={0: [KEY | window for window in WINDOWS]}))
        assert spans_of(feature)["ripe figs."] == {"figs": round(value, 3)}


@pytest.mark.parametrize("lacking", ["modelId", "layer", "index"])
def test_an_object_that_lacks_a_key_says_which(tmp_path, lacking):
    rest = {key: value for key, value in RECORD.items() if key != lacking}
    assert f"f.json: line 1: an object with activations, " in (said := refused(write(tmp_path, rest))) and f"needs {lacking}, too" in said


def test_tables_of_a_folder_are_read_and_what_is_left_out_is_said(tmp_path):
    (tmp_path / "a.csv").write_text("word,activation\nsaw,1\ntree,0")
    (tmp_path / "._a.json").write_bytes(b"\0\5\x16\7")  # as macOS writes beside a file
    write(tmp_path, RECORD)
    assert [feature.name for feature in features(tmp_path)] == ["a", "gpt2-small/6-res-jb/650"]
    (tmp_path / "batch-0.json").write_text(json.dumps(RECORD))
    assert len(features(tmp_path, ["a.csv, f.json is not read, the features are in batch-*.json"])) == 1


def test_a_damaged_file_of_a_folder_is_named(tmp_path):
    (bulk(tmp_path, activations={0: [KEY | WINDOWS[0]]}) / "activations" / "batch-0.jsonl.gz").write_bytes(b"\x1f\x8b\0")
    assert "activations/batch-0.jsonl.gz: the file is compressed, and cut off" in refused(tmp_path)


def test_a_name_is_no_tokenizer(tmp_path):
    with pytest.raises(TypeError, match="tokenizer is 'gpt2'; give a tokenizer of transformers"):
        list(read_features(write(tmp_path, RECORD), tokenizer="gpt2"))


def test_dead_and_damaged_features_are_left_out_and_counted(tmp_path):
    dead, damaged, only = KEY | {"index": "1"}, KEY | {"index": "2"}, KEY | {"index": "3"}
    lines = [KEY | WINDOWS[1], damaged | {"tokens": ["a", " b"], "values": [1]}, only | {"tokens": [" a"], "values": [1]}]
    [feature] = features(bulk(tmp_path, features={0: [KEY, dead]}, activations={0: lines}), left_out=[
        "3 of 4 features are left out; the first: activations/batch-0.jsonl.gz: line 2: window 0: 2 tokens need as many values"])
    assert feature.name.endswith("650")


def test_a_damaged_line_of_a_bulk_export_is_named(tmp_path):
    folder = bulk(tmp_path, activations={0: [KEY | WINDOWS[1], {"modelId": "m", "tokens": [], "values": []}]})
    assert "activations/batch-0.jsonl.gz: line 2: layer is None; an object of Neuronpedia has modelId, layer and index" in refused(folder)


# SAEDashboard

def dashboard(*records): return {"model_id": "gpt2-small", "layer": 6, "sae_set": "res-jb", "features": list(records)}


def record(index, *windows): return {"feature_index": index, "frac_nonzero": 0.01, "pos_str": [], "neg_str": [], "activations": [
    {"bin_min": 0, "bin_max": 5, "bin_contains": 0.1, "qualifying_token_index": 1, "tokens": tokens, "values": values}
    for tokens, values in windows]}


def test_a_batch_of_saedashboard_has_byte_level_tokens_and_windows_again_in_other_bins(tmp_path):
    window = ["<|endoftext|>", " Eve", "âĢĻ", "s", "Ċ", " na", "Ã", "¯", "ve"], [70.0, 0, 0, 0, 0, 0, 4.0, 0, 0]
    (tmp_path / "run_settings.json").write_text('{"sae_set": "res-jb"}')
    (tmp_path / "batch-10.json").write_text(json.dumps(dashboard(record(9, ([" b", " c"], [1.0, 0.0])))))
    batch = dashboard(record(3, window, window, ([" a", " b"], [0.0, 0.5])), record(4))
    (tmp_path / "batch-2.json").write_text(json.dumps(batch))
    [first, last] = features(tmp_path, left_out=["1 of 3", "batch-2.json: line 1: feature 1", "has no activation above 0"])
    assert spans_of(first) == {"Eve’s\n naïve": {"naïve": 1.0}, "a b": {"b": 0.125}}  # no spike, each window once
    assert (first.name, last.name) == ("gpt2-small/6-res-jb/3", "gpt2-small/6-res-jb/9")
    assert first.source == {"model": "gpt2-small", "layer": "6-res-jb", "index": 3}


def test_accents_of_a_text_are_no_bytes(tmp_path):
    window = [" un", " café", " à", " Évian", "é"], [0, 2.0, 0, 0, 0]
    [feature] = features(write(tmp_path, dashboard(record(0, window))))
    assert feature.texts == ("un café à Éviané",)
    [feature] = features(write(tmp_path, dashboard(record(0, (["ľ", " æ", "Ĺ", "¥", " a", "æ"], [0, 2.0, 0, 0, 0, 0])))))
    assert feature.texts == ("\ufffd 日 a\ufffd",)  # both ends are cut


# OpenAI

NEURON = {"neuron_id": {"layer_index": 5, "neuron_index": 0}, "mean": float("nan"), "quantile_boundaries": [0.1],
          "most_positive_activation_records": [{"tokens": [" a", " sharp", " saw"], "activations": [-0.17, 0.5, 4.0]}],
          "random_sample": [{"tokens": [" rain", " falls"], "activations": [-0.1, -0.2]}],
          "random_sample_by_quantile": [[{"tokens": [" an", " axe"], "activations": [0, 1.0]}], []]}


def test_a_neuron_of_openai_has_negative_values_and_statistics_that_are_nan(tmp_path):
    [feature] = features(write(tmp_path, NEURON))
    assert spans_of(feature) == {"a sharp saw": {"sharp": 0.125, "saw": 1.0}, "rain falls": {}, "an axe": {"axe": 0.25}}
    assert (feature.name, feature.source) == ("5/0", {"layer": 5, "index": 0})
    bad = NEURON | {"random_sample": [{"tokens": [" a"], "activations": [float("nan")]}]}
    assert refused(write(tmp_path, bad)) == "f.json: line 1: window 1: activation nan is not a finite number"
    assert "random_sample is not a list" in refused(write(tmp_path, NEURON | {"random_sample_by_quantile": [3]}))


# circuit-tracer

def tracer(index, act_max=8.0):
    example = {"tokens": [" a", " sharp", " saw"], "tokens_acts_list": [0, 0, 4.0], "train_token_ind": 2,
               "is_repeated_datapoint": False}
    return {"index": index, "transcoder_id": "t3", "top_logits": [], "act_max": act_max, "examples_quantiles": [
        {"quantile_name": "Top activations", "examples": [example]}, {"quantile_name": "Interval 1", "examples": [
            example, {"tokens": [" rain"], "tokens_acts_list": [0]}]}]}


def test_a_folder_of_circuit_tracer_has_a_file_for_each_feature(tmp_path):
    for n in (12, 7): (tmp_path / f"{n}.json").write_text(json.dumps(tracer(n)))
    found = features(tmp_path)
    assert [feature.name for feature in found] == ["t3/7", "t3/12"]
    assert spans_of(found[0]) == {"a sharp saw": {"saw": 0.5}, "rain": {}}
    (tmp_path / "9.json").write_text("{")
    assert refused(tmp_path).split(": ")[1] == "9.json"


# delphi

def entry(text, activations, **other):
    return {"str_tokens": text, "activations": activations, "distance": 0, "activating": True, "prediction": True,
            "probability": None, "correct": True} | other


ACTIVE, INACTIVE = ([" a", " saw"], [0, 2.5]), ([" the", " rain"], [0, 1.5])  # 1.5: of a similar latent


def run(folder, **scores):
    for kind, entries in scores.items():
        (folder / "scores" / kind).mkdir(parents=True)
        (folder / "scores" / kind / "layers.6.mlp_latent12.txt").write_text(json.dumps(entries))
    (folder / "explanations").mkdir()
    (folder / "explanations" / "layers.6.mlp_latent12.txt").write_text('"tools with \\"teeth\\""')
    (folder / "run_config.json").write_text('{"model": "openai/gpt2"}')
    return folder


def test_scores_of_delphi_give_windows_explanation_and_published_score(tmp_path):
    silent = entry(*INACTIVE, distance=0.2, activating=False, prediction=False)
    [feature] = features(run(tmp_path, detection=[entry(*ACTIVE), silent, silent | {"prediction": True, "correct": False}],
                             fuzz=[entry(*ACTIVE), silent | {"prediction": None, "correct": None}]))
    assert spans_of(feature) == {"a saw": {"saw": 1.0}, "the rain": {}}  # each once, nothing of another latent
    assert feature.source == {"model": "openai/gpt2", "layer": "layers.6.mlp", "index": 12,
                              "explanations": ['tools with "teeth"'], "scores": {"detection": 0.75}}
    assert "openai/gpt2/layers.6.mlp/12" in str(feature) and "from model openai/gpt2, layer layers.6.mlp" in str(feature)
    assert features(tmp_path / "scores" / "detection" / "layers.6.mlp_latent12.txt") == [feature]


def test_in_files_of_2024_the_prediction_says_whether_the_answer_was_right(tmp_path):
    old = [{"str_tokens": tokens, "activations": values, "distance": decile, "prediction": right}
           for (tokens, values), decile, right in [(ACTIVE, 1, True), (ACTIVE, 10, True), (INACTIVE, -1, True)]]
    [feature] = features(run(tmp_path, detection=old))
    assert feature.source["scores"] == {"detection": 1.0} and spans_of(feature)["the rain"] == {}


def test_a_window_that_fires_on_newlines_alone_is_no_inactive_text(tmp_path):
    newlines = {"tokens": [" a", "\n", " saw"], "values": [0, 30.0, 4.0]}
    assert "fires on white space, which is no word" in refused(write(tmp_path, RECORD | {"activations": [newlines]}))
    [feature] = features(write(tmp_path, RECORD | {"activations": [newlines, *WINDOWS]}), ["1 of 3 windows are left out"])
    assert feature.texts == ("an apple a day", "ripe figs.")


@pytest.mark.parametrize("change, message", [
    (dict(str_tokens=["The", "cat", "sat", "on", "the", "mat"], activations=[0, 2, 0, 0, 0, 0]),
     "the tokens have lost their spaces, as in 'Thecatsatonthemat'"),
    (dict(str_tokens="the cat"), "tokens is not a list of strings"),
    (dict(activations=None), "2 tokens need as many values, not None"),
    (dict(activations=[0, float("inf")]), "activation inf is not a finite number"),
    (dict(activations=[0, 0]), "no activation above 0"), (dict(correct="yes"), "an answer is 'yes'; expected true or false")])
def test_what_is_wrong_in_scores_of_delphi_is_said(tmp_path, change, message):
    assert message in refused(run(tmp_path, detection=[entry(*ACTIVE) | change]))


def test_scripts_without_spaces_are_no_lost_spaces(tmp_path):
    tokens = ["猫", "は", "マ", "ット", "の", "上", "に"]
    [feature] = features(run(tmp_path, detection=[entry(tokens, [2, 0, 0, 0, 0, 0, 0])]))
    assert feature.texts == ("猫はマットの上に",)


@pytest.fixture
def cached(tmp_path):
    "A cache of 4 latents in 3 rows of 40 tokens, and its tokenizer; latents 10 and 13 fire, 11 on start tokens, 12 is dead."
    tokenizer = tiny_tokenizer(bos=True)
    rows = [tokenizer.encode("<bos>" * (n == 9) + text * 20)[:40] for n, text in enumerate((" cat’s", " saw dog", " mat book"))]
    folder = tmp_path / "latents" / "layers.6.mlp"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_name": "openai/gpt2", "dataset_repo": "text"}')
    word = next(k for k in range(6, 12) if tokenizer.decode(rows[1][k]).isalpha())
    arrays = {"locations": np.array([[2, 39, 3], [0, 5, 0], [1, 0, 1], [1, word, 0], [1, 30, 0], [0, 0, 0]], "u2"),
              "activations": np.array([1, 2, 9, 4, 1, 9], "f2"), "tokens": np.array(rows, "u2")}
    save_file(arrays, folder / "10_13.safetensors")
    return tmp_path, tokenizer, arrays, folder / "10_13.safetensors"


def test_the_cache_of_delphi_is_read_with_the_tokenizer(cached):
    folder, tokenizer, arrays, _ = cached
    [first, last] = features(folder, ["2 of 4 features are left out", "layers.6.mlp_latent11", "no activation above 0"],
                             tokenizer=tokenizer)
    assert first.source == {"model": "openai/gpt2", "layer": "layers.6.mlp", "index": 10}
    assert [first.name, last.name] == ["openai/gpt2/layers.6.mlp/10", "openai/gpt2/layers.6.mlp/13"]
    strong, weak, silent = first.texts  # by activation; row 0 has a spike on its start token
    decode = lambda row, end: tokenizer.decode(arrays["tokens"][row, 1:end].tolist()).strip()
    assert (strong, weak) == (decode(1, 32), decode(0, 32)) and "<bos>" not in "".join(first.texts) and first.spans[2] == ()
    assert [max(span.activation for span in spans) for spans in first.spans[:2]] == [1.0, 0.5]
    where = len(tokenizer.decode(arrays["tokens"][1, 1:arrays["locations"][3, 1]].tolist()).lstrip())
    assert any(start <= where < end and value == 1 for start, end, value in first.spans[0])


def test_half_of_the_silent_windows_are_alike_on_request():
    draw = np.random.default_rng(0)
    tokens = draw.integers(100, 1000, (400, 64))
    tokens[:10, 20:30] = draw.integers(0, 20, (10, 10))    # rows in which the latent fires
    tokens[10:60, 40:50] = draw.integers(0, 20, (50, 10))  # other rows with the same words
    place = np.arange(10), np.full(10, 25), np.ones(10)
    plain, hard = (list(cut_windows(tokens, *place, hard_negatives=on)) for on in (False, True))
    silent = lambda windows: [ids.tobytes() for ids, values in windows if not values.any()]
    alike = lambda windows: sum((ids < 20).sum() == 10 for ids, values in windows if not values.any())
    assert len(silent(plain)) == len(silent(hard)) == len(set(silent(hard))) == 50 and len(plain) == len(hard) == 60
    assert alike(plain) < 10 and alike(hard) >= 25


def test_a_file_without_other_texts_has_no_hard_negatives(tmp_path, cached):
    message = "hard negatives come from a cache of delphi, a folder with latents/*/*.safetensors, and need tokenizer="
    assert message in refused(write(tmp_path, RECORD), tokenizer=cached[1], hard_negatives=True)
    assert message in refused(cached[0], hard_negatives=True)
    assert len(features(cached[0], ["2 of 4 features"], tokenizer=cached[1], hard_negatives=True)) == 2


def test_what_is_wrong_in_a_cache_of_delphi_is_said(cached):
    folder, tokenizer, arrays, file = cached
    assert "give tokenizer=, the tokenizer of openai/gpt2" in refused(folder)
    for change, message in [({"tokens": arrays["tokens"] + 999}, "is not in the vocabulary of 300 tokens; give the tokenizer"),
                            ({"activations": np.ones(5, "f2")}, "shapes do not agree"),
                            ({"tokens": arrays["tokens"][:1]}, "is outside of"),
                            ({"activations": np.full(6, np.nan, "f2")}, "not a finite number"),
                            ({"locations": arrays["locations"].astype("i4") - [0, 0, 1]}, "location [0, 5, -1] is outside of"),
                            ({"locations": arrays["locations"] + 0.5}, "locations has numbers of type float64; expected integers"),
                            ({"tokens": arrays["tokens"].astype("i4") - 400}, "is negative")]:
        save_file(arrays | change, file)
        assert message in refused(folder, tokenizer=tokenizer)
    file.write_bytes(b"cut off")
    assert "10_13.safetensors: cannot be read" in refused(folder, tokenizer=tokenizer)
    save_file(arrays, file)
    for name in "0_4000000000", "0_99999999999999999999", "13_10":
        file = file.rename(file.with_name(f"{name}.safetensors"))
        assert f"{name} is no range of at most" in refused(folder, tokenizer=tokenizer)
    file.rename(file.with_name("latents.safetensors"))
    assert "expected a name such as 0_4095.safetensors" in refused(folder, tokenizer=tokenizer)


def test_a_cache_with_scores_needs_no_tokenizer(cached):
    folder = cached[0]
    assert [feature.name for feature in features(run(folder, fuzz=[entry(*ACTIVE)]))] == ["openai/gpt2/layers.6.mlp/12"]


def test_a_folder_without_features_is_refused(tmp_path):
    assert "has no activations/, latents/ or scores/, and no file with JSON" in refused(tmp_path)
    (tmp_path / "scores").mkdir()
    assert "neither latents/*/*.safetensors nor scores/*/*.txt is there" in refused(tmp_path)


def test_a_latent_that_fires_on_start_tokens_only_has_silent_windows_alone():
    none = np.zeros(0, int)
    for hard in (False, True):
        assert not any(values.any() for _, values in cut_windows(np.arange(200).reshape(4, 50), none, none, none.astype(float), hard))
