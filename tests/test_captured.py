"""Steps that are laid out beforehand do what the search does. (On a GPU they are recorded: see test_cuda.py.)"""
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, make_tiny_lm, tiny_model

from tokenlabel import captured, synthetic
from tokenlabel.captured import ROUND, Steps, even, make_plan, playable, played, recorded, stacked, stepping
from tokenlabel.direct import Question, direct
from tokenlabel.discriminator import channel
from tokenlabel.feature import tokenize
from tokenlabel.lm import load_lm
from tokenlabel.objective import LossWeights
from tokenlabel.descent import Search
from tokenlabel.search import count_positions

NAMES = ("loss", "accuracy_loss", "entropy", "kl", "hard_accuracy_loss", "temperature", "entropy_weight")


ASK = {"words": Question("Is {word} {label}?", answer=" ", yes="1", no="0"),
       "texts": Question("In {text} is {token} {label}?", answer=" ", yes="1", no="0")}


def tokens_of(family="llama", mode="words", size=None):
    lm, feature = make_tiny_lm(family), synthetic.animals(0, mode, size=size or {"words": 24, "texts": 10}[mode])
    return lm, tokenize(feature, lm, feature.heldout_types(0.3, 0))


def judge_of(family="llama", mode="words", label_tokens=1, prompts=None, size=None):
    return channel(*tokens_of(family, mode, size), prompts, label_tokens)


def asked_of(family="llama", mode="words", label_tokens=1, **options):
    return direct(*tokens_of(family, mode), ASK[mode], label_tokens, **options)


def compare(one, other, steps=6):
    "Step both searches, the second as it would be played."
    rows = [row for _ in range(steps) for row in one.step()]
    with played(other) as step: again = [row for _ in range(steps) for row in step()]
    for row, same in zip(rows, again, strict=True):
        for name in NAMES: assert same[name] == pytest.approx(row[name], abs=2e-3, nan_ok=True), name
        assert same["tokens"] == row["tokens"] and same["probabilities"] == pytest.approx(row["probabilities"], abs=1e-3)
    shared = one.met.items() & other.met.items()  # a label that is just as likely as another one may be missing
    assert len(shared) >= .98 * max(len(one.met), len(other.met))
    # Adam lets rounding grow, but one step moves v by up to 0.5
    assert (one.v - other.v).abs().max() < 1e-2 and other.v.is_leaf and other.v.requires_grad
    assert one.done == other.done == steps and torch.equal(one.generator.get_state(), other.generator.get_state())
    one.step(), other.step()  # AdamW goes on, too
    assert (one.v - other.v).abs().max() < 2e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["words", "texts"])
@pytest.mark.parametrize("label_tokens", [1, 2])
def test_laid_out_steps_do_what_the_search_does(family, mode, label_tokens):
    judge = judge_of(family, mode, label_tokens)
    assert len({len(prompt.before) for prompt in judge.prompts}) > 1, "caches are padded"
    compare(*(Search(judge, label_tokens=label_tokens, steps=8) for _ in range(2)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["words", "texts"])
@pytest.mark.parametrize("label_tokens", [1, 2])
def test_laid_out_questions_do_what_the_search_does(family, mode, label_tokens):
    judge = asked_of(family, mode, label_tokens)
    assert len(judge.levels) == {"words": 2, "texts": 3}[mode], "rows are of several levels"
    compare(*(Search(judge, label_tokens=label_tokens, steps=8) for _ in range(2)))


@pytest.mark.parametrize("options", [
    dict(calibrated=False, weights=LossWeights(active=None, entropy=0.3)),
    dict(batch_size=5, restarts=3, weights=LossWeights(active=0.8, accuracy=2.0))])
def test_settings_of_questions_count(options):
    judge = asked_of("qwen2")
    compare(*(Search(judge, steps=8, **options) for _ in range(2)))


@pytest.mark.parametrize("options", [
    dict(calibrated=False, weights=LossWeights(active=None, entropy=0.3)), dict(restarts=3, lr=0.1, weight_decay=0.1),
    dict(temperature=(1.0, 1.0), ramp=(1.0, 1.0)), dict(batch_size=5, weights=LossWeights(active=0.8, accuracy=2.0))])
def test_settings_count(options):
    judge = judge_of("qwen2")
    compare(*(Search(judge, steps=8, **options) for _ in range(2)))


def test_one_recording_serves_searches_of_the_same_shapes():
    judge = judge_of("gpt2")
    judge.lm.recordings.clear()
    for seed in range(3): compare(*(Search(judge, steps=8, seed=seed) for _ in range(2)))
    kept = judge.lm.recordings
    assert 1 <= len(kept) < 3
    compare(*(Search(judge, steps=8, lr=0.2) for _ in range(2)))  # other settings are another recording
    assert len(judge.lm.recordings) == len(kept)
    for steps in range(3, 10): compare(*(Search(judge, steps=steps) for _ in range(2)), steps=2)
    assert len(judge.lm.recordings) <= captured.KEPT


@pytest.mark.parametrize("error, for_good", [
    (RuntimeError("operation not permitted when stream is capturing"), True),
    (torch.OutOfMemoryError("CUDA out of memory"), False)])  # another search may need less
def test_a_step_that_fails_leaves_the_search_as_it_was(monkeypatch, error, for_good):
    judge = judge_of("llama")
    search, other = (Search(judge, steps=8) for _ in range(2))
    def refuse(steps): raise error
    monkeypatch.setattr(captured, "recorded", refuse)
    monkeypatch.setattr(captured, "_unfit", set())
    judge.lm.recordings.clear()
    with pytest.warns(UserWarning, match="one by one, as they cannot be recorded"):
        with played(search) as step: rows = step()
    assert (judge.lm in captured._unfit) == for_good and rows == other.step()


def test_only_a_search_on_a_gpu_with_even_prompts_is_played_and_only_if_nobody_counts():
    class OnGPU:  # a search as far as `playable` looks at it
        def __init__(self, judge, done=0): self.discriminator, self.done, self.v = judge, done, type("v", (), {"is_cuda": True})
    judge = judge_of("llama")
    assert playable(OnGPU(judge)) and not playable(Search(judge)) and not playable(OnGPU(judge, done=1))
    assert not playable(OnGPU(judge_of("llama", prompts=["A {label}:", "Some {label} are these:"])))
    with count_positions(judge.lm): assert not playable(OnGPU(judge))
    assert playable(OnGPU(replace(judge)))
    search = Search(judge)
    with stepping(search) as step: assert step == search.step


def test_questions_are_played_if_they_are_in_memory_and_fit_into_one_pass():
    assert even(Search(asked_of())) and even(Search(asked_of(), batch_size=20))
    assert not even(Search(asked_of(memory=0)))
    positions = 2 * 2 * 16 * (1 + len(asked_of().after))  # restarts, alone and in mixture, questions, tokens
    assert even(Search(asked_of(positions=positions))) and not even(Search(asked_of(positions=positions - 1)))


def test_what_was_kept_of_questions_is_not_kept_for_other_features():
    judge = asked_of("gpt2")
    judge.lm.recordings.clear()
    with played(Search(judge, steps=2)) as step: step()
    assert not judge.lm.recordings


def test_a_recording_does_not_keep_the_model_alive():
    lm = load_lm(tiny_model("llama"), tokenizer=make_tiny_lm("llama").tokenizer)
    feature = synthetic.animals(0, size=24)
    with played(Search(channel(lm, tokenize(feature, lm)), steps=2)) as step: step()
    assert lm.recordings
    gone = weakref.ref(lm)
    del lm, step
    gc.collect()
    assert gone() is None


def test_padding_counts_nowhere():
    search = Search(judge_of("llama"), steps=5)
    batches = [search.draw(size) for size in (8, 3, 6, 2, 7)]
    plan = make_plan(search, batches)
    reads = plan.reads
    for table, size in zip((reads.ids, reads.place, reads.column, plan.kind), (2, 1, 1, 1)): assert table.shape[size] % ROUND == 0
    for batch, kind, weight, unit in zip(batches, plan.kind, plan.weight, reads.unit):
        count = len(batch.unit)
        assert (kind[:count] >= 0).all() and (kind[count:] == -1).all() and not weight[:, count:].any()
        assert weight.sum() == pytest.approx(1) and unit.max() == count


def test_rows_are_padded_to_a_round_size():
    rows = stacked([torch.ones(3), torch.ones(ROUND + 1)], value=2.0)
    assert rows.shape == (2, 2 * ROUND) and rows.sum() == 3 + ROUND + 1 + 2.0 * (4 * ROUND - 4 - ROUND)


def test_without_a_gpu_nothing_is_recorded():
    search = Search(judge_of("llama"), steps=2)
    steps = Steps(search, make_plan(search, [search.draw(4) for _ in range(2)]))
    assert recorded(steps) == steps.step
