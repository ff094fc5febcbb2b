"""The command line: what it prints, what it saves and how it ends."""
import inspect
import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import nbformat
import pytest

from tokenlabel import optimize
from tokenlabel.cli import _parser, main
from tokenlabel.objective import LossWeights

COMMAND = Path(sys.executable).with_name("tokenlabel")


@pytest.fixture
def feature_file(tmp_path):
    lines = [{"word": word, "activation": 1.} for word in ("saw", "drill", "hammer", "wrench")]
    lines += [{"word": word, "activation": 0.} for word in ("apple", "cat", "river", "song")]
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@dataclass
class Result:
    "A stand-in for a `LabelResult`."
    interrupted: bool = False

    def __str__(self): return "the label and its table"

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = ["result.json", "feature.jsonl", *(f"{name}.parquet" for name in optimize.TABLES)]
        for name in names: (folder / name).touch()

    def plot(self): return matplotlib.figure.Figure()


@pytest.fixture
def optimizer(monkeypatch):
    "Puts a stand-in for the optimizer in place and lists what it was called with."
    calls = []
    def put(made):
        def label_feature(feature, lm, **options):
            calls.append({"feature": feature, "lm": lm, **options})
            if isinstance(made, BaseException): raise made
            return made
        monkeypatch.setitem(sys.modules, "tokenlabel.optimize",
                            SimpleNamespace(label_feature=label_feature, LossWeights=lambda **weights: weights,
                                            check_folder=optimize.check_folder,
                                            WEIGHTS={"channel": LossWeights(kl=0.5), "direct": LossWeights(kl=0.6)}))
        monkeypatch.setitem(sys.modules, "tokenlabel.lm", SimpleNamespace(load_lm=lambda source, dtype: f"model {source}"))
        return calls
    return put


# label

def test_label_prints_the_label_and_the_table_and_saves(optimizer, feature_file, tmp_path, capsys):
    calls = optimizer(Result())
    options = ["--out", str(tmp_path / "out"), "--steps", "7", "--kl", ".1", "--lm", "some/model"]
    assert main(["label", str(feature_file), *options]) == 0
    printed = capsys.readouterr().out
    assert printed == f"the label and its table\n\nsaved in {tmp_path / 'out'}\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} > {"result.json", "figure.png", "figure.pdf"}
    [call] = calls
    assert call["feature"].texts == ("saw", "drill", "hammer", "wrench", "apple", "cat", "river", "song")
    assert call["lm"] == "model some/model" and call["steps"] == 7
    assert call["weights"] == {"accuracy": 1., "entropy": .2, "kl": .1, "end": .01}


@pytest.mark.parametrize("discriminator, kl", [("channel", 0.5), ("direct", 0.6)])
def test_the_weight_of_the_kl_is_the_discriminators_own_unless_it_is_given(discriminator, kl, optimizer, feature_file,
                                                                           tmp_path):
    calls = optimizer(Result())
    assert main(["label", str(feature_file), "--out", str(tmp_path / "out"), "--discriminator", discriminator]) == 0
    assert calls[0]["weights"]["kl"] == kl


def test_a_label_may_have_several_tokens_and_other_labels_to_try(optimizer, feature_file, tmp_path, capsys):
    calls = optimizer(Result())
    for text, length in ("2", 2), ("auto", "auto"):
        options = ["--out", str(tmp_path / text), "--label-tokens", text, "--guesses", "0", "--expected", "9"]
        assert main(["label", str(feature_file), *options]) == 0
        assert (calls[-1]["label_tokens"], calls[-1]["guesses"], calls[-1]["expected"]) == (length, 0, 9)
    with pytest.raises(SystemExit): main(["label", str(feature_file), "--label-tokens", "two"])
    assert "'two' is neither a whole number nor auto" in capsys.readouterr().err


def test_an_interrupted_search_is_printed_and_saved(optimizer, feature_file, tmp_path, capsys):
    optimizer(Result(interrupted=True))
    assert main(["label", str(feature_file), "--out", str(tmp_path / "out")]) == 130
    assert "the label and its table" in capsys.readouterr().out
    assert (tmp_path / "out" / "result.json").exists()


def test_ctrl_c_before_there_is_a_result(optimizer, feature_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    optimizer(KeyboardInterrupt())
    assert main(["label", str(feature_file)]) == 130
    assert capsys.readouterr().err == "tokenlabel: interrupted\n"
    assert not (tmp_path / "runs").exists()


def test_the_result_goes_to_runs_by_default(optimizer, feature_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer(Result())
    assert main(["label", str(feature_file)]) == 0
    assert (tmp_path / "runs" / "tools" / "result.json").exists()


def test_a_folder_with_other_files_is_refused_before_the_search(optimizer, feature_file, tmp_path, capsys):
    calls = optimizer(Result())
    assert main(["label", str(feature_file), "--out", str(tmp_path)]) == 2
    assert "something else than a saved result" in capsys.readouterr().err
    assert calls == [] and list(tmp_path.iterdir()) == [feature_file]


def test_a_label_that_the_terminal_cannot_show_is_saved_all_the_same(optimizer, feature_file, tmp_path, monkeypatch):
    class Chinese(Result):
        def __str__(self): return "猫"
    optimizer(Chinese())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["label", str(feature_file), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "result.json").exists()


def test_a_bad_weight_is_told_before_the_model_is_loaded(feature_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tokenlabel.lm.load_lm", None)
    assert main(["label", str(feature_file), "--kl", "-1", "--out", str(tmp_path / "out")]) == 2
    assert "kl=-1" in capsys.readouterr().err


def test_a_result_of_before_is_replaced(optimizer, feature_file, tmp_path):
    optimizer(Result())
    for _ in range(2): assert main(["label", str(feature_file), "--out", str(tmp_path / "out")]) == 0


def test_defaults_are_those_of_label_feature():
    from tokenlabel.optimize import label_feature
    options = vars(_parser().parse_args(["label", "some.jsonl"]))
    signature = {name: parameter.default for name, parameter in inspect.signature(label_feature).parameters.items()}
    for name in ("discriminator", "restarts", "steps", "heldout", "seed"): assert options[name] == signature[name], name
    for name in ("accuracy", "entropy", "end"): assert options[name] == getattr(LossWeights(), name), name


# errors

@pytest.mark.parametrize("content", [None, "", "no json\n", '{"word": "saw", "activation": 7}\n'])
def test_a_bad_feature_file_is_one_line_on_stderr(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tools.jsonl"
    if content is not None: path.write_text(content)
    assert main(["label", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tokenlabel: error: ") and err.count("\n") == 1 and "tools.jsonl" in err
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises((ValueError, OSError)): main(["label", str(tmp_path / "none.jsonl"), "--debug"])


def test_a_mistake_in_the_program_is_not_called_an_error_of_the_user(optimizer, feature_file):
    optimizer(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError): main(["label", str(feature_file)])


@pytest.mark.parametrize("arguments, message", [
    (["reproduce", "nothing-of-that-name"], "there is no experiment 'nothing-of-that-name'"),
    (["reproduce", "nowhere.ipynb"], "there is no notebook at nowhere.ipynb"),
    (["reproduce", "--set", "seeds"], "--set needs NAME=VALUE"),
    (["reproduce", "--set", "sedes=3"], "no parameter 'sedes'"),
    (["reproduce", "--seeds", "3", "--set", "seeds=2"], "--set seeds has an option of its own: --seeds"),
])
def test_reproduce_says_what_it_was_not_given(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_reproduce_passes_on_what_was_given(monkeypatch, tmp_path):
    ran = []
    def record(notebooks, parameters, figures, runs, at_once):
        ran.append(([notebook.name for notebook in notebooks], parameters, figures, runs, at_once))
        yield from ()
    monkeypatch.setattr("tokenlabel.experiment.find_experiment", Path)
    monkeypatch.setattr("tokenlabel.experiment.check_parameters", lambda *arguments: None)
    monkeypatch.setattr("tokenlabel.experiment.run_experiments", record)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    for arguments in ("a b --quick --set rate=.5 --set name=x --lm model.gguf", "a --seeds 3", "a b --quick",
                      "a --seeds 3 --lm some/model --figures f"):
        assert main(["reproduce", *arguments.split()]) == 0
    runs, path = Path("runs"), str(tmp_path / "model.gguf")
    assert ran == [   # the figures of the report stay, and only small runs of the small model go side by side
        (["a", "b"], {"quick": True, "rate": .5, "name": "x", "lm": path}, runs / "model-rate=.5-name=x-quick", runs, 1),
        (["a"], {"seeds": 3}, Path("figures"), runs, 1),
        (["a", "b"], {"quick": True}, runs / "quick", runs, 2),
        (["a"], {"seeds": 3, "lm": "some/model"}, Path("f"), runs, 1)]


@pytest.mark.parametrize("options, message", [
    (["--seeds", "0"], "--seeds 0 is less than 1"), (["--seeds", "3", "--quick"], "--quick is one seed")])
def test_seeds_that_cannot_be_are_refused_before_anything_runs(options, message, capsys):
    assert main(["reproduce", "numbers", *options]) == 2
    assert message in capsys.readouterr().err


# the installed command

def test_help_is_quick():
    took = []
    for _ in range(3):
        start = time.perf_counter()
        shown = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True).stdout
        took.append(time.perf_counter() - start)
    assert all(name in shown for name in ("label", "reproduce", "fetch"))
    assert min(took) < .5


def test_a_feature_is_labeled_on_the_default_model(lm, feature_file, tmp_path):   # lm: fetched by now
    from tokenlabel.optimize import LabelResult
    command = [COMMAND, "label", feature_file, "--steps", "3", "--restarts", "1", "--out", tmp_path / "out"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = LabelResult.load(tmp_path / "out")
    assert printed == f"{result}\n\nsaved in {tmp_path / 'out'}\n" and repr(result.label) in printed
    assert result.trace.step.max() == 2 and not result.interrupted


def test_the_exit_status_reaches_the_shell(tmp_path):
    done = subprocess.run([COMMAND, "label", tmp_path / "none.jsonl"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_nothing_half_done(how, tmp_path):
    cells = [nbformat.v4.new_code_cell('figures: str = "figures"   # folder', metadata=dict(tags=["parameters"])),
             nbformat.v4.new_code_cell("import time\ntime.sleep(600)")]
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), tmp_path / "slow.ipynb")
    command = [COMMAND, "reproduce", "slow.ipynb", "--figures", "figures", "--runs", "runs"]
    in_background = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)   # as a shell's & does it
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said, preexec_fn=in_background)
    while not list(tmp_path.glob("runs/.slow-*/executed.ipynb")): time.sleep(.1)   # the kernel is at work
    process.send_signal(how)
    assert process.wait(60) == (130 if how == signal.SIGTERM else -how)
    start = time.perf_counter()
    while list(tmp_path.glob("runs/.*")) and time.perf_counter() - start < 60: time.sleep(.1)
    assert not list(tmp_path.glob("runs/.*")) and not (tmp_path / "figures").exists()
    if how == signal.SIGTERM: assert (tmp_path / "said").read_text().endswith("tokenlabel: interrupted\n")
