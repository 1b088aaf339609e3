"""The house rules that no linter knows: sizes, openings, words."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES_MOST = 450
FUNCTION_LINES_MOST = 70
FOLDERS = ("xdp", "ipam", "dataplane", "bench", "tests")


def _sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


SOURCES = [path for path in _sources() if path.stat().st_size]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_file_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= FILE_LINES_MOST, "split the file along its rule"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= FUNCTION_LINES_MOST, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", [path for path in SOURCES if "tests" not in path.parts], ids=_name)
def test_module_opens_with_its_rule(path):
    opening = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "Rule:" in opening, "say the module's one rule"
    assert "Theory." in opening, "say why it is built like this"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_leftovers(path):
    if path == Path(__file__):
        return
    text = path.read_text()
    for word in ("TO" + "DO", "FIX" + "ME", "X" * 3):
        assert not re.search(rf"\b{word}\b", text), f"{word} left behind"


def test_only_the_house_decorators_compile():
    for path in SOURCES:
        if path.name in ("house.py", Path(__file__).name):
            continue
        assert not re.search(r"@(numba\.)?n?jit\b", path.read_text()), f"{path}: use @kernel"


def test_only_the_house_imports_numba():
    """numba reads the cache folder's name when it is imported: `settle` must have run before."""
    for path in SOURCES:
        if path == Path(__file__):
            continue
        found = re.search(r"^(import|from) (numba|llvmlite)\b", path.read_text(), re.MULTILINE)
        assert not found or path.name in ("house.py", "rows.py", "compiler.py"), path
        if found:
            assert 0 < path.read_text().find("\ncache.settle()\n") < found.start(), path


def test_readme_names_real_targets():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)", readme):
        assert target in targets, f"README names make {target}"


def test_make_help_lists_the_targets():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("run", "test", "lint", "bench", "fuzz"):
        assert target in done.stdout
