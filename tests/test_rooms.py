"""Which module may import which: whoever works on one part need not know the others."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

SCRIPTS = {"main", "valid", "image_annotate", "download_data"}
FOLDERS = ("utils", "digits", "methods", "annotate", "watch", "tools", "tests")
FILES = {  # module -> file
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))]
    if path.name != "__init__.py"
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
PARTS = {*FOLDERS[:5], "model", "data_loader"}
ALLOWED = {  # what a room may import of ours; tools and tests may import anything
    "utils": {"utils"},
    "model": {"utils", "data_loader"},
    "data_loader": {"utils", "model"},
    **dict.fromkeys(("digits", "methods", "annotate", "watch"), PARTS),
    **dict.fromkeys(SCRIPTS, PARTS | SCRIPTS - {"main"}),
    "hubconf": PARTS,
}


def room(module: str) -> str:
    return module.split(".")[0]


def imports(tree: ast.AST) -> set[str]:
    """Our modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & FILES.keys() or {node.module}
    return {name for name in found if name in FILES or room(name) in FOLDERS}


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_what_its_room_may_and_leaves_the_path_alone(name):
    if room(name) in ALLOWED:
        assert {room(other) for other in imports(TREES[name])} <= ALLOWED[room(name)]
    for node in ast.walk(TREES[name]):
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"), f"line {node.lineno}"
        assert not (isinstance(node, ast.ImportFrom) and node.module == "sys"), f"line {node.lineno}"


def test_every_room_is_known():
    """A new folder with Python in it gets a rule, and the search finds imports."""
    assert {path.parent.name for path in ROOT.glob("*/*.py")} <= set(FOLDERS)
    assert {room(name) for name in FILES} == {*ALLOWED, "tools", "tests"}
    assert {"data_loader", "model", "valid", "utils.machine", "watch.watcher"} <= imports(TREES["main"])


def test_no_module_imports_itself_by_way_of_others():
    order = TopologicalSorter({name: imports(tree) for name, tree in TREES.items()}).static_order()
    assert set(order) >= FILES.keys()  # CycleError names the modules


IMPORT_ALL = """
import argparse, importlib, os, sys
def refuse(*_): raise AssertionError("arguments parsed at import")
argparse.ArgumentParser.parse_known_args = refuse
def watch(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        assert not os.path.abspath(str(arguments[0])).startswith({folders!r}), arguments
sys.addaudithook(watch)
for name in {names!r}:
    importlib.import_module(name)
"""


def test_modules_can_be_imported_without_anything_happening(tmp_path):
    names = sorted(name for name in FILES if room(name) != "tests")
    program = IMPORT_ALL.format(names=names, folders=(str(ROOT), str(tmp_path)))
    command = [sys.executable, "-B", "-c", program, "--nonsense"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
