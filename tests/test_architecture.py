"""The house keeps its shape: which room may import which, who may import the big libraries, and how long things get."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import alignkit

PACKAGE = Path(alignkit.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in FILES}
MIDDLE = {"models", "data", "rollout", "reward", "observe"}
ROOMS = {"runtime", "stages", *MIDDLE, "algo"}
FREE = {"errors", "schema"}  # two small modules that every room may import
DOWN = {  # what a room may import besides itself and the free modules
    "algo": set(),
    "data": set(),
    "observe": set(),
    "models": {"algo", "data"},
    "rollout": {"algo"},
    "reward": {"algo", "data", "models"},
    "stages": {"algo", *MIDDLE},
    "runtime": {"stages", "algo", *MIDDLE},
    "cli": {"runtime"},
}


def imports(text: str) -> Iterator[str]:
    """Full dotted names that a file imports, wherever it does so, but for those under `if TYPE_CHECKING`."""
    todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        todo += ast.iter_child_nodes(node)


def room(path: str) -> str:
    """alignkit/models/scalar.py -> models; alignkit/cli.py -> cli."""
    return Path(path).with_suffix("").parts[1]


def rooms_imported(text: str) -> set[str]:
    names = [name.split(".") for name in imports(text) if name.split(".")[0] == "alignkit"]
    return {parts[1] for parts in names if parts[1:] and parts[1] in ROOMS | FREE | {"cli"}}


def importers(library: str) -> set[str]:
    return {
        path
        for path, text in SOURCES.items()
        if any(name == library or name.startswith(f"{library}.") for name in imports(text))
    }


def test_the_rooms_are_those_of_the_plan():
    assert {place.name for place in PACKAGE.iterdir() if (place / "__init__.py").is_file()} == ROOMS


def test_the_check_sees_imports_in_functions_and_skips_those_for_types():
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a.b\ndef f():\n    from c import d\n"
    assert set(imports(text)) == {"typing.TYPE_CHECKING", "c.d"}


@pytest.mark.parametrize("path", SOURCES)
def test_imports_point_downwards(path):
    own = room(path)
    if own in FREE | {"__init__"}:
        assert rooms_imported(SOURCES[path]) == set()
        return
    assert rooms_imported(SOURCES[path]) <= DOWN[own] | FREE | {own}


def test_of_data_the_models_know_only_tokens():
    used = {name for path, text in SOURCES.items() if room(path) == "models" for name in imports(text)}
    assert {name.rpartition(".")[0] for name in used if name.startswith("alignkit.data")} <= {"alignkit.data.tokens"}


@pytest.mark.parametrize("path", [path for path in SOURCES if room(path) == "algo"])
def test_algo_is_torch_and_arithmetic(path):
    allowed = sys.stdlib_module_names | {"torch", "alignkit"}
    assert {name.split(".")[0] for name in imports(SOURCES[path])} <= allowed
    assert {
        name for name in imports(SOURCES[path]) if name.startswith(("torch.distributed", "alignkit.errors"))
    } == set()


def test_a_recipe_imports_nothing_but_the_runtime():
    folder = next(place for place in (ROOT / "recipes", PACKAGE / "recipes") if place.is_dir())
    for file in folder.glob("*.py"):
        names = set(imports(file.read_text("utf-8")))
        assert names == {"alignkit.runtime.recipe.recipe"}
        assert len(file.read_text("utf-8").splitlines()) <= 30


def test_only_the_sink_and_the_dashboard_import_wandb():
    assert importers("wandb") == {"alignkit/observe/wandb_sink.py", "alignkit/observe/dashboard.py"}


def test_only_the_runtime_imports_hydra():
    assert {room(path) for library in ("hydra", "omegaconf") for path in importers(library)} == {"runtime"}


def test_only_sharding_imports_fsdp():
    assert importers("torch.distributed.fsdp") == {"alignkit/runtime/sharding.py"}


@pytest.mark.parametrize("path", SOURCES)
def test_files_and_functions_are_short(path):
    text = SOURCES[path]
    assert len(text.splitlines()) < 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 < 60, node.name


def test_the_package_can_be_read_in_a_day():
    assert sum(len(text.splitlines()) for text in SOURCES.values()) < 22500


def test_nothing_is_defined_that_only_tests_use():
    """Functions and classes of a module. A strategy is used where a YAML file names it, a public name in __init__."""
    root, init = Path(__file__).parents[1], PACKAGE / "__init__.py"
    files = [*root.glob("conf/**/*.yaml"), *root.glob("recipes/*.py"), root / "pyproject.toml", init]
    used = {name for file in files for name in re.findall(r"\w+", file.read_text("utf-8"))}
    defined: dict[str, str] = {}
    for path, text in SOURCES.items():
        for node in ast.parse(text).body:
            own = getattr(node, "name", "")
            defined |= {own: path} if own else {}
            used |= {
                name for each in ast.walk(node) if (name := getattr(each, "id", getattr(each, "attr", own))) != own
            }
    assert {name: path for name, path in defined.items() if name not in used} == {}


def docstrings(text: str) -> Iterator[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    yield from (ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, documented))


def is_test(name: str) -> bool:
    """`test_file.py::test_name`, in tests/unit, or with its folder in tests."""
    path, _, test = name.partition("::")
    file = ROOT / "tests" / (path if "/" in path else f"unit/{path}")
    return file.is_file() and test in {getattr(node, "name", "") for node in ast.parse(file.read_text("utf-8")).body}


@pytest.mark.parametrize("path", SOURCES)
def test_a_formula_names_its_source_and_the_tests_that_pin_it(path):
    for doc in docstrings(SOURCES[path]):
        named = re.findall(r"[\w/]+\.py::\w+", doc.partition("Tests:")[2])
        assert [name for name in named if not is_test(name)] == []
        assert named or room(path) != "algo" or "Source:" not in doc, doc


def test_no_note_to_self_is_left():
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    folders = [place for place in (PACKAGE, ROOT / "conf", ROOT / "recipes") if place.is_dir()]
    files = [file for place in folders for ending in ("*.py", "*.yaml") for file in place.rglob(ending)]
    assert [str(file) for file in files if marks.search(file.read_text("utf-8"))] == []


def test_no_file_of_tests_is_left_out():
    """pytest skips folders of some names (dist, build) without a word unless it is told not to, and of two files of one
    name it takes neither."""
    skipped = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"][
        "norecursedirs"
    ]
    files = list((ROOT / "tests").rglob("test_*.py"))
    folders = {part for file in files for part in file.relative_to(ROOT).parts[:-1]}
    assert not [(name, skip) for name in folders for skip in skipped if fnmatch(name, skip)]
    assert len({file.name for file in files}) == len(files)
