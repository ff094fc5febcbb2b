"""The phase map: many descents as one batch, how each ends, and the map as a figure, as a file and beside the sliders."""
import json
import xml.etree.ElementTree as ET

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from tokenlabel.feature import Feature
from tokenlabel.objective import LossWeights
from tokenlabel.descent import Search, initial_v
from tokenlabel.phase import (FAVORITE, LOOK, MIXED, OTHER, RIGHT, descend, load_maps, map_html, map_svg, maps_file,
                              phase_of, place, plot_phase_map, save_maps, sweep)
from tokenlabel.widgets import make_judge


def small(): return Feature.from_words("small", ["cat", "dog", "horse", "animal"], ["house", "car", "book", "red"])


def table(token="·word"):
    return pd.DataFrame([dict(entropy=e, kl=k, phase=phase, token=token, probability=0.7)
                         for (e, k), phase in zip([(0.0, 0.0), (0.0, 0.1), (0.4, 0.0), (0.4, 0.1)], LOOK)])


@pytest.fixture(params=["channel", "direct"])
def judge(request, tiny_lm): return make_judge(small(), tiny_lm("llama"), request.param)


def test_each_row_is_a_search_with_its_own_weights(judge):
    pairs, steps = [(0.2, 0.02), (0.0, 0.1), (0.05, 0.0)], 8
    start = initial_v(judge.log_prior, 3, torch.Generator().manual_seed(1))
    log_p, loss = descend(judge, *torch.tensor(pairs).T, start, steps)
    for r, (entropy_weight, kl_weight) in enumerate(pairs):
        search = Search(judge, weights=LossWeights(1.0, entropy_weight, kl_weight), restarts=1, steps=steps, batch_size=8)
        search.v.data[0] = start[r]
        for _ in range(steps): search.step()
        mine = search.log_p(0.1)[0].exp().detach()
        assert torch.allclose(log_p[r].exp(), mine, atol=1e-3)
        assert loss[r].isfinite()


def test_descending_leaves_the_starting_points_alone(judge):
    start = initial_v(judge.log_prior, 1, torch.Generator().manual_seed(1))
    kept = start.clone()
    descend(judge, torch.tensor([0.1]), torch.tensor([0.1]), start, 2)
    assert start.equal(kept) and not start.requires_grad


@pytest.mark.parametrize("p, phase", [
    ([0.6, 0.2, 0.2, 0.0], RIGHT), ([0.2, 0.6, 0.2, 0.0], FAVORITE), ([0.0, 0.1, 0.1, 0.8], OTHER),
    ([0.4, 0.4, 0.2, 0.0], MIXED), ([0.5, 0.5, 0.0, 0.0], RIGHT)])
def test_the_token_that_has_half_says_how_it_ended(p, phase):
    assert phase_of(torch.tensor(p), right=[0], favorites=[0, 1]) == phase


def test_a_sweep_has_a_row_for_each_pair_and_the_same_for_the_same_seed(judge):
    settings = dict(entropies=(0.0, 0.2), kls=(0.0, 0.1, 0.2), restarts=2, steps=3)
    word = judge.lm.token(int(judge.lm.admissible.nonzero()[40])).strip()
    found = sweep(judge, [word], **settings)
    assert list(found.columns) == ["entropy", "kl", "phase", "token", "probability"] and len(found) == 6
    assert set(found.phase) <= set(LOOK) and found.probability.between(0, 1).all()
    assert sweep(judge, [word], **settings).equals(found)


def test_the_best_restart_counts(judge, monkeypatch):
    V = len(judge.log_prior)
    log_p = torch.full((4, V), -100.0)
    log_p[range(4), [10, 11, 12, 13]] = 0.0  # two places, two restarts
    monkeypatch.setattr("tokenlabel.phase.descend", lambda *_: (log_p, torch.tensor([2.0, 1.0, 1.0, 2.0])))
    monkeypatch.setattr("tokenlabel.phase.spellings", lambda word, lm: [11])
    found = sweep(judge, ["x"], entropies=(0.1,), kls=(0.0, 0.1), restarts=2)
    assert found.token.tolist() == [judge.lm.show(11), judge.lm.show(12)] and found.phase[0] == RIGHT


def test_a_right_label_without_a_token_is_refused(judge):
    with pytest.raises(ValueError, match="is a single token"): sweep(judge, ["no such token at all"])
    with pytest.raises(ValueError, match="give a list of words"): sweep(judge, "animal")
    word = judge.lm.token(70)
    for none in dict(entropies=[]), dict(kls=[]), dict(restarts=0), dict(steps=0):
        with pytest.raises(ValueError, match=f"{[*none][0]}: there are 0"): sweep(judge, [word], **none)


def test_maps_are_read_as_they_were_written(tmp_path):
    maps = {"a": table("·“x”"), "b": table("中")}
    file = save_maps(maps, "some/model", tmp_path / "new" / "maps.json")
    read = load_maps("some/model", file)
    assert list(read) == ["a", "b"] and all(read[name].equals(maps[name]) for name in maps)
    assert load_maps("other/model", file) == {} and load_maps("some/model", tmp_path / "none.json") == {}


def test_the_kept_maps_are_of_the_features_of_the_explorer_and_of_the_default_model():
    from tokenlabel.widgets import FEATURES
    kept = json.loads(maps_file().read_text())
    maps = load_maps(kept["lm"])
    assert kept["lm"] == "SmolLM2-135M-Instruct" and set(maps) == {"animals", "mammals", "Chinese", "numbers"} <= set(FEATURES)
    for found in maps.values(): assert len(found) == 25 and set(found.phase) <= set(LOOK)
    assert set().union(*(found.phase for found in maps.values())) == set(LOOK)


def test_a_figure_shows_every_place_in_its_color_with_its_token():
    ax = plot_phase_map(table("·a_very_long_token"), "a feature")
    texts = [text.get_text() for text in ax.texts]
    assert len(ax.patches) == 4 and len(texts) == 4 and all("…" in text and "70 %" in text for text in texts)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(LOOK)
    ax.figure.canvas.draw()
    page = ax.figure.bbox
    for artist in (*ax.texts, ax.get_legend(), ax.xaxis.label, ax.yaxis.label):
        box = artist.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    plt.close(ax.figure)


def test_the_four_colors_differ_in_lightness():
    from matplotlib.colors import to_rgb
    light = sorted(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), to_rgb(color))) for color, _ in LOOK.values())
    assert all(b - a > 0.05 for a, b in zip(light, light[1:]))


@pytest.mark.parametrize("value, at", [(0.0, 0), (0.1, 1), (0.4, 2), (0.25, 1.5), (9.0, 2), (-1.0, 0)])
def test_a_place_between_two_tiles_is_in_proportion(value, at): assert place(value, (0.0, 0.1, 0.4)) == pytest.approx(at)


def test_the_svg_is_well_formed_and_escaped():
    root = ET.fromstring(map_svg(table("<b>&"), 0.2, 0.05))
    texts = [node.text for node in root.iter("text")]
    assert texts.count("<b>&") == 4 and len(list(root.iter("rect"))) == 4
    [circle] = root.iter("circle")
    _, _, width, height = map(float, root.get("viewBox").split())
    assert 0 < float(circle.get("cx")) < width and 0 < float(circle.get("cy")) < height
    for name in LOOK: assert name.replace("'", "&#x27;") in map_html(table(), 0.2, 0.05)
