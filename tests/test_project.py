"""The project as a whole: notebooks, exported code, README, lessons, settings and Makefile agree."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file

from conftest import Forked

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(path.relative_to(ROOT) for path in (ROOT / "nbs").rglob("*.ipynb") if "checkpoint" not in str(path))
EXPERIMENTS = [path for path in NOTEBOOKS if "experiments" in path.parts]
LESSONS = [path for path in NOTEBOOKS if not (ROOT / path).with_name(".notest").exists()]


@pytest.fixture
def copy(tmp_path):
    "A copy of the checkout: the tools under test write into that, never into the tree."
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info", "build", "dist", "_docs", "_proc")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=lambda folder, names: ignored(folder, names) - {".notest", ".ci"})
    return tmp_path / "copy"


def run(*command, cwd, **environment):
    "Run a command of this environment to its success and return what it printed."
    environment |= {"JUPYTER_DATA_DIR": str(cwd / ".jupyter"), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=inherited | environment)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make(*arguments, cwd):
    return run("make", "--no-print-directory", "-o", ".venv/installed", f"BIN={BIN}", *arguments, cwd=cwd)


def test_exported_code_equals_the_notebooks(copy):
    shutil.rmtree(copy / "tokenlabel")
    run("nbdev_export", cwd=copy)
    exported = {path.name: path.read_text() for path in (copy / "tokenlabel").glob("*.py")}
    present = {path.name: path.read_text() for path in (ROOT / "tokenlabel").glob("*.py")}
    assert sorted(exported) == sorted(present)
    assert [name for name in exported if exported[name] != present[name]] == [], "run `make export`"


def test_notebooks_are_clean(copy):
    run("nbdev_clean", cwd=copy)
    dirty = [str(path) for path in NOTEBOOKS if (copy / path).read_text() != (ROOT / path).read_text()]
    assert dirty == [], "run `make export`"


def test_notebooks_name_the_kernel_that_everybody_has():
    kernels = {str(path): nbformat.read(ROOT / path, as_version=4).metadata["kernelspec"]["name"] for path in NOTEBOOKS}
    assert set(kernels.values()) == {"python3"}, kernels


def test_every_notebook_opens_with_what_it_teaches_and_how_long_it_takes():
    for path in NOTEBOOKS:
        first = nbformat.read(ROOT / path, as_version=4).cells[0]
        opening = re.match(r"# \S.*\n+> (\S.*)", first.source)
        assert first.cell_type == "markdown" and opening, f"{path} opens with a title, and a line with > below it"
        assert re.search(r"\b(second|minute|hour|day|\d+ s\b)", opening[1]), f"{path}: how long does it take?"


def test_readme_equals_the_index_notebook(copy):
    (copy / "README.md").unlink()
    make("README.md", cwd=copy)
    assert (copy / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make export`"


def test_results_in_the_readme_are_those_of_the_figures():
    from tokenlabel.paper import load_verdicts, verdict_table
    table = verdict_table(load_verdicts(ROOT / "figures"))
    assert table.strip() in (ROOT / "README.md").read_text(), "run index.ipynb again, then `make export`"


def pages():
    "All text for people, with the place of each."
    guides = (ROOT / "nbs" / "docs").glob("*.md")
    for path in (*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")), *guides):
        yield path, path.read_text()
    for path in NOTEBOOKS:
        cells = nbformat.read(ROOT / path, as_version=4).cells
        yield ROOT / path, "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_links_lead_somewhere():
    missing = []
    for path, text in pages():
        for link in re.findall(r'(?:\]\(|(?:src|href)=")([^)"#\s]+)', re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)):
            if "://" not in link and not (path.parent / link).exists(): missing.append(f"{path.relative_to(ROOT)}: {link}")
    assert missing == []


def test_readme_shows_before_it_tells():
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("## "))
    assert first <= 38 and any("```python" in line for line in lines[:first]) and any("![" in line for line in lines[:first])


def test_notebooks_are_light():
    assert sum((ROOT / path).stat().st_size for path in NOTEBOOKS) < 2_800_000
    for path in NOTEBOOKS:
        nb = nbformat.read(ROOT / path, as_version=4)
        assert "widgets" not in nb.metadata, f"{path} carries the state of widgets"
        pictures = [output for cell in nb.cells for output in cell.get("outputs", [])
                    if any(kind.startswith("image/") for kind in output.get("data", {}))]
        if path in EXPERIMENTS: assert not pictures, f"{path} repeats a committed figure"


def run_lesson(copy, path):
    "In a process of its own: what the command `nbdev_test` does for one notebook."
    from nbdev.test import nbdev_test
    with (copy / "said").open("w") as said:
        for stream in (1, 2): os.dup2(said.fileno(), stream)
    os.chdir(copy)
    os.environ["JUPYTER_DATA_DIR"] = str(copy / ".jupyter")
    nbdev_test(path=str(path), n_workers=0)


def check_lesson(copy, path):
    status, said = Forked(run_lesson, copy, path).wait(), (copy / "said").read_text()
    assert status == 0 and said.rstrip().endswith("Success."), said


@pytest.mark.slow
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_runs(copy, path): check_lesson(copy, path)


# As little of a study as goes through all of its cells. (The plan for a million features computes with the default model.)
SMALL = {"balance": dict(seeds=1, words=24, shares=[0.0, 1.0]), "evaluators": dict(quick=True, features=["mammals"])}
SMALL |= {name: dict(quick=True) for name in ("cost", "long_labels", "wordnet", "phase_map", "prompts", "search", "questions", "settings")}
SMALL["latents"] = dict(silent=4, workers=1)
SMALL["sae"] = dict(tokens=400, latents=24, k=3, layer=0, epochs=2, batch=4, length=12, scored=4, shown=[0])
SMALL["hundred"] = dict(count=12, together=6, generated=2)
SMALL["paper_recipe"] = dict(quick=True, claims=[], ladder=["animals_words"])


def write_latents(path):
    "Latents in the form that the study of latents reads, each of which fires on one word."
    def window(word, place, **more):
        tokens = ["the", " old", " house", " is", " here"]
        return dict(tokens=[*tokens[:place], f" {word}", *tokens[place:]], values=[10 * (i == place) for i in range(6)]) | more
    silent = [dict(tokens=["a", f" {word}", " day"], values=[0, 0, 0], decile=None) for word in ("red", "long", "good")]
    rows = [dict(id=f"L0-{n}", explanation=f"the word {word}", detection=0.8, fuzz=0.7, train=[window(word, i) for i in range(1, 5)],
                 test=[window(word, 1 + i % 4, decile=i + 1) for i in range(10)] + silent) for n, word in enumerate(("cat", "dog", "car", "red"))]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def write_autoencoder(folder):
    "A top-k autoencoder for the tiny model whose latents are random directions, and texts on which they fire."
    folder.mkdir()
    directions = torch.nn.functional.normalize(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    save_file(dict(W_enc=directions.T.contiguous(), b_enc=torch.zeros(24), W_dec=directions, b_dec=torch.zeros(64)), folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(dict(
        architecture="topk", d_in=64, d_sae=24, k=1, apply_b_dec_to_input=True, metadata=dict(hook_name="blocks.0.hook_resid_post"))))
    texts = [f"the {a} and the {b} sat on the {c}" for a in ("cat", "dog", "horse") for b in ("animal", "book") for c in ("mat", "car", "house")]
    (folder / "texts.json").write_text(json.dumps(texts))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_study_runs_with_another_model(copy, tiny_folder, tmp_path, name):
    path = Path("nbs/studies") / f"{name}.ipynb"
    (copy / path).with_name(".notest").unlink()
    nb, given = papermill.iorw.load_notebook_node(str(copy / path)), SMALL[name] | {"figures": str(tmp_path / "figures")}
    read = papermill.inspect_notebook(copy / path)
    given |= {each: str(tmp_path / each) for each in ("runs", "data") if each in read}
    given |= {"lms": [tiny_folder]} if "lms" in read else {"lm": tiny_folder}
    if "path" in read: given["path"] = write_latents(tmp_path / "latents.jsonl")
    if "sae" in read: given |= {"sae": write_autoencoder(tmp_path / "sae"), "page": str(tmp_path / "page.html")}
    assert set(given) <= set(read)
    nbformat.write(papermill.parameterize.parameterize_notebook(nb, given), copy / path)
    check_lesson(copy, path)
    assert list((tmp_path / "figures").iterdir())


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_papermill_reads_every_parameter_of_an_experiment(path):
    nb = nbformat.read(ROOT / path, as_version=4)
    [cell] = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    written = {node.target.id for node in ast.parse(cell.source).body if isinstance(node, ast.AnnAssign)}
    read = papermill.inspect_notebook(ROOT / path)
    assert set(read) == written, "every line of the cell is `name: type = value   # what it is`"
    assert all(parameter["help"] for parameter in read.values())
    assert {"figures", "runs", "seeds", "quick", "lm", "settings"} <= written


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def listed_requirements(settings):
    return " ".join(settings[name] for name in ("requirements", "dev_requirements", "workshop_requirements", "ray_requirements")).split()


def test_the_installed_package_is_what_settings_say(settings):
    installed = distribution(settings["lib_name"])
    assert installed.version == settings["version"] and installed.metadata["License"] == "Apache-2.0"
    [script] = [entry for entry in installed.entry_points if entry.group == "console_scripts"]
    assert f"{script.name}={script.value}" == settings["console_scripts"]
    required = {canonicalize_name(Requirement(text).name) for text in installed.requires}
    listed = listed_requirements(settings)
    assert required == {canonicalize_name(Requirement(text).name) for text in listed}


def test_the_citation_names_this_version_and_the_paper(settings):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"]) == (settings["lib_name"], settings["version"])
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Schulz", "Fallows"] and "2504.00754" in paper["url"]
    assert f"## {settings['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_runs_targets_that_exist(settings):
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = {run.split()[1] for run in runs if run.startswith("make")}
    assert targets == {"test", "check", "docs"} <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert jobs["check"]["strategy"]["matrix"]["python"] == settings["pythons"].split()[1:]


def test_constraints_pin_versions_that_settings_allow(settings):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact versions, no paths, no local versions"
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for text in listed_requirements(settings):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


def test_modules_import_only_what_settings_require(settings):
    names = {"PIL": "pillow"}
    required = {canonicalize_name(Requirement(text).name) for text in settings["requirements"].split()}
    # Parts of Jupyter and transformers that these cannot do without.
    required |= {"ipython", "jupyter-client", "nbclient", "tokenizers", "traitlets"}
    required |= {"ray"}  # an extra; without it `start_ray` says how to get it
    extra = {"page": {"voila", "jupyter-server", "tornado"}}  # voila is an extra, and brings the others
    for path in (ROOT / "tokenlabel").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level: modules = [node.module]
            for module in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"tokenlabel"}:
                assert canonicalize_name(names.get(module, module)) in required | extra.get(path.stem, set()), f"{path.name} imports {module}"


def test_make_without_a_fitting_python_says_so(copy):
    done = subprocess.run(["make", "test", "PYTHON="], cwd=copy, capture_output=True, text=True)
    assert done.returncode != 0 and "tokenlabel needs Python 3.11 or newer" in done.stderr
    assert not (copy / ".venv").exists()


def test_ci_runs_make_test_and_nothing_else():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test"
