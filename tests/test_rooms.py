"""The rooms of grn/: a module imports from rooms below its own, and nothing but a command imports the command line."""

import ast
from pathlib import Path

import pytest

import grn

ROOT = Path(grn.__file__).parent
ROOMS = (  # from below
    "runtime", "method", "media", "weights", "networks", "checkpoints", "data", "metrics", "toys", "runs", "sampling",
    "training", "evaluation", "callbacks", "benchmarks", "studies", "web", "cli",
)  # fmt: skip


def imported(path):
    """The modules of grn that a file imports, also inside of its functions, each with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "grn":
            names = [f"grn.{alias.name}" for alias in node.names]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        yield from ((node.lineno, name) for name in names if name.startswith("grn."))


def test_every_folder_is_a_room():
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_imports_upward(room):
    allowed = ROOMS[: ROOMS.index(room) + 1]
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for line, name in imported(path)
        if name.split(".")[1] not in allowed
    ]
    assert not upward, "\n".join(upward)


def test_modules_import_in_no_circle():
    modules = {
        ".".join(("grn", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    at_import = {name: {module for _, module in imported(path)} & modules.keys() for name, path in modules.items()}
    done, chain = set(), []

    def visit(name):
        assert name not in chain, " -> ".join([*chain[chain.index(name) :], name])
        if name not in done:
            chain.append(name)
            for other in sorted(at_import[name] - {name}):
                visit(other)
            chain.pop()
            done.add(name)

    for name in sorted(modules):
        visit(name)
