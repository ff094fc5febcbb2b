"""The wheel alone, in an environment that has the dependencies and no checkout: what it carries, and that its commands run."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built by way of the source distribution, as for a package index. Nothing is downloaded."
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info", "build", "dist", "_docs")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "The folder of the programs of a new environment: the wheel is installed there, the other packages are those of this one."
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, env=ENVIRONMENT)
    [packages] = folder.glob("[Ll]ib/**/site-packages")
    packages.joinpath("others.pth").write_text(sysconfig.get_path("purelib"))  # the links of that folder are not followed
    return programs


def run(installed, command, folder):
    "Run a command in a folder outside the checkout, and return what it prints."
    done = subprocess.run([installed / command[0], *command[1:]], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_carries_page_maps_lessons_and_experiments(installed, tmp_path):
    code = ("from tokenlabel.files import bundled; print(bundled('.'), *(path.relative_to(bundled('.')) "
            "for place in ('nbs', 'figures') for path in bundled(place).rglob('*.*')), sep='\\n')")
    package, *found = run(installed, ["python", "-c", code], tmp_path).splitlines()
    assert Path(package).is_relative_to(installed.parent)
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    wanted = {path.relative_to(ROOT) for pattern in settings["DEFAULT"]["bundled"].split() for path in ROOT.glob(pattern)}
    assert set(map(Path, found)) == wanted and {str(path) for path in wanted} >= {
        "nbs/workshop/explorer.ipynb", "nbs/workshop/3_losses.ipynb", "nbs/experiments/animals.ipynb", "figures/phase_map.json"}
    for path in wanted: assert Path(package, path).read_bytes() == (ROOT / path).read_bytes()


def test_the_page_of_a_package_index_has_no_relative_link(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    assert "\nProject-URL: Documentation, https://github.com/tokenlabel/tokenlabel/blob/main/nbs/docs/index.md\n" in text
    assert [f"Programming Language :: Python :: 3.{n}" in text for n in (11, 12, 13)] == [True] * 3
    assert "<style" not in text  # would be shown as text
    text = re.sub(r"```.*?```|`[^`]*`", "", text.partition("\n\n")[2], flags=re.S)
    links = re.findall(r'(?:\]\(|(?:src|href)=")([^)"\s]+)', text)
    assert len(links) > 50 and [link for link in links if not link.startswith(("https://", "#"))] == []
    host = r"https://(?:github|raw\.githubusercontent)\.com"
    ours = [re.match(host + r"/tokenlabel/tokenlabel(?:/blob)?/main/(.+)", link) for link in links]
    assert [link[1] for link in ours if link and not (ROOT / link[1]).is_file()] == []


@pytest.mark.slow
def test_the_workshop_serves_the_page_of_the_wheel(installed, tmp_path):
    code = ("from tokenlabel import cli, page\npage.serve = lambda notebook, *_, **__: print(notebook)\n"
            "raise SystemExit(cli.main(['workshop', '--port', '0']))")
    page = Path(run(installed, ["python", "-c", code], tmp_path).strip())
    assert page.is_file() and page.is_relative_to(installed.parent)


@pytest.mark.slow
def test_experiments_run_outside_a_checkout_into_the_current_folder(installed, tiny_folder, tmp_path):
    said = run(installed, ["tokenlabel", "reproduce", "numbers", "--quick", "--lm", tiny_folder], tmp_path)
    assert re.search(r"^numbers: executed notebook .*/runs/numbers-.*\.ipynb, figures in runs/.*-quick$", said, re.M)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    figures = next(tmp_path.glob("runs/*quick"))
    assert {path.name for path in figures.iterdir()} >= {"numbers.png", "numbers.json", "summary.png"}
