"""The command line: what it prints, what it saves and how it ends."""
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from tokenlabel.cli import _parameters, _parser, main
from tokenlabel.result import LabelResult
from tokenlabel.settings import FIELDS, Settings

COMMAND = Path(sys.executable).with_name("tokenlabel")
QUICK = ["--prompts", '["Examples of {label}:"]', "--steps", "3", "--candidates", "2", "--heldout", "0"]


@pytest.fixture
def feature_file(tmp_path):
    lines = [{"word": word, "activation": 1.} for word in ("saw", "drill", "hammer", "wrench")]
    lines += [{"word": word, "activation": 0.} for word in ("apple", "cat", "river", "song")]
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def tiny(stored): return ["--lm", stored.model.name_or_path]


@pytest.fixture
def interrupted(monkeypatch):
    "Presses Ctrl-C in the step of that number."
    def press(step):
        import tokenlabel.search
        schedule = tokenlabel.search.schedule
        monkeypatch.setattr("tokenlabel.search.schedule", lambda number, settings: signal.raise_signal(signal.SIGINT)
                            if number == step else schedule(number, settings))
    return press


# label

def test_label_prints_the_label_and_the_table_and_saves(feature_file, tiny, stored, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2): assert main(["label", str(feature_file), *tiny, *QUICK, "--out", str(out), "--kl-weight", ".1"]) == 0
    result = LabelResult.load(out)
    assert capsys.readouterr().out.endswith(f"{result}\n\nsaved in {out}: figure.png, ranking.csv and other tables\n")
    assert repr(result.label) in str(result)
    assert result.settings == Settings(prompts=["Examples of {label}:"], steps=3, candidates=2, heldout=0, kl_weight=.1)
    assert {path.name for path in out.iterdir()} > {"result.json", "figure.png", "figure.pdf", "ranking.csv", "trace.csv"}
    assert pd.read_csv(out / "ranking.csv").label.tolist() == result.ranking.label.tolist()
    assert json.loads(pd.read_csv(out / "trace.csv").tokens[0]) == result.trace.tokens[0]


def test_json_is_one_line_for_a_pipe(feature_file, tiny, tmp_path, capfd):
    feature_file.write_text("word\tactivation\nsaw\t1\ndrill\t1\nhammer\t0.9\ncat\t0\nsong\t0\n")  # TSV is read, too
    assert main(["label", str(feature_file), *tiny, *QUICK, "--restarts", "1", "--out", str(tmp_path / "out"), "--json"]) == 0
    row, result = json.loads(capfd.readouterr().out), LabelResult.load(tmp_path / "out")
    assert row["label"] == result.label and row["folder"] == str(tmp_path / "out") and row["name"] == "tools"
    assert row["loss"] == result.ranking.loss[0] and not row["interrupted"] and "1 restart, 3 steps" in str(result)


def test_a_file_of_latents_becomes_a_folder_with_a_page_and_files_for_other_programs(tiny, tmp_path, capsys):
    texts = ["the cat sat", "a red cat ran", "the cat and a dog", "a house", "the red car", "is it here", "it ran"]
    windows = [dict(tokens=[" " * bool(i) + word for i, word in enumerate(text.split())], values=[3.0 * (word == "cat") for word in text.split()])
               for text in texts]
    rows = [dict(modelId="gpt2-small", layer="6-res", index=str(i), activations=windows, explanations=[dict(description="cats & <dogs>")])
            for i in (7, 30)]
    (tmp_path / "latents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["label", str(tmp_path / "latents.jsonl"), *tiny, "--steps", "3", "--proposals", "2", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"2 labels in {tmp_path / 'out' / 'labels.csv'}" in printed and "page.html" in printed
    table = pd.read_csv(tmp_path / "out" / "labels.csv")
    assert table["index"].tolist() == [7, 30] and (table.verdict == "a token").all() and (table.label.str.strip() == "cat").all()
    assert json.loads((tmp_path / "out" / "explanations" / "6-res_latent7.txt").read_text()) == "cat"
    assert main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["name"], row["verdict"]) for row in rows] == [("gpt2-small/6-res/7", "a token"), ("gpt2-small/6-res/30", "a token")]
    assert all(LabelResult.load(row["folder"]).label == row["label"] for row in rows)
    assert "cats &amp; &lt;dogs&gt;" in (tmp_path / "out" / "page.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/result.json")}
    assert main(command) == 0 and len(before) == 2 and all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert main([*command, "--steps", "4"]) == 2 and "other settings" in capsys.readouterr().err


def test_latents_of_two_models_with_one_number_are_kept_apart(tiny, tmp_path):
    windows = [dict(tokens=["a", " cat", " sat"], values=[0, 3, 0]), dict(tokens=["the", " cat", " ran"], values=[0, 2, 0]),
               dict(tokens=["a", " house"], values=[0, 0]), dict(tokens=["the", " car"], values=[0, 0])]
    rows = [dict(modelId=model, layer="6-res", index="1", activations=windows) for model in ("gpt2", "pythia")]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["label", str(tmp_path / "two.jsonl"), *tiny, "--steps", "3", "--proposals", "2", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/**/*.txt")) == [
        f"delphi/{model}/explanations/6-res_latent1.txt" for model in ("gpt2", "pythia")]
    assert (tmp_path / "out" / "page.html").exists() and len((tmp_path / "out" / "neuronpedia.jsonl").read_text().splitlines()) == 2


def test_settings_of_matplotlib_in_the_current_folder_cost_nothing(feature_file, tiny, tmp_path):
    (tmp_path / "matplotlibrc").write_text("backend: module://evilback")
    (tmp_path / "evilback.py").write_text("open('ran', 'w')")
    subprocess.run([COMMAND, "label", feature_file, *tiny, *QUICK, "--out", "out"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out" / "figure.png").exists() and not (tmp_path / "ran").exists()


def test_every_setting_is_an_option_with_its_help_and_default():
    defaults = Settings()
    for name, text in FIELDS.items():
        given = vars(_parser(True).parse_args(["label", "x", f"--{name.replace('_', '-')}", repr(getattr(defaults, name))]))
        assert given[name] == getattr(defaults, name)
        [option] = [one for one in _parser(True)._subparsers._group_actions[0].choices["label"]._actions if one.dest == name]
        assert option.help.replace("%%", "%").startswith(text)


def test_an_interrupted_search_is_printed_and_saved(feature_file, tiny, tmp_path, capsys, interrupted):
    interrupted(2)
    assert main(["label", str(feature_file), *tiny, *QUICK, "--out", str(tmp_path / "out")]) == 130
    assert "(interrupted)" in capsys.readouterr().out and LabelResult.load(tmp_path / "out").interrupted


def test_ctrl_c_while_the_figure_is_drawn_loses_the_figure_only(feature_file, tiny, tmp_path, monkeypatch):
    def plot(self): raise KeyboardInterrupt
    monkeypatch.setattr(LabelResult, "plot", plot)
    assert main(["label", str(feature_file), *tiny, *QUICK, "--out", str(tmp_path / "out")]) == 130
    assert LabelResult.load(tmp_path / "out").label and not (tmp_path / "out" / "figure.png").exists()


def test_ctrl_c_before_there_is_a_result(feature_file, tiny, tmp_path, monkeypatch, capsys, interrupted):
    monkeypatch.chdir(tmp_path)
    interrupted(0)
    assert main(["label", str(feature_file), *tiny, *QUICK]) == 130
    assert capsys.readouterr().err.endswith("tokenlabel: interrupted\n")
    assert not (tmp_path / "runs").exists()


def test_the_result_goes_to_runs_by_default(feature_file, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["label", str(feature_file), *tiny, *QUICK]) == 0
    assert (tmp_path / "runs" / "tools" / "result.json").exists()


def test_a_mistake_is_told_before_the_model_is_loaded(feature_file, tmp_path, capsys):
    for options, message in [(["--out", str(tmp_path)], "give a new or empty folder"), (["--kl-weight", "-1"], "kl_weight=-1"),
                             (["--label-tokens", "two"], "label_tokens='two'")]:
        assert main(["label", str(feature_file), "--lm", "no/such/model", *options]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [feature_file]


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


def test_what_needs_no_torch_is_said_without_it(feature_file, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "config.json").write_text("{}")
    (tmp_path / "bad.csv").write_text("word,activation\nsaw,high\n")
    cases = [("none.jsonl", "there is no file or folder none.jsonl"), ("bad.csv", "bad.csv: row 2: activation 'high' is not a number"),
             ("tools.jsonl --lm bad", "bad is no model folder: it has no config.json"),
             ("tools.jsonl --lm sae", "sae is no model folder: there is no file named model.safetensors"),
             ("tools.jsonl --lm none.gguf", "no file none.gguf"), ("tools.jsonl --lm ./none", "no folder none"),
             ("tools.jsonl --lm bad.csv", "bad.csv is a file; give the folder of a model, or a .gguf file"),
             ("tools.jsonl --lm some/body", "cannot load some/body from the model hub (there is no folder or file of this name)"),
             ("tools.jsonl --tokenizer some/body", "cannot load some/body from the model hub"),
             ("tools.jsonl --steps few", "steps='few' is not a whole number from 1 on")]
    code = ("import sys; from tokenlabel.cli import main\n"
            f"for line in {[line for line, _ in cases]}: assert main(['label', *line.split()]) == 2\n"
            "print({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": ":".join(sys.path)})
    assert done.stdout == "set()\n", done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(cases)
    for line, (_, message) in zip(said, cases): assert message in line and "Errno" not in line and line.startswith("tokenlabel: error: ")


@pytest.mark.parametrize("arguments, message", [
    ("label x.jsonl --stepss 3", "did you mean --steps?"), ("label x.jsonl --step 3", "did you mean --steps?"),
    ("label x.jsonl --step=3", "did you mean --steps?"), ("reproduce --seed 3", "did you mean --seeds?"),
    ("fetch now", "unknown argument: now")])
def test_an_unknown_option_shows_the_usage_of_its_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as done: main(arguments.split())
    err = capsys.readouterr().err
    assert done.value.code == 2 and message in err and err.startswith(f"usage: tokenlabel {arguments.split()[0]} [-h]")


def test_options_are_in_groups(capsys):
    with pytest.raises(SystemExit): main(["label", "--help"])
    shown = capsys.readouterr().out
    places = [shown.index(text) for text in ("options:\n", "  --lm ", "the descent:\n", "  --steps ", "the loss:\n", "  --kl-weight ",
                                             "the ranking:\n", "  --proposals ", "  --seed ")]
    assert places == sorted(places)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises((ValueError, OSError)): main(["label", str(tmp_path / "none.jsonl"), "--debug"])


def test_a_bug_is_not_called_an_error_of_the_user(feature_file, tiny, monkeypatch):
    monkeypatch.setattr("tokenlabel.label.label_feature", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): main(["label", str(feature_file), *tiny])


@pytest.mark.parametrize("arguments, message", [
    (["nothing-of-that-name"], "there is no experiment 'nothing-of-that-name'"),
    (["nowhere.ipynb"], "there is no notebook at nowhere.ipynb"),
    (["--set", "seeds"], "--set needs NAME=VALUE"),
    (["--set", "sedes=3"], "no parameter 'sedes'"),
    (["--set", "steps=0"], "steps=0 is not a whole number from 1 on"),
    (["--seeds", "3", "--set", "seeds=2"], "--set seeds has an option of its own: --seeds"),
    (["--seeds", "0"], "--seeds 0 is less than 1"),
    (["--seeds", "3", "--quick"], "--quick is one seed"),
])
def test_reproduce_says_what_is_wrong_before_anything_runs(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_reproduce_passes_on_what_was_given_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    given = lambda line: _parameters(_parser(False).parse_args(["reproduce", *line.split()]))
    assert given("a b") == {}
    assert given("a --seeds 3 --lm some/model") == {"seeds": 3, "lm": "some/model"}
    assert given("--quick --lm model.gguf") == {"quick": True, "lm": str(tmp_path / "model.gguf")}
    assert given("--discriminator direct --set steps=7 --set size=x --set temperature=1,.5 --preset paper") == {
        "preset": "paper", "size": "x", "settings": {"discriminator": "direct", "steps": 7, "temperature": (1, .5)}}


def test_figures_of_other_settings_have_a_folder_of_their_own(tmp_path, monkeypatch, capsys):
    cells = [nbformat.v4.new_code_cell('figures: str = "f"  # folder\nseeds: int = 1  # number\nquick: bool = False  # small\n'
                                       'rate: float = .1  # rate\nlm: str = "default"  # model', metadata=dict(tags=["parameters"])),
             nbformat.v4.new_code_cell("from pathlib import Path\nPath(figures, 'a.svg').touch()")]
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), tmp_path / "a.ipynb")
    monkeypatch.chdir(tmp_path)
    assert main("reproduce a.ipynb --seeds 2".split()) == 0
    assert main("reproduce a.ipynb --quick --set rate=.5 --lm some/model.gguf".split()) == 0
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.svg"))] == [
        "figures/a.svg", "runs/model-rate=.5-quick/a.svg"]


# the installed command

def test_help_imports_nothing_that_takes_time():
    code = ("import sys; from tokenlabel.cli import main\ntry: main(['--help'])\nexcept SystemExit: "
            "print({'torch', 'numpy', 'pandas', 'papermill'} & set(sys.modules))")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in ("label", "reproduce", "fetch")) and shown.endswith("set()\n")


def test_a_feature_is_labeled_on_the_default_model(lm, feature_file, tmp_path):  # lm: fetched by now
    command = [COMMAND, "label", feature_file, "--steps", "3", "--restarts", "1", "--out", tmp_path / "out"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = LabelResult.load(tmp_path / "out")
    assert printed.startswith(f"{result}\n\nsaved in {tmp_path / 'out'}") and repr(result.label) in printed
    assert result.trace.step.max() == 2 and not result.interrupted


def test_the_exit_status_reaches_the_shell(tmp_path):
    done = subprocess.run([COMMAND, "label", tmp_path / "none.jsonl"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_label_that_the_terminal_cannot_show_is_saved_all_the_same(feature_file, tiny, tmp_path):
    chinese = tmp_path / "猫.jsonl"
    feature_file.rename(chinese)
    done = subprocess.run([COMMAND, "label", chinese, *tiny, *QUICK, "--out", tmp_path / "out"], capture_output=True,
                          env={"PYTHONIOENCODING": "ascii", "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert b"?: " in done.stdout and (tmp_path / "out" / "result.json").exists()


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
