"""The workshop: what its checks say about typical mistakes, and its lessons, with and without their solutions."""
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient

from tokenlabel import workshop
from tokenlabel.cli import main
from tokenlabel.live import SAE, latents
from tokenlabel.workshop import Feedback, FunctionCheck, draw_words, learner_copy, read_exercises, solve, write_lessons, write_solutions

FOLDER = Path(__file__).resolve().parents[1] / "nbs" / "workshop"
LESSONS = sorted(FOLDER.glob("[1-9]_*.ipynb"))
CHECKS = {name: check for name, check in vars(workshop).items() if isinstance(check, FunctionCheck)}
checks = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)


def read(path): return nbformat.read(path, as_version=4)


# what a check says

@checks
def test_the_right_answer_is_right_and_praised(check):
    assert check(check.right) == Feedback(True, check.praise) and check.praise


@checks
def test_each_mistake_is_told_by_its_own_name(check):
    messages = check.mistakes(check.right(*check.cases[0]), *check.cases[0])
    assert len(messages) >= 4
    for message in messages:
        assert check(lambda *case: check.mistakes(check.right(*case), *case)[message]) == Feedback(False, message)


@checks
def test_missing_answers_are_told_apart(check):
    assert "dots" in check(lambda *case: ...).message
    assert "`return`" in check(lambda *case: None).message
    assert "ZeroDivisionError" in check(lambda *case: 1 / 0).message
    assert "without calling it" in check(0.5).message
    assert "The right answer is" in check(lambda *case: 123.456).message
    assert not any(check(wrong).right for wrong in (lambda *case: ..., lambda *case: 123.456, 0.5))


@pytest.mark.parametrize("check, learner, said", [
    ("entropy", lambda p: -(p * p.log()).sum(), "0 · log 0"),
    ("entropy", lambda p: -sum(float(x) * float(x.log2()) for x in p), "bits"),
    ("entropy", lambda p: (p * p.log2()).sum(), "bits, and the minus sign"),
    ("softmax", lambda v, t: (v / t).exp() / (v / t).exp().sum(), "largest entry first"),
    ("log_prob", lambda x, i: x.softmax(-1)[i].log(), "Never leave the logarithms"),
    ("bce", lambda z, a: -(z[a].sigmoid().log().mean() + (1 - z[~a].sigmoid()).log().mean()) / 2, "softplus"),
    ("bce", lambda z, a: torch.nn.functional.binary_cross_entropy_with_logits(z, a.float()), "larger class"),
    ("kl", lambda p, q: (p * (p / q).log()).sum(), "0 · log 0"),
    ("kl", lambda p, q: torch.nn.functional.kl_div(p.log(), q, reduction="sum"), "swapped"),
])
def test_mistakes_as_learners_write_them(check, learner, said):
    assert said in CHECKS[f"check_{check}"](learner).message


@pytest.mark.parametrize("check, learner", [
    ("entropy", lambda p: torch.distributions.Categorical(probs=p).entropy()),
    ("entropy", lambda p: -sum(float(x) * float(x.log()) for x in p if x > 0)),
    ("softmax", lambda v, t: torch.nn.functional.softmax(v / t, 0)),
    ("embedding", lambda p, E: (p[:, None] * E).sum(0)),
    ("auroc", lambda z, a: __import__("sklearn.metrics").metrics.roc_auc_score(a, z)),
    ("kl", lambda p, q: torch.nn.functional.kl_div(q.log(), p, reduction="sum")),
    ("false_alarms", lambda z, a: np.float32((z[~a] > 0).float().mean())),
    ("balanced_accuracy", lambda said, a: __import__("sklearn.metrics").metrics.balanced_accuracy_score(a, said)),
])
def test_other_ways_to_be_right(check, learner):
    assert CHECKS[f"check_{check}"](learner).right


def test_a_learner_cannot_spoil_the_case_for_the_right_answer():
    def spoils(p): return p.zero_()
    check = FunctionCheck([(torch.ones(2),)], lambda p: p, lambda right, p: {}, "")
    assert not check(spoils).right


def test_a_name_that_is_missing_sends_the_learner_to_the_first_cell():
    assert "first code cell" in CHECKS["check_entropy"](lambda p: numpy_that_nobody_imported(p)).message


def test_a_table_is_not_printed_into_the_feedback():
    assert "a table of 32 rows" in workshop.check_decided(lambda trace: -1.5).message
    assert not workshop.check_decided(lambda trace: trace.step[2:4]).right


@pytest.mark.parametrize("answer, right, said", [
    (..., None, "dots"), ("warm", False, "a temperature is needed"), (-1.0, False, "positive"), (1.0, False, "lower"),
    (0.1, False, "higher"), (0.435, True, "90"), (torch.tensor(0.435), True, "90"), (np.float32(0.435), True, "90")])
def test_a_temperature(answer, right, said):
    feedback = workshop.check_temperature(answer)
    assert feedback.right == right and said in feedback.message


@pytest.mark.parametrize("weight, right, said", [
    (..., None, "dots"), (0.05, False, "cancels"), (0.01, False, "rewards a mixture"), (-1.0, False, "negative"),
    (5.0, False, "the data hardly count"), (0.2, True, "+0.15")])
def test_a_weight_of_the_entropy(weight, right, said):
    feedback = workshop.check_entropy_weight(weight, kl_weight=0.05)
    assert feedback.right == right and said in feedback.message


@pytest.mark.parametrize("price, right, said", [
    (0.05, True, "price"), (-0.05, False, "sign"), (0.35, False, "Subtract"), (0.35 / 0.3, False, "quotient"),
    (1.0, False, "0.350"), (..., None, "dots")])
def test_a_price(price, right, said):
    feedback = workshop.check_price(price, discrete=0.35, soft=0.3)
    assert feedback.right == right and said in feedback.message


@pytest.mark.parametrize("answers, right, said", [
    (dict(accuracy="c", entropy="a", kl="b"), True, "all three"), (dict(accuracy="c", entropy="a"), None, "the letter for kl"),
    (dict(accuracy="c", entropy="b", kl="b"), False, "entropy: nothing"), (dict(accuracy=3, entropy="a", kl="b"), False, "a or b or c"),
    (..., None, "dots"), (dict(accuracy="c", entropy="a", kl=...), None, "the letter for kl")])
def test_the_effect_of_each_loss_alone(answers, right, said):
    feedback = workshop.check_alone(answers)
    assert feedback.right == right and said in feedback.message


@pytest.mark.parametrize("verdicts, right, said", [
    (dict(good="can", lucky="cannot", bad="cannot"), True, "before any run"),
    (dict(good="can", lucky="can", bad="cannot"), False, "luck"), (dict(good="can", lucky="cannot", bad="can"), False, "not enough"),
    (dict(good="cannot", lucky="cannot", bad="cannot"), False, "is enough"), (dict(good="yes"), False, "can or cannot"),
    (dict(good="can"), None, "the verdict for lucky"), (dict(good=...), None, "the verdict for good")])
def test_verdicts_on_evaluators(verdicts, right, said):
    feedback = workshop.check_verdicts(verdicts, dict(good=(0.95, 0.9), lucky=(0.85, 0.6), bad=(0.6, 0.5)))
    assert feedback.right == right and said in feedback.message


@pytest.mark.parametrize("answer, right, said", [
    (..., None, "dots"), ("one", False, "the number of a latent is needed"), (7, False, "choose a latent of the table: 1, 2, 3"),
    (1, False, "holds in a new text. The latent fires where the label says: We saw [three 9]"), (2, False, "0.55 only"),
    (3, True, "silent in this text: Some context"), (torch.tensor(3), True, "0.95"), (np.int64(3), True, "0.95")])
def test_a_label_with_a_high_score_that_is_wrong(answer, right, said, monkeypatch):
    texts = {1: ("We saw [three 9]", 9.0), 2: ("Music", 0.0), 3: ("Some context", 0.0)}
    monkeypatch.setattr(workshop, "NEW_TEXTS", {number: text for number, (text, _) in texts.items()})
    monkeypatch.setattr(workshop, "try_texts", lambda found, number, new: pd.DataFrame([texts[number]], columns=["text", "activation"]))
    labels = pd.DataFrame(dict(label=[" numbers", " music", " context"], auroc=[0.9, 0.55, 0.95]), [1, 2, 3])
    feedback = workshop.check_wrong_label(answer, labels, found=None)
    assert feedback.right == right and said in feedback.message


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # with a start token, and without one
def test_new_texts_show_where_a_latent_fires(family, tiny_lm):
    lm, text = tiny_lm(family), "the cat and the dog"
    always = dict(W_enc=torch.zeros(32, 2), b_enc=torch.tensor([2.0, -1.0]), W_dec=torch.ones(2, 32), b_dec=torch.zeros(32))
    found = latents(lm, SAE("standard", "blocks.0.hook_resid_post", always, start=False), [text], progress=False)
    rest = lm.encode(text)[1:]
    shown, most = workshop.try_texts(found, 0, [text]).loc[0]
    assert most == 2.0 and shown.count(" 2]") == len(rest) and not shown.startswith("[")  # the first token of a row never counts
    assert re.sub(r"\[(.+?) 2\]", r"\1", shown) == text
    assert workshop.try_texts(found, 1, [text]).loc[0].tolist() == [text, 0.0]


def test_feedback_is_shown_with_a_sign_and_escaped():
    shown = Feedback(False, "p < 0")._repr_html_()
    assert "✗" in shown and "p &lt; 0" in shown and "✓" in repr(Feedback(True, ""))


def test_an_exercise_that_nobody_has_tried_is_not_called_wrong():
    for check in CHECKS.values(): assert not re.search("✗|Not yet", repr(check(lambda *case: ...)))


def test_names_on_a_line_do_not_cover_each_other():
    z = {f"word{i}": 0.05 * i for i in range(40)}
    figure = draw_words({"a": z, "b": {word: 10 * value for word, value in z.items()}}, {"even": list(z)[::2], "odd": list(z)[1::2]})
    figure.draw_without_rendering()
    for ax in figure.axes:
        boxes = [text.get_window_extent() for text in ax.texts]
        assert 1 < len(boxes) <= 40 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# the lessons

def test_there_are_six_lessons_of_two_to_four_exercises():
    assert [path.name[0] for path in LESSONS] == list("123456")
    for path in LESSONS:
        exercises = read_exercises(read(path))
        assert 2 <= len(exercises) <= 4 and all(1 <= e.minutes <= 15 for e in exercises), path.name
        assert all(e.hint and e.solution for e in exercises)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_exercises_fail_as_they_are_and_pass_as_they_are_solved(path, quick_starts):
    lesson = read(path)
    exercises, solved = {e.cell: e.title for e in read_exercises(lesson)}, solve(lesson)
    cells, tries = [], {}  # in front of each solution: the cell as it is, and its check
    for i, cell in enumerate(solved.cells):
        if i in exercises:
            cells += [lesson.cells[i], lesson.cells[i + 1]]
            tries[exercises[i]] = len(cells) - 1, len(cells) + 1
        cells.append(cell)
    cells = [nbformat.from_dict(dict(cell) | dict(id=f"cell{i}")) for i, cell in enumerate(cells)]
    both = nbformat.v4.new_notebook(cells=cells, metadata=lesson.metadata)
    NotebookClient(both, timeout=600, resources=dict(metadata=dict(path=str(FOLDER)))).execute()
    assert len(tries) == len(exercises)
    for title, (unsolved, after) in tries.items():
        first, second = (said(both.cells[i]) for i in (unsolved, after))
        assert first.startswith("○ Your turn: ") and "dots" in first, f"{title}: {first}"
        assert second.startswith("✓ Right."), f"{title}: {second}"


def said(cell):
    "What the check in a cell says."
    [output] = [o for o in cell.outputs if o.output_type == "execute_result"]
    return output.data["text/plain"]


def test_a_lesson_is_kept_as_the_learner_finds_it():
    for path in LESSONS:
        lesson = read(path)
        for exercise in read_exercises(lesson):
            assert "..." in lesson.cells[exercise.cell].source
            assert said(lesson.cells[exercise.cell + 1]).startswith("○ Your turn: "), f"{path.name}: {exercise.title}"


def test_the_lessons_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < 600_000


def test_each_lesson_has_two_pictures_or_more_and_says_first_what_it_loads():
    for path in LESSONS:
        lesson = read(path)
        outputs = [output for cell in lesson.cells for output in cell.get("outputs", [])]
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2, path.name
        first = next(cell for cell in lesson.cells if cell.cell_type == "code")
        assert re.match(r'print\("Loading .* seconds', first.source), path.name  # before the imports, which are silent


def test_no_bar_and_no_warning_is_left_in_a_lesson():
    for path in LESSONS:
        outputs = [output for cell in read(path).cells for output in cell.get("outputs", [])]
        assert not any(output.get("name") == "stderr" or "it/s" in str(output.get("data", "")) for output in outputs), path.name


# the learner's copies

@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    return write_lessons(FOLDER, folder / "mine")


def test_a_learners_copy_tells_no_answer_and_judges_nobody(copies):
    assert [path.name for path in copies] == [path.name for path in LESSONS]
    for path in copies:
        for cell in read(path).cells:
            if cell.cell_type == "code": assert cell.outputs == [] and "assert" not in cell.source


def test_a_learners_copy_needs_nothing_beside_it_but_the_other_lessons(copies):
    for path in copies:
        for cell in read(path).cells:
            if cell.cell_type != "markdown": continue
            for link in re.findall(r"\]\(([^)]+)\)", cell.source):
                attached = link.removeprefix("attachment:")
                assert link.startswith("https://") or (path.parent / link).exists() or attached in cell.attachments, f"{path.name}: {link}"


def test_a_cell_says_in_words_that_the_first_one_was_skipped(copies):
    for path in copies:
        code = [cell for cell in read(path).cells if cell.cell_type == "code"]
        for cell in code[1:]:
            if "exercise" in cell.metadata.get("tags", []): continue
            with pytest.raises(NameError) as error: exec(cell.source, {})
            assert error.traceback[-1].lineno == 0 and "Run the first code cell" in cell.source.splitlines()[0], cell.source


def test_code_that_only_draws_is_folded(copies):
    folded = [cell for path in copies for cell in read(path).cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert folded and all("plt." in cell.source for cell in folded)


def test_the_learners_work_is_kept(tmp_path):
    write_lessons(FOLDER, tmp_path)
    for path, text in ((tmp_path / LESSONS[0].name, "mine"), (tmp_path / LESSONS[1].name, None)):
        path.write_text(text) if text else path.unlink()
    assert [path.name for path in write_lessons(FOLDER, tmp_path)] == [LESSONS[1].name]
    assert (tmp_path / LESSONS[0].name).read_text() == "mine"


def test_the_command_writes_copies_and_keeps_those_that_are_there(tmp_path, capsys):
    assert main(["lessons", str(tmp_path / "mine")]) == 0 and "6 lessons written" in capsys.readouterr().out
    assert main(["lessons", str(tmp_path / "mine")]) == 0
    said = capsys.readouterr().out
    assert "kept as they are: 1_soft_labels.ipynb" in said and "0 lessons written" in said
    assert main(["lessons", str(FOLDER)]) == 2 and "give a folder outside" in capsys.readouterr().err


def test_copies_do_not_go_into_the_repository(tmp_path):
    with pytest.raises(ValueError, match="give a folder outside"): write_lessons(FOLDER, FOLDER.parents[1] / "runs" / "lessons")
    (tmp_path / "link").symlink_to(FOLDER)  # a link does not hide where a folder lies
    with pytest.raises(ValueError, match="give a folder outside"): write_lessons(FOLDER, tmp_path / "link" / "mine")
    with pytest.raises(FileNotFoundError, match="there are no lessons in"): write_lessons(tmp_path / "no" / "nbs" / "workshop", tmp_path / "mine")


def test_solutions_are_written_for_lessons_only(tmp_path):
    written = write_solutions(FOLDER, tmp_path / "solved")
    assert [path.name for path in written] == [path.name for path in LESSONS]
    for path in written:
        assert [e.title for e in read_exercises(read(path))] == [e.title for e in read_exercises(read(FOLDER / path.name))]
        assert not any(re.search(r"= \.\.\.|return \.\.\.", c.source) for c in read(path).cells if "exercise" in c.metadata.get("tags", []))
        assert not any(re.search(r"!\[[^]]*\]\((?!attachment:|https:)", cell.source) for cell in read(path).cells), "pictures come along"


def test_the_teachers_page_has_every_exercise_and_its_time():
    page = "\n".join(cell.source for cell in read(FOLDER / "teacher.ipynb").cells)
    for path in LESSONS:
        assert path.name in page
        for e in read_exercises(read(path)): assert f"| {e.title} | {e.difficulty} | {e.minutes} |" in page, e.title
