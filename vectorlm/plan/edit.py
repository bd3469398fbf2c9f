"""Keys of a YAML file changed in place: comments, order and all other lines stay. Floor 1, called
by `plan_door` for `--apply`.

The new file is written beside the old one, read back, compared with what was meant, and only then
renamed over it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from vectorlm.config.load import load_config
from vectorlm.errors import ConfigError
from vectorlm.files import sync_folder, write_synced
from vectorlm.plan.changes import Patch, patched, told, yaml_value


def apply(path: str, overrides: Sequence[str], patch: Patch) -> None:
    """Write the patch into the file; ConfigError, and the file as it was, where that cannot be."""
    target = Path(path).resolve()
    meant = patched(load_config(path, overrides), patch)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.yaml")
    try:
        text = target.read_bytes().decode("utf-8")
        for key, value in patch.items():
            text = edited(text, key.split("."), None if value is None else yaml_value(value))
        write_synced(unfinished, text)
        if load_config(unfinished, overrides).model_dump() != meant.model_dump():
            raise ValueError("what was read back is not what was meant")
        shutil.copymode(target, unfinished)
        os.replace(unfinished, target)
        sync_folder(target.parent)
    except (OSError, ValueError, yaml.YAMLError, ConfigError) as error:
        raise ConfigError(
            f"plan --apply: {path} could not be changed ({error}); it is as it was. Change it by "
            f"hand: {told(patch)}"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def edited(text: str, path: Sequence[str], value: str | None) -> str:
    """The text with that key set to `value`, or without it."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("it holds no keys")
    section = root
    for depth, name in enumerate(path):
        found = _pair(section, name)
        last = depth == len(path) - 1
        if found is None:
            return text if value is None else _inserted(text, root, section, path[depth:], value)
        if last:
            return _removed(text, *found) if value is None else _replaced(text, *found, value)
        if not isinstance(found[1], yaml.MappingNode):
            raise ValueError(f"{name} is no section")
        section = found[1]
    return text


def _pair(section: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    return next((pair for pair in section.value if pair[0].value == name), None)


def _replaced(text: str, key: yaml.Node, node: yaml.Node, value: str) -> str:
    start, stop = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        start, stop = key.end_mark.index + 1, _end_of_block(text, node)
        return text[:start] + f" {value}\n" + text[stop:]
    gap = "" if text[start - 1] in " \t" else " "
    return text[:start] + gap + value + text[stop:]


def _removed(text: str, key: yaml.Node, node: yaml.Node) -> str:
    start = text.rfind("\n", 0, key.start_mark.index) + 1
    if text[start : key.start_mark.index].strip():
        raise ValueError(f"{key.value} stands in braces")
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        return text[:start] + text[_end_of_block(text, node) :]
    stop = text.find("\n", node.end_mark.index)
    return text[:start] + ("" if stop < 0 else text[stop + 1 :])


def _end_of_block(text: str, node: yaml.CollectionNode) -> int:
    """Where the last line of a block ends; comments behind it belong to what follows."""
    last: yaml.Node = node
    while isinstance(last, yaml.CollectionNode) and not last.flow_style and last.value:
        item = last.value[-1]
        last = item[1] if isinstance(item, tuple) else item
    stop = text.find("\n", last.end_mark.index)
    return len(text) if stop < 0 else stop + 1


def _inserted(
    text: str, root: yaml.MappingNode, section: yaml.MappingNode, path: Sequence[str], value: str
) -> str:
    """A new key on top of its section; a new section at the end of the file."""
    if section.flow_style:
        start = text.index("{", section.start_mark.index) + 1  # an anchor may stand before it
        rest = ", " if section.value else ""
        return text[:start] + _nested(path, value) + rest + text[start:]
    if section is root:
        joint = "" if text.endswith("\n") else "\n"
        lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(path)]
        return text + joint + "\n".join(lines) + f" {value}\n"
    first = section.value[0][0].start_mark
    indent = " " * first.column
    start = text.rfind("\n", 0, first.index) + 1
    lines = [f"{indent}{'  ' * depth}{name}:" for depth, name in enumerate(path)]
    return text[:start] + "\n".join(lines) + f" {value}\n" + text[start:]


def _nested(path: Sequence[str], value: str) -> str:
    head, *rest = path
    return f"{head}: {{{_nested(rest, value)}}}" if rest else f"{head}: {value}"
