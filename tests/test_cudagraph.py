"""Steps that are planned beforehand are those of the search. (On a GPU they are recorded: see test_cuda.py.)"""
import gc
import weakref

import pytest
import torch
from conftest import make_tiny_lm, tiny_model
from test_rank import ACTIVE, FEATURES, INACTIVE
from test_search import same_rows, same_search

from tokenlabel import cudagraph
from tokenlabel.channel import channel
from tokenlabel.cudagraph import PlannedSteps, make_plan, record, replaying, stepping
from tokenlabel.direct import direct
from tokenlabel.feature import Feature
from tokenlabel.lm import load_lm
from tokenlabel.prompts import Question
from tokenlabel.search import Search
from tokenlabel.settings import Settings
from tokenlabel.tokenize import tokenize

ASK = {"words": Question("Is {word} {label}?", answer=" ", yes="1", no="0"),
       "texts": Question("In {text} is {token} {label}?", answer=" ", yes="1", no="0")}


def make(kind="channel", mode="words", family="llama", **options):
    "A discriminator of a tiny model, with prompts of several lengths or a short question."
    lm, feature = make_tiny_lm(family), FEATURES[mode]
    tokens = tokenize(feature, lm, feature.heldout_types(0.3, 0))
    return channel(lm, tokens, **options) if kind == "channel" else direct(lm, tokens, ASK[mode], **options)


def compare(one, count=4, steps=8, **settings):
    "Step a search, and the same one from a plan."
    first, second = (Search(one, Settings(steps=steps, **settings)) for _ in range(2))
    rows = [row for _ in range(count) for row in first.step()]
    with replaying(second) as step:
        assert step != second.step
        again = [row for _ in range(count) for row in step()]
    same_rows(rows, again)
    same_search(first, second)
    assert second.v.is_leaf and second.v.requires_grad and second.draw(4).example.equal(first.draw(4).example)
    first.step(), second.step()  # AdamW goes on, too
    assert (first.v - second.v).abs().max() < 2e-2


# --- the same steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, mode, T, family", [
    ("channel", "words", 1, "llama"), ("channel", "texts", 1, "gpt2"), ("channel", "words", 2, "gemma3"), ("channel", "texts", 2, "opt"),
    ("direct", "words", 1, "qwen2"), ("direct", "texts", 1, "llama"), ("direct", "words", 2, "gpt2"), ("direct", "texts", 2, "gemma")])
def test_planned_steps_are_those_of_the_search(kind, mode, T, family):
    one = make(kind, mode, family)
    if kind == "channel": assert len({len(prompt.before) for prompt in one.read_prompts}) > 1  # caches are padded
    else: assert len(one.levels) == {"words": 2, "texts": 3}[mode]
    compare(one, count=3 if mode == "texts" else 6, label_tokens=T)


@pytest.mark.parametrize("kind, settings", [
    ("channel", dict(calibrated=False, positive_weight=None, entropy_weight=0.3)), ("channel", dict(restarts=3, lr=0.1, weight_decay=0.1)),
    ("channel", dict(temperature=(1.0, 1.0), entropy_schedule=(1.0, 1.0), kl_weight=0.0)),
    ("direct", dict(calibrated=False, positive_weight=None)), ("direct", dict(batch_size=5, restarts=3, positive_weight=0.8, accuracy_weight=2.0))])
def test_planned_steps_use_the_settings(kind, settings):
    compare(make(kind), **settings)


def test_rows_may_have_weights_of_their_own():
    one = make()
    searches = [Search(one, Settings(steps=4)) for _ in range(2)]
    for search in searches: search.weights = search.weights._replace(entropy=torch.tensor([0.0, 2.0]), kl=torch.tensor([0.5, 0.0]))
    rows = [row for _ in range(4) for row in searches[0].step()]
    with replaying(searches[1]) as step: same_rows(rows, [row for _ in range(4) for row in step()])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_search_that_stops_early_is_in_the_state_of_its_steps(count):
    compare(make(), count=count)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_padding_has_no_weight():
    search = Search(make("channel", "texts"), Settings(steps=4))
    batches = [search.draw(size) for size in (5, 2, 4, 3)]
    plan = make_plan(search, batches)
    data, layout = plan.data, plan.layout
    for i, batch in enumerate(batches):
        E, held = len(batch.example), search.discriminator.tokens.heldout[batch.example]
        assert layout.example[i, :E].equal(batch.example) and (layout.example[i, E:] == -1).all()
        assert (data.kind[i, :, E:] == -1).all() and not data.on[i, :, E:].any() and not data.off[i, :, E:].any()
        assert ((data.kind[i, :, :E] == -1) == held).all()
        assert (data.on + data.off)[i].sum(-1).tolist() == pytest.approx([1.0, 1.0])
        N = len(batch.token)
        assert (layout.example_of_token[i, N:] == layout.example.shape[1]).all() and not layout.marginal[i, N:].any()
    assert search.done == 0


def test_without_a_gpu_nothing_is_recorded():
    search = Search(make(), Settings(steps=2))
    steps = PlannedSteps(search, make_plan(search, [search.draw(4) for _ in range(2)]))
    assert record(steps) == steps.step
    with stepping(search) as step: assert step == search.step


@pytest.mark.parametrize("options", [dict(memory=0), dict(positions=8)])
def test_questions_that_cannot_be_planned_are_stepped_by_the_search(options):
    one = make("direct", **options)
    search, other = (Search(one, Settings(steps=3)) for _ in range(2))
    with replaying(search) as step:
        assert step == search.step
        same_rows(step(), other.step(), abs=0)
    same_search(search, other)


# --- recordings -------------------------------------------------------------------------------------------------------


def test_a_recording_serves_searches_with_the_same_shapes_and_at_most_two_are_kept():
    one = make(family="gpt2")
    kept = one.lm.recordings
    kept.clear()
    for seed in range(3): compare(one, count=3, seed=seed)
    assert len(kept) == 1  # one plan size
    entry = kept[0]
    compare(one, count=2, lr=0.2)  # another recording
    assert len(kept) == 2 and kept[1] is entry
    swapped = Feature.from_words("things", INACTIVE, ACTIVE)
    compare(channel(one.lm, tokenize(swapped, one.lm, swapped.heldout_types(0.3, 0))), count=3)  # another feature
    assert len(kept) == 2 and kept[0] is entry
    for steps in (3, 4): compare(one, count=2, steps=steps)
    assert len(kept) == 2 and entry not in kept


def test_a_recording_of_questions_is_not_kept():
    one = make("direct", family="gpt2")
    one.lm.recordings.clear()
    compare(one, count=1)
    assert not one.lm.recordings


@pytest.mark.parametrize("error, for_good", [
    (RuntimeError("operation not permitted when stream is capturing"), True),
    (torch.OutOfMemoryError("CUDA out of memory"), False)])  # another search may need less
def test_a_recording_that_fails_leaves_the_search_as_it_was(monkeypatch, error, for_good):
    one = make()
    search, other = (Search(one, Settings(steps=8)) for _ in range(2))
    def refuse(steps): raise error
    monkeypatch.setattr(cudagraph, "record", refuse)
    monkeypatch.setattr(cudagraph, "_unrecordable", set())
    one.lm.recordings.clear()
    with pytest.warns(UserWarning, match="run without a CUDA graph, because recording failed"):
        with replaying(search) as step: rows = step()
    assert (one.lm in cudagraph._unrecordable) == for_good
    same_rows(rows, other.step(), abs=0)
    same_search(search, other)


def test_a_recording_does_not_keep_the_model_alive():
    lm = load_lm(tiny_model("llama"), tokenizer=make_tiny_lm("llama").tokenizer)
    with replaying(Search(channel(lm, tokenize(FEATURES["words"], lm)), Settings(steps=2))) as step: step()
    assert lm.recordings
    gone = weakref.ref(lm)
    del lm, step
    gc.collect()
    assert gone() is None
