"""Imports go one way: no circle anywhere, none upward between folders, and optional packages are imported in one place.

Imports inside functions and under TYPE_CHECKING count too.
"""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each folder may import from those before it.
ORDER = [
    "kernels",
    "pipelines.plan",
    "pipelines.formats",
    "pipelines.sources",
    "pipelines.loaders",
    "pipelines.host",
    "pipelines.device",
    "pipelines.conversion",
    "model",
    "teacher",
    "training",
    "report",
    "commands",
]

OPTIONAL = {"nvidia", "ffcv", "apex", "plotly", "pyarrow", "sklearn", "matplotlib", "scipy", "safetensors"}


def modules():
    """Path of every module by its name."""
    found = {}
    for top in ("fastdeit", "kernels", "pipelines"):
        for path in (ROOT / top).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name if top == "fastdeit" else f"fastdeit.{name}"] = path
    return found


@cache
def statements(path):
    """The imports of a file, wherever in it."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported(path, known):
    """The modules of the project that a file imports."""
    for node in statements(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastdeit"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


@cache
def graph():
    known = modules()
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def folder(module):
    return next((name for name in ORDER if module.startswith(f"fastdeit.{name}.")), None)


def test_there_is_no_circle():
    order = list(TopologicalSorter(graph()).static_order())  # raises CycleError with the circle
    assert len(order) > 100


def imports(wrong):
    """The imports for which `wrong(module, other)` holds."""
    return [(module, other) for module, others in graph().items() for other in others if wrong(module, other)]


def test_no_folder_imports_upward():
    def upward(module, other):
        return folder(module) and folder(other) and ORDER.index(folder(other)) > ORDER.index(folder(module))

    assert imports(upward) == []


def test_data_code_knows_nothing_of_training():
    data = ("fastdeit.kernels", "fastdeit.pipelines")
    assert imports(lambda module, other: module.startswith(data) and not other.startswith(data)) == []


def test_the_stages_do_not_know_each_other():
    stages = {"pipelines.host", "pipelines.device"}
    assert imports(lambda module, other: {folder(module), folder(other)} == stages) == []


def test_optional_packages_are_imported_in_one_file_each():
    users = {}
    for name, path in modules().items():
        for node in statements(path):
            tops = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for package in (top.split(".")[0] for top in tops):
                if package in OPTIONAL:
                    users.setdefault(package, set()).add(name)
    assert {package: names for package, names in users.items() if len(names) > 1} == {}
