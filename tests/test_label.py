"""Labels from beginning to end, on tiny random models."""
import inspect
import math
import random
import re
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny_lm, tiny_config, tiny_model, tiny_tokenizer
from pandas.testing import assert_frame_equal
from test_rank import ACTIVE, FEATURES, INACTIVE, SENTENCES, TEXTS, WORDS
from transformers import AutoModelForCausalLM

import tokenlabel.label as module
from tokenlabel.candidates import NoLabel
from tokenlabel.evaluator import check_evaluator
from tokenlabel.exhaustive import oracle
from tokenlabel.feature import Feature
from tokenlabel.forward import progress_line
from tokenlabel.label import begin, conclude, label_feature, label_length, score_soft
from tokenlabel.label import run as take_steps
from tokenlabel.lm import load_lm
from tokenlabel.objective import balanced_bce
from tokenlabel.prompts import Question
from tokenlabel.rank import rank_labels
from tokenlabel.result import TABLES, LabelResult
from tokenlabel.search import Search, has_collapsed, make_discriminator, round_trips
from tokenlabel.settings import Settings
from tokenlabel.tokenize import tokenize

QUESTION = Question("Is {word} {label}?", yes="1", no="0")


def run(feature=WORDS, family="llama", **options) -> LabelResult:
    "A short search on a tiny model; running text is read in context, with held-out word types."
    view = None if feature.isolated else "context"
    return label_feature(feature, make_tiny_lm(family), **(dict(steps=8, restarts=2, proposals=4, progress=False, view=view) | options))


@pytest.fixture(scope="module", params=FEATURES)
def result(request) -> LabelResult:
    "One search in each mode, for tests that do not change it."
    return run(FEATURES[request.param])


def same_result(a: LabelResult, b: LabelResult) -> None:
    "Equal in all but the time taken."
    for field in fields(LabelResult):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, pd.DataFrame): assert_frame_equal(one, other, check_exact=True)
        elif field.name != "seconds": assert one == other, field.name


def stop_after(steps: int):
    "A callback that interrupts, as a user would, after this many steps."
    def progress(rows):
        if rows[0]["step"] + 1 == steps: raise KeyboardInterrupt
    return progress


# --- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_of_other_kinds_are_refused():
    lm = make_tiny_lm("llama")
    for arguments, message in [((lm, WORDS), "swapped: give the feature first"), (("animals", lm), "the feature is a str; make one with"),
                               ((["cat"], lm), "the feature is a list"), ((WORDS, "gpt2"), "the language model is a str; .*load_lm")]:
        with pytest.raises(TypeError, match=message): label_feature(*arguments)
        with pytest.raises(TypeError, match=message): oracle(*arguments)
        with pytest.raises(TypeError, match=message): check_evaluator(*arguments, ["animals"])


@pytest.mark.parametrize("name, value", [
    ("restarts", 0), ("steps", 2.5), ("lr", math.nan), ("batch_size", 1), ("temperature", (0.0, 0.1)), ("heldout", 1.0), ("seed", -1),
    ("prompts", []), ("prompts", "Examples of {label}:"), ("discriminator", "oracle"), ("label_tokens", "two"), ("candidates", 0)])
def test_settings_that_cannot_work_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name): run(**{name: value})


def test_an_unknown_setting_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="'step'.* 'steps'"): run(step=3)
    with pytest.raises(ValueError, match="0 label slots"): run(prompts=["Examples:"])


@pytest.mark.parametrize("positive_weight", [0.5, None])
def test_examples_of_one_class_are_refused_before_anything_is_read(positive_weight, monkeypatch):
    monkeypatch.setattr(module, "make_discriminator", None)  # would be called next
    monkeypatch.setattr(Feature, "heldout_types", lambda self, share, seed: frozenset(ACTIVE))
    with pytest.raises(ValueError, match="animals: all 8 examples to train on are inactive; give more data"):
        run(positive_weight=positive_weight)
    monkeypatch.setattr(Feature, "heldout_types", lambda self, share, seed: frozenset(ACTIVE[:3]))
    with pytest.raises(ValueError, match="all 3 examples held out are active"): run()


def test_the_held_out_words_are_drawn_by_share_and_seed():
    lm = make_tiny_lm("llama")
    for share, seed in ((0.25, 7), (0.5, 0)):
        tokens = begin(WORDS, lm, Settings(heldout=share, seed=seed)).discriminator.tokens
        assert {kind for kind, out in zip(tokens.types, tokens.heldout) if out} == WORDS.heldout_types(share, seed)
    assert not begin(WORDS, lm, Settings(heldout=0.0)).discriminator.tokens.heldout.any()


# --- the result -------------------------------------------------------------------------------------------------------


def test_a_result_has_the_trace_the_ranking_and_the_scores(result):
    trace, ranking, table = result.trace, result.ranking, result.heldout.set_index(["label", "metric"])
    assert list(zip(trace.step, trace.restart)) == [(s, r) for s in range(trace.step.nunique()) for r in range(2)]
    assert ranking.loss.is_monotonic_increasing and ranking.token_id.is_unique and result.label == ranking.label[0]
    assert ranking.step.between(-1, len(trace) // 2).all() and ranking.restart.isin([-1, 0, 1]).all()
    assert set(table.index.get_level_values(0)) == {"discrete", "soft", "chance"} and table.index.is_unique
    assert table.value["discrete", "auroc"] == pytest.approx(ranking.auroc_heldout[0])
    assert result.soft["loss_gap"] == pytest.approx(ranking.loss[0] - 0.01 * ranking.stop[0] - result.soft["loss"])
    assert (result.settings.steps, result.lm, result.dtype, result.interrupted) == (8, "LlamaForCausalLM", "float32", False)
    assert result.seconds > 0 and len(result.prompts) > 1


def test_a_result_of_a_question_comes_back_from_disk(tmp_path):
    result = run(discriminator="direct", prompts=QUESTION, steps=3, label_tokens=2)
    same_result(LabelResult.load(result.save(tmp_path / "direct")), result)
    assert result.prompts == result.settings.prompts == QUESTION
    for row in result.ranking.itertuples():
        assert len(row.token_id) == 2 and tuple(make_tiny_lm("llama").encode(row.label)) == row.token_id


@pytest.mark.parametrize("mode", FEATURES)
def test_the_same_seed_gives_the_same_result_whatever_others_draw(mode):
    state = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    before = state()
    one, other = run(FEATURES[mode], steps=4), run(FEATURES[mode], steps=4, seed=1)
    assert state() == before
    torch.manual_seed(2)
    same_result(one, run(FEATURES[mode], steps=4))
    assert not one.trace.loss.equals(other.trace.loss) and not one.heldout.equals(other.heldout)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_label_is_among_the_best_tokens_there_are(family):
    lm = make_tiny_lm(family)
    everything, _ = rank_labels(make_discriminator(lm, tokenize(WORDS, lm)), lm.admissible.nonzero()[:, 0].tolist())
    for steps in (4, 20):  # the gradient points to good tokens from the first steps on
        found = run(family=family, steps=steps, restarts=3, heldout=0)
        rank = [(everything.loss < loss - 1e-6).mean() for loss in found.ranking.loss]  # 0.5 for random labels
        assert rank[0] < 0.01 and np.median(rank) < 0.25, rank


def test_a_search_ends_when_all_restarts_have_collapsed():
    result = run(steps=300, lr=2.0, entropy_weight=20.0)
    steps, rows = result.trace.step.nunique(), result.trace.to_dict("records")
    assert 3 <= steps < 300 and not result.interrupted
    assert has_collapsed(rows, 2) and not has_collapsed(rows[:-2], 2)  # not a step too late
    assert set(result.trace[-2:].tokens.str[0]) <= set(result.ranking.token)  # the final labels are ranked


@pytest.mark.parametrize("options", [dict(), dict(steps=12, lr=5.0, temperature=(0.1, 0.01))])  # ties of probabilities that are 0
def test_control_tokens_and_padding_are_never_candidates(options):
    config = tiny_config("llama")
    config.vocab_size = 1000  # 300 tokens, 3 of them for control, and 700 rows without a token
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm = load_lm(model, tokenizer=tiny_tokenizer(True))
    excluded = {lm.show(id) for id in (~lm.admissible).nonzero()[:, 0].tolist()}
    # Without the KL, only the mask excludes these tokens.
    result = label_feature(WORDS, lm, **dict(kl_weight=0.0, candidates=1000, steps=4, progress=False) | options)
    assert lm.admissible[result.ranking.token_id.tolist()].all()
    assert not excluded & {*result.ranking.token, *result.trace.tokens.explode()}


def test_the_soft_label_is_scored_on_all_training_examples():
    lm = make_tiny_lm("llama")
    for options in (dict(), dict(discriminator="direct", prompts=QUESTION, label_tokens=2)):
        search = begin(WORDS, lm, Settings(steps=3, batch_size=4, **options))
        rows, _ = take_steps(search)
        soft, z = score_soft(search, rows)
        one, train, last = search.discriminator, ~search.discriminator.tokens.heldout, rows[-2:][rows[-1]["loss"] < rows[-2]["loss"]]
        accuracy = balanced_bce(z[train], one.tokens.activation[train], smooth=one.needs_scale)
        assert soft["restart"] == last["restart"] and soft["accuracy_loss"] == pytest.approx(accuracy.item(), abs=1e-5)
        assert soft["loss"] == pytest.approx(soft["accuracy_loss"] + last["entropy_weight"] * soft["entropy"] + one.kl_weight * soft["kl"])


def test_the_score_of_the_soft_label_does_not_depend_on_batches(monkeypatch):
    search = begin(WORDS, make_tiny_lm("llama"), Settings("direct", QUESTION, 2, steps=2))
    rows, _ = take_steps(search)
    (soft, z), batches = score_soft(search, rows), type(search.discriminator).batches
    for size in (3, 7):
        monkeypatch.setattr(type(search.discriminator), "batches", lambda self: batches(self, size))
        found, again = score_soft(search, rows)
        assert found == pytest.approx(soft, abs=1e-3) and torch.allclose(again, z, atol=1e-3)


# --- held-out words ---------------------------------------------------------------------------------------------------


def test_without_held_out_words_there_are_no_held_out_scores():
    result = run(TEXTS, heldout=0, steps=3)
    assert result.heldout.empty and list(result.heldout.columns) == ["label", "metric", "value", "low", "high"]
    assert result.ranking.auroc_heldout.isna().all() and result.ranking.auroc_train.notna().all()


@pytest.mark.parametrize("mode", FEATURES)
def test_the_activation_of_held_out_words_has_no_part_in_the_search(mode):
    out = FEATURES[mode].heldout_types(0.3, 0)
    assert out & set(ACTIVE)
    def weaker(kinds):  # words that are still active, so the same ones are held out
        change = lambda text, s: s._replace(activation=0.6) if text[s.start:s.end] in {*ACTIVE} & kinds else s
        one = FEATURES[mode]
        return replace(one, spans=tuple(tuple(change(text, s) for s in spans) for text, spans in zip(one.texts, one.spans)))
    one, other, third = run(FEATURES[mode], steps=4), run(weaker(out), steps=4), run(weaker({*ACTIVE} - out), steps=4)
    assert other.feature != one.feature and weaker(out).heldout_types(0.3, 0) == out
    assert_frame_equal(one.trace, other.trace, check_exact=True)
    train = ["token_id", "loss", "accuracy_loss", "kl", "stop", "auroc_train", "step", "restart"]
    assert_frame_equal(one.ranking[train], other.ranking[train], check_exact=True)
    assert one.soft == other.soft and not one.trace.loss.equals(third.trace.loss)


# --- unusual data -----------------------------------------------------------------------------------------------------


def test_graded_activations_count_as_what_they_are():
    graded = Feature.from_words("size", {"horse": 1.0, "cow": 0.9, "goat": 0.6, "dog": 0.5}, {"mouse": 0.1, "bird": 0.2, "cat": 0.4, "car": 0.0})
    flat = Feature.from_words("size", ["horse", "cow", "goat", "dog"], ["mouse", "bird", "cat", "car"])
    one, other = (run(feature, heldout=0.25, steps=2).trace.loss for feature in (graded, flat))
    assert np.isfinite(one).all() and not np.allclose(one[:2], other[:2], atol=1e-3)


def test_a_model_in_half_precision_works(result):
    half = load_lm(tiny_model("llama"), tokenizer=tiny_tokenizer(True), dtype=torch.bfloat16)
    found = label_feature(result.feature, half, steps=4, progress=False, view=result.settings.view)
    assert found.dtype == "bfloat16" and np.isfinite(found.trace.loss).all()
    assert found.trace.loss[:2].tolist() == pytest.approx(result.trace.loss[:2].tolist(), abs=0.05)


def test_one_word_of_each_class_is_enough():
    result = run(Feature.from_words("cats", ["cat"], ["car"]), heldout=0, steps=3)
    assert result.label and result.ranking.auroc_train[0] in (0.0, 0.5, 1.0)


def test_texts_without_any_inactive_text_work():
    texts, spans = ([all[i] for i in (0, 1, 4, 5)] for all in (SENTENCES, TEXTS.spans))
    assert run(Feature.from_texts("animals", texts, [[(s.start, s.end, 1.0) for s in one] for one in spans]), heldout=0, batch_size=2, steps=3).label


# --- interruption -----------------------------------------------------------------------------------------------------


def test_an_interrupted_search_gives_what_it_has(result):
    found = run(result.feature, progress=stop_after(3))
    assert found.interrupted and found.trace.step.max() == 2
    assert_frame_equal(found.trace, result.trace[result.trace.step < 3], check_exact=True)
    assert found.label == found.ranking.label[0] and not found.heldout.empty and (found.ranking.step <= 3).all()
    assert "interrupted" in repr(found) and "interrupted" not in repr(result)


def test_an_interrupt_before_the_first_step_is_passed_on(monkeypatch):
    def step(self): raise KeyboardInterrupt
    monkeypatch.setattr(Search, "step", step)
    with pytest.raises(KeyboardInterrupt): run()


def test_an_interrupt_in_the_middle_of_a_step_leaves_whole_steps(monkeypatch):
    real, calls = torch.optim.AdamW.step, []

    def adam_step(self, *args):
        real(self, *args)
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", adam_step)
    result = run()
    assert result.interrupted and result.trace.step.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.isfinite(result.ranking.loss).all() and math.isfinite(result.soft["loss"])


def test_an_interrupt_during_the_beam_search_leaves_the_candidates_of_the_search(monkeypatch):
    def beam_search(*args): raise KeyboardInterrupt
    monkeypatch.setattr(module, "beam_search", beam_search)
    result = run(label_tokens=2)
    assert result.interrupted and len(result.ranking) and len(result.trace) == 16
    assert (result.ranking.step >= 0).any()


@pytest.fixture
def interrupt_pass(monkeypatch):
    "Presses Ctrl-C in that pass of the language model after the descent, and tells how many passes there were."
    def press(number, family="llama"):
        passes, real = [], module.conclude

        def hook(*_):
            passes.append(1)
            if len(passes) - 1 == number: raise KeyboardInterrupt

        def conclude(*args, **options):
            handle = make_tiny_lm(family).model.base_model.register_forward_hook(hook)
            try: return real(*args, **options)
            finally: handle.remove()

        monkeypatch.setattr(module, "conclude", conclude)
        return passes
    yield press
    monkeypatch.undo()


LATENT = Feature.from_texts("cats", [f"the cat sat on the {x}" for x in "abcdef"] + [f"the car ran to the {x}" for x in "abcdef"],
                            [[(4, 7, 1.0)]] * 6 + [[]] * 6)


@pytest.mark.parametrize("feature, options", [
    (WORDS, {}), (WORDS, dict(label_tokens=2)), (WORDS, dict(discriminator="direct", prompts=QUESTION)), (TEXTS, {}),
    (LATENT, dict(view="types", heldout=0.5)), (LATENT, dict(view="texts", heldout=0.5))],
    ids=["words", "two tokens", "direct", "context", "types", "texts"])
def test_an_interrupt_in_any_pass_after_the_descent_gives_what_is_known(feature, options, interrupt_pass):
    options = dict(steps=2, candidates=2) | options
    passes = interrupt_pass(-1)
    whole, count = run(feature, **options), len(passes)
    assert not whole.interrupted and count > 3
    ranked = 0
    for number in sorted({*range(0, count, max(1, count // 6)), count - 1}):
        interrupt_pass(number)
        result = run(feature, **options)
        assert result.interrupted and np.isfinite(result.ranking.loss).all() and math.isfinite(result.soft["loss_gap"])
        assert_frame_equal(result.trace, whole.trace, check_exact=True)
        assert result.label.strip() and (result.label == result.ranking.label[0] or result.verdict == "a token")
        assert f"{result.label!r} (interrupted)" in repr(result)
        if number == 0 and feature is not TEXTS and "label_tokens" not in options: assert result.heldout.empty and result.plot()
        ranked += set(result.ranking.label) == set(whole.ranking.label) and result.ranking.auroc_train.notna().all()
    assert ranked  # the last interrupt comes after the ranking, which is kept


@pytest.mark.parametrize("label_tokens", [1, "auto"])
def test_an_error_of_a_callback_is_passed_on(label_tokens):
    def progress(rows): raise ValueError("disk full")
    with pytest.raises(ValueError, match="disk full"): run(label_tokens=label_tokens, progress=progress)


def test_progress_is_shown_on_request(capsys):
    seen = []
    result = run(steps=2, progress=seen.append)
    assert capsys.readouterr() == ("", "") and [len(rows) for rows in seen] == [2, 2]
    assert [row["loss"] for rows in seen for row in rows] == result.trace.loss.tolist()
    run(steps=2, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "2/2" in err and "loss" in err and "entropy" in err and "KL" in err


def test_the_work_before_and_after_the_steps_is_shown(capsys):
    run(steps=2, progress=True)
    shown = capsys.readouterr().err
    places = [shown.index(part) for part in ("reading the examples without a label", "2/2", "ranking the candidates", "scoring the label")]
    assert places == sorted(places)
    run(steps=2, progress=stop_after(1))
    assert capsys.readouterr() == ("", "")
    with progress_line("some work") as line: begin(WORDS, make_tiny_lm("llama"))
    assert line.n > 3 and "some work: forward pass 0, 00:00" in capsys.readouterr().err


def test_the_help_names_every_parameter_and_every_column(result):
    help, columns = inspect.getdoc(label_feature), inspect.getdoc(LabelResult)
    for name in inspect.signature(label_feature).parameters: assert re.search(rf"^(\*\*)?{name}: ", help, re.M), name
    for field in fields(LabelResult): assert re.search(rf"^([\w, ]+, )?{field.name}[,:]", columns, re.M), field.name
    for table in TABLES:
        part = re.search(rf"^{table}: .*(\n .*)*", columns, re.M)[0]
        for column in getattr(result, table): assert re.search(rf"\b{column}\b", part), (table, column)
    for name in result.soft: assert re.search(rf"\b{name}\b", re.search(r"^soft: .*(\n .*)*", columns, re.M)[0])


def test_a_search_can_be_concluded_at_any_step():
    search = begin(WORDS, make_tiny_lm("llama"), Settings(steps=8, proposals=4))
    rows = search.step() + search.step()
    found = conclude(search, rows)
    assert found.seconds == 0 and not found.interrupted and len(found.trace) == 4 and found.label == found.ranking.label[0]


# --- the number of tokens ---------------------------------------------------------------------------------------------


def length(**options):
    return label_length(WORDS, make_tiny_lm("llama"), **(dict(steps=2, proposals=2, candidates=2, progress=False) | options))


def test_a_token_is_added_if_it_gains_enough_on_held_out_words():
    never, lengths = length(margin=100.0)
    assert never.settings.label_tokens == 1 and lengths.index.tolist() == [1, 2]
    always, lengths = length(margin=-100.0, longest=2)
    assert always.settings.label_tokens == 2 and lengths.label.tolist() == [never.label, always.label]
    assert lengths.accuracy_loss_heldout[2] == always.ranking.accuracy_loss_heldout[0]
    assert round_trips(always.ranking.token_id[0], make_tiny_lm("llama"))


def test_an_automatic_length_is_that_of_label_length(monkeypatch):
    monkeypatch.setattr(module, "label_length", lambda *arguments, progress: (arguments, progress))
    settings = Settings(label_tokens="auto", steps=2)
    assert label_feature(WORDS, make_tiny_lm("llama"), settings, progress=False) == (WORDS, make_tiny_lm("llama"), settings)


def test_without_held_out_words_there_is_nothing_to_choose_a_length_by():
    with pytest.raises(ValueError, match="heldout=0"): length(heldout=0.0)
    with pytest.raises(ValueError, match="heldout=0"): run(label_tokens="auto", heldout=0)
    with pytest.raises(ValueError, match="steps"): length(steps=0)


@pytest.mark.parametrize("second", [KeyboardInterrupt(), NoLabel("no label of 2 tokens"), None])
def test_a_longer_label_that_is_not_found_leaves_the_shorter_one(second, monkeypatch):
    first = replace(run(steps=2), seconds=1e6)

    def label(feature, lm, settings, **options):
        if settings.label_tokens == 1: return replace(first, settings=settings)
        if second: raise second
        return replace(first, settings=settings, interrupted=True)  # half a search is not compared

    monkeypatch.setattr(module, "label_feature", label)
    found, lengths = length(margin=-100.0)
    assert found.settings.label_tokens == 1 and lengths.index.tolist() == [1] and found.label == first.label
    assert 0 < found.seconds < 1e6  # of the whole call
    assert found.interrupted == (not isinstance(second, NoLabel))
