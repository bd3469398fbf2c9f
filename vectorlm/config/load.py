"""A YAML file and `--set` -> one frozen Config, or one ConfigError with every mistake. Floor 0.

Every door calls `load_config` first. A line of the error reads `file:line: section.key: what is
wrong; what is allowed; did you mean ...`.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import ValidationError

from vectorlm.config import checks, suggest
from vectorlm.config.draft import Draft, Origin
from vectorlm.config.keys import SECTIONS, KeyPath, all_keys, canonical, dotted, find, keys_of
from vectorlm.config.schema import Config, DatasetConfig, DatasetPreprocess
from vectorlm.config.sweep import sweep_points
from vectorlm.config.yaml_text import Document, YamlError, read_yaml
from vectorlm.errors import ConfigError

LARGEST_FILE_BYTES = 1 << 20
RANGE_ERRORS = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
}
SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|credentials?)$", re.IGNORECASE)
REDACTED = "<redacted>"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override, validate and cross-check; ConfigError with one line for each problem."""
    draft, config = _loaded(path, overrides)
    if draft.problems:
        raise ConfigError("\n".join(draft.sorted_problems()))
    assert config is not None
    return config


def load_sound_part(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[Config, frozenset[KeyPath]] | None:
    """Of a file with mistakes, a Config with stand-ins for what is wrong, and the keys from which
    nothing may be concluded; None where there cannot be one. Never to be run.
    """
    try:
        draft, config = _loaded(path, overrides)
    except ConfigError:
        return None
    if config is None:
        return None
    # Which runs a sweep makes cannot be told; what they differ in is no value of the file.
    varied = {*config.sweep.grid, *chain(*config.sweep.runs)} if config.sweep else set()
    apart = {("sweep",), *(tuple(name.split(".")) for name in varied)} if config.sweep else set()
    return config.model_copy(update={"sweep": None}), frozenset(draft.doubtful | apart)


def _loaded(path: str | Path, overrides: Sequence[str]) -> tuple[Draft, Config | None]:
    draft = _read_file(path)
    _rehome_sections(draft)
    for number, text in enumerate(overrides):
        _override(draft, text, Origin((1, number), "--set "))
    config = _settled(draft)
    if config is not None and not draft.problems:
        _check_points(draft, config)
    return draft, config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON values, to be stored and logged, without secrets."""
    dumped = config.model_dump(mode="json")
    absent = {path[0] for path in SECTIONS if len(path) == 1 and dumped[path[0]] is None}
    return {name: _redacted(dumped[name], (name,)) for name in dumped if name not in absent}


@overload
def required_section(
    config: Config, name: Literal["dataset"], path: str | Path
) -> DatasetConfig: ...
@overload
def required_section(
    config: Config, name: Literal["dataset_preprocess"], path: str | Path
) -> DatasetPreprocess: ...
def required_section(
    config: Config, name: Literal["dataset", "dataset_preprocess"], path: str | Path
) -> DatasetConfig | DatasetPreprocess:
    """The optional section that a door cannot do without; `path` is the file the message names."""
    section = config.dataset if name == "dataset" else config.dataset_preprocess
    if section is not None:
        return section
    purpose = "training" if name == "dataset" else "preprocessing"
    needed = ", ".join(key.name for key in keys_of((name,)).values() if key.required)
    raise ConfigError(
        f"{path}: {name}: section is missing; {purpose} needs it, with at least: {needed}"
    )


def _redacted(value: Any, path: KeyPath) -> Any:
    # The schema's own keys (add_bos_eos_tokens) are never secrets; only free mappings can hold any,
    # those of a sweep under dotted names.
    if value is not None and find(path) is None and SECRET.search(path[-1].rpartition(".")[2]):
        return REDACTED
    if isinstance(value, dict):
        return {name: _redacted(entry, (*path, str(name))) for name, entry in value.items()}
    if isinstance(value, list):
        return [_redacted(entry, (*path, "")) for entry in value]
    return value


# --- the file and the overrides -------------------------------------------------------------------


def _read_file(path: str | Path) -> Draft:
    text = _file_text(path)
    try:
        document = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    origins = {key: Origin((0, line), f"{path}:{line}: ") for key, line in document.lines.items()}
    origins[()] = Origin((0, document.line), f"{path}:{document.line}: ")
    if document.value is None and not document.faults:
        raise ConfigError(
            f"{path}: is empty; must hold at least the keys model and train_parameters"
        )
    if not isinstance(document.value, dict) and not document.faults:
        shown = suggest.shown(document.value)
        raise ConfigError(
            f"{path}:{document.line}: holds {shown}; must hold keys such as `model: ...`"
        )
    draft = Draft(document.value if isinstance(document.value, dict) else {}, origins)
    for fault in document.faults:
        draft.report(fault.path, fault.message, Origin((0, fault.line), f"{path}:{fault.line}: "))
    return draft


def _file_text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_neighbour(Path(path))}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; must be a YAML file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    if len(data) > LARGEST_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than 1 MiB; must be a YAML configuration file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text; save the file as UTF-8") from None


def _neighbour(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.parent.glob("*.y*ml"))
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _override(draft: Draft, text: str, origin: Origin) -> None:
    name, equals, raw = text.partition("=")
    path = tuple(name.strip().split("."))
    if path[:2] == ("sweep", "grid") and path[2:]:
        path = ("sweep", "grid", ".".join(path[2:]))
    if not equals or not all(path):
        example = "train_parameters.optimizer.lr=1e-4"
        draft.problems.append((origin.order, f"--set {text}: must be KEY=VALUE, such as {example}"))
        return
    try:
        document = _override_value(path, raw)
        faults = [((*path, *fault.path), fault.message) for fault in document.faults]
    except YamlError as error:
        faults = [(path, f"the value {error}")]
    key = find(path)
    if not faults and document.value is None and key and key.kind == "section" and key.nullable:
        draft.drop(path)  # there is no other way to be without a section of the file
    elif not faults:
        reason = draft.put(path, document.value, origin)
        faults = [(path, reason)] if reason else []
    else:
        draft.drop(path)
    for where, message in faults:
        draft.report(where, message, origin)


def _override_value(path: KeyPath, raw: str) -> Document:
    key = find(path)
    text = raw.strip()
    is_yaml = text in ("", "~", "null") or text[:1] in ("'", '"')
    is_yaml |= text[:1] in ("[", "{") and not (key and key.takes(raw))
    if key and key.kind == "text" and not is_yaml:
        # YAML would cut `### Answer:` off as a comment, and read 007 its own way.
        return Document(raw)
    return read_yaml(raw)


# --- from values to a Config ----------------------------------------------------------------------


def _settled(draft: Draft) -> Config | None:
    """The Config, with what is wrong in it noted; None where there cannot be one."""
    _refuse_empty_sections(draft)
    _settle_spellings(draft)
    _refuse_none_texts(draft)
    config = _validated(draft)
    if config is not None:
        _cross_check(draft, config)
    return config


def _rehome_sections(draft: Draft) -> None:
    """Report sections that are misspelt or misplaced, and move them, to look into them all the "
    "same."""
    moved = True
    while moved:
        moved = any([_rehome_in(draft, section) for section in SECTIONS])


def _rehome_in(draft: Draft, section: KeyPath) -> bool:
    moved = False
    for name, value in list(draft.mapping(section).items()):
        path = (*section, name)
        target = suggest.section_for(path) if isinstance(value, dict) else None
        if target and target != path and not draft.has(target) and draft.holds(target[:-1]):
            draft.report(path, suggest.unknown(path).message)
            draft.move(path, target)
            moved = True
    return moved


def _refuse_empty_sections(draft: Draft) -> None:
    for path in filter(None, SECTIONS):
        if draft.has(path) and draft.get(path) is None:
            allowed = all_keys()[path].allowed
            draft.report(path, f"is empty; must be {allowed}; leave it out if it is not wanted")
            draft.drop(path)


def _settle_spellings(draft: Draft) -> None:
    """Two spellings of one key are refused; pydantic would quietly take the first."""
    for key in all_keys().values():
        given = [
            path for path in ((*key.path[:-1], word) for word in key.spellings) if draft.has(path)
        ]
        for path in given[1:]:
            other = draft.origin(given[0])
            where = f"line {other.line}" if other.line else "--set"
            draft.report(path, f"is another spelling of {given[0][-1]} ({where}); keep one")
            draft.drop(path)


def _refuse_none_texts(draft: Draft) -> None:
    """`None` is a text to YAML: `eval_ds: None` would name a folder."""
    for key in all_keys().values():
        path = draft.as_spelt(key.path)
        value = draft.get(path)
        if key.kind == "text" and key.nullable and value in ("None", "none"):
            draft.report(path, suggest.wrong_value(path, path, value, out_of_range=False))
            draft.drop(path)


def _validated(draft: Draft) -> Config | None:
    """The Config; without the keys that are wrong, so that the rules about others still run."""
    try:
        return Config.model_validate(copy.deepcopy(draft.values))
    except ValidationError as error:
        errors: list[Any] = error.errors(include_url=False)
    for entry in sorted(errors, key=lambda entry: bool(entry["type"] == "missing")):
        _report(draft, entry["type"], entry["loc"], entry["input"])
    return _healed(draft, errors)


def _report(draft: Draft, kind: str, loc: tuple[str | int, ...], value: Any) -> None:
    path = tuple(part for part in loc if isinstance(part, str))
    if kind == "extra_forbidden":
        finding = suggest.unknown(path)
        draft.report(path, finding.message)
        draft.doubtful.update(finding.candidates)
        return
    if kind == "missing" and path == loc:
        if not draft.in_doubt(path):
            key = all_keys()[path]
            draft.report(path, f"missing; must be {key.allowed}", draft.origin(path[:-1]))
        return
    draft.report(path, suggest.wrong_value(path, loc, value, out_of_range=kind in RANGE_ERRORS))


def _healed(draft: Draft, errors: list[Any]) -> Config | None:
    """Without the wrong keys and with stand-ins for the missing ones; None where that cannot be."""
    trial = Draft(copy.deepcopy(draft.values), {})
    for _ in range(len(all_keys())):
        for entry in errors:
            path = tuple(part for part in entry["loc"] if isinstance(part, str))
            draft.doubtful.add(canonical(path))
            trial.drop(path)
            key = find(path)
            if key and key.required:
                trial.put(path, copy.copy(key.placeholder), Origin((0, 0), ""))
        try:
            return Config.model_validate(trial.values)
        except ValidationError as error:
            errors = error.errors(include_url=False)
    return None


def _cross_check(draft: Draft, config: Config) -> None:
    told: set[tuple[str, ...]] = set()
    contradicting: set[KeyPath] = set()
    for problem in checks.problems(config):
        paths = [draft.path_of(name) for name in problem.keys]
        if problem.keys not in told and any(draft.in_doubt(path) for path in paths):
            continue
        told.add(problem.keys)
        given = [path for path in map(draft.as_spelt, paths) if draft.has(path)] or paths[:1]
        given.sort(
            key=lambda path: draft.origin(path).order[0], reverse=True
        )  # --set first: it is newest
        others = [f"{dotted(path)} is {draft.origin(path).words}" for path in given[1:]]
        draft.report(given[0], "; ".join([problem.message, *others]))
        contradicting.update(map(canonical, paths))
    draft.doubtful |= contradicting  # at the end: several rules may have to say something of a key


# --- sweeps ---------------------------------------------------------------------------------------


def _check_points(draft: Draft, config: Config) -> None:
    """Every run of a sweep must be as sound as the file, and none may be there twice."""
    seen: set[str] = set()
    points = sweep_points(config)
    grid_size = len(points) // max(1, len(config.sweep.runs)) if config.sweep else 0
    for index, point in enumerate(points):
        trial = Draft(copy.deepcopy(draft.values), dict(draft.origins))
        trial.drop(("sweep",))
        for name, value in point.items():
            origin = _point_origin(draft, name, index // grid_size + 1)
            path = tuple(name.split("."))
            reason = trial.put(path, copy.deepcopy(value), origin)
            if reason:
                trial.report(path, reason, origin)
        changed = _settled(trial)
        draft.problems += trial.problems
        text = changed.model_dump_json() if changed else ""
        if text and text in seen and not trial.problems:
            same = json.dumps(point, ensure_ascii=False)
            draft.report(("sweep",), f"two of its runs are the same, {same}; remove one")
        seen.add(text)


def _point_origin(draft: Draft, name: str, run: int) -> Origin:
    in_grid = ("sweep", "grid", name) in draft.origins
    path = ("sweep", "grid", name) if in_grid else ("sweep", "runs")
    origin = draft.origin(path)
    place = "sweep.grid." if in_grid else f"sweep.runs: run {run}: "
    return Origin((2 if origin.line else 1, origin.order[1]), origin.label + place)
