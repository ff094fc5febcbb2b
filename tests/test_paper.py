"""The paper's claims, its settings, and how several seeds become a verdict."""
import json
from dataclasses import asdict, replace
from math import ceil

import nbformat
import numpy as np
import pandas as pd
import pytest

from tokenlabel.cli import main
from tokenlabel.evaluator import check_evaluator
from tokenlabel.feature import Feature
from tokenlabel.files import write_json
from tokenlabel.label import begin, conclude, label_feature, run
from tokenlabel.lm import visible
from tokenlabel.notebooks import list_experiments, run_experiment
from tokenlabel.paper import (PAPER, Verdict, claim_settings, failure_cause, load_verdicts, make_verdict, mean_auroc, overview,
                              reproduce, score_right, sum_up, typical_seed, verdict_table)
from tokenlabel.score import auroc
from tokenlabel.search import Search
from tokenlabel.settings import Settings
from tokenlabel.tokenize import tokenize

FRUIT = Feature.from_words("fruit", "apple banana cherry lemon peach grape plum pear".split(),
                           "chair river engine teacher hammer cloud violin basket".split())


def example(**changes) -> Verdict:
    "A verdict with invented numbers."
    return replace(Verdict(
        experiment="animals", form="isolated words", paper="converges to `animal`", descent=["·animal", "·mouse"],
        descent_matches=[True, False], labels=["·animal", "·animals"], matches=[True, True], auroc=[.9, 1.], found=[.95, .9, 1.],
        right=[.95, .9, 1.], shared=.5, verdict="reproduced", reason="", details=[], lm="some", discriminator="channel",
        preset="default", seconds=10.), **changes)


# the paper's settings

def test_each_claim_belongs_to_a_notebook(): assert set(list_experiments()) == {claim.experiment for claim in PAPER.values()}


def test_the_paper_takes_its_epochs_in_steps_over_all_questions(tiny_lm):
    lm, claim = tiny_lm("llama"), PAPER["palindromes"]
    examples = ceil(.7 * len(tokenize(claim.make(0, 24), lm).activation))  # 30 % are held out
    settings = claim_settings(claim, lm, "paper")
    assert claim_settings(claim, lm, "paper", quick=True, steps=7).steps == 7
    assert settings.batch_size == 15 and settings.steps >= 15 * ceil(examples / 15)


def test_the_paper_starts_from_noise_and_keeps_its_weights_constant(tiny_lm):
    lm = tiny_lm("llama")
    search = begin(FRUIT, lm, claim_settings(PAPER["numbers"], lm, "paper", steps=5, restarts=8))
    assert isinstance(search, Search) and search.v.mean().abs() < .1 and (search.v.std() - 1).abs() < .1
    rows = [row for _ in range(3) for row in search.step()]
    assert {row["temperature"] for row in rows} == {1.} and {round(row["entropy_weight"], 6) for row in rows} == {.2}
    assert search.optimizer.defaults["weight_decay"] == .01 and search.optimizer.defaults["lr"] == .1


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_runs_have_steps_without_one_class(name, tiny_lm):
    lm, claim = tiny_lm("gpt2"), PAPER[name]
    short = replace(claim.run.question, few_shot=())  # the context of the tiny model is short
    settings = claim_settings(claim, lm, "paper", quick=True, steps=25, batch_size=2, prompts=short)
    result = label_feature(claim.make(0, 16 if claim.form == "isolated words" else 3), lm, settings, progress=False)
    assert result.trace[["accuracy_active", "accuracy_inactive"]].isna().any(axis=None)


def test_another_discriminator_takes_its_own_prompts(tiny_lm):
    settings = claim_settings(PAPER["chinese"], tiny_lm("llama"), "paper", discriminator="channel", kl_weight=.5)
    assert (settings.discriminator, settings.prompts, settings.kl_weight, settings.entropy_weight) == ("channel", None, .5, .25)


def test_wrong_names_and_no_held_out_words_are_refused(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    with pytest.raises(ValueError, match="no preset 'papers'; there is default, paper"): claim_settings(PAPER["numbers"], lm, "papers")
    with pytest.raises(ValueError, match="heldout"): claim_settings(PAPER["numbers"], lm, heldout=0)
    with pytest.raises(ValueError, match="no claim 'number'; there are animals_words"): reproduce("number", lm, runs=tmp_path)


# verdicts

FRUITS = replace(PAPER["numbers"], labels=("fruit", "fruits"))


@pytest.fixture(scope="module")
def found(lm):
    "Two seeds of an easy feature, the right labels and held-out words of each, and the check."
    one = dict(prompts=["Examples of {label}:"])
    results = [label_feature(FRUIT, lm, steps=10, restarts=1, seed=seed, progress=False, **one) for seed in (0, 1)]
    scored = [score_right(result, lm, FRUITS) for result in results]
    return results, scored, check_evaluator(FRUIT, lm, FRUITS.labels, **one)


@pytest.mark.parametrize("label, right", [(" animal", True), ("Animals", True), (" ANIMALS ", True), (" animate", False)])
def test_number_and_case_are_the_only_leniency(found, label, right):
    assert overview([replace(found[0][0], label=label)], ["animal", "animals"]).match.tolist() == [right]


@pytest.mark.parametrize("matches, of, word", [(9, 10, "reproduced"), (8, 10, "partly"), (5, 5, "reproduced"), (4, 5, "partly"),
                                               (5, 10, "partly"), (4, 10, "deviates")])
def test_nine_in_ten_are_reproduced_and_half_are_partly(found, matches, of, word):
    results, scored, check = found
    seeds = overview([results[0]] * of, ["fruit"])
    seeds["match"] = [True] * matches + [False] * (of - matches)
    made = make_verdict(FRUITS, seeds, [scored[0][1]] * of, [results[0]] * of, [("search", "a"), ("search", "b")])
    assert (made.verdict, made.reason, made.details) == (word, "the search missed a better label (2 seeds)", ["a", "b"])
    assert made.shared == 1 and all(low <= value <= high for value, low, high in (made.found, made.right))
    json.dumps(asdict(made))  # plain data


def test_a_failure_that_is_found_again_is_only_consistent_with_the_paper(found):
    results, scored, check = found
    seeds = overview([results[0]] * 5, ["fruit"]).assign(match=True)
    assert make_verdict(PAPER["palindromes"], seeds, [scored[0][1]] * 5, results).verdict == "consistent"


def test_the_right_label_is_scored_on_the_held_out_words_of_the_seed(found):
    for result, (ranking, examples) in zip(*found[:2]):
        assert set(examples.word) == result.feature.heldout_types(result.settings.heldout, result.settings.seed)
        assert {label.strip().casefold() for label in ranking.label} <= {"fruit", "fruits"}
        assert auroc(examples.found, examples.activation) == pytest.approx(result.ranking.auroc_heldout[0])
        assert auroc(examples.right, examples.activation) == pytest.approx(ranking.auroc_heldout[0])


def test_scores_of_the_right_label_are_kept(found, lm, tmp_path, monkeypatch):
    first = score_right(found[0][0], lm, FRUITS, tmp_path)
    monkeypatch.setattr("tokenlabel.paper.begin", None)  # nothing is computed again
    for one, other in zip(first, score_right(found[0][0], lm, FRUITS, tmp_path)): pd.testing.assert_frame_equal(one, other)


def test_seeds_with_the_same_words_are_no_more_evidence_than_one_and_others_are():
    random = np.random.default_rng(0)
    def draw(n): return pd.DataFrame({"word": [f"{n} {i}" for i in range(30)], "activation": [1., 0.] * 15,
                                      "found": random.normal(size=30) + [1, 0] * 15})
    one, *others = [draw(n) for n in range(10)]
    value, low, high = mean_auroc([one], "found")
    assert mean_auroc([one] * 10, "found") == pytest.approx([value, low, high])
    assert np.ptp(mean_auroc([one, *others], "found")[1:]) < (high - low) / 2
    assert low < value < high and value == pytest.approx(auroc(one.found, one.activation))


def test_the_figure_shows_the_seed_of_median_loss_among_those_of_the_usual_label(found):
    def result(label, loss): return replace(found[0][0], label=label, ranking=found[0][0].ranking.assign(loss=loss))
    assert typical_seed([result(" pig", 0.), result(" cat", 3.), result(" cat", 1.), result(" cat", 2.)]) == 3


def test_the_label_of_the_descent_is_the_argmax_of_the_best_restart(lm):
    search = begin(FRUIT, lm, Settings(prompts=["Examples of {label}:"], steps=10, restarts=2))
    rows, _ = run(search)
    result = conclude(search, rows)
    best = min(rows[-2:], key=lambda row: row["loss"])
    assert result.soft["label"] == lm.token(search.log_p(best["temperature"])[best["restart"], 0].argmax())
    assert overview([result], ["fruit"]).descent.tolist() == [visible(result.soft["label"].encode())]


def test_the_cause_is_the_search_if_a_right_word_has_the_lower_loss(found, lm):
    results, scored, check = found
    (worse, better), ranking = (replace(results[0], ranking=results[0].ranking.assign(loss=loss)) for loss in (99., -1.)), scored[0][0]
    can, cannot = replace(check, verdict="can"), replace(check, verdict="cannot", sentence="no")
    assert failure_cause(worse, ranking, ["fruit"], can)[0] == "search"
    assert failure_cause(better, ranking, ["fruit"], can)[0] == "objective"
    assert failure_cause(better, ranking, ["fruit"], cannot) == ("evaluator", "the evaluator cannot do it: no")
    assert failure_cause(better, ranking, ["palindrome"], can)[0] == "evaluator"  # of several tokens


def test_verdicts_come_back_in_the_papers_order_and_sum_up(tmp_path):
    numbers = example(experiment="numbers", verdict="deviates", labels=["·金", "·age"], matches=[False, False], reason="so")
    for name, one in ("numbers", numbers), ("animals_texts", example(form="running text")), ("animals_words", example()):
        write_json(tmp_path / f"{name}.json", "verdict", asdict(one))
    assert load_verdicts(tmp_path) == [example(), example(form="running text"), numbers] == sum_up(tmp_path)
    assert (tmp_path / "summary.pdf").stat().st_size and (tmp_path / "summary.png").stat().st_size
    table = verdict_table(load_verdicts(tmp_path)).splitlines()
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert "1 × `·金`" in table[-1] and "**deviates**: so" in table[-1]
    assert "| 1 of 2: 1 × `·animal`, 1 × `·mouse` | 2 of 2: 1 × `·animal`, 1 × `·animals` | 0.95 [0.90, 1.00] |" in table[2]


def test_a_verdict_of_another_version_is_named(tmp_path):
    write_json(tmp_path / "numbers.json", "verdict", {"experiment": "numbers"})
    with pytest.raises(ValueError, match="numbers.json is no verdict of this version"): load_verdicts(tmp_path)
    (tmp_path / "numbers.json").write_text('[{"experiment": "numbers"}]')
    with pytest.raises(ValueError, match="numbers.json is damaged"): load_verdicts(tmp_path)


def test_a_verdict_in_the_file_of_another_experiment_is_refused(tmp_path):
    write_json(tmp_path / "numbers.json", "verdict", asdict(example()))
    with pytest.raises(ValueError, match="numbers.json has the verdict on animals"): load_verdicts(tmp_path)


def test_without_verdicts_nothing_is_written(tmp_path): assert sum_up(tmp_path) == [] and not list(tmp_path.iterdir())


# the notebooks

def test_an_experiment_in_two_forms_leaves_figures_and_verdicts_of_both(tiny_folder, tmp_path, quick_starts):
    given = {"lm": tiny_folder, "quick": True, "settings": {"steps": 3}}
    executed = run_experiment("animals", given, figures=tmp_path / "figures", runs=tmp_path / "runs", progress=False)
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"animals_{form}.{kind}" for form in ("words", "texts") for kind in ("pdf", "png", "json")}
    words, texts = load_verdicts(tmp_path / "figures")
    assert (words.form, texts.form) == ("isolated words", "running text") and len(words.labels) == len(texts.labels) == 1
    assert nbformat.read(executed, as_version=4).cells


def test_the_papers_preset_runs_on_another_model(tiny_folder, tmp_path, quick_starts):
    given = {"preset": "paper", "lm": tiny_folder, "quick": True, "settings": {"steps": 2}}
    run_experiment("numbers", given, figures=tmp_path / "figures", runs=tmp_path / "runs", progress=False)
    [made] = load_verdicts(tmp_path / "figures")
    assert (made.preset, made.discriminator) == ("paper", "direct")


@pytest.mark.slow
def test_an_unknown_preset_is_told(tmp_path, capsys, quick_starts, tiny_folder):
    folders = ["--figures", str(tmp_path / "figures"), "--runs", str(tmp_path / "runs"), "--lm", tiny_folder]
    assert main(["reproduce", "numbers", "--preset", "article", *folders]) == 1
    assert "there is no preset 'article'; there is default, paper" in capsys.readouterr().err
