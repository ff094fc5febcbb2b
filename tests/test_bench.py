"""The benchmark: all ways to do a step give the same loss and gradient, and what is counted is right."""
import pytest
import torch

import tokenlabel.bench as module
from tokenlabel.bench import (NAMES, bench, check_agreement, compare_steps, gemm_pass, gemm_rates, interleave,
                              layer_weights, make_trial, operations, peak_memory, plot_costs, size_costs, steps_of)
from tokenlabel.direct import PAPER_QUESTIONS, Question
from tokenlabel.search import count_positions

SHORT = {"words": Question("{word}? {label}?", answer=" ", yes="1", no="0"),
         "texts": Question("{text} {token}? {label}?", answer=" ", yes="1", no="0")}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma"])
def lm(request, tiny_lm): return tiny_lm(request.param)


@pytest.fixture(autouse=True)
def short_questions(monkeypatch):
    "The tiny models take 256 tokens, and spell."
    monkeypatch.setitem(PAPER_QUESTIONS, "mammals_words", SHORT["words"])
    monkeypatch.setitem(PAPER_QUESTIONS, "animals", SHORT["texts"])


@pytest.mark.parametrize("mode", ["words", "texts"])
@pytest.mark.parametrize("restarts", [1, 2])
def test_all_ways_to_do_a_step_agree(lm, mode, restarts):
    trial = make_trial(lm, mode, units=8, restarts=restarts)
    assert trial.judge.tokens.activation.unique().numel() == 2, "both classes"
    check_agreement(trial)


def test_a_step_that_is_wrong_is_found(lm, monkeypatch):
    right = module.direct_step
    monkeypatch.setattr(module, "direct_step", lambda trial: (right(trial)[0] * 1.01, right(trial)[1]))
    with pytest.raises(ValueError, match="differ"): check_agreement(make_trial(lm, units=4))


def test_direct_does_the_least_work_of_the_three(lm):
    work = {name: operations(step) for name, step in steps_of(make_trial(lm, units=8)).items()}
    assert work[NAMES[2]] < work[NAMES[0]] and work[NAMES[2]] < work[NAMES[1]] and work[NAMES[3]] < work[NAMES[4]]


def test_interleave_calls_each_equally_often_and_takes_medians():
    calls = []
    table = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3)
    assert sorted(calls) == ["a"] * 4 + ["b"] * 4  # one call of each does not count
    assert list(table.index) == ["a", "b"] and (table.low <= table.seconds).all() and (table.seconds <= table.high).all()
    for start in range(0, 8, 2): assert set(calls[start:start + 2]) == {"a", "b"}, "by turns"


def test_operations_of_a_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7, requires_grad=True)
    assert operations(lambda: a @ b) == 2 * 3 * 5 * 7
    assert operations(lambda: (a @ b).sum().backward()) == 2 * 2 * 3 * 5 * 7


def test_peak_memory_counts_what_is_held_at_the_same_time():
    if torch.cuda.is_available(): pytest.skip("on the CPU")
    def call():
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        third = second + 1
        return third
    assert 8_000_000 <= peak_memory(call) < 8_100_000


def test_passes_count_positions_forward_and_back(lm):
    with count_positions(lm) as counted:
        lm.model.base_model(input_ids=torch.zeros(2, 5, dtype=torch.long))
        lm.model.base_model(inputs_embeds=lm.embed(torch.zeros(1, 3, dtype=torch.long)).requires_grad_())
    assert (counted.positions, counted.passes) == (2 * 5 + 2 * 1 * 3, 3)


def test_the_gemm_pass_is_the_work_of_the_model_without_its_output_layer(tiny_lm):
    lm = tiny_lm("llama")
    run, flops = gemm_pass(lm, 7)
    assert operations(run) == flops == 2 * 7 * sum(weight.numel() for weight in layer_weights(lm))
    ids = torch.zeros(1, 7, dtype=torch.long)
    with torch.no_grad(): work = operations(lambda: lm.model.base_model(input_ids=ids))
    assert flops <= work < 1.2 * flops  # attention is the rest


def test_tables(tiny_lm):
    lm = tiny_lm("llama")
    table = compare_steps(make_trial(lm, units=4), repeats=1, rates=gemm_rates(lm, (4, 64), repeats=1))
    assert list(table.index) == list(NAMES) and table.times[NAMES[2]] == 1
    assert (table[["GEMM share", "memory share", "positions", "GFLOP"]] > 0).all(axis=None)
    both = [torch.float32, torch.bfloat16]
    assert set(bench(lm, repeats=1, units=4, dtypes=both).index.levels[0]) == {"float32", "bfloat16"}


@pytest.mark.parametrize("native, formats", [(None, ["float32"]), (torch.bfloat16, ["float32", "bfloat16"])])
def test_bfloat16_is_timed_where_the_processor_has_it(tiny_lm, monkeypatch, native, formats):
    monkeypatch.setattr("tokenlabel.bench.fastest_dtype", lambda: native)
    assert bench(tiny_lm("llama"), repeats=1, units=4).index.unique(0).tolist() == formats


def test_costs_and_their_figure(tiny_lm):
    costs = size_costs(tiny_lm("llama"), repeats=1)
    assert set(costs.what) == {"words", "texts", "restarts", "label tokens"}
    [ax] = plot_costs(costs).axes
    assert len(ax.lines) == 4 and {text.get_text() for text in ax.get_legend().texts} == set(costs.what)
