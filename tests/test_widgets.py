"Facts about tokenlabel.widgets, without a browser: the search behind the sliders, its pictures, its thread."
import re
import threading
import time
from dataclasses import replace

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from tokenlabel import widgets
from tokenlabel.feature import ACTIVE, Feature
from tokenlabel.descent import Search
from tokenlabel.widgets import (LIVE, OWN, Controls, Exploration, Explorer, Worker, cooled, data_html, draw, error_html,
                                explore, live_part, make_judge, make_sliders, own_feature, png, read_words, tokens_html,
                                view)

STILL = Controls(entropy=0.1, temperature=0.5, anneal=False, restarts=2)


def small():
    "A feature of eight words; a model of two layers reads it at once."
    return Feature.from_words("small", ["cat", "dog", "horse", "animal"], ["house", "car", "book", "red"])


def sentences():
    texts = ["the cat sat", "the dog and the horse", "the car is red", "the red book is on the mat"]
    return Feature.from_texts("sentences", texts, [[(4, 7, 1.0)], [(4, 7, 1.0), (16, 21, 1.0)], [], []])


@pytest.fixture
def tiny(tiny_lm): return tiny_lm("llama")


@pytest.fixture
def exploration(tiny): return Exploration(small(), tiny, controls=STILL)


@pytest.fixture
def explorer(tiny):
    made = Explorer(small(), tiny)
    made.worker.wait()
    yield made
    made.close()


def threads(): return [thread for thread in threading.enumerate() if thread.name == "tokenlabel explorer"]


# live data

def test_the_live_part_is_half_active_and_of_the_fewest_tokens(tiny):
    feature = Feature.from_words("many", [f"cat{'x' * i}" for i in range(30)], [f"car{'y' * i}" for i in range(30)])
    part = live_part(feature, tiny, 8)
    assert part.texts == tuple([f"cat{'x' * i}" for i in range(4)] + [f"car{'y' * i}" for i in range(4)])


@pytest.mark.parametrize("on, off", [(1, 20), (20, 1), (3, 3)])
def test_the_live_part_fills_up_from_the_larger_class(tiny, on, off):
    feature = Feature.from_words("odd", [f"a{i}" for i in range(on)], [f"b{i}" for i in range(off)])
    active = [spans[0].activation >= ACTIVE for spans in live_part(feature, tiny, 8).spans]
    assert len(active) == min(8, on + off) and 0 < sum(active) < len(active)
    assert abs(sum(active) - min(on, max(4, 8 - off))) == 0


@pytest.mark.parametrize("discriminator", ["channel", "direct"])
@pytest.mark.parametrize("make", [small, sentences])
def test_both_discriminators_explore_words_and_texts(tiny, discriminator, make):
    exploration = Exploration(make(), tiny, discriminator, STILL)
    assert len(exploration.judge.tokens.feature.texts) <= LIVE[discriminator, make().mode]
    for _ in range(5): exploration.step()
    seen = view(exploration)
    known = ~seen.fires.isnan()
    assert known.any() and ((seen.fires[known] >= 0) & (seen.fires[known] <= 1)).all()
    assert png(draw(seen))[:4] == b"\x89PNG"


# the search

def test_left_alone_it_is_a_search_number_for_number(tiny):
    exploration = Exploration(small(), tiny, controls=STILL, seed=3)
    search = Search(make_judge(small(), tiny), weights=STILL.weights, restarts=2, temperature=(0.5, 0.5), ramp=(1, 1),
                    batch_size=64, seed=3)
    for _ in range(6): pd.testing.assert_frame_equal(pd.DataFrame(exploration.step()), pd.DataFrame(search.step()))
    assert torch.equal(torch.stack(exploration.rows), search.v)


def test_annealing_follows_the_schedule_of_label_feature(tiny):
    exploration = Exploration(small(), tiny, controls=Controls(restarts=2))
    search = Search(make_judge(small(), tiny), restarts=2, steps=50, batch_size=64)
    for _ in range(12):
        mine, its = exploration.step()[0], search.step()[0]
        assert mine["temperature"] == pytest.approx(its["temperature"]) and mine["tokens"][0] == its["tokens"][0]
        assert mine["entropy_weight"] == pytest.approx(its["entropy_weight"], abs=1e-12)


def test_every_control_acts_on_the_next_step(exploration):
    exploration.step()
    exploration.set(accuracy=2.0, entropy=0.3, kl=0.1, temperature=0.2, lr=0.05)
    before = torch.stack(exploration.rows).detach()
    [row, _] = exploration.step()
    assert row["step"] == 1 and row["temperature"] == 0.2
    assert row["loss"] == pytest.approx(2 * row["accuracy_loss"] + 0.3 * row["entropy"] + 0.1 * row["kl"], rel=1e-5)
    moved = (torch.stack(exploration.rows).detach() - before).abs()
    assert 0 < moved.max() < 0.2, "a learning rate of 0.05, not of 0.5"


def test_restarts_come_and_go_without_disturbing_the_others(tiny):
    alone, joined = (Exploration(small(), tiny, controls=STILL) for _ in range(2))
    for _ in range(3): alone.step(), joined.step()
    joined.set(restarts=4)
    for _ in range(3):
        few, many = alone.step(), joined.step()
        assert [row["restart"] for row in many] == [0, 1, 2, 3]
        assert [row["loss"] for row in many[:2]] == pytest.approx([row["loss"] for row in few], abs=1e-4)
    joined.set(restarts=1)
    joined.step()
    assert {row["restart"] for row in joined.trace} == {0} and view(joined).trace.restart.unique().tolist() == [0]
    assert len(joined.search.adam.param_groups) == len(joined.search.adam.state) == 1


def test_a_restart_that_is_added_takes_steps_of_the_learning_rate(exploration):
    for _ in range(30): exploration.step()
    exploration.set(restarts=3)
    exploration.step()
    before = exploration.rows[2].detach().clone()
    exploration.step()
    assert (exploration.rows[2] - before).abs().max() < 1.5 * STILL.lr, "no old moments, no steps as of an old run"


def test_starting_again_moves_to_other_points_and_keeps_what_is_known(exploration):
    for _ in range(4): exploration.step()
    known, first = dict(exploration.points), exploration.rows[0].detach().clone()
    exploration.start(seed=1)
    assert exploration.trace == [] and exploration.points == known
    assert not torch.equal(exploration.rows[0], first)
    assert exploration.step()[0]["step"] == 0


def test_single_tokens_on_the_way_are_tried(exploration):
    before = set(exploration.points)
    for _ in range(8): exploration.step()
    assert set(exploration.points) > before
    ranking = view(exploration).ranking
    assert ranking.loss.is_monotonic_increasing and len(ranking) == len(exploration.points)


def test_the_order_of_single_tokens_follows_the_weights(exploration):
    exploration.step()
    exploration.set(accuracy=0.0, kl=1.0)
    ranking = view(exploration).ranking
    assert ranking.kl.is_monotonic_increasing
    exploration.set(accuracy=1.0, kl=0.0)
    assert view(exploration).ranking.accuracy_loss.is_monotonic_increasing


def test_what_is_predicted_is_what_the_accuracy_counts(exploration):
    for _ in range(6): exploration.step()
    seen = view(exploration)
    active = seen.tokens.activation >= ACTIVE
    last = exploration.trace[-2:][seen.restart]
    assert (seen.fires[active] > 0.5).double().mean() == pytest.approx(last["accuracy_active"])
    assert (seen.fires[~active] <= 0.5).double().mean() == pytest.approx(last["accuracy_inactive"])


@pytest.mark.parametrize("wrong", [dict(lr=0), dict(temperature=0), dict(restarts=0), dict(kl=-1), dict(entropy=-0.1)])
def test_impossible_controls_are_refused_and_change_nothing(exploration, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): exploration.set(**wrong)
    assert exploration.controls == STILL


def test_annealing_ends_and_leaves_alone_what_is_beyond_its_end():
    controls = Controls()
    for _ in range(200): controls = cooled(controls)
    assert (controls.temperature, controls.entropy) == pytest.approx((0.1, 0.2))
    beyond = replace(controls, temperature=0.05, entropy=0.9)
    assert cooled(beyond) == beyond


# what is seen

def test_what_is_drawn_is_escaped(tiny):
    feature = Feature.from_words("html", ["<b>cat</b>", "dog"], ["<script>", "&amp;"])
    exploration = Exploration(feature, tiny, controls=STILL)
    for _ in range(3): exploration.step()
    seen = view(exploration)
    seen = replace(seen, top=(("<i>", 0.5), *seen.top[1:]), leaders=(("<i>", 0.5),))
    shown = data_html(seen.tokens, seen.fires) + tokens_html(seen) + error_html(ValueError("<script>"))
    assert "<script>" not in shown and "<b>cat" not in shown and ">&lt;i&gt;<" in shown and "&amp;amp;" in shown


def test_texts_are_shown_in_full_with_what_is_active_underlined(tiny):
    exploration = Exploration(sentences(), tiny, controls=STILL)
    html = data_html(exploration.judge.tokens, torch.full_like(exploration.judge.tokens.activation, 1.0))
    plain = re.sub("<[^>]*>", "", html)
    assert all(text in plain for text in sentences().texts)
    assert "".join(re.findall("<u>(.*?)</u>", html)).split() == ["cat", "dog", "horse"]


def test_drawing_leaves_no_figure_open(exploration):
    exploration.step(), exploration.step()
    before = plt.get_fignums()
    png(draw(view(exploration)))
    assert plt.get_fignums() == before


# words

@pytest.mark.parametrize("text, words", [("", []), ("  \n ", []), ("saw", ["saw"]), ("saw hammer", ["saw", "hammer"]),
                                         ("polar bear\nlion\n", ["polar bear", "lion"]), ("a, b;c", ["a", "b", "c"]),
                                         ("saw hammer\n", ["saw", "hammer"])])
def test_words_are_read_as_people_type_them(text, words): assert read_words(text) == words


@pytest.mark.parametrize("active, inactive, message", [("", "sofa", "fires on"), ("saw", " ", "does not fire on"),
                                                       ("saw", "saw", "saw")])
def test_words_that_make_no_feature_are_refused(active, inactive, message):
    with pytest.raises(ValueError, match=message): own_feature(active, inactive)


# the thread

def test_a_worker_has_a_thread_only_while_there_is_work():
    gate, done = threading.Event(), []
    worker = Worker(lambda: False, failed=done.append)
    worker.do(gate.wait)
    worker.do(lambda: done.append(1))
    assert len(threads()) == 1 and done == []
    gate.set()
    worker.wait()
    assert done == [1] and threads() == []


def test_a_worker_runs_until_enough_and_does_jobs_in_between():
    seen = []
    def again():
        seen.append("again")
        if len(seen) == 2: worker.do(lambda: seen.append("job"))
        return len(seen) < 6
    worker = Worker(again, failed=seen.append)
    worker.run()
    worker.wait()
    assert seen == ["again", "again", "job", "again", "again", "again"] and not worker.runs


def test_an_error_ends_the_work_and_is_told():
    told = []
    worker = Worker(lambda: 1 / 0, failed=told.append)
    worker.run()
    worker.wait()
    assert [type(error) for error in told] == [ZeroDivisionError] and not worker.runs and threads() == []
    worker.do(lambda: told.append("works again"))
    worker.wait()
    assert told[-1] == "works again"


def test_stopping_forgets_what_is_still_to_do():
    gate, done = threading.Event(), []
    worker = Worker(lambda: True, failed=done.append)
    worker.do(gate.wait)
    worker.do(lambda: done.append("never"))
    worker.run()
    threading.Timer(0.1, gate.set).start()
    worker.stop()
    assert done == [] and threads() == []


# the widget

def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_every_control_has_its_slider():
    assert set(make_sliders(Controls())) == set(Controls.__dataclass_fields__)
    for name, slider in make_sliders(STILL).items(): assert slider.value == getattr(STILL, name)


@pytest.mark.parametrize("name", ["small", "animals", widgets.OWN])
def test_a_feature_that_is_given_is_the_one_explored_whatever_its_name(tiny, name):
    made = Explorer(replace(small(), name=name), tiny)
    made.worker.wait()
    assert set(made.exploration.judge.tokens.feature.texts) <= set(small().texts) and made.phases is None
    made.close()


def test_run_moves_everything_and_pause_stops_it(explorer):
    first = bytes(explorer.picture.value), explorer.tokens.value
    explorer.run()
    until(lambda: explorer.exploration.search.done > 5)
    explorer.pause()
    explorer.worker.wait()
    steps = explorer.exploration.search.done
    assert threads() == [] and explorer.status.value == f"paused after step {steps}"
    assert bytes(explorer.picture.value) != first[0] and explorer.tokens.value != first[1]
    assert f"after step {steps}" in explorer.tokens.value
    assert explorer.sliders["temperature"].value == pytest.approx(explorer.exploration.controls.temperature, rel=0.02)


def test_a_run_ends_by_itself(explorer, monkeypatch):
    monkeypatch.setattr(widgets, "LONGEST", 7)
    explorer.run()
    explorer.worker.wait()
    assert explorer.exploration.search.done == 1 + 8 and threads() == []


def test_a_moved_slider_acts_and_does_not_start_over(explorer):
    explorer.run()
    until(lambda: explorer.exploration.search.done > 2)
    explorer.sliders["kl"].value = 0.25
    explorer.sliders["restarts"].value = 1
    done = explorer.exploration.search.done
    until(lambda: explorer.exploration.search.done > done + 2)
    explorer.pause()
    explorer.worker.wait()
    last = explorer.exploration.trace[-1]
    assert last["step"] > done and last["restart"] == 0
    assert explorer.exploration.search.weights.kl == 0.25
    assert explorer.sliders["anneal"].value, "no hand was on temperature or entropy"


def test_a_hand_on_temperature_or_entropy_takes_over(explorer):
    explorer.sliders["temperature"].value = 0.4
    assert not explorer.sliders["anneal"].value and not explorer.exploration.controls.anneal
    explorer.step()
    explorer.worker.wait()
    assert explorer.exploration.trace[-1]["temperature"] == pytest.approx(0.4)
    assert explorer.exploration.controls.temperature == pytest.approx(0.4)


def test_a_page_that_reports_what_annealing_did_is_no_hand(explorer):
    explorer.step()
    explorer.worker.wait()
    sent = explorer.sliders["temperature"].value
    explorer.step()
    explorer.worker.wait()
    assert explorer.sliders["temperature"].value < sent
    explorer.sliders["temperature"].value = sent   # as the page sends it, late
    assert explorer.sliders["anneal"].value and explorer.exploration.controls.temperature < sent


def test_step_takes_one_and_restart_begins_anew(explorer):
    done = explorer.exploration.search.done
    explorer.buttons["step"].click()
    explorer.worker.wait()
    assert explorer.exploration.search.done == done + 1
    explorer.buttons["restart"].click()
    explorer.worker.wait()
    assert explorer.exploration.search.done == 1 and explorer.exploration.seed == 1


def test_another_discriminator_keeps_the_sliders(explorer):
    explorer.sliders["kl"].value = 0.3
    explorer.discriminator.value = "direct"
    explorer.worker.wait()
    assert explorer.exploration.judge.scaled and explorer.exploration.controls.kl == 0.3


def test_own_words_are_used_and_mistakes_are_shown(explorer):
    explorer.feature.value = OWN
    assert explorer.own.layout.display != "none"
    explorer.active.value, explorer.inactive.value = "cat dog", "dog book"
    explorer.use.click()
    explorer.worker.wait()
    assert "in both lists: dog" in explorer.error.value and explorer.data.value == "" and threads() == []
    assert explorer.picture.layout.display == "none", "no picture of other data"
    explorer.run()
    explorer.worker.wait()
    assert "choose a feature" in explorer.error.value
    explorer.inactive.value = "car book"
    explorer.use.click()
    explorer.worker.wait()
    assert explorer.error.value == "" and ">book<" in explorer.data.value
    assert explorer.picture.layout.display is None


def test_an_error_in_a_step_is_shown_with_where_it_happened(explorer, monkeypatch):
    def broken(): raise RuntimeError("out of <memory>")
    monkeypatch.setattr(explorer.exploration.search, "step", broken)
    explorer.run()
    explorer.worker.wait()
    assert "out of &lt;memory&gt;" in explorer.error.value and "in broken" in explorer.error.value
    assert explorer.status.value == "stopped" and threads() == []
    explorer.restart()
    explorer.worker.wait()
    explorer.step()
    explorer.worker.wait()
    assert explorer.error.value == "" and explorer.exploration.search.done == 2


def test_moving_a_slider_never_waits_for_a_step(explorer, monkeypatch):
    gate, step = threading.Event(), explorer.exploration.search.step
    monkeypatch.setattr(explorer.exploration.search, "step", lambda: gate.wait() and step())
    explorer.run()
    start = time.perf_counter()
    for i in range(100): explorer.sliders["kl"].value = i / 1000
    assert time.perf_counter() - start < 1 and not gate.is_set()
    gate.set()


def test_a_map_with_a_point_where_the_sliders_stand_for_features_that_have_one(tiny, monkeypatch):
    table = pd.DataFrame([dict(entropy=e, kl=k, phase="superposition", token="·a", probability=0.1)
                          for e in (0.0, 0.4) for k in (0.0, 0.2)])
    monkeypatch.setattr(widgets, "load_maps", lambda lm: {"animals": table} if lm == tiny.name else {})
    made = Explorer(lm=tiny)
    made.worker.wait()
    def point(): return [float(x) for x in re.search(r'class="tl-here" cx="([\d.]+)" cy="([\d.]+)"', made.map.value).groups()]
    x, y = point()
    made.sliders["kl"].value = 0.2
    assert point()[0] > x and point()[1] == y
    made.sliders["entropy"].value = 0.3
    assert point()[1] < y
    made.discriminator.value = "direct"
    made.worker.wait()
    assert made.map.value == ""
    made.discriminator.value, made.feature.value = "channel", "numbers"
    made.worker.wait()
    assert made.map.value == ""
    made.feature.value = "animals"
    made.worker.wait()
    assert "tl-here" in made.map.value
    made.close()


def test_running_one_explorer_pauses_the_other(explorer, tiny):
    other = Explorer(small(), tiny)
    other.worker.wait()
    explorer.run()
    other.run()
    assert not explorer.worker.runs and other.worker.runs
    other.close()
    explorer.worker.wait()
    assert threads() == []


def test_closing_in_the_middle_of_a_run_leaves_no_thread(tiny):
    explorer = explore(small(), tiny)
    explorer.run()
    until(lambda: explorer.exploration and explorer.exploration.search.done > 2)
    explorer.close()
    assert threads() == []
    assert explorer.comm is None


def test_the_model_is_loaded_once_and_by_the_worker(tiny, monkeypatch):
    loaded = []
    monkeypatch.setattr(widgets, "load_lm", lambda **settings: loaded.append(threading.current_thread().name) or tiny)
    widgets.default_lm.cache_clear()
    for _ in range(2):
        explorer = explore(small())
        explorer.worker.wait()
        assert explorer.exploration.judge.lm is tiny
        explorer.close()
    widgets.default_lm.cache_clear()
    assert loaded == ["tokenlabel explorer"]


def test_it_is_a_widget_that_jupyter_shows(explorer):
    assert isinstance(explorer, ipywidgets.DOMWidget)
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()
