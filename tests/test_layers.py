"""Which module imports which: no circle, and only in the direction that the numbers of the notebooks allow."""
import ast
import json
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The part of a notebook is the tens digit of its number. A module of a part imports from these parts, at any place, and
# lower numbers of its own part (in part 3x, any).
MAY_IMPORT = {0: {3}, 1: {0, 3}, 2: {0, 1, 3}, 3: set(), 4: {0, 1, 2, 3}, 5: {0, 1, 2, 3}}
ALSO = {"label": {"cudagraph"}, "synthetic": {"feature"}}  # the fastest step on a GPU; generators make features
INSIDE = {"cli", "__init__"}  # may import inside functions: what is not needed costs no time
LATER = {("result", "plot")}  # so may this one: matplotlib takes a second, and a label needs no picture


def modules():
    "Number of the notebook of each module."
    found = {}
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        names = [name for cell in cells for name in re.findall(r"^#\| default_exp (\S+)", "".join(cell["source"]), re.M)]
        if names: found[names[0]] = int(path.name[:2])
    return found


NUMBER = modules()


def imports(module):
    "Modules of the package that a module imports, and whether each import is inside a function."
    tree = ast.parse((ROOT / "tokenlabel" / f"{module}.py").read_text(encoding="utf-8"))
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(f)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 1 or getattr(node, "module", None) == "tokenlabel":
            names = [node.module] if node.module and node.module != "tokenlabel" else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokenlabel."): names = [node.module[11:]]
        elif isinstance(node, ast.Import): names = [a.name[11:] for a in node.names if a.name.startswith("tokenlabel.")]
        yield from ((name, id(node) in inside) for name in names if name in NUMBER)


GRAPH = {module: list(imports(module)) for module in NUMBER}


def test_every_module_has_a_notebook():
    assert {path.stem for path in (ROOT / "tokenlabel").glob("*.py")} - {"_modidx"} == set(NUMBER)


def test_there_is_no_circle():
    try: list(TopologicalSorter({module: {name for name, _ in found} for module, found in GRAPH.items()}).static_order())
    except CycleError as error: pytest.fail("imports in a circle: " + " -> ".join(error.args[1]))


@pytest.mark.parametrize("module", [name for name in NUMBER if name not in INSIDE])
def test_imports_go_down(module):
    own = NUMBER[module]
    for name, inside in GRAPH[module]:
        assert not inside or (module, name) in LATER, f"{module} imports {name} inside a function; only {', '.join(sorted(INSIDE))} may"
        part, other = own // 10, NUMBER[name] // 10
        allowed = other in MAY_IMPORT[part] or other == part and (part == 3 or NUMBER[name] < own) or name in ALSO.get(module, ())
        assert allowed, (f"{own:02}_{module} imports {NUMBER[name]:02}_{name}: part {part}x may import lower numbers of its "
                         f"own part and parts {', '.join(f'{p}x' for p in sorted(MAY_IMPORT[part])) or 'none'}")
