"""Renders docs/config.md and configs/schema.json from the schema, so that neither can lie. Floor 0.

`python -m vectorlm.config.reference` writes both; `--check` only says whether they are up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from vectorlm.config.keys import MISSPELT, SECTIONS, Key, KeyPath, all_keys, dotted
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python -m vectorlm.config.reference"

INTRODUCTION = f"""\
<!-- Written by `{COMMAND}`; edit vectorlm/config/schema.py instead. -->

# Configuration

One YAML file says what is trained, on what and how. [configs/config.yaml](../configs/config.yaml)
holds every key with a comment; copy it and edit the paths. `vectorlm check --config FILE` tells in
a second whether a file is sound. Editors that know the YAML language server complete and check keys
while you type, through the first line `# yaml-language-server: $schema=schema.json`.

Numbers may be written as `2e-5`, `2.0e-5` or `0.00002`. A key that is given twice, a key that does
not exist, a number in quotes: all are errors, never ignored. Anchors, aliases and `<<` work.
`time: 08:00:00`, `time: 90` and `mem: 0` need no quotes.

## Changing a key from the command line

Every command takes `--set KEY=VALUE`, as often as needed; the value is read as YAML. Sections that
the file does not have are made.

    vectorlm check --config my.yaml --set train_parameters.optimizer.lr=1e-4 \\
        --set train_parameters.lora_peft_config.r=16 --set 'wandb_config.tags=[a, b]'

Keys that hold a text take it as it stands: `--set 'dataset_preprocess.separator=### Answer:'`.
A section that a file may lack is taken out with `null`: `--set sweep=null`.

## What a mistake looks like

All mistakes are reported at once, each with its line, and the command ends with exit code 2. This
file:

"""

SAMPLE = """\
model: path/to/model
train_parameters:
  output_dir: path/to/output
  max_seq_len: "2048"
  epoch: 3
  sharding_strategy: full_shard
  optimizer:
    lr: -1
dataset:
  train_ds: path/to/train
  save_frequency: 0.5
"""


def markdown() -> str:
    """The whole of docs/config.md."""
    parts = [INTRODUCTION, _indented(SAMPLE), "\ngives:\n\n", _indented(_sample_errors())]
    parts += [_section(path) for path in SECTIONS]
    parts.append(_old_spellings())
    return "".join(parts)


def json_schema() -> str:
    """The whole of configs/schema.json."""
    document = Config.model_json_schema()
    for path, model in SECTIONS.items():
        node = document if model is Config else document["$defs"][model.__name__]
        for key in _members(path):
            _edit_property(node["properties"], key)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "VectorLM"}
    return json.dumps(head | _untitled(document), indent=2) + "\n"


def files() -> dict[Path, str]:
    return {ROOT / "docs/config.md": markdown(), ROOT / "configs/schema.json": json_schema()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Render the pages on configuration.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    check = parser.parse_args(argv).check
    stale = [path for path, text in files().items() if not _holds(path, text)]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)}: out of date; run `{COMMAND}`", file=sys.stderr)
        else:
            path.write_text(files()[path], encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: written")
    return 1 if check and stale else 0


def _members(section: KeyPath) -> list[Key]:
    return [key for path, key in all_keys().items() if path[:-1] == section]


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def _sample_errors() -> str:
    """What `load_config` really says about the sample."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "my.yaml"
        path.write_text(SAMPLE, encoding="utf-8")
        try:
            load_config(path)
        except ConfigError as error:
            return str(error).replace(str(path), "my.yaml") + "\n"
    raise AssertionError("the sample is meant to be wrong")


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _section(path: KeyPath) -> str:
    title = f"`{dotted(path)}`" if path else "Top level"
    summary = (SECTIONS[path].__doc__ or "").strip()
    rows = [_row(key) for key in _members(path)]
    head = "| key | must be | default | |\n|---|---|---|---|\n"
    return f"\n## {title}\n\n{summary}\n\n{head}" + "".join(rows)


def _row(key: Key) -> str:
    names = ", ".join(f"`{spelling}`" for spelling in key.spellings)
    cells = [names, key.allowed, _default(key), key.description]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _default(key: Key) -> str:
    if key.required:
        return "**required**"
    if key.kind == "section":
        return "defaults below" if key.default else "none"
    return f"`{json.dumps(key.default)}`".replace('"', "")


def _old_spellings() -> str:
    keys = [(key, old) for key in all_keys().values() for old in key.spellings[1:]]
    lines = [f"- `{old}` for `{dotted(key.path)}`\n" for key, old in keys]
    lines += [f"- the value `{old}` for `{new}`\n" for old, new in MISSPELT.items()]
    return "\n## Old spellings\n\nFiles written for earlier versions keep working:\n\n" + "".join(
        lines
    )


def _edit_property(properties: dict[str, Any], key: Key) -> None:
    entry = properties[key.name]
    entry.pop("allowed", None)
    for node in [entry, entry.get("items", {}), *entry.get("anyOf", [])]:
        if "pattern" in node:  # which editors would show instead
            node["patternErrorMessage"] = f"must be {key.allowed}"
    if key.kind == "section":
        # `dataset:` with nothing below it is a mistake to the loader; the editor should say so too.
        branches = entry.pop("anyOf", [])
        entry.pop("default", None)
        entry |= next((one for one in branches if "$ref" in one), {})
    for old in key.spellings[1:]:
        note = f"Old spelling of {key.name}."
        properties[old] = entry | {"description": note, "deprecated": True}


def _untitled(value: Any) -> Any:
    """Without the titles that pydantic makes up from the names of keys."""
    if isinstance(value, dict):
        made_up = isinstance(value.get("title"), str)
        return {
            name: _untitled(v) for name, v in value.items() if not (made_up and name == "title")
        }
    return [_untitled(entry) for entry in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
