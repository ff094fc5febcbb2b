"Facts about tokenlabel.widgets, without a browser: the picture, the thread, and the explorer as its buttons move it."
import re
import threading
import time
from dataclasses import replace
from urllib.parse import parse_qs

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from tokenlabel import widgets
from tokenlabel.exploration import Exploration, live_settings
from tokenlabel.feature import Feature
from tokenlabel.settings import FIELDS
from tokenlabel.widgets import FEATURES, OWN, Explorer, Worker, describe, draw, explore, make_sliders, own_feature, read_words


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
    for _ in range(3): exploration.step()
    assert [picture[:4] for picture in draw(exploration.view())] == [b"\x89PNG"] * 2
    assert plt.get_fignums() == before


def test_pictures_are_described_with_the_numbers_that_they_show(tiny):
    exploration = Exploration(small(), tiny)
    for _ in range(3): exploration.step()
    seen = exploration.view()
    losses, plane = describe(seen)
    last = seen.trace[seen.trace.restart == seen.restart].iloc[-1]
    assert f"has loss {last.loss:.2f}, the sum of" in losses and "3 steps" in losses
    assert seen.ranking.token[0] in plane and f"{seen.losses['kl']:.1f}" in plane


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


def shown(explorer): return [name for name, button in explorer.buttons.items() if button.layout.display != "none"]


def test_before_the_first_step_there_are_data_a_question_and_one_button(explorer):
    assert explorer.exploration.done == 0 and shown(explorer) == ["run"] and not explorer.buttons["run"].disabled
    assert ">cat<" in explorer.data.value and "fires with probability" not in explorer.data.value
    assert "Press <b>Run</b>" in explorer.tokens.value and "%" not in explorer.tokens.value
    assert explorer.gallery.layout.display == "none" and explorer.map.value == ""
    explorer.step()
    explorer.worker.wait()
    assert shown(explorer) == ["run", "step", "restart", "reset"]


def test_run_moves_everything_and_pause_stops_it(explorer):
    def pictures(): return [bytes(picture.value) for picture in explorer.pictures.values()]
    explorer.step()
    explorer.step()
    explorer.worker.wait()
    first, tokens = pictures(), explorer.tokens.value
    explorer.buttons["run"].click()
    assert explorer.buttons["run"].description == "Pause"
    until(lambda: explorer.exploration.done > 5)
    explorer.buttons["run"].click()
    explorer.worker.wait()
    assert explorer.buttons["run"].description == "Run"
    steps = explorer.exploration.done
    assert threads() == [] and explorer.status.value == f"paused after step {steps}"
    assert not set(pictures()) & set(first) and explorer.tokens.value != tokens
    assert explorer.behind.value == f"pictures: step {steps}" and f"over {steps} steps" in explorer.bridge.texts["tl-losses"]
    assert explorer.bridge.says.startswith(f"Paused after step {steps}")
    assert f"after step {steps}" in explorer.tokens.value
    assert explorer.sliders["temperature"].value == pytest.approx(explorer.exploration.settings.temperature[0], abs=0.005)


def test_a_run_ends_by_itself(explorer, monkeypatch):
    monkeypatch.setattr(Explorer, "longest", 7)
    explorer.run()
    explorer.worker.wait()
    assert explorer.exploration.done == 1 + 7 and threads() == [] and explorer.buttons["run"].description == "Run"


def test_pictures_that_are_behind_say_so(explorer):
    explorer.step()
    explorer.step()
    explorer.worker.wait()
    explorer.cost = 1e9
    explorer.drawn = time.perf_counter()
    explorer.run()
    until(lambda: explorer.exploration.done > 5)
    until(lambda: "behind" in explorer.behind.value)
    assert explorer.behind.value.startswith("pictures: step 2, ")


def test_a_moved_slider_acts_and_does_not_start_over(explorer):
    explorer.run()
    until(lambda: explorer.exploration and explorer.exploration.done > 2)
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
    assert explorer.exploration.done == 1 and explorer.exploration.settings.seed == 2 == explorer.sliders["seed"].value
    explorer.sliders["seed"].value = 7
    assert "seed 7" in explorer.status.value and explorer.exploration.settings.seed == 2
    explorer.buttons["restart"].click()
    explorer.worker.wait()
    assert explorer.exploration.settings.seed == 7 == explorer.sliders["seed"].value


def test_reset_takes_everything_back_and_reads_no_data_again(explorer):
    exploration, first = explorer.exploration, {name: slider.value for name, slider in explorer.sliders.items()}
    for name, value in dict(accuracy_weight=0.0, lr=1.26, temperature=0.3, restarts=4, seed=9).items():
        explorer.sliders[name].value = value
    explorer.go(0.4, 0.2)
    for _ in range(3): explorer.step()
    explorer.worker.wait()
    assert explorer.address()
    explorer.buttons["reset"].click()
    explorer.worker.wait()
    assert {name: slider.value for name, slider in explorer.sliders.items()} == first and explorer.address() == ""
    assert explorer.exploration is exploration and exploration.done == 0 and shown(explorer) == ["run"]
    explorer.step()
    explorer.worker.wait()
    row = exploration.trace[-1]
    assert (len(exploration.trace), row["temperature"], row["entropy_weight"], exploration.settings.lr) == (2, 1, 0, 0.5)


def test_another_discriminator_keeps_the_sliders(explorer):
    explorer.sliders["kl_weight"].value = 0.3
    explorer.discriminator.value = "direct"
    explorer.worker.wait()
    assert explorer.exploration.discriminator.needs_scale and explorer.exploration.settings.kl_weight == 0.3


def test_run_takes_the_words_that_are_typed(explorer):
    explorer.feature.value = OWN
    assert explorer.own.layout.display != "none" and explorer.data.value == "" and "Type words" in explorer.status.value
    explorer.on.value, explorer.off.value = "cat dog", "dog book"
    explorer.run()
    explorer.worker.wait()
    assert "in both lists: dog" in explorer.error.value and explorer.data.value == "" and threads() == []
    explorer.off.value = "car book"
    assert "in both lists" in explorer.error.value, "an error stays until the words are read again"
    explorer.run()
    until(lambda: explorer.exploration and explorer.exploration.done > 2)
    assert explorer.error.value == explorer.hint.value == "" and ">book<" in explorer.data.value
    explorer.off.value = "car book red"
    explorer.worker.wait()
    assert "not read yet" in explorer.hint.value and ">red<" not in explorer.data.value and not explorer.worker.runs
    assert "tl-old" in explorer.data._dom_classes
    explorer.run()
    until(lambda: explorer.built and "red" in explorer.built[-1] and explorer.exploration.done > 2)
    assert ">red<" in explorer.data.value and explorer.hint.value == "" and "tl-old" not in explorer.data._dom_classes


def test_the_words_come_with_the_press_of_a_button(explorer):
    explorer.feature.value = OWN
    explorer._hear(dict(words=["cat dog", "car"]))
    explorer.step()
    explorer.worker.wait()
    assert ">dog<" in explorer.data.value and ">car<" in explorer.data.value


def test_empty_fields_are_named(explorer):
    explorer.feature.value = OWN
    explorer.run()
    explorer.worker.wait()
    assert "under “fires on”" in explorer.error.value and not explorer.worker.runs


def test_another_choice_clears_the_page_at_once_and_waits(explorer, monkeypatch):
    for _ in range(2): explorer.step()
    explorer.worker.wait()
    gate, make = threading.Event(), widgets.Exploration
    monkeypatch.setattr(widgets, "Exploration", lambda *args: gate.wait() and make(*args))
    explorer.discriminator.value = "direct"
    assert not any(part.value for part in (explorer.tokens, explorer.data, explorer.loss, explorer.behind))
    assert explorer.gallery.layout.display == "none" and explorer.buttons["run"].disabled
    until(lambda: "reads the data" in explorer.status.value)
    assert re.search(r"about \d+ s", explorer.status.value)
    explorer.feature.value = "animals"  # while the first choice is read
    explorer.feature.value = "small"
    explorer.discriminator.value = "channel"
    gate.set()
    explorer.worker.wait()
    assert explorer.built == ("small", "channel") and ">cat<" in explorer.data.value and not explorer.buttons["run"].disabled


def test_a_choice_that_comes_late_is_not_shown_under_another_name(explorer, monkeypatch):
    gate, make = threading.Event(), widgets.Exploration
    monkeypatch.setattr(widgets, "Exploration", lambda *args: gate.wait() and make(*args))
    explorer.feature.value = "animals"
    until(lambda: "reads the data" in explorer.status.value)
    explorer.feature.value = OWN
    gate.set()
    explorer.worker.wait()
    assert explorer.data.value == "" and explorer.exploration is None and "Type words" in explorer.status.value


# the address

def test_an_address_says_what_was_chosen_and_an_explorer_takes_it(tiny):
    made = Explorer(small(), tiny)
    made.worker.wait()
    assert made.address() == ""
    made.feature.value, made.on.value, made.off.value = OWN, "cat, dog & co", "car\nbook"
    for name, value in dict(kl_weight=0.2, lr=0.49999999999999994, restarts=3, seed=5).items(): made.sliders[name].value = value
    made.run()
    until(lambda: made.exploration and made.exploration.done > 3)
    made.pause()
    made.worker.wait()
    assert parse_qs(made.bridge.state) == dict(feature=[OWN], on=["cat, dog & co"], off=["car\nbook"], kl_weight=["0.2"],
                                               restarts=["3"], seed=["5"]), "and nothing that annealing has moved"
    same = Explorer(small(), tiny, made.bridge.state)
    while not same.exploration or same.exploration.done < made.exploration.done:
        same.step()
        same.worker.wait()
    assert same.address() == made.address()
    assert [row["loss"] for row in same.exploration.trace] == [row["loss"] for row in made.exploration.trace]
    made.close()
    same.close()


def test_an_address_has_the_end_of_annealing_or_the_values_held_by_hand(tiny):
    made = Explorer(small(), tiny, "entropy_weight=0.4&token=secret")
    made.worker.wait()
    assert made.exploration.end.entropy_weight == 0.4 and made.sliders["entropy_weight"].value == 0
    assert made.address() == "entropy_weight=0.4"
    made.sliders["entropy_weight"].value = 0.1
    assert parse_qs(made.address()) == dict(entropy_weight=["0.1"], anneal=["0"])
    same = Explorer(small(), tiny, made.address())
    same.worker.wait()
    assert same.exploration.settings.entropy_weight == 0.1 and not same.exploration.anneal
    made.close()
    same.close()


@pytest.mark.parametrize("wrong", ["feature=dragons", "kl_weight=much", "kl_weight=7", "lr=nan", "seed=-1", "anneal=x"])
def test_an_impossible_address_is_named_and_the_default_stays(tiny, wrong):
    made = Explorer(small(), tiny, wrong)
    made.worker.wait()
    assert wrong in made.error.value and made.address() == "" and made.exploration
    made.close()


def test_an_error_in_a_step_is_shown_with_where_it_happened(explorer, monkeypatch):
    explorer.step()  # the first one makes the searches
    explorer.worker.wait()
    def broken(settings): raise RuntimeError("out of <memory>")
    monkeypatch.setattr(explorer.exploration.searches[0], "configure", broken)
    explorer.run()
    explorer.worker.wait()
    assert "out of &lt;memory&gt;" in explorer.trouble.value and "in broken" in explorer.trouble.value
    assert explorer.status.value == "stopped" and threads() == [] and explorer.buttons["run"].description == "Run"
    explorer.restart()
    explorer.worker.wait()
    explorer.step()
    explorer.worker.wait()
    assert explorer.trouble.value == "" and explorer.exploration.done == 2


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
    assert made.map.value == "" and made.asked.layout.display is None, "the map gives the answer away"
    made.asked.value = True
    def point(): return [float(x) for x in re.search(r'class="tl-here" cx="([\d.]+)" cy="([\d.]+)"', made.map.value).groups()]
    x, y = point()
    made.sliders["kl_weight"].value = 0.2
    assert point()[0] > x and point()[1] == y
    made._hear(dict(tile=2))  # entropy 0.4, KL 0.0
    assert (made.sliders["entropy_weight"].value, made.sliders["kl_weight"].value) == (0.4, 0.0) and made.sliders["anneal"].value
    assert point()[0] < x and point()[1] < y and made.address() == "entropy_weight=0.4&kl_weight=0"
    made.step()
    made.step()
    made.worker.wait()
    assert [row["entropy_weight"] for row in made.exploration.trace[::2]] == pytest.approx([0, 0.4 / 49]), "it rises to the tile"
    made.discriminator.value = "direct"
    made.worker.wait()
    assert made.map.value == "" and made.asked.layout.display == "none"
    made.discriminator.value, made.feature.value = "channel", "numbers"
    made.worker.wait()
    assert made.asked.layout.display == "none"
    made.close()


def test_the_map_appears_when_a_run_has_ended(tiny, monkeypatch):
    table = pd.DataFrame([dict(entropy_weight=e, kl_weight=k, phase="superposition", token="·a", probability=0.1)
                          for e in (0.0, 0.4) for k in (0.0, 0.2)])
    monkeypatch.setattr(widgets, "load_maps", lambda lm: {"animals": table})
    monkeypatch.setattr(Explorer, "longest", 3)
    made = Explorer(lm=tiny)
    made.run()
    made.worker.wait()
    assert made.asked.value and "tl-here" in made.map.value
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


def test_a_prepared_exploration_is_taken_by_one_explorer_only(tiny, monkeypatch):
    monkeypatch.setattr(widgets, "default_lm", lambda: tiny)
    widgets.prepare()
    [ready] = widgets.prepared.values()
    first, second = explore(), explore()
    for made in first, second: made.worker.wait()
    assert first.exploration is ready and second.exploration is not ready and not widgets.prepared
    assert first.exploration.discriminator.tokens.feature == second.exploration.discriminator.tokens.feature
    for made in first, second: made.close()


def test_latents_of_the_package_are_features():
    latents = [make() for name, make in FEATURES.items() if name.startswith("latent")]
    assert len(latents) == 3
    for one in latents: assert sorted(spans[0].activation for spans in one.spans) == [0.0] * 16 + [1.0] * 16
