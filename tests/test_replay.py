"""The page of recorded descents: what a recording has, the file, and the page in a browser."""
import re
import shutil
from pathlib import Path

import pytest
import torch
from playwright.sync_api import expect, sync_playwright

from tokenlabel.feature import Feature
from tokenlabel.phase import PHASES, sweep
from tokenlabel.rank import score_labels
from tokenlabel.replay import read_replay, record, write_replay
from tokenlabel.search import make_discriminator
from tokenlabel.settings import Settings
from tokenlabel.tokenize import tokenize

PAGE = Path(__file__).resolve().parents[1] / "figures" / "replay.html"
GRID = dict(entropies=(0.0, 0.2), kls=(0.0, 0.1, 0.3), restarts=2, steps=4)


@pytest.fixture(scope="module", params=["channel", "direct"])
def recorded(request, tiny_lm):
    "Discriminator, right label, recording."
    lm = tiny_lm("llama")
    feature = Feature.from_words("small", ["cat", "dog", "horse", "animal"], ["house", "car", "book", "red"])
    discriminator = make_discriminator(lm, tokenize(feature, lm), Settings(discriminator=request.param))
    right = lm.token(int(lm.admissible.nonzero()[40])).strip()
    return discriminator, right, record(discriminator, [right], top=5, **GRID)[1]


def test_a_recording_ends_where_the_map_says(recorded):
    discriminator, right, recording = recorded
    table = sweep(discriminator, [right], **GRID)
    ends = [(run["entropy_weight"], run["kl_weight"], run["phase"], run["probabilities"][-1][0]) for run in recording["runs"]]
    assert ends == [(row.entropy_weight, row.kl_weight, row.phase, pytest.approx(100 * row.probability, abs=0.11)) for row in table.itertuples()]


def test_a_recording_has_each_state_from_the_first_to_the_last(recorded):
    _, _, recording = recorded
    states, words = GRID["steps"] + 1, len(recording["words"])
    assert len(recording["temperature"]) == len(recording["share"]) == states and recording["share"][-1] == 1
    for run in recording["runs"]:
        assert all(len(run[name]) == states for name in ("accuracy_loss", "entropy", "kl", "tokens", "probabilities", "fires"))
        assert all(len(fires) == words and all(0 <= one <= 100 for one in fires) for fires in run["fires"])
        assert all(p == sorted(p, reverse=True) and sum(p) <= 101 for p in run["probabilities"])


def test_all_places_start_from_the_same_state(recorded):
    _, _, recording = recorded
    assert len({(run["entropy"][0], run["kl"][0]) for run in recording["runs"]}) <= GRID["restarts"]


def test_the_dots_of_the_plane_are_scores_of_single_tokens(recorded):
    discriminator, right, recording = recorded
    names = recording["tokens"][:recording["right"]]
    ids = [id for id in range(len(discriminator.lm.embedding)) if discriminator.lm.admissible[id] and discriminator.lm.show(id) == names[0]]
    scores = score_labels(discriminator, torch.tensor(ids[:1])[:, None], Settings(), discriminator.batches())
    assert recording["dots"][0] == pytest.approx([float(scores.accuracy[0]), float(scores.kl[0])], abs=2e-3)


def test_a_page_is_read_as_it_was_written(recorded, tmp_path):
    _, _, recording = recorded
    recording = recording | {"words": ["</script><b>", *recording["words"][1:]]}
    page = write_replay({"a </script> feature": recording}, "some/model", tmp_path / "new" / "page.html")
    assert read_replay(page) == ({"a </script> feature": recording}, "some/model")
    (tmp_path / "other.html").write_text("<p>no page</p>")
    with pytest.raises(ValueError, match="no page of recorded descents"): read_replay(tmp_path / "other.html")
    with pytest.raises(ValueError, match="at least one"): write_replay({}, "some/model", tmp_path / "none.html")


def test_the_committed_page_is_small_and_alone():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    features, lm = read_replay(PAGE)
    assert lm == "SmolLM2-135M-Instruct" and "animals" in features
    for recording in features.values():
        assert len(recording["runs"]) == 25 and {run["phase"] for run in recording["runs"]} <= {*PHASES}
    assert "The MIT License" in text and not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:)", text)


def test_the_committed_page_has_the_present_template(tmp_path):
    assert write_replay(*read_replay(PAGE), tmp_path / "page.html").read_text() == PAGE.read_text(), "run the study of phase maps again"


# in a browser

@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium: pytest.skip("there is no chromium")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, request):
    "The page from disk, without a network, and what went wrong on it."
    width, height = getattr(request, "param", (1280, 800))
    context = browser.new_context(viewport=dict(width=width, height=height), offline=True)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(asked.url))
    page.goto(PAGE.as_uri())
    yield page
    assert wrong == []
    context.close()


def text(page, id): return page.locator(f"#{id}").inner_text()


def move(page, id, value):
    page.locator(f"#{id}").evaluate("(node, value) => { node.value = value; node.dispatchEvent(new Event('input', {bubbles: true})) }", value)


@pytest.mark.parametrize("opened", [(1280, 800), (390, 844)], indirect=True)
def test_every_control_of_the_page(opened):
    page, (features, _) = opened, read_replay(PAGE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    for name, recording in features.items():
        page.locator("#feature").select_option(name)
        weights = [sorted({run[key] for run in recording["runs"]}) for key in ("entropy_weight", "kl_weight")]
        for e, k in ((0, len(weights[1]) - 1), (len(weights[0]) - 1, 1)):
            move(page, "entropy", e)
            move(page, "kl", k)
            [run] = [run for run in recording["runs"] if (run["entropy_weight"], run["kl_weight"]) == (weights[0][e], weights[1][k])]
            for step in (0, 20, len(run["kl"]) - 1):
                move(page, "step", step)
                assert text(page, "top") == recording["tokens"][run["tokens"][step][0]]
                assert f"{run['probabilities'][step][0]:g} % of the label" in text(page, "share").replace(".0 %", " %")
                wrong = sum((fires > 50) != bool(active) for fires, active in zip(run["fires"][step], recording["active"]))
                assert page.locator("#words .wrong").count() == wrong
    # a tile sets the sliders, and the address brings a visitor back
    page.locator("#map button").first.click()
    assert (page.locator("#entropy").input_value(), page.locator("#kl").input_value()) == (str(len(weights[0]) - 1), "0")
    move(page, "step", 7)
    address, top = page.url, text(page, "top")
    page.goto("about:blank")
    page.goto(address)
    assert text(page, "top") == top and page.locator("#step").input_value() == "7"
    # play goes to the end, and stops there
    move(page, "step", int(page.locator("#step").get_attribute("max")) - 2)
    page.locator("#play").click()
    expect(page.locator("#step")).to_have_value(page.locator("#step").get_attribute("max"))
    expect(page.locator("#play")).to_contain_text("Play")


def test_tokens_and_plane_answer_to_the_pointer(opened):
    page = opened
    page.locator(".bar").nth(2).hover()
    assert page.locator(".bar").nth(2).locator("b").inner_text() in text(page, "said")
    x, y = page.evaluate("(() => { const {x, y} = plane.getDatasetMeta(1).data[0]; return [x, y] })()")
    box = page.locator("#plane").bounding_box()
    page.mouse.move(box["x"] + x, box["y"] + y)
    expect(page.locator("#said")).to_contain_text("right label")
    x, y = page.evaluate("(() => { const {x, y} = plane.getDatasetMeta(2).data[3]; return [x, y] })()")
    page.mouse.click(box["x"] + x, box["y"] + y)
    expect(page.locator("#step")).to_have_value("3")


def test_the_keyboard_moves_a_slider_and_says_the_weight(opened):
    page = opened
    page.locator("#kl").focus()
    before = page.locator("#kl").get_attribute("aria-valuetext")
    page.keyboard.press("ArrowRight")
    after = page.locator("#kl").get_attribute("aria-valuetext")
    assert float(after) > float(before) and text(page, "kl-value") == after
