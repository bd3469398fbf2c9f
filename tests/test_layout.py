"""The house keeps its shape: floors, light doors, empty `__init__` files, sizes."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from tests.check.project import Project

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vectorlm"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "examples").glob("*.py")])
HEAVY = ("torch", "transformers", "datasets", "peft")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60


def floors() -> list[list[str]]:
    """The modules of each floor, from the highest down, as the import contract has them."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    lines = contract["importlinter:contract:floors"]["layers"].strip().splitlines()
    return [re.findall(r"\w+", line) for line in lines]


def light_modules() -> Iterator[str]:
    """Every module of floors 0 and 1 that there is."""
    for name in chain(*floors()[-2:]):
        for path in [PACKAGE / f"{name}.py", *(PACKAGE / name).rglob("*.py")]:
            if path.is_file():
                parts = path.relative_to(ROOT).with_suffix("").parts
                yield ".".join(part for part in parts if part != "__init__")


def run_without_heavy_libraries(code: str) -> subprocess.CompletedProcess[str]:
    block = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_imports_go_down(capsys: pytest.CaptureFixture[str]) -> None:
    code = lint_imports(config_filename=str(ROOT / ".importlinter"), no_cache=True)
    assert code == 0, capsys.readouterr().out


def test_lower_floors_start_without_heavy_libraries() -> None:
    names = sorted(light_modules())
    assert "vectorlm.config.schema" in names
    done = run_without_heavy_libraries("".join(f"import {name}\n" for name in names))
    assert done.returncode == 0, done.stderr


def test_check_runs_without_heavy_libraries(tmp_path: Path) -> None:
    path = str(Project(tmp_path).write())
    done = run_without_heavy_libraries(
        f"from vectorlm.cli import main\nsys.exit(main(['check', '--config', {path!r}]))"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_init_files_are_empty() -> None:
    version = re.compile(r'__version__ = "\d+\.\d+\.\d+"')
    for path in PACKAGE.rglob("__init__.py"):
        text = path.read_text().strip()
        expected = version.fullmatch(text) if path.parent == PACKAGE else text == ""
        assert expected, f"{path.relative_to(ROOT)} has content"


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    long = [f"{path.relative_to(ROOT)}: {n}" for path, n in lengths.items() if n > MAX_FILE_LINES]
    assert not long, f"over {MAX_FILE_LINES} lines, split them: {long}"


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long, f"over {MAX_FUNCTION_LINES} lines, split them: {long}"
