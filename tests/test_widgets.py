"Facts about tokenlabel.widgets, without a browser: the picture, the thread, and the explorer as its buttons move it."
import re
import threading
import time
from dataclasses import replace

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from tokenlabel import widgets
from tokenlabel.exploration import Exploration, live_settings
from tokenlabel.feature import Feature
from tokenlabel.settings import FIELDS
from tokenlabel.widgets import OWN, Explorer, Worker, draw, explore, make_sliders, own_feature, read_words


def small():
    "A feature of eight words; a model of two layers reads it at once."
    return Feature.from_words("small", ["cat", "dog", "horse", "animal"], ["house", "car", "book", "red"])


@pytest.fixture
def tiny(tiny_lm): return tiny_lm("llama")


@pytest.fixture
def explorer(tiny):
    made = Explorer(small(), tiny)
    made.worker.wait()
    yield made
    made.close()


def threads(): return [thread for thread in threading.enumerate() if thread.name == "tokenlabel explorer"]


# the picture

def test_drawing_leaves_no_figure_open(tiny):
    exploration, before = Exploration(small(), tiny), plt.get_fignums()
    for _ in range(2):
        exploration.step()
        assert draw(exploration.view())[:4] == b"\x89PNG"
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


def test_a_worker_runs_until_the_end_and_does_jobs_in_between():
    seen = []
    def again():
        seen.append("again")
        if len(seen) == 2: worker.do(lambda: seen.append("job"))
        return len(seen) < 6
    worker = Worker(again, failed=seen.append)
    worker.run()
    worker.wait()
    assert seen == ["again", "again", "job", "again", "again", "again"] and not worker.runs


def test_an_error_ends_the_work_and_is_reported():
    told = []
    worker = Worker(lambda: 1 / 0, failed=told.append)
    worker.run()
    worker.wait()
    assert [type(error) for error in told] == [ZeroDivisionError] and not worker.runs and threads() == []
    worker.do(lambda: told.append("works again"))
    worker.wait()
    assert told[-1] == "works again"


def test_stopping_discards_the_jobs_left():
    gate, done = threading.Event(), []
    worker = Worker(lambda: True, failed=done.append)
    worker.do(gate.wait)
    worker.do(lambda: done.append("never"))
    worker.run()
    threading.Timer(0.1, gate.set).start()
    worker.stop()
    assert done == [] and threads() == []


# the widget

def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def test_a_slider_has_name_value_and_help_of_its_setting():
    settings = live_settings(kl_weight=0.2, temperature=0.5, restarts=3)
    sliders = make_sliders(settings)
    assert sliders.keys() - FIELDS.keys() == {"anneal"} and sliders["temperature"].value == 0.5
    for name in sliders.keys() - {"anneal", "temperature"}:
        assert sliders[name].value == getattr(settings, name) and sliders[name].tooltip == FIELDS[name]


@pytest.mark.parametrize("name", ["small", "animals", widgets.OWN])
def test_a_feature_that_is_given_is_the_one_explored_whatever_its_name(tiny, name):
    made = Explorer(replace(small(), name=name), tiny)
    made.worker.wait()
    assert set(made.exploration.discriminator.tokens.feature.texts) <= set(small().texts) and made.phases is None
    made.close()


def test_run_moves_everything_and_pause_stops_it(explorer):
    first = bytes(explorer.picture.value), explorer.tokens.value
    explorer.run()
    until(lambda: explorer.exploration.done > 5)
    explorer.pause()
    explorer.worker.wait()
    steps = explorer.exploration.done
    assert threads() == [] and explorer.status.value == f"paused after step {steps}"
    assert bytes(explorer.picture.value) != first[0] and explorer.tokens.value != first[1]
    assert f"after step {steps}" in explorer.tokens.value
    assert explorer.sliders["temperature"].value == pytest.approx(explorer.exploration.settings.temperature[0], rel=0.02)


def test_a_run_ends_by_itself(explorer, monkeypatch):
    monkeypatch.setattr(Explorer, "longest", 7)
    explorer.run()
    explorer.worker.wait()
    assert explorer.exploration.done == 1 + 8 and threads() == []


def test_a_moved_slider_acts_and_does_not_start_over(explorer):
    explorer.run()
    until(lambda: explorer.exploration.done > 2)
    explorer.sliders["kl_weight"].value = 0.25
    explorer.sliders["restarts"].value = 1
    done = explorer.exploration.done
    until(lambda: explorer.exploration.done > done + 2)
    explorer.pause()
    explorer.worker.wait()
    last = explorer.exploration.trace[-1]
    assert last["step"] > done and last["restart"] == 0
    assert explorer.exploration.searches[0].settings.kl_weight == 0.25
    assert explorer.sliders["anneal"].value, "no hand was on temperature or entropy"


def test_a_hand_on_temperature_or_entropy_takes_over(explorer):
    explorer.sliders["temperature"].value = 0.4
    assert not explorer.sliders["anneal"].value and not explorer.exploration.anneal
    explorer.step()
    explorer.worker.wait()
    assert explorer.exploration.trace[-1]["temperature"] == pytest.approx(0.4)
    assert explorer.exploration.settings.temperature[0] == pytest.approx(0.4)


def test_a_report_of_the_page_about_annealing_is_no_hand(explorer):
    explorer.step()
    explorer.worker.wait()
    sent = explorer.sliders["temperature"].value
    explorer.step()
    explorer.worker.wait()
    assert explorer.sliders["temperature"].value < sent
    explorer.sliders["temperature"].value = sent   # as the page sends it, late
    assert explorer.sliders["anneal"].value and explorer.exploration.settings.temperature[0] < sent


def test_step_takes_one_and_restart_begins_anew(explorer):
    done = explorer.exploration.done
    explorer.buttons["step"].click()
    explorer.worker.wait()
    assert explorer.exploration.done == done + 1
    explorer.buttons["restart"].click()
    explorer.worker.wait()
    assert explorer.exploration.done == 1 and explorer.exploration.settings.seed == 2


def test_another_discriminator_keeps_the_sliders(explorer):
    explorer.sliders["kl_weight"].value = 0.3
    explorer.discriminator.value = "direct"
    explorer.worker.wait()
    assert explorer.exploration.discriminator.needs_scale and explorer.exploration.settings.kl_weight == 0.3


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
    def broken(settings): raise RuntimeError("out of <memory>")
    monkeypatch.setattr(explorer.exploration.searches[0], "configure", broken)
    explorer.run()
    explorer.worker.wait()
    assert "out of &lt;memory&gt;" in explorer.error.value and "in broken" in explorer.error.value
    assert explorer.status.value == "stopped" and threads() == []
    explorer.restart()
    explorer.worker.wait()
    explorer.step()
    explorer.worker.wait()
    assert explorer.error.value == "" and explorer.exploration.done == 2


def test_moving_a_slider_never_waits_for_a_step(explorer, monkeypatch):
    gate, step = threading.Event(), explorer.exploration.step
    monkeypatch.setattr(explorer.exploration, "step", lambda: gate.wait() and step())
    explorer.run()
    start = time.perf_counter()
    for i in range(100): explorer.sliders["kl_weight"].value = i / 1000
    assert time.perf_counter() - start < 1 and not gate.is_set()
    gate.set()


def test_a_map_with_a_point_where_the_sliders_stand_for_features_that_have_one(tiny, monkeypatch):
    table = pd.DataFrame([dict(entropy_weight=e, kl_weight=k, phase="superposition", token="·a", probability=0.1)
                          for e in (0.0, 0.4) for k in (0.0, 0.2)])
    monkeypatch.setattr(widgets, "load_maps", lambda lm: {"animals": table} if lm == tiny.name else {})
    made = Explorer(lm=tiny)
    made.worker.wait()
    def point(): return [float(x) for x in re.search(r'class="tl-here" cx="([\d.]+)" cy="([\d.]+)"', made.map.value).groups()]
    x, y = point()
    made.sliders["kl_weight"].value = 0.2
    assert point()[0] > x and point()[1] == y
    made.sliders["entropy_weight"].value = 0.3
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
    until(lambda: explorer.exploration and explorer.exploration.done > 2)
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
        assert explorer.exploration.discriminator.lm is tiny
        explorer.close()
    widgets.default_lm.cache_clear()
    assert loaded == ["tokenlabel explorer"]


def test_it_is_a_widget_that_jupyter_shows(explorer):
    assert isinstance(explorer, ipywidgets.DOMWidget)
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()
