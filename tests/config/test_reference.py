"""The generated pages are up to date, complete, and agree with the loader."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vectorlm.config import reference
from vectorlm.config.keys import MISSPELT, SECTIONS, Key, all_keys, dotted, find
from vectorlm.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
KEYS = list(all_keys().values())
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", ["docs/config.md", "configs/schema.json"])
def test_page_is_up_to_date(name: str) -> None:
    written = (ROOT / name).read_text(encoding="utf-8")
    assert written == reference.files()[ROOT / name], f"run `{reference.COMMAND}`"


def test_check_tells_stale_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    for folder in ("docs", "configs"):
        (tmp_path / folder).mkdir()
    assert reference.main(["--check"]) == 1
    assert "docs/config.md: out of date" in capsys.readouterr().err
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0


@pytest.mark.parametrize("key", KEYS, ids=lambda key: dotted(key.path))
def test_every_key_has_a_row(key: Key) -> None:
    assert key.description
    assert f"| `{key.name}`" in reference.markdown()


def test_schema_refuses_what_the_loader_refuses() -> None:
    schema = json.loads(reference.json_schema())
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        for name, entry in section["properties"].items():
            assert entry["description"], name
    top = schema["properties"]
    assert top["dataset"]["$ref"] == "#/$defs/DatasetConfig"
    prepare = schema["$defs"]["DatasetPreprocess"]["properties"]
    assert prepare["seperator"]["deprecated"] is True
    train = schema["$defs"]["TrainParameters"]
    assert train["required"] == ["output_dir", "max_seq_len"]
    assert "plataeu-with-warmup" in train["properties"]["lr_scheduler_type"]["enum"]
    assert train["properties"]["epochs"]["minimum"] == 1


def test_schema_of_the_job() -> None:
    """Patterns say in words what they admit, and only editors' own keywords are used."""
    schema = json.loads(reference.json_schema())
    assert '"allowed"' not in reference.json_schema()
    top, job = schema["properties"], schema["$defs"]["Slurm"]["properties"]
    assert top["slurm"]["$ref"] == "#/$defs/Slurm"
    assert job["preprocess"]["$ref"] == "#/$defs/SlurmPreprocess"
    integer, text = job["time"]["anyOf"]
    assert (integer["type"], text["type"]) == ("integer", "string")
    assert text["patternErrorMessage"].startswith("must be a duration such as 90")
    assert job["extra_flags"]["items"]["patternErrorMessage"].startswith("must be a list of long")
    for node in nodes(schema):
        assert ("pattern" in node) == ("patternErrorMessage" in node), node
        assert not node.get("pattern") or re.compile(node["pattern"])


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value
        value = list(value.values())
    for entry in value if isinstance(value, list) else []:
        yield from nodes(entry)


def test_old_values_are_choices_but_not_recommended() -> None:
    kind = find(("train_parameters", "lr_scheduler_type"))
    assert kind is not None
    for old, new in MISSPELT.items():
        assert {old, new} <= set(kind.choices)
        assert old not in kind.allowed


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configuration_is_sound(path: Path) -> None:
    assert load_config(path).dataset_preprocess is not None


@pytest.mark.parametrize("name", ["config.yaml", "config_lora.yaml", "config_multinode.yaml"])
def test_editors_find_the_schema(name: str) -> None:
    first = (ROOT / "configs" / name).read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"


def test_first_configuration_shows_every_key() -> None:
    """Uncommented, `configs/config.yaml` holds all keys; those in comments show their default."""
    shown: set[str] = set()
    for line in (ROOT / "configs/config.yaml").read_text(encoding="utf-8").splitlines():
        name, colon, rest = line.strip().removeprefix("# ").partition(":")
        if colon and name.isidentifier():
            shown.add(name)
            candidates = [key for key in KEYS if key.name == name]
            if line.strip().startswith("#") and candidates:
                value = yaml.safe_load(rest)
                assert value in [key.default for key in candidates], line
    assert {key.name for key in KEYS} <= shown


def test_every_key_is_read() -> None:
    """A key that nothing reads would be accepted and ignored, which is what a strict file forbids.

    Reading is an attribute access outside the config room (also by `for key in ("a", "b"):
    getattr(config, key)`), or one in a property of the schema that is itself read outside.
    """
    outside = _names_read(
        path
        for path in (ROOT / "vectorlm").rglob("*.py")
        if "config" not in path.relative_to(ROOT).parts
    )
    for model in SECTIONS.values():
        for name, member in vars(model).items():
            if isinstance(member, property) and member.fget and name in outside:
                outside |= set(member.fget.__code__.co_names)
    unread = [dotted(key.path) for key in KEYS if key.name not in outside]
    assert unread == []


def _names_read(paths: Iterable[Path]) -> set[str]:
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.For):
                names |= _names_read_by_loop(node)
    return names


def _names_read_by_loop(loop: ast.For) -> set[str]:
    calls = [node for node in ast.walk(loop) if isinstance(node, ast.Call)]
    reads = any(
        ast.unparse(call.func) == "getattr"
        and ast.unparse(call.args[1]) == ast.unparse(loop.target)
        for call in calls
    )
    constants = [node.value for node in ast.walk(loop.iter) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str)} if reads else set()
