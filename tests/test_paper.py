"""The paper's presets, claims and verdicts."""
import json
from dataclasses import asdict, replace
from math import ceil

import nbformat
import pytest

from tokenlabel import synthetic
from tokenlabel.cli import main
from tokenlabel.direct import Question, direct
from tokenlabel.evaluator import check_evaluator
from tokenlabel.experiment import (Layout, _layout_file, available_cpus, list_experiments, possible_layouts,
                                   processes_in_memory, run_experiment)
from tokenlabel.feature import Feature, tokenize
from tokenlabel.lm import load_lm
from tokenlabel.descent import Search
from tokenlabel.optimize import label_feature
from tokenlabel.paper import (PAPER, Verdict, cause, is_among, judge_claim, load_verdicts, overview, preset_lm,
                              preset_options, save_verdicts, sum_up, verdict, verdict_table)

FRUIT = Feature.from_words("fruit", "apple banana cherry lemon peach grape plum pear".split(),
                           "chair river engine teacher hammer cloud violin basket".split())


def example(**changes) -> Verdict:
    "A verdict with invented numbers."
    return replace(Verdict(
        experiment="animals", form="isolated words", paper="converges to `animal`", labels=["·animal", "·animals"],
        matches=[True, True], auroc=[.9, 1.], balanced_accuracy=[.8, .9], evaluator_auroc=.95, evaluator_low=.9,
        evaluator_high=1., evaluator="can", share=1., low=.34, high=1., verdict="reproduced", reason="", details=[], lm="some",
        discriminator="channel", preset="default", seconds=10.), **changes)


# presets

def test_each_experiment_has_a_notebook_and_a_preset(): assert set(list_experiments()) == set(PAPER)


def test_the_paper_takes_its_epochs_in_steps_over_all_questions(lm):
    feature = synthetic.palindromes(seed=100, mode="texts", size=6)
    units = ceil(.7 * len(tokenize(feature, lm).activation))  # 30 % are held out
    options = preset_options("palindromes", "paper", feature, lm)
    assert options["steps"] == 15 * ceil(units / 15) and options["batch_size"] == 15


def test_the_paper_starts_from_noise_and_changes_nothing_on_the_way(lm):
    options = preset_options("numbers", "paper", FRUIT, lm, steps=5)
    names = ("weights", "restarts", "steps", "lr", "temperature", "ramp", "init", "weight_decay", "calibrated", "batch_size")
    search = Search(direct(lm, tokenize(FRUIT, lm), Question('Is "{word}" {label}?')),
                    **{name: options[name] for name in names})
    assert search.v.mean().abs() < .02 and (search.v.std() - 1).abs() < .02
    rows = [row for _ in range(3) for row in search.step()]
    assert {row["temperature"] for row in rows} == {1.} and {row["entropy_weight"] for row in rows} == {.2}
    assert search.adam.defaults["weight_decay"] == .01 and search.adam.defaults["lr"] == .1


@pytest.mark.parametrize("experiment, feature", [
    ("animals", synthetic.animals(size=16)), ("animals", synthetic.animals(mode="texts", size=6)),
    ("mammals_text", synthetic.mammals(mode="texts", size=6)), ("mammals_balanced", synthetic.mammals(size=16)),
    ("chinese", synthetic.chinese(size=16)), ("chinese", synthetic.chinese(mode="texts", size=6)),
    ("numbers", synthetic.numbers(size=16)), ("palindromes", synthetic.palindromes(mode="texts", size=6))])
def test_the_paper_has_a_question_for_each_form_and_its_runs_can_be_drawn(experiment, feature, tiny_folder):
    "With its unbalanced steps, in some of which one class is missing."
    lm = load_lm(tiny_folder)
    options = preset_options(experiment, "paper", feature, lm, steps=4) | dict(batch_size=2)
    result = label_feature(feature, lm, **options, progress=False)
    assert result.trace[["accuracy_active", "accuracy_inactive"]].isna().any(axis=None)
    result.plot()


def test_an_experiment_needs_held_out_words(lm):
    for heldout in 0, 1, 2.0:
        with pytest.raises(ValueError, match="heldout"): preset_options("numbers", "default", FRUIT, lm, heldout=heldout)


def test_single_numbers_of_a_preset_can_be_changed(lm):
    paper = preset_options("chinese", "paper", FRUIT, lm)
    changed = preset_options("chinese", "paper", FRUIT, lm, kl=.5, restarts=2, entropy=None)
    assert changed == paper | {"restarts": 2, "weights": replace(paper["weights"], kl=.5)}
    channel = preset_options("chinese", "paper", FRUIT, lm, discriminator="channel")
    assert "prompts" not in channel and channel["discriminator"] == "channel"


@pytest.mark.parametrize("arguments, message", [
    (("animal", "default"), "no experiment 'animal'; there is animals"),
    (("animals", "papers"), "no preset 'papers'; there is default, paper")])
def test_an_unknown_experiment_or_preset_is_refused(arguments, message, lm):
    with pytest.raises(ValueError, match=message): preset_options(*arguments, FRUIT, lm)
    with pytest.raises(ValueError, match=message): preset_lm(*arguments, "default")


# verdicts

@pytest.mark.parametrize("label, right", [(" animal", True), ("Animals", True), (" ANIMALS ", True), (" animate", False),
                                          (" wildlife", False)])
def test_number_and_case_are_the_only_leniency(label, right): assert is_among(label, ["animal", "animals"]) == right


@pytest.mark.parametrize("matches, of, word", [(10, 10, "reproduced"), (9, 10, "reproduced"), (8, 10, "partly"),
                                               (5, 5, "reproduced"), (4, 5, "partly"), (5, 10, "partly"),
                                               (4, 10, "deviates"), (0, 5, "deviates")])
def test_nine_in_ten_are_reproduced_and_half_are_partly(matches, of, word): assert judge_claim(matches / of) == word


@pytest.fixture(scope="module")
def found(lm):
    "Two seeds of an easy feature, their overview and the check."
    one = dict(prompts=["Examples of {label}:"])
    results = [label_feature(FRUIT, lm, steps=10, restarts=1, seed=seed, progress=False, **one) for seed in (0, 1)]
    return results, check_evaluator(FRUIT, lm, ["fruit", "fruits"], **one)


def test_a_verdict_counts_the_seeds_that_match(found):
    results, check = found
    seeds = overview(results, ["fruit", "fruits"])
    seeds["match"] = [True, False]
    made = verdict("animals", "isolated words", "converges", seeds, check, results, [("search", "a"), ("search", "b")])
    assert (made.share, made.verdict) == (.5, "partly") and made.matches == [True, False]
    assert made.low == pytest.approx(.0945, abs=1e-3) and made.high == pytest.approx(.9055, abs=1e-3)  # Wilson, 1 of 2
    assert made.reason == "the search missed a better label (2 seeds)" and made.details == ["a", "b"]
    assert made.evaluator_low <= made.evaluator_auroc <= made.evaluator_high
    json.dumps(asdict(made))  # plain data


def test_the_cause_is_the_search_if_a_right_word_has_the_lower_loss(found, lm):
    results, check = found
    worse = results[0].ranking.assign(loss=99.)
    assert cause(replace(results[0], ranking=worse), lm, ["fruit"], check)[0] == "search"


def test_the_cause_is_the_objective_if_the_evaluator_can_and_another_word_has_the_lower_loss(found, lm):
    results, check = found
    better = results[0].ranking.assign(loss=-1.)
    assert check.verdict == "can" and cause(replace(results[0], ranking=better), lm, ["fruit"], check)[0] == "objective"
    cannot = replace(check, verdict="cannot", sentence="no")
    assert cause(replace(results[0], ranking=better), lm, ["fruit"], cannot) == ("evaluator", "the evaluator cannot do it: no")


def test_a_word_of_several_tokens_is_the_evaluators_limit(found, lm):
    results, check = found
    assert cause(results[0], lm, ["palindrome"], check)[0] == "evaluator"


def test_verdicts_come_back_in_the_papers_order_and_sum_up(tmp_path):
    numbers = example(experiment="numbers", verdict="deviates", share=0., labels=["·金", "·age"], matches=[False, False],
                      low=0., high=.66, reason="so")
    save_verdicts([numbers], tmp_path)
    save_verdicts([example(), example(form="running text")], tmp_path)
    assert load_verdicts(tmp_path) == [example(), example(form="running text"), numbers] == sum_up(tmp_path)
    assert [row["experiment"] for row in json.loads((tmp_path / "verdicts.json").read_text())] == [
        "animals", "animals", "numbers"]
    assert (tmp_path / "summary.pdf").stat().st_size and (tmp_path / "summary.png").stat().st_size
    table = verdict_table(load_verdicts(tmp_path)).splitlines()
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert "1 × `·金`" in table[-1] and "**deviates**: so" in table[-1]


def test_without_verdicts_nothing_is_written(tmp_path): assert sum_up(tmp_path) == [] and not list(tmp_path.iterdir())


# the notebooks

def test_an_experiment_leaves_the_verdict_of_its_evaluator(tmp_path, quick_starts):
    small = {"seeds": 1, "words": 24, "steps": 4, "restarts": 1}
    executed = run_experiment("numbers", small, figures=tmp_path / "figures", runs=tmp_path / "runs", progress=False)
    [made] = load_verdicts(tmp_path / "figures")
    assert made.form == "isolated words" and len(made.labels) == 1
    assert made.evaluator == "can" and made.evaluator_auroc > .85
    assert nbformat.read(executed, as_version=4).cells[-1].outputs


def as_if_measured(lm, runs):
    "One process at a time is the fastest: no others are started, and no time goes into the measurement."
    layouts = possible_layouts(available_cpus(), processes_in_memory(lm))
    runs.mkdir()
    _layout_file(lm, layouts, runs).write_text(json.dumps([asdict(Layout(1, 1, 1.0))]))


def test_an_experiment_in_two_forms_leaves_figures_and_verdicts_of_both(tiny_folder, tmp_path, quick_starts):
    small = {"lm": tiny_folder, "seeds": 1, "words": 24, "texts": 6, "steps": 3}
    as_if_measured(load_lm(tiny_folder), tmp_path / "runs")
    run_experiment("animals", small, figures=tmp_path / "figures", runs=tmp_path / "runs", progress=False)
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"animals_{form}.{kind}" for form in ("words", "texts") for kind in ("pdf", "png")} | {"animals.json"}
    words, texts = load_verdicts(tmp_path / "figures")
    assert (words.form, texts.form) == ("isolated words", "running text") and len(words.labels) == len(texts.labels) == 1


def test_the_papers_preset_runs_on_another_model(tiny_folder, tmp_path, quick_starts):
    "Direct, from noise, with constant weights."
    run_experiment("numbers", {"preset": "paper", "lm": tiny_folder, "seeds": 1, "words": 16, "steps": 2},
                   figures=tmp_path / "figures", runs=tmp_path / "runs", progress=False)
    [made] = load_verdicts(tmp_path / "figures")
    assert (made.preset, made.discriminator) == ("paper", "direct")


def test_an_unknown_preset_is_told_at_once(tmp_path, capsys, quick_starts):
    folders = ["--figures", str(tmp_path / "figures"), "--runs", str(tmp_path / "runs")]
    assert main(["reproduce", "numbers", "--preset", "article", *folders]) == 1
    assert "there is no preset 'article'; there is default, paper" in capsys.readouterr().err
