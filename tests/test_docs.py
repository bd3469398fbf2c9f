"""The papers keep up with the code: links, commands, keys and messages they name are there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from vectorlm import errors
from vectorlm.cli import VERBS
from vectorlm.config.keys import SECTIONS, all_keys, find, keys_of
from vectorlm.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent
PAPERS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = sorted((ROOT / "vectorlm").rglob("*.py"))
MESSAGES = ROOT / "docs/troubleshooting.md"
HOLE = "\0"  # where a message has something that varies
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
FREE = {path for path, key in all_keys().items() if key.kind == "mapping"}

each_paper = pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


# --- links ----------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    """Code blanked out, so that lines keep their numbers."""
    pattern = r"^```.*?^```|^ {4}.*?$|`[^`\n]*`"
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S | re.M)


@cache
def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings; a heading that comes again gets a number."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", read(path), flags=re.S | re.M), re.M
    ):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 1
        name = slug
        while name in found:
            name, number = f"{slug}-{number}", number + 1
        found.add(name)
    return found


@each_paper
def test_links_lead_somewhere(paper: Path) -> None:
    text = without_code(read(paper))
    dead = []
    for found in re.finditer(r"\]\(([^)\s]+)\)", text):
        link = found[1]
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (paper.parent / name).resolve() if name else paper
        known = anchors(target) if target.suffix == ".md" and target.is_file() else set()
        if not target.exists() or (anchor and anchor not in known):
            dead.append(f"{paper.name}:{line_of(text, found.start())}: {link}")
    assert not dead


def test_anchors_of_messages_are_unique() -> None:
    headings = re.findall(r"^#+ (.+)$", read(MESSAGES), re.M)
    assert len(headings) == len(set(headings)) > 50


# --- commands and keys ----------------------------------------------------------------------------


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(line, words) of everything that reads like a command of ours, in code only."""
    for found in re.finditer(r"`([^`\n]+)`|^ {4}(.+)$", text, re.M):
        line = (found[1] or found[2]).strip().removeprefix("$ ").split("  ")[0]
        words = line.split()
        if words and words[0] in ("vectorlm", "make", "python", "torchrun", "source"):
            yield line, words


def exists(words: list[str]) -> bool:
    if words[0] == "vectorlm":
        verb = words[1] if len(words) > 1 else "VERB"
        return verb in (*VERBS, "convert", "VERB") or not verb.isalpha()
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.M)
        return any(word in targets for word in words[1:2])
    if "-m" in words:
        return importlib.util.find_spec(words[words.index("-m") + 1]) is not None
    scripts = [word for word in words if word.endswith(".py")]
    return all((ROOT / script).is_file() for script in scripts)


@each_paper
def test_commands_exist(paper: Path) -> None:
    unknown = [line for line, words in commands(read(paper)) if not exists(words)]
    assert not unknown


def test_commands_are_recognised() -> None:
    """Guards the two tests around it."""
    found = [words[:2] for _, words in commands(read(ROOT / "README.md"))]
    assert ["make", "demo"] in found
    assert ["vectorlm", "check"] in found
    assert not exists(["vectorlm", "fly"])
    assert not exists(["make", "tea"])
    assert not exists(["python", "-m", "vectorlm.nowhere"])


def key_exists(name: str) -> bool:
    path = tuple(name.split("."))
    return find(path) is not None or any(path[: len(free)] == free for free in FREE)


@each_paper
def test_keys_exist(paper: Path) -> None:
    sections = "|".join({path[0] for path in SECTIONS if path} | {"wandb_config", "optimizer"})
    spans = re.findall(r"`([^`\n]+)`", read(paper))
    dotted = {
        m for span in spans for m in re.findall(rf"^(?:{sections})\.(?!py\b)[a-z][\w.]*", span)
    }
    full = {f"train_parameters.{m}" if m.startswith("optimizer.") else m for m in dotted}
    unknown = [name for name in full if not key_exists(name)]
    assigned = {m[1] for span in spans if (m := re.match(r"([a-z_]+): \S", span))}
    names = {name for section in SECTIONS for name in keys_of(section)}
    no_keys = {"momentum", "file", "name"}  # an optimizer's argument; how rows are named
    assert not unknown + sorted(assigned - names - no_keys)


def test_readme_begins_with_the_two_commands() -> None:
    top = read(ROOT / "README.md").splitlines()[:20]
    for command in ("make demo", "make test"):
        assert any(line.strip().startswith(command) for line in top), command


def test_readme_example_is_sound(tmp_path: Path) -> None:
    example = re.search(r"^```yaml\n(.*?)^```", read(ROOT / "README.md"), re.S | re.M)
    assert example
    path = tmp_path / "readme.yaml"
    path.write_text(example[1], encoding="utf-8")
    config = load_config(path)
    assert config.dataset
    assert config.dataset_preprocess


def test_exit_codes_are_told() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", read(ROOT / "README.md"), re.M)}
    assert codes <= table


def test_example_script_is_the_training_door(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/llama_example.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--yaml_path", str(tmp_path / "absent.yaml")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == errors.EXIT_USER
    assert "absent.yaml: no such file" in done.stderr


# --- messages -------------------------------------------------------------------------------------


def patterns() -> Iterator[tuple[int, list[str]]]:
    """(line, parts) of every message told; `<...>` is a hole, and ` ...` stands between parts."""
    text = read(MESSAGES).split("\n## Messages of libraries")[0]
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("    "):
            parts = re.split(r" \.\.\.", line.strip())
            # `<<` is YAML's merge key, not a hole.
            yield number, [re.sub(r"<(?!<)[^<> ]+>", HOLE, part) for part in parts]


def constants(tree: ast.AST) -> dict[str, str]:
    return {
        node.targets[0].id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def flat(node: ast.expr, known: dict[str, str]) -> str | None:
    """A literal text, with names of constant texts filled in, and holes for all else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(flat(part, known) or HOLE for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return known.get(node.value.id, HOLE)
    return None


def literals(nodes: Iterable[ast.AST], known: dict[str, str]) -> Iterator[str]:
    for node in nodes:
        text = flat(node, known) if isinstance(node, ast.Constant | ast.JoinedStr) else None
        if text:
            yield text


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(read(path)) for path in SOURCES}


@cache
def texts() -> list[str]:
    """Every text in the code, shortened to one line as a message is quoted."""
    found = [
        text for tree in trees().values() for text in literals(ast.walk(tree), constants(tree))
    ]
    return [one_line(text) for text in found]


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_every_message_told_is_in_the_code() -> None:
    stale = [
        f"{MESSAGES.name}:{number}: {part.replace(HOLE, '<>')}"
        for number, parts in patterns()
        for part in parts
        if not any(part in text for text in texts())
    ]
    assert not stale, "told, but no longer in the code:\n" + "\n".join(stale)


def raised() -> Iterator[tuple[str, str]]:
    """(place, text) of every error a user can meet, where it is raised as a literal text, or as
    what a function of the same file returns."""
    for path, tree in trees().items():
        known = constants(tree)
        functions = {
            node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            if node.func.id not in ERRORS | {"Problem"}:
                continue
            given = node.args[-1]
            if isinstance(given, ast.Call) and isinstance(given.func, ast.Name):
                maker = functions.get(given.func.id)
                returns = [n for n in ast.walk(maker) if isinstance(n, ast.Return)] if maker else []
                given_texts = literals((n.value for n in returns if n.value), known)
            else:
                given_texts = literals([given], known)
            yield from ((f"{path.relative_to(ROOT)}:{node.lineno}", text) for text in given_texts)


def test_every_error_is_told() -> None:
    told = [part for _, parts in patterns() for part in parts if len(part.replace(HOLE, "")) > 8]
    missing = [
        f"{place}: {text.replace(HOLE, '<>')}"
        for place, text in raised()
        if re.sub(rf"[{HOLE}\W]", "", text) and not any(part in one_line(text) for part in told)
    ]
    assert not missing, f"give these an entry in {MESSAGES.name}:\n" + "\n".join(missing)


def test_errors_are_found_in_the_code() -> None:
    """Guards the test above: it must see plain texts, texts with holes, and makers of texts."""
    found = dict((text[:30], place) for place, text in raised())
    assert len(found) > 100
    assert any("config/checks.py" in place for place in found.values())
    assert any("preprocess.py" in place for place in found.values())
