"""The documentation. `make docs` builds it with Sphinx from the committed notebooks; nothing is executed.

Two pieces are our own: what nbdev keeps out of a lesson is kept out of its page, and the reference shows each signature
with its comments, because here the comments document the parameters."""
import ast
import json
import re
from configparser import ConfigParser
from inspect import cleandoc
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_parser = ConfigParser(delimiters=["="])
_parser.read(ROOT / "settings.ini", encoding="utf-8")
_settings = _parser["DEFAULT"]

project, version, author, copyright = (_settings[name] for name in ("lib_name", "version", "author", "copyright"))
PAGES = f"{_settings['git_url']}/blob/{_settings['branch']}"
extensions = ["myst_nb"]
root_doc = "docs/index"
exclude_patterns = ["index.ipynb", "workshop/explorer.ipynb", "docs/requirements.txt", "**/.*"]  # README; a page of widgets alone
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_extra_path = [str(ROOT / "figures" / "replay.html")]  # shown on the front page
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_theme_options = dict(repository_url=_settings["git_url"], repository_branch=_settings["branch"], path_to_docs="nbs",
                          use_repository_button=True, navbar_persistent=[])  # one search box is enough


# Lessons

def lesson(notebook: str, name: str) -> str:  # name: the path in nbs/, without .ipynb
    "A notebook without its hidden cells, without nbdev's directives, and without outputs that need a running kernel."
    nb = json.loads(notebook)
    for cell in nb["cells"]:
        lines = "".join(cell["source"]).splitlines(keepends=True)
        directives = [line[2:].strip() for line in lines if line.startswith("#|")]
        rest = "".join(line for line in lines if not line.startswith("#|")).strip("\n")
        hidden = cell["cell_type"] == "code" and ("hide" in directives or not rest)
        if cell["cell_type"] == "markdown":
            rest = re.sub(r"\.ipynb#[\w-]+", lambda link: link[0].lower(), rest)  # Jupyter keeps capitals
            outside = "../" * (name.count("/") + 1)  # a text beside nbs/ is no page of the site
            rest = re.sub(rf"\]\({re.escape(outside)}([\w/.-]+\.md)\)", rf"]({PAGES}/\1)", rest)
        cell["source"] = "" if hidden else rest
        for output in cell.get("outputs", []): output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    nb["cells"] = [cell for cell in nb["cells"] if cell["source"]]
    return json.dumps(nb)


# Reference

def _text(node: ast.AST, lines: list[str]) -> str:
    "The source of a definition with its comments, up to its docstring or its first statement."
    first = min([node.lineno, *(each.lineno for each in node.decorator_list if ast.unparse(each).startswith("dataclass"))])
    body = node.body[0]
    if isinstance(node, ast.ClassDef):  # all of the fields
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        shown = [*lines[first - 1:node.lineno], *(lines[i] for each in fields for i in range(each.lineno - 1, each.end_lineno))]
    else: shown = lines[first - 1:max(body.lineno - 1, node.lineno)]
    return cleandoc("\n".join(shown)) if shown else ""


def entry(module: str, name: str, level: int = 3) -> str:
    "The part of the reference on a function or class: signature with comments, docstring, methods, and the defining lesson."
    source = (ROOT / "tokenlabel" / f"{module}.py").read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    lesson = re.search(r"File to edit: \.\./nbs/(\S+?)\.ipynb", source)[1]
    [node] = [each for each in tree.body if getattr(each, "name", "") == name]
    def part(node, title, level):
        said = ast.get_docstring(node) or ""
        said = re.sub(r"^( *)([*\w]+(?:, [*\w]+)*): ", r"\1- `\2`: ", said, flags=re.M)  # lines that explain a name
        return f"{'#' * level} `{title}`\n\n{said}\n\n```python\n{_text(node, lines)}\n```\n"
    parts = [part(node, name, level), f"Defined in [{lesson}](../{lesson}.ipynb).\n"]
    if isinstance(node, ast.ClassDef):
        patched = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.decorator_list and each.args.args
                   and getattr(each.args.args[0].annotation, "id", "") == name]
        methods = [each for each in [*node.body, *patched] if isinstance(each, ast.FunctionDef) and each.name[0] != "_"]
        parts += [part(each, f"{name}.{each.name}", level + 1) for each in methods]
    return "\n".join(parts)


def reference(text: str) -> str:
    "A page in which each line `@module.name` has become the entry of this function or class."
    return re.sub(r"^@(\w+)\.(\w+)$", lambda found: entry(*found.groups()), text, flags=re.M)


def _read(app, docname: str, source: list[str]) -> None:
    if Path(app.env.doc2path(docname)).suffix == ".ipynb": source[0] = lesson(source[0], docname)
    elif docname == "docs/api": source[0] = reference(source[0])


def _finish(app, error) -> None:
    front = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">'
    if not error: Path(app.outdir, "index.html").write_text(front, encoding="utf-8")


def setup(app) -> dict:
    app.connect("source-read", _read)
    app.connect("build-finished", _finish)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
