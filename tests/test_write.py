"""Results as files for other programs, and as a page."""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from test_result import make_result
from tokenlabel.by_type import word_table
from tokenlabel.detect import score_gains
from tokenlabel.feature import Feature
from tokenlabel.latent_page import histogram, latent_card, predicted, shown_texts, window, write_page
from tokenlabel.read import read_features
from tokenlabel.write import COLUMNS, PLACE, summary_row, write_delphi, write_neuronpedia, write_table

ODD = '<b>"x"</b> & 動物'
HALF = "cut \ud83d"  # half an emoji


def make_latent(name="small/6-res/42", index=42, active=20, silent=20, text="a <b>{day}</b> & 動物 {n}", **changes):
    "A made-up result of a latent that fires on Friday."
    random = np.random.default_rng(0)
    texts = [text.format(day="Friday", n=n) for n in range(active)] + [text.format(day="noon", n=n) for n in range(silent)]
    at = text.index("{day}")
    feature = Feature.from_texts(name, texts, [[(at, at + 6, 0.5 + n / (2 * active))] for n in range(active)] + [[]] * silent)
    feature.source.update(model="small", layer="6-res", index=index, explanations=["given <i>", "second"])
    words = word_table(feature).assign(heldout=lambda table: table.text % 3 == 0)
    words["gain"] = random.normal(0, 0.5, len(words)) + 3 * (words.type == "friday")
    return make_result(**dict(feature=feature, words=words, scores=score_gains(words), verdict="labelled", evidence="1 > 0") | changes)


LATENT, ISOLATED = make_latent(), make_result()
NAMELESS = make_latent(name=ODD, index=7, label=f" {ODD}", evidence=ODD, lm=ODD)


def broken():
    "Results of which the second cannot be had."
    yield LATENT
    raise RuntimeError("the search failed")


# --- rows and tables --------------------------------------------------------------------------------------------------


def test_a_row_has_what_the_result_knows():
    row = summary_row(LATENT)
    value = LATENT.scores.set_index(["score", "metric"]).value
    assert tuple(row) == COLUMNS and [row[key] for key in PLACE] == ["small", "6-res", 42]
    assert row["label"] == "animal" and row["descent"] == "animals" and row["given"] == "given <i>" and row["evaluator"] == "tiny"
    assert row["detection_auroc"] == value["detection", "auroc"] and row["simulation"] == value["simulation", "correlation"]


def test_what_is_unknown_is_none():
    row = summary_row(ISOLATED)
    assert {key for key, value in row.items() if value is None} == {
        *PLACE, "verdict", "detection_auroc", "detection_balanced_accuracy", "fuzzing_balanced_accuracy", "simulation", "given"}
    scores = LATENT.scores.assign(value=np.nan)
    assert summary_row(make_latent(scores=scores, soft={}, index=0)) | dict(seconds=0) == summary_row(LATENT) | dict(
        seconds=0, index=0, descent=None, detection_auroc=None, detection_balanced_accuracy=None, fuzzing_balanced_accuracy=None,
        simulation=None)


def test_a_table_comes_back(tmp_path):
    results = [LATENT, ISOLATED, NAMELESS]
    rows = [summary_row(result) for result in results]
    path = write_table(iter(results), tmp_path / "new" / "labels.jsonl")
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == rows
    table = pd.read_csv(write_table(iter(results), str(tmp_path / "labels.CSV")), keep_default_na=False, dtype=str)
    assert table.to_dict("records") == [{key: "" if x is None else str(x) for key, x in row.items()} for row in rows]


@pytest.mark.parametrize("name", ["labels.txt", "labels", "labels.json"])
def test_another_suffix_is_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises(ValueError, match="has to end in .csv or .jsonl"): write_table(broken(), tmp_path / name)


def test_no_results_make_an_empty_table_and_page(tmp_path):
    assert write_table([], tmp_path / "a.csv").read_text() == ",".join(COLUMNS) + "\n"
    assert write_table([], tmp_path / "a.jsonl").read_text() == ""
    assert "Labels of 0 features" in write_page([], tmp_path / "a.html").read_text()


# --- delphi and Neuronpedia -------------------------------------------------------------------------------------------


def test_a_run_of_delphi_has_the_label_as_its_explanation(tmp_path):
    target = write_delphi([make_latent(index="3", label=" 動物 \"x\""), LATENT], tmp_path)
    assert {path.name: json.loads(path.read_bytes()) for path in target.iterdir()} == {
        "6-res_latent3.txt": '動物 "x"', "6-res_latent42.txt": "animal"}
    (scores := tmp_path / "scores" / "detection").mkdir(parents=True)
    window = dict(str_tokens=[" a", " Friday"], activations=[0.0, 2.0], activating=True)
    silent = dict(str_tokens=[" a", " bar"], activations=[0.0, 0.0], activating=False)
    (scores / "6-res_latent3.txt").write_text(json.dumps([window, silent]))
    assert next(read_features(tmp_path)).source["explanations"] == ['動物 "x"']


def test_other_files_of_a_run_stay(tmp_path):
    (tmp_path / "explanations").mkdir()
    (tmp_path / "explanations" / "6-res_latent1.txt").write_text('"old"')
    write_delphi([LATENT], tmp_path)
    assert len([*(tmp_path / "explanations").iterdir()]) == 2


def test_a_label_without_a_place_is_refused(tmp_path):
    nowhere = make_latent(name=ODD, index=None)
    with pytest.raises(ValueError, match="動物.* has no index"): write_delphi([LATENT, nowhere], tmp_path)
    with pytest.raises(ValueError, match="'animals' has no layer and no index"): write_delphi([ISOLATED], tmp_path)
    with pytest.raises(ValueError, match="has no model and no layer and no index"): write_neuronpedia([ISOLATED], tmp_path / "a")
    for index in ("../../x", "1\n", "a/b"):
        with pytest.raises(ValueError, match="is not the name of a file"): write_delphi([LATENT, make_latent(index=index)], tmp_path)
    with pytest.raises(ValueError, match="two results are for the file '6-res_latent42.txt'"): write_delphi([LATENT, LATENT], tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_an_export_of_neuronpedia_has_the_label_as_its_explanation(tmp_path):
    path = write_neuronpedia([LATENT, NAMELESS], tmp_path / "explanations" / "batch-0.jsonl")
    one, odd = map(json.loads, path.read_text("utf-8").splitlines())
    row = summary_row(LATENT)
    assert one == dict(modelId="small", layer="6-res", index="42", description="animal", typeName="tokenlabel",
                       explanationModelName="tiny", scores=[dict(explanationScoreTypeName=name, value=row[name]) for name in
                       ("detection_auroc", "detection_balanced_accuracy", "fuzzing_balanced_accuracy", "simulation")])
    assert odd["description"] == odd["explanationModelName"] == ODD
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "batch-0.jsonl").write_text("".join(json.dumps(dict(
        modelId="small", layer="6-res", index=index, tokens=[" a", " Friday"], values=[0.0, 2.0])) + "\n" for index in ("7", "42")))
    assert [feature.source["explanations"] for feature in read_features(tmp_path)] == [[ODD], ["animal"]]


def test_a_latent_without_scores_has_none_in_the_export(tmp_path):
    path = write_neuronpedia([make_latent(scores=LATENT.scores[:0])], tmp_path / "a.jsonl")
    assert json.loads(path.read_text())["scores"] == []


WRITERS = [(write_table, "labels.csv"), (write_table, "labels.jsonl"), (write_neuronpedia, "batch-0.jsonl"), (write_page, "page.html"),
           (write_delphi, "explanations")]


@pytest.mark.parametrize("write, name", WRITERS)
def test_an_error_in_the_middle_leaves_what_was_there(tmp_path, write, name):
    target = tmp_path if write is write_delphi else tmp_path / name
    with pytest.raises(RuntimeError, match="the search failed"): write(broken(), target)
    assert [*tmp_path.iterdir()] == []
    write([make_latent(label=" old")], target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError, match="the search failed"): write(broken(), target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("write, name", [WRITERS[0], WRITERS[1], WRITERS[3]])
def test_half_an_emoji_in_an_explanation_is_no_error(tmp_path, write, name):
    result = make_latent()
    result.feature.source["explanations"] = [HALF]
    assert "cut ?" in write([result], tmp_path / name).read_text("utf-8")


# --- the page ---------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    "The tags of a page, the text outside of style and script, and whether each tag is closed."
    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text, self.links, self.ids = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "link", "rect", "path"): self.open.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src")]
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_startendtag(self, tag, attrs): self.tags.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]): self.text.append(data)


def test_a_page_has_a_table_and_a_card_for_each_result(tmp_path):
    page = write_page(iter([LATENT, ISOLATED, NAMELESS]), tmp_path / "new" / "page.html").read_text("utf-8")
    found = Tags(page)
    assert found.open == [] and found.tags.count("article") == 3 and found.tags.count("script") == 1
    assert found.links == ["data:,", "#latent-0", "#latent-1", "#latent-2"] and found.ids == ["latent-0", "latent-1", "latent-2"]
    assert not re.search(r"https?:|url\(|@import", page)


def test_nothing_of_the_data_becomes_a_tag(tmp_path):
    nasty = '</script><script>alert(1)</script><img src=x onerror="alert(1)">'
    result = make_latent(name=nasty, text="a <img src=y> {day} " + nasty + " {n}", label=nasty, verdict=nasty, evidence=nasty, lm=nasty,
                         ranking=LATENT.ranking.assign(label=[nasty, nasty + "2", nasty + "3"]))
    result.feature.source.update(model=nasty, layer=nasty, explanations=[nasty])
    found = Tags(write_page([result], tmp_path / "page.html").read_text("utf-8"))
    assert found.tags.count("script") == 1 and "img" not in found.tags and found.open == []
    assert "".join(found.text).count(nasty) > 10


def test_a_card_shows_label_verdict_scores_rivals_and_explanations():
    text = "|".join(Tags(latent_card(NAMELESS)).text)
    for part in (ODD, "labelled", "given <i>", "second", "balanced accuracy", "animals", f"{LATENT.ranking.loss[1]:.3f}", "Decile 1 ",
                 "Silent", "20 active texts, and 20 silent", "(seen in the search)"): assert part in text, part
    assert latent_card(NAMELESS).count("class=legend") == 1


def test_a_card_of_isolated_words_has_no_texts():
    card = latent_card(ISOLATED)
    assert "class=window" not in card and "class=legend" not in card and "badge" not in card
    assert "active words, and" in card and "0.50 to 0.90" in card  # the scores on held-out words


def test_texts_are_shown_by_decile_and_held_out_ones_first():
    table = shown_texts(LATENT.words)
    assert table.decile.tolist() == [d for d in range(1, 11) for _ in range(2)] + [0] * 4
    assert table.activation.max() == table.activation.iloc[:2].max() and (table.activation[table.decile == 0] == 0).all()
    for _, part in table.groupby("decile"): assert part.heldout.is_monotonic_decreasing
    few = shown_texts(LATENT.words[LATENT.words.text.isin([0, 1, 2, 20])])
    assert few.decile.tolist() == [1, 4, 7, 0]


def test_the_threshold_comes_from_the_texts_of_the_search():
    words = LATENT.words
    changed = words.assign(gain=words.gain.where(~words.heldout, 99.0))
    assert (predicted(changed)[~words.heldout] == predicted(words)[~words.heldout]).all()
    for heldout in (True, words.text > 3):  # nothing to fit on, and one class only
        value = predicted(words.assign(heldout=heldout))
        assert ((0 <= value) & (value <= 1)).all() and value[words.type == "friday"].min() > value[words.type == "noon"].max()


@pytest.mark.parametrize("before, after", [(0, 0), (0, 300), (300, 0), (300, 300)])
def test_a_long_text_is_cut_around_its_strongest_word(before, after):
    text = "z " * before + "Friday" + " z" * after
    words = word_table(Feature.from_texts("f", [text, "z"], [[(2 * before, 2 * before + 6, 0.9)], []]))
    words = words[words.text == 0].assign(gain=0.0, predicted=0.7)
    html = window(text, words)
    assert html.count(">Friday</i>") == 2 and len("".join(Tags(html).text)) <= 2 * 125
    assert html.count("… ") == 2 * bool(before) and html.count(" …") == 2 * bool(after)


def test_a_word_longer_than_the_window_is_shown():
    text = "a " + "x" * 500
    words = word_table(Feature.from_texts("f", [text, "z"], [[(2, 502, 0.9)], []])).query("text == 0").assign(gain=0.0, predicted=0.7)
    assert "x" * 500 in window(text, words)


def test_the_histogram_says_its_counts_in_words():
    svg = re.match("<svg.*</svg>", histogram(LATENT.feature))[0].replace("role=img", 'role="img"')
    said, drawn = ElementTree.fromstring(svg).get("aria-label"), re.findall(r">(\d+)</text>", svg)[:5]
    assert said.startswith("texts by largest activation: ") and "from 0.9 to 1" in said
    assert re.findall(r"(\d+) from", said) == drawn and sum(map(int, drawn)) == 20


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_click_on_a_head_sorts_the_table(tmp_path):
    results = [make_latent(name=name, scores=scores) for name, scores in (
        ("f10", LATENT.scores.assign(value=0.5)), ("f9", LATENT.scores[:0]), ("f8", LATENT.scores.assign(value=-0.1)),
        ("f7", LATENT.scores.assign(value=0.9)))]
    path = write_page(results, tmp_path / "page.html")
    click = """<script>for (const [head, times] of [[0, 1], [0, 2], [3, 1], [3, 2]]) {
      document.querySelectorAll("th[aria-sort]").forEach(th => th.removeAttribute("aria-sort"))
      for (let n = 0; n < times; n++) document.querySelectorAll(".labels th button")[head].click()
      document.title += " " + [...document.querySelectorAll(".labels tbody a")].map(a => a.textContent).join() }</script>"""
    path.write_text(path.read_text("utf-8").replace("</body>", click + "</body>"), "utf-8")
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
                          capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*)</title>", done.stdout)[1].split()
    assert title[-4:] == ["f7,f8,f9,f10", "f10,f9,f8,f7", "f7,f10,f8,f9", "f8,f10,f7,f9"]
