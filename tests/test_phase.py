"""The phase map: one search for all places, how each place ends, the stored maps and the drawing."""
import re
import xml.etree.ElementTree as ET
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from tokenlabel.files import read_json
from tokenlabel.feature import Feature
from tokenlabel.phase import PHASES, load_maps, phase_map_svg, phase_of, save_maps, sweep
from tokenlabel.search import Search, make_discriminator
from tokenlabel.settings import Settings
from tokenlabel.tokenize import tokenize

SVG = "{http://www.w3.org/2000/svg}"


def table(token="·word"):
    places = [(0.0, 0.0), (0.0, 0.1), (0.4, 0.0), (0.4, 0.1)]
    return pd.DataFrame([dict(entropy_weight=e, kl_weight=k, phase=phase, token=token, probability=0.7)
                         for (e, k), phase in zip(places, PHASES)])


@pytest.fixture(params=["channel", "direct"])
def discriminator(request, tiny_lm):
    lm = tiny_lm("llama")
    feature = Feature.from_words("small", ["cat", "dog", "horse", "animal"], ["house", "car", "book", "red"])
    return make_discriminator(lm, tokenize(feature, lm), Settings(discriminator=request.param))


def a_word(lm): return lm.token(int(lm.admissible.nonzero()[40])).strip()


def test_each_place_ends_where_a_search_with_its_weights_ends(discriminator):
    steps, lm = 8, discriminator.lm
    found = sweep(discriminator, [a_word(lm)], entropies=(0.0, 0.2), kls=(0.0, 0.1), restarts=1, steps=steps)
    for row in found.itertuples():
        search = Search(discriminator, Settings(restarts=1, steps=steps, entropy_weight=row.entropy_weight,
                                                kl_weight=row.kl_weight, batch_size=8))
        for _ in range(steps): search.step()
        p = search.log_p(0.1)[0, 0].exp().detach()
        assert row.token == lm.show(int(p.argmax())) and row.probability == pytest.approx(float(p.max()), abs=2e-3)


def test_the_restart_with_the_lowest_loss_after_the_last_step_counts(discriminator):
    lm, settings = discriminator.lm, Settings(restarts=3, steps=4, entropy_weight=0.2, kl_weight=0.1, batch_size=8)
    search = Search(discriminator, settings)
    for _ in range(4): search.step()
    p = search.log_p(0.1)[:, 0].exp().detach()
    search.settings = Settings(temperature=(0.1, 0.1), entropy_schedule=(1.0, 1.0))
    loss = [row["loss"] for row in search.step()]
    best = p[loss.index(min(loss))]
    [row] = sweep(discriminator, [a_word(lm)], entropies=(0.2,), kls=(0.1,), restarts=3, steps=4).itertuples()
    assert row.token == lm.show(int(best.argmax())) and row.probability == pytest.approx(float(best.max()), abs=2e-3)


def test_a_sweep_has_a_row_for_each_pair_and_the_same_for_the_same_seed(discriminator):
    sizes = dict(entropies=(0.0, 0.2), kls=(0.0, 0.1, 0.2), restarts=2, steps=3)
    found = sweep(discriminator, [a_word(discriminator.lm)], **sizes)
    assert list(found.columns) == ["entropy_weight", "kl_weight", "restart", "phase", "token", "probability"] and len(found) == 6
    assert found.phase.isin(PHASES).all() and found.probability.between(0, 1).all()
    assert sweep(discriminator, [a_word(discriminator.lm)], **sizes).equals(found)


def test_a_right_label_without_a_token_is_refused(discriminator):
    with pytest.raises(ValueError, match="is a single token"): sweep(discriminator, ["no such token at all"])
    with pytest.raises(ValueError, match="give a list of words"): sweep(discriminator, "animal")
    for none in dict(entropies=[]), dict(kls=[]), dict(restarts=0), dict(steps=0):
        with pytest.raises(ValueError, match=f"{[*none][0]}: there are 0"): sweep(discriminator, ["a"], **none)


@pytest.mark.parametrize("p, phase", [
    ([0.6, 0.2, 0.2, 0.0], "right label"), ([0.2, 0.6, 0.2, 0.0], "prior's favorite"),
    ([0.0, 0.1, 0.1, 0.8], "another word"), ([0.4, 0.4, 0.2, 0.0], "superposition"), ([0.5, 0.5, 0.0, 0.0], "right label")])
def test_the_token_that_has_half_says_how_it_ended(p, phase):
    assert phase_of(torch.tensor(p), right=[0], favorites=[0, 1]) == phase


def test_maps_are_read_as_they_were_written(tmp_path):
    maps = {"a": table("·“x”"), "b": table("中")}
    file = save_maps(maps, "some/model", tmp_path / "new" / "maps.json")
    read = load_maps("some/model", file)
    assert list(read) == ["a", "b"] and all(read[name].equals(maps[name]) for name in maps)
    assert load_maps("other/model", file) == {} and load_maps("some/model", tmp_path / "none.json") == {}


def test_the_stored_maps_are_of_the_synthetic_features_and_a_latent():
    figures = Path(str(files("tokenlabel"))).parent / "figures"
    stored = read_json(figures / "phase_map.json", "phase maps")
    maps = load_maps("SmolLM2-135M-Instruct")
    assert stored["lm"] == "SmolLM2-135M-Instruct" and list(maps) == ["animals", "mammals", "Chinese", "numbers", "latent 2341"]
    for found in maps.values(): assert len(found) == 25 and found.phase.isin(PHASES).all()
    assert {phase for found in maps.values() for phase in found.phase} == set(PHASES)
    drawn = [title.text for title in ET.parse(figures / "phase_map.svg").iter(f"{SVG}title")]
    assert drawn == [f"{row.phase}: {row.token}" for found in maps.values() for row in found.itertuples()]


def test_the_four_colors_differ_in_lightness():
    light = sorted(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), to_rgb(color))) for color, _ in PHASES.values())
    assert all(b - a > 0.05 for a, b in zip(light, light[1:]))


def test_the_drawing_shows_every_place_in_its_color_with_its_token_and_share():
    root = ET.fromstring(phase_map_svg(table("<b>&")))
    texts, tiles = [node.text for node in root.iter(f"{SVG}text")], [*root.iter(f"{SVG}title")]
    assert texts.count("<b>&") == texts.count("70 %") == len(tiles) == 4 and not [*root.iter(f"{SVG}circle")]
    assert {*PHASES, "KL weight", "entropy weight", "0", "0.1", "0.4"} <= {*texts}
    fills = [node.get("fill") for node in root.iter(f"{SVG}rect") if len(node)]
    assert fills == [fill for fill, _ in PHASES.values()]
    assert "a_very_lon…" in phase_map_svg(table("a_very_long_token"))


def test_all_parts_of_the_drawing_are_on_the_page():
    root = ET.fromstring(phase_map_svg(table(), 0.2, 0.05))
    _, _, width, height = map(float, root.get("viewBox").split())
    for node in root.iter():
        x, y = (float(node.get(name, node.get(f"c{name}", 0))) for name in "xy")
        assert 0 <= x and x + float(node.get("width", 0)) <= width and 0 <= y and y + float(node.get("height", 0)) <= height


@pytest.mark.parametrize("weight, tiles", [(0.0, 0), (0.1, 1), (0.4, 2), (0.25, 1.5), (9.0, 2), (-1.0, 0)])
def test_the_point_between_two_tiles_is_in_proportion(weight, tiles):
    places = pd.DataFrame([dict(entropy_weight=w, kl_weight=w, phase="superposition", token="a", probability=0.1)
                           for w in (0.0, 0.1, 0.4)])
    x, y = (float(re.search(f'class="tl-here".*? c{axis}="([^"]+)"', phase_map_svg(places, weight, weight))[1]) for axis in "xy")
    left, bottom = (float(re.search(f'class="tl-here".*? c{axis}="([^"]+)"', phase_map_svg(places, 0, 0))[1]) for axis in "xy")
    assert (x - left, bottom - y) == pytest.approx((56 * tiles, 56 * tiles), abs=0.1)
