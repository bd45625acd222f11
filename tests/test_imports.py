"""Imports point one way: no circle, nothing of the kernel knows evaluation or training, and the leaves stay leaves."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minimas

PACKAGE = Path(minimas.__file__).parent
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in PACKAGE.rglob("*.py")
}
MODULES = {
    name.removesuffix(".__init__"): file for name, file in FILES.items() if name != "__init__"
}


NOT_IMPORTED = (
    "TYPE_CHECKING",
    "__name__ == '__main__'",
)  # named in hints only; what makes a command


def nodes(tree):
    """All nodes of a syntax tree but those below a condition that does not hold when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in NOT_IMPORTED:
            continue
        yield node
        yield from nodes(node)


def imported(name, file):
    """The modules of minimas that a module imports, also within functions."""
    parts = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
    for node in nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parts[: len(parts) + 1 - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in MODULES else ".".join(base)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            assert not any(part.split(".")[0] == "minimas" for part in names), (
                f"{file}: import relatively"
            )


@pytest.fixture(scope="module")
def imports():
    """{a module: the modules of minimas that it imports}."""
    return {
        name: {other for other in imported(name, file) if other} for name, file in MODULES.items()
    }


def test_there_is_no_circle(imports):
    TopologicalSorter(imports).prepare()
    assert "system" in imports["evaluate.answering"] and "system" in imports["train.links"]
    assert imports["recurse"] >= {"agent", "generate", "turn"}
    assert "system" in imports["commands.ask"]


def test_the_kernel_knows_no_evaluation_no_training_and_no_command(imports):
    flat = {name for name, file in MODULES.items() if file.parent == PACKAGE}
    kernel = flat - {"__main__"}
    assert len(kernel) > 18 and not {
        (name, other)
        for name in kernel
        for other in imports[name]
        if other.startswith(("evaluate", "train", "commands", "serve"))
    }


def test_only_commands_know_how_commands_fail(imports):
    commands = {"__main__", "evaluate.__main__", "train.__main__", "serve.__main__", "tiny.build"}
    for name in imports:
        if name not in commands and not name.startswith("commands"):
            assert not any(other.startswith("commands") for other in imports[name]), name


def test_what_knows_little_stays_so(imports):
    decoders = {"llama", "mistral", "gemma", "qwen", "delta", "cache"}
    for name in decoders:
        assert imports[name] <= decoders | {"common"}
    assert imports["link"] <= {"common", "fast.linear"}
    assert not any(other.startswith(("fast", "load", "train")) for other in imports["styles"])
    assert imports["common"] == set()
    assert imports["commands.failures"] <= {
        "common",
        "runs.lock",
    }  # light: `minimas --help` imports it
    for leaf in "look", "sandbox", "tiny.task":
        for name in imports:
            if name.startswith(leaf):
                assert not {
                    other for other in imports[name] if "." in other and not other.startswith(leaf)
                }, name


def test_what_evaluation_and_training_share_knows_neither(imports):
    shared = {name for name in imports if name.startswith("runs.")}
    assert {"runs.lock", "runs.dependencies", "runs.processes"} <= shared
    for name in shared:
        assert not {
            other for other in imports[name] if other.startswith(("evaluate", "train", "commands"))
        }, name


def test_tests_import_from_no_test():
    """What they share lies in conftest.py, or in a module that is none."""
    for file in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not any(
                part.startswith("test_") for name in names for part in name.split(".")
            ), f"{file.name} imports {names}"


def test_the_tour_follows_the_imports(imports):
    """docs/reading.md comes to a file of the kernel after those of the kernel that it imports."""
    page = (PACKAGE.parent / "docs" / "reading.md").read_text(encoding="utf-8")
    kernel, _ = page.split("## The sub-packages")
    tour = list(dict.fromkeys(re.findall(r"\]\(\.\./minimas/(\w+)\.py\)", kernel)))
    assert len(tour) > 20
    for i, name in enumerate(tour):
        assert not imports[name] & set(tour[i:]), name
