"""The documentation: a place for every notebook, a complete reference, code that runs, and links that lead somewhere."""
import json
import re
import runpy
from fnmatch import fnmatch
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

import tokenlabel

ROOT = Path(__file__).resolve().parents[1]
NBS, SITE = ROOT / "nbs", ROOT / "_docs" / "html"
GUIDES = sorted((NBS / "docs").glob("*.md"))
CONF = runpy.run_path(str(NBS / "docs" / "conf.py"))


def test_each_notebook_and_guide_has_one_place_in_the_contents():
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (NBS / "docs" / "index.md").read_text(), re.S)
    lines = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    entries = [line if line.startswith("/") else f"/docs/{line}" for line in lines]
    pages = [path for path in (*NBS.rglob("*.ipynb"), *GUIDES) if not any(part.startswith(".") for part in path.parts)]
    names = ["/" + str(path.relative_to(NBS).with_suffix("")) for path in pages]
    left_out = {name: n for name in names if (n := sum(fnmatch(name, entry) for entry in entries)) != 1}
    assert left_out == {"/index": 0, "/workshop/explorer": 0, "/docs/index": 0}
    assert [entry for entry in entries if not any(fnmatch(name, entry) for name in names)] == []


def test_the_reference_has_every_public_name_with_the_comments_of_its_parameters():
    text = (NBS / "docs" / "api.md").read_text()
    modules = {"synthetic", "workshop"}
    entries = {name for _, name in re.findall(r"^@(\w+)\.(\w+)$", text, re.M)}
    assert set(dir(tokenlabel)) - {"__version__"} - modules <= entries and all(f"`tl.{name}`" in text for name in modules)
    made = CONF["reference"](text)
    assert not re.search(r"^@\w+\.", made, re.M) and "### `load_lm`" in made
    assert "#### `LabelResult.save`" in made and "#### `Feature.from_words`" in made and "LabelResult._repr" not in made
    assert "dtype: torch.dtype | str | None = None,  # or \"fastest\"" in made
    assert "- `lm`: the language model" in made and "    - `token_id`: the token" in made  # docstrings that list names
    assert re.search(r"class Settings:\n    discriminator: str = \"channel\"  # how", made)


def test_what_nbdev_hides_is_not_on_the_page():
    new = nbformat.v4
    cells = [new.new_markdown_cell("[a](../07_prompts.ipynb#Questions-of-it) [b](../../data/a.md) [c](../a.md)"),
             new.new_code_cell("#| default_exp lm"), new.new_code_cell("#| hide\n#| export\nimport os"),
             new.new_code_cell("#| export\nx = 1  #| no directive")]
    shown = json.loads(CONF["lesson"](nbformat.writes(new.new_notebook(cells=cells)), "studies/a"))["cells"]
    assert [cell["source"] for cell in shown] == [
        f"[a](../07_prompts.ipynb#questions-of-it) [b]({CONF['PAGES']}/data/a.md) [c](../a.md)", "x = 1  #| no directive"]


def code(guide): return re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.S | re.M)


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if code(guide)], ids=lambda path: path.stem)
def test_the_code_of_a_guide_runs(guide, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_lm, label_feature = tokenlabel.load_lm, tokenlabel.label_feature
    monkeypatch.setattr(tokenlabel, "load_lm", lambda *_, **__: load_lm(tiny_folder), raising=False)
    monkeypatch.setattr(tokenlabel, "label_feature", partial(label_feature, steps=3, proposals=2, progress=False), raising=False)
    place = {}
    for block in code(guide): exec(compile(block, guide.name, "exec"), place)


class Links(HTMLParser):
    "The links, pictures and anchors of a page."
    def __init__(self, page):
        super().__init__()
        self.links, self.anchors = [], {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]


@pytest.mark.skipif(not SITE.exists(), reason="no _docs/html: run `make docs`, which needs Sphinx")
def test_links_and_pictures_of_the_site_are_there():
    pages = {page: Links(page) for page in SITE.rglob("*.html") if "_static" not in page.parts}
    assert len(pages) > 60
    missing = set()
    for page, found in pages.items():
        for link in found.links:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            fragment = unquote(url.fragment)
            if not target.exists() or target in pages and fragment not in pages[target].anchors:
                missing.add((str(page.relative_to(SITE)), link))
    assert missing == set()
