"""The table of docs/architecture.md against the imports: which layer of the package knows which, and none upwards."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import clvp_fast

ROOT = Path(__file__).resolve().parent.parent
# Of the package's own root: its table of names, which knows all, and the command line's entrance.
ROOT_MODULES = ("clvp_fast", "clvp_fast.__main__")
ROW = re.compile(r"^\| `(\S+)` \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)


def _layers() -> dict[str, list[str]]:
    """Return the layers of the table from top to bottom, each with the layers that it claims to know."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = text.split("## Layers")[1].split("\n## ")[0]
    return {layer: re.findall(r"`(\S+)`", known) for layer, known in ROW.findall(table)}


def _modules() -> dict[str, Path]:
    files = [*(ROOT / "clvp_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    return {_name(path): path for path in files}


def _name(path: Path) -> str:
    place = path.relative_to(ROOT).with_suffix("")
    parts = ["clvp_fast", *place.parts] if place.parts[0] == "kernels" else list(place.parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(nodes: Iterable[ast.AST], modules: dict[str, Path]) -> set[str]:
    """Return modules of the package that statements import; a name of the root counts as its module."""
    exported = {name: module for module, names in clvp_fast._EXPORTS.items() for name in names}
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"imports have whole names: {ast.unparse(node)}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                of_root = exported.get(alias.name) if node.module == "clvp_fast" else None
                found.add(of_root or (inner if inner in modules else node.module))
    return found & modules.keys() - set(ROOT_MODULES)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _layer_of(module: str, layers: list[str]) -> str:
    place = module.removeprefix("clvp_fast.").replace(".", "/")
    inside = [layer for layer in layers if place == layer.removesuffix(".py") or f"{place}/".startswith(layer)]
    assert inside, f"docs/architecture.md has no layer for {module}"
    return max(inside, key=len)


def _known(layers: list[str]) -> dict[str, set[str]]:
    """Return the imports of each layer's modules, also those within functions."""
    modules = _modules()
    known: dict[str, set[str]] = {layer: set() for layer in layers}
    for module in modules.keys() - set(ROOT_MODULES):
        here = _layer_of(module, layers)
        known[here] |= {_layer_of(other, layers) for other in _imports(ast.walk(_tree(modules[module])), modules)} - {
            here
        }
    return known


def test_each_layer_knows_what_the_table_says():
    layers = _layers()
    assert len(layers) > 10
    assert {layer: sorted(names) for layer, names in layers.items()} == {
        layer: sorted(names) for layer, names in _known(list(layers)).items()
    }


def test_layers_know_those_below_them():
    layers = _layers()
    order = list(layers)
    upwards = {(layer, other) for layer in layers for other in layers[layer] if order.index(other) < order.index(layer)}
    # `generate()` of the classes asks the engine at the moment of a call.
    assert upwards == {("models/clvp/", "engine/")}


def test_no_circle_of_imports():
    """Look at imports that run while modules are imported themselves."""
    modules = _modules()
    names = modules.keys() - set(ROOT_MODULES)
    left = {name: _imports(_tree(modules[name]).body, modules) - {name} for name in names}
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left
