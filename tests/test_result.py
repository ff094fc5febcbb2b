"""What becomes of a result: text, page, and folder."""
import json
from dataclasses import fields, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

import tokenlabel.files
from tokenlabel.feature import Feature
from tokenlabel.prompts import Question
from tokenlabel.files import check_saved, seal
from tokenlabel.result import LabelResult
from tokenlabel.settings import Settings

TABLES = ("ranking", "heldout", "trace", "words", "scores")


def make_result(name="animals", label_tokens: int = 1, seed: int = 0, **changes) -> LabelResult:
    "A made-up result of two restarts and three steps."
    random = np.random.default_rng(seed)
    feature = Feature.from_words(name, ["cat", "dog", "two words"], ["car", '"', "猫"])
    ids = [70, 80, 90] if label_tokens == 1 else [(70, 71), (80, 81), (90, 91)]
    numbers = {column: np.sort(random.random(3)) for column in
               ("loss", "accuracy_loss", "kl", "stop", "accuracy_loss_heldout", "auroc_train", "auroc_heldout")}
    ranking = pd.DataFrame({"token_id": ids, "label": [" animal", " animals", "$x$"], "token": ["·animal", "·animals", "$x$"]}
                           | numbers | {"step": [2, 1, -1], "restart": [0, 1, -1]})
    heldout = pd.DataFrame([dict(label=label, metric=metric, value=0.8, low=0.5, high=0.9) for label in ("discrete", "soft", "chance")
                            for metric in ("auroc", "balanced_accuracy")])
    trace = pd.DataFrame([dict(step=step, restart=r, temperature=0.5, entropy_weight=0.1 * step, loss=1 - 0.1 * step + 0.01 * r,
                               accuracy_loss=0.5, entropy=2.0 - 0.5 * step, kl=4.0, accuracy_active=0.7, accuracy_inactive=0.8,
                               discrete_accuracy_loss=0.6 if step == 0 else np.nan, tokens=["·animal", "·car"],
                               probabilities=[0.6, 0.1]) for step in range(3) for r in range(2)])
    settings = Settings(label_tokens=label_tokens, steps=3, seed=seed)
    soft = dict(label=" animals", probability=0.9, loss=0.4, accuracy_loss=0.321, entropy=0.1, kl=3.0, restart=0, loss_gap=0.02)
    return LabelResult(**dict(label=" animal", feature=feature, ranking=ranking, heldout=heldout, trace=trace, soft=soft,
                              settings=settings, lm="tiny", dtype="float32", threads=1, prompts=("Examples of {label}:",),
                              interrupted=False, seconds=1.5) | changes)


ONE, OTHER = make_result(), make_result(seed=1, label_tokens=2)
ODD = [ONE, OTHER, make_result('<b>"odd"</b> & 動物', interrupted=True),
       make_result(heldout=pd.DataFrame(columns=["label", "metric", "value", "low", "high"])),
       make_result(settings=Settings(discriminator="direct", kl_weight=0.1, positive_weight=None, temperature=(2, 0.5)),
                   prompts=Question("Is {word} {label}?", yes="1", no="0", few_shot=[["Is red blue?", "no"]]))]


def same_result(a: LabelResult, b: LabelResult) -> None:
    for name in TABLES: assert_frame_equal(getattr(a, name), getattr(b, name), check_exact=True)
    for field in fields(LabelResult):
        if field.name not in TABLES: assert getattr(a, field.name) == getattr(b, field.name), field.name


def files(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- display ----------------------------------------------------------------------------------------------------------


def test_a_result_shows_itself_as_text():
    text = repr(ONE)
    assert text.startswith("animals: ' animal'") and "2 restarts, 3 steps" in text and "interrupted" not in text
    for token in ONE.ranking.token: assert token in text
    assert f"{ONE.ranking.loss[0]:.3f}" in text and "0.321" in text and "balanced_accuracy" in text and "chance" in text
    assert "(interrupted)" in repr(ODD[2]) and "Held out, 95 %" not in repr(ODD[3])


def test_a_result_shows_itself_as_html_with_a_picture_and_escapes_names():
    result = make_result('<script>alert("$x$ & $")</script>')
    open_figures = plt.get_fignums()
    html = result._repr_html_()
    assert plt.get_fignums() == open_figures
    assert '<img src="data:image/png;base64,iVBOR' in html and len(html) < 120_000
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert html.count("<table") == 2 and "<th>AUROC held out</th>" in html
    assert ODD[3]._repr_html_().count("<table") == 1


def test_the_tables_for_people_have_a_row_per_label_and_metric():
    assert list(ONE.ranking_head(2).index) == [1, 2] and list(ONE.ranking_head().label) == list(ONE.ranking.token)
    assert ONE.heldout_wide().loc["auroc", "soft"] == "0.80 [0.50, 0.90]"


# --- save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", ODD, ids=["one", "two tokens", "odd name", "nothing held out", "question"])
def test_a_result_comes_back_as_it_was_saved(result, tmp_path):
    folder = result.save(tmp_path / "some" / "where")
    assert folder == tmp_path / "some" / "where" and [*tmp_path.iterdir()] == [tmp_path / "some"]
    assert [*folder.parent.iterdir()] == [folder]
    back = LabelResult.load(str(folder))
    same_result(back, result)
    assert repr(back) == repr(result)
    assert {p.suffix for p in folder.iterdir()} == {".json", ".jsonl", ".parquet"}  # no pickle


def test_saving_again_replaces_the_old_result(tmp_path):
    ONE.save(tmp_path / "result", figure=True)
    assert {"figure.png", "figure.pdf", "ranking.csv", "heldout.csv", "trace.csv"} <= files(tmp_path / "result").keys()
    same_result(LabelResult.load(tmp_path / "result"), ONE)
    OTHER.save(tmp_path / "result")
    same_result(LabelResult.load(tmp_path / "result"), OTHER)
    assert [p.name for p in tmp_path.iterdir()] == ["result"] and not (tmp_path / "result" / "figure.png").exists()


def test_an_empty_folder_and_a_long_name_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "名" * 80): same_result(LabelResult.load(ONE.save(tmp_path / name)), ONE)


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert ONE.save(tmp_path / "link") == tmp_path / "real" and (tmp_path / "link").is_symlink()
    same_result(LabelResult.load(tmp_path / "link"), ONE)


@pytest.mark.parametrize("content", [["notes.txt"], ["sub/notes.txt"], ["result.json", "data.csv"], ["result.json"]])
def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path, content):
    folder = tmp_path / "mine"
    for name in content:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    before = files(tmp_path)
    with pytest.raises(ValueError, match="mine"): ONE.save(folder)
    with pytest.raises(ValueError, match="mine"): check_saved(folder, "result")
    assert files(tmp_path) == before and [*tmp_path.iterdir()] == [folder]


def test_a_note_beside_a_saved_result_is_not_lost(tmp_path):
    folder = ONE.save(tmp_path / "result")
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="notes.txt"): OTHER.save(folder)
    assert (folder / "notes.txt").read_text() == "precious"
    same_result(LabelResult.load(folder), ONE)


@pytest.mark.parametrize("place", ["result", "result/below"])
def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path, place):
    (tmp_path / "result").write_text("precious")
    with pytest.raises(ValueError, match="result is a file"): ONE.save(tmp_path / place)
    assert files(tmp_path) == {"result": b"precious"}


def test_a_folder_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="/proc"): check_saved("/proc", "result")  # a mount point
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be replaced"): check_saved(Path("."), "result")
    with pytest.raises(ValueError, match="cannot be written to"): check_saved(Path("/proc/new/folder"), "result")


@pytest.mark.parametrize("there", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("where", ["table", "move"])
def test_a_save_that_fails_leaves_things_as_they_were(tmp_path, monkeypatch, there, where):
    folder = tmp_path / "result"
    if there: ONE.save(folder)
    before = files(tmp_path)
    if where == "table":
        real = pd.DataFrame.to_parquet

        def to_parquet(self, path, **options):
            real(self, path, **options)
            if "trace" in str(path): raise OSError("disk full")

        monkeypatch.setattr(pd.DataFrame, "to_parquet", to_parquet)
    else:
        move = tokenlabel.files.os.replace

        def fail(source, target):
            if str(target) == str(folder) and "new" in str(source): raise OSError("disk full")
            move(source, target)

        monkeypatch.setattr(tokenlabel.files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"): OTHER.save(folder)
    monkeypatch.undo()
    assert files(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == (["result"] if there else [])
    if there: same_result(LabelResult.load(folder), ONE)


def test_there_is_nothing_to_load_where_nothing_was_saved(tmp_path):
    with pytest.raises(FileNotFoundError): LabelResult.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["result.json", "feature.jsonl", *(f"{table}.parquet" for table in TABLES)])
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1, 2]", None])
def test_a_damaged_file_is_named(tmp_path, name, content):
    folder = ONE.save(tmp_path / "result")
    (folder / name).unlink()
    if content is not None: (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"lacks the file '{name}'" if content is None else f"{name} was altered"): LabelResult.load(folder)


def test_a_folder_without_a_seal_is_no_result(tmp_path):
    folder = ONE.save(tmp_path / "result")
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no manifest.json"): LabelResult.load(folder)
    with pytest.raises(ValueError, match="give a new or empty folder"): OTHER.save(folder)


@pytest.mark.parametrize("seed", range(40))
def test_a_result_altered_anywhere_is_refused_or_unchanged(tmp_path, seed):
    random, folder = np.random.default_rng(seed), ONE.save(tmp_path / "result")
    path = sorted(folder.iterdir())[seed % 6]
    content = bytearray(path.read_bytes())
    match seed // 6 % 4:
        case 0: content[random.integers(len(content))] ^= 1 << int(random.integers(8))
        case 1: del content[random.integers(len(content)):]
        case 2: content[random.integers(len(content)):0] = random.bytes(5)
        case 3:
            del (lines := content.split(b"\n"))[random.integers(len(lines))]
            content = b"\n".join(lines)
    path.write_bytes(content)
    try: back = LabelResult.load(folder)
    except ValueError as error: assert str(folder) in str(error) and len(str(error)) < 500
    else: same_result(back, ONE)


@pytest.mark.parametrize("path", ["new/../results", "results/missing/..", "./results/../results"])
def test_a_path_with_dots_never_replaces_another_folder(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "result.json").write_text("precious")
    with pytest.raises(ValueError, match="give a new or empty folder"): ONE.save(path)
    assert files(tmp_path) == {"results/result.json": b"precious"}


def test_a_result_of_an_older_version_is_refused_by_the_names_it_lacks(tmp_path):
    folder = ONE.save(tmp_path / "result")
    whole = json.loads((folder / "result.json").read_text())
    for change, match in [
        (lambda d: d.pop("dtype") and d.pop("lm"), "it lacks dtype, lm"), (lambda d: d["settings"].pop("seed"), "lack seed"),
        (lambda d: d["settings"].update(ramp=[0, 1]), "no setting 'ramp'"), (lambda d: d.update(weights={}), "weights"),
        (lambda d: d["settings"].update(steps=-1), "steps=-1")]:
        changed = json.loads(json.dumps(whole))
        change(changed)
        (folder / "result.json").write_text(json.dumps(changed))
        (folder / "manifest.json").unlink()
        seal(folder, "result")
        with pytest.raises(ValueError, match=match): LabelResult.load(folder)


def test_a_result_can_be_changed_in_a_copy():
    assert replace(ONE, interrupted=True).interrupted and not ONE.interrupted
