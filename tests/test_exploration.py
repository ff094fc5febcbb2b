"Facts about tokenlabel.exploration: searches whose settings change on their way, and views of them."
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

from tokenlabel.exploration import LIVE, Exploration, annealed, data_html, live_part, live_settings, tokens_html
from tokenlabel.feature import ACTIVE, Feature
from tokenlabel.search import Search, make_discriminator, step
from tokenlabel.settings import Settings
from tokenlabel.tokenize import tokenize

STILL = live_settings(entropy_weight=0.1, temperature=0.5)


def small():
    "A feature of eight words; a model of two layers reads it at once."
    return Feature.from_words("small", ["cat", "dog", "horse", "animal"], ["house", "car", "book", "red"])


def sentences():
    texts = ["the cat sat", "the dog and the horse", "the car is red", "the red book is on the mat"]
    return Feature.from_texts("sentences", texts, [[(4, 7, 1.0)], [(4, 7, 1.0), (16, 21, 1.0)], [], []])


def still(lm, feature=None, **changes):
    made = Exploration(feature or small(), lm, replace(STILL, **changes))
    made.change(anneal=False)
    return made


@pytest.fixture
def tiny(tiny_lm): return tiny_lm("llama")


@pytest.fixture
def exploration(tiny): return still(tiny)


# the data

def test_the_live_part_is_half_active_and_of_the_fewest_tokens(tiny):
    feature = Feature.from_words("many", [f"cat{'x' * i}" for i in range(30)], [f"car{'y' * i}" for i in range(30)])
    part = live_part(feature, tiny, 8)
    assert part.texts == tuple([f"cat{'x' * i}" for i in range(4)] + [f"car{'y' * i}" for i in range(4)])


@pytest.mark.parametrize("on, off", [(1, 20), (20, 1), (3, 3)])
def test_the_live_part_fills_up_from_the_larger_class(tiny, on, off):
    feature = Feature.from_words("odd", [f"a{i}" for i in range(on)], [f"b{i}" for i in range(off)])
    active = [spans[0].activation >= ACTIVE for spans in live_part(feature, tiny, 8).spans]
    assert len(active) == min(8, on + off) and 0 < sum(active) < len(active)
    assert sum(active) == min(on, max(4, 8 - off))


@pytest.mark.parametrize("discriminator", LIVE)
@pytest.mark.parametrize("make", [small, sentences])
def test_both_discriminators_explore_words_and_texts(tiny, discriminator, make):
    exploration = Exploration(make(), tiny, live_settings(discriminator))
    assert len(exploration.discriminator.tokens.documents) <= LIVE[discriminator][make().isolated]
    for _ in range(3): exploration.step()
    fires = exploration.view().fires
    assert len(fires) == len(exploration.discriminator.tokens.activation) and ((fires >= 0) & (fires <= 1)).all()


# the steps

def test_with_constant_settings_it_takes_the_steps_of_ordinary_searches(tiny):
    exploration = still(tiny, seed=3)
    discriminator = make_discriminator(tiny, tokenize(small(), tiny), STILL)
    searches = [Search(discriminator, replace(STILL, restarts=1, seed=3 + i)) for i in range(2)]
    for _ in range(6):
        same = [row | {"restart": i, "accuracy_weight": 1.0} for i, [row] in enumerate(step(searches))]
        pd.testing.assert_frame_equal(pd.DataFrame(exploration.step()), pd.DataFrame(same))
    assert all(torch.equal(one.v, other.v) for one, other in zip(exploration.searches, searches))


def test_annealing_follows_the_schedule_of_an_ordinary_search(tiny):
    exploration = Exploration(small(), tiny, live_settings(restarts=1))
    ordinary = replace(live_settings(restarts=1), **{name: getattr(Settings(), name)
                                                     for name in ("temperature", "entropy_schedule", "entropy_weight")})
    search = Search(exploration.discriminator, ordinary)
    for _ in range(12):
        [mine], [its] = exploration.step(), search.step()
        assert mine["temperature"] == pytest.approx(its["temperature"]) and mine["tokens"][0] == its["tokens"][0]
        assert mine["entropy_weight"] == pytest.approx(its["entropy_weight"], abs=1e-7)


def test_annealing_ends_and_keeps_a_value_beyond_its_end():
    settings = live_settings()
    for _ in range(200): settings = annealed(settings)
    assert (*settings.temperature, settings.entropy_weight) == pytest.approx((0.1, 0.1, 0.2))
    beyond = live_settings(temperature=0.05, entropy_weight=0.9)
    assert annealed(beyond) == beyond


def test_annealing_ends_where_the_exploration_says(tiny):
    exploration = Exploration(small(), tiny, live_settings(restarts=1))
    exploration.end = Settings(entropy_weight=0.4, steps=3)
    for _ in range(5): exploration.step()
    assert [row["entropy_weight"] for row in exploration.trace] == pytest.approx([0, 0.2, 0.4, 0.4, 0.4])


def test_every_setting_acts_on_the_next_step(exploration):
    exploration.step()
    exploration.change(accuracy_weight=2.0, entropy_weight=0.3, kl_weight=0.1, temperature=0.2, lr=0.05)
    before = [search.v.detach().clone() for search in exploration.searches]
    row = exploration.step()[0]
    assert row["step"] == 1 and row["temperature"] == 0.2
    assert row["loss"] == pytest.approx(2 * row["accuracy_loss"] + 0.3 * row["entropy"] + 0.1 * row["kl"], rel=1e-5)
    for search, v in zip(exploration.searches, before): assert 0 < (search.v - v).abs().max() < 0.2, "lr is 0.05, not 0.5"


def test_restarts_come_and_go_without_a_change_to_the_others(tiny):
    alone, joined = still(tiny), still(tiny)
    for _ in range(3): alone.step(), joined.step()
    joined.change(restarts=4)
    for _ in range(3):
        few, many = alone.step(), joined.step()
        assert [(row["step"], row["restart"]) for row in many] == [(few[0]["step"], i) for i in range(4)]
        assert [row["loss"] for row in many[:2]] == pytest.approx([row["loss"] for row in few], abs=1e-4)
    joined.change(restarts=1)
    joined.step()
    assert {row["restart"] for row in joined.trace} == {0} and len(joined.searches) == 1
    assert joined.view().trace.restart.unique().tolist() == [0]


def test_an_added_restart_begins_with_steps_of_the_learning_rate(exploration):
    for _ in range(30): exploration.step()
    exploration.change(restarts=3)
    exploration.step()
    before = exploration.searches[2].v.detach().clone()
    exploration.step()
    assert (exploration.searches[2].v - before).abs().max() < 1.5 * STILL.lr, "the optimizer has no moments of an older run"


def test_a_new_start_has_other_soft_labels_and_keeps_the_scores_of_tokens(exploration):
    for _ in range(4): exploration.step()
    scores, first = dict(exploration.scores), exploration.searches[0].v.detach().clone()
    exploration.start(seed=5)
    assert exploration.trace == [] and exploration.scores == scores and exploration.done == 0
    assert not torch.equal(exploration.searches[0].v, first)
    assert exploration.step()[0]["step"] == 0


@pytest.mark.parametrize("wrong", [dict(lr=0), dict(temperature=0), dict(restarts=0), dict(kl_weight=-1),
                                   dict(entropy_weight=-0.1), dict(learning_rate=1)])
def test_impossible_settings_are_refused_and_change_nothing(exploration, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): exploration.change(**wrong)
    assert exploration.settings == STILL


# the view

def test_candidates_of_the_run_are_scored(exploration):
    before = set(exploration.scores)
    for _ in range(8): exploration.step()
    assert set(exploration.scores) > before
    ranking = exploration.view().ranking
    assert ranking.loss.is_monotonic_increasing and len(ranking) == len(exploration.scores)


def test_the_order_of_single_tokens_follows_the_weights(exploration):
    exploration.step()
    exploration.change(accuracy_weight=0.0, kl_weight=1.0)
    assert exploration.view().ranking.kl.is_monotonic_increasing
    exploration.change(accuracy_weight=1.0, kl_weight=0.0)
    assert exploration.view().ranking.accuracy_loss.is_monotonic_increasing


def test_a_collapsed_label_has_the_losses_and_predictions_of_its_token(tiny):
    exploration = still(tiny, temperature=(1e-3, 1e-3), restarts=1)
    exploration.step()
    seen = exploration.view()
    [(token, p)] = seen.leaders
    assert p > 0.99 and seen.top[0] == (token, p)
    exploration.score([id for id in tiny.admissible.nonzero()[:, 0].tolist() if tiny.show(id) == token])
    alone = exploration.view().ranking.set_index("token").loc[token]
    assert seen.losses["accuracy_loss"] == pytest.approx(alone.accuracy_loss, abs=1e-3)
    assert seen.losses["kl"] == pytest.approx(alone.kl, abs=1e-2)
    active = seen.tokens.activation
    log_likelihood = torch.where(active >= ACTIVE, seen.fires, 1 - seen.fires).log()
    assert -log_likelihood.mean().item() == pytest.approx(alone.accuracy_loss, abs=1e-3), "the classes have the same size"


def test_what_is_drawn_is_escaped(tiny):
    exploration = still(tiny, Feature.from_words("html", ["<b>cat</b>", "dog"], ["<script>", "&amp;"]))
    for _ in range(3): exploration.step()
    seen = exploration.view()
    seen = replace(seen, top=[("<i>", 0.5), *seen.top[1:]], leaders=[("<i>", 0.5)])
    shown = data_html(seen.tokens, seen.fires) + tokens_html(seen)
    assert "<script>" not in shown and "<b>cat" not in shown and ">&lt;i&gt;<" in shown and "&amp;amp;" in shown


def test_texts_are_shown_in_full_and_what_is_active_is_underlined(tiny):
    tokens = still(tiny, sentences()).discriminator.tokens
    html = data_html(tokens, torch.full_like(tokens.activation, 1.0))
    plain = re.sub("<[^>]*>", "", html)
    assert all(text in plain for text in sentences().texts)
    assert "".join(re.findall("<u>(.*?)</u>", html)).split() == ["cat", "dog", "horse"]


def test_before_the_first_step_the_data_have_no_predictions(tiny):
    for make in small, sentences:
        html = data_html(still(tiny, make()).discriminator.tokens)
        assert "probability" not in html and "orange" not in html and "tl-wrong" not in html
        assert all(word in html for word in ("cat", "dog", "horse", "car", "red"))
