"""What shapes the rows of a prepared folder, besides the tokenizer and the contents of its sources;
and how what the configuration says now differs from it. Floor 1; called by `preprocess`, which
compares before it prepares, by `check`, and by `assemble` before a run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vectorlm.chat.formats import TURNS
from vectorlm.chat.template import find_template, own_template
from vectorlm.config.data_parts import Drawn, FolderToMake, folders_of
from vectorlm.config.schema import Config, DatasetPreprocess
from vectorlm.errors import DataError
from vectorlm.hub_cache import find_model_folder
from vectorlm.manifest import Manifest, SourceCounts
from vectorlm.source_files import find_files

LONGEST = 60
# How a key of the record is called in the YAML file.
NAMES = {
    "row_format": "dataset_format",
    "source_format": "the kind of its files",
    "chat_template_sha256": "the text of chat_template",
}
OF_A_SOURCE = (
    "source_format",
    "split",
    "data_field",
    "text_rows",
    "row_format",
    "columns",
    "learn",
    "chat_template_sha256",
    "weight",
)
OF_ALL_SOURCES = ("learn", "chat_template_sha256")  # written down with each, where it has a say
# Not of the section: training has its own words for the one, and a sweep may vary the other.
NOT_OF_THE_SECTION = ("max_seq_len", "seed")
# They come and go with other keys, and are told only where both sides have them.
FOLLOWING = ("seed", "memory_mb", "held_out", "learn", "chat_template_sha256")


class Found(NamedTuple):
    """What a source turned out to be."""

    kind: str
    row_format: str


def recipe(config: Config, folder: FolderToMake, found: Sequence[Found]) -> dict[str, Any]:
    """A change of it means preparing anew; `found` says of each source what it is."""
    assert config.dataset_preprocess is not None
    options, seed = config.dataset_preprocess, config.train_parameters.seed
    packing = options.effective_packing
    # Keys that say nothing for other packings are left out, so that what is prepared stays so.
    used: dict[str, Any] = {
        "max_seq_len": config.train_parameters.max_seq_len,
        "packing_type": packing,
        "overlap": options.overlap if packing == "partial" else 0,
        "add_bos_eos_tokens": options.add_bos_eos_tokens,
        "pre_pend": options.pre_pend,
        "separator": options.separator,
        "ignore_index": options.ignore_index,
        "skip_bad_rows": options.skip_bad_rows,
    }
    if packing == "best_fit":
        used |= {"seed": seed, "memory_mb": options.memory_mb}
    if options.too_long == "drop":
        used["too_long"] = "drop"
    parts = [
        _of_source(source, what, config.model) | {"weight": source.weight}
        for source, what in zip(folder.sources, found, strict=True)
    ]
    if [part["weight"] for part in parts] == [1]:
        used |= {key: value for key, value in parts[0].items() if key != "weight"}
    else:
        used |= {"sources": parts, "seed": seed}
    if folder.held is not None:
        used |= {"val_split": options.val_split, "held_out": folder.held, "seed": seed}
    return used


def _of_source(source: Drawn, found: Found, model: str) -> dict[str, Any]:
    options = source.options
    used: dict[str, Any] = {
        "source_format": found.kind,
        "split": source.split,
        "data_field": options.data_field,
        "text_rows": options.text_rows if found.kind == "text" else None,
    }
    if found.row_format == "text":
        # Without effect, they may yet make other rows of it.
        return used | ({"columns": options.columns} if options.columns else {})
    used |= {"row_format": found.row_format, "columns": options.columns}
    if found.row_format == "tokenized":
        return used
    digest = _template_sha256(options, found.row_format, model)
    return used | {"learn": options.learn, "chat_template_sha256": digest}


def _template_sha256(options: DatasetPreprocess, row_format: str, model: str) -> str | None:
    folder = find_model_folder(model)
    has_own = folder is not None and own_template(folder) is not None
    if row_format not in TURNS and not options.chat_template and not has_own:
        return None
    return hashlib.sha256(find_template(options.chat_template, folder).source.encode()).hexdigest()


# --- what differs ---------------------------------------------------------------------------------


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each key whose value is another, with both values."""
    before, after = _sources(made), _sources(now)
    found = list(_changed(_of_all(made), _of_all(now)))
    if len(before) != len(after):
        return [*found, f"the number of sources was {len(before)} and is {len(after)}"]
    for number, pair in enumerate(zip(before, after, strict=True), start=1):
        of = f" of source {number}" if len(after) > 1 else ""
        found += _changed(*pair, of=of)
    return list(dict.fromkeys(found))


def _of_all(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in options if key not in (*OF_A_SOURCE, "sources")}


def _sources(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    alone = {key: options[key] for key in OF_A_SOURCE if key in options}
    return [{"weight": 1.0, **one} for one in options.get("sources", [alone])]


def _changed(made: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> Iterator[str]:
    for key in {**made, **now}:
        both = key in made and key in now
        old, new = made.get(key, DEFAULTS.get(key)), now.get(key, DEFAULTS.get(key))
        if old != new and (both or key not in FOLLOWING):
            whose = "" if key in OF_ALL_SOURCES else of
            name = NAMES.get(key, key)
            if key.endswith("_sha256") and both:
                yield f"{name}{whose} is another"
            else:
                yield f"{name}{whose} was {_short(old)} and is {_short(new)}"


# What a key that is not written down stands for.
DEFAULTS = {"row_format": "text", "too_long": "cut", "columns": {}}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


# --- a folder that is there -----------------------------------------------------------------------


def changed_since(config: Config, path: str, manifest: Manifest) -> list[str]:
    """What `dataset_preprocess` says otherwise than when it made the folder `path`; nothing where
    it makes no such folder. Sources need not be there: settings are compared, not files."""
    prepare = config.dataset_preprocess
    for folder in folders_of(prepare) if prepare and manifest.options else []:
        if os.path.realpath(folder.path) == os.path.realpath(path):
            return _of_the_folder(config, folder, manifest)
    return []


def _of_the_folder(config: Config, folder: FolderToMake, manifest: Manifest) -> list[str]:
    made = manifest.options
    parts = _sources(made)
    if len(parts) == len(folder.sources):
        found = [_as_found(*pair) for pair in zip(folder.sources, parts, strict=True)]
    else:
        found = [Found("", "text")] * len(folder.sources)
    try:
        now = recipe(config, folder, found)
    except DataError as problem:  # of the chat template
        return [str(problem).partition("\n")[0]]
    kept = {key: value for key, value in now.items() if key not in NOT_OF_THE_SECTION}
    old = {key: value for key, value in made.items() if key not in NOT_OF_THE_SECTION}
    return differences(old, kept) + other_places(folder, manifest)


def _as_found(source: Drawn, made: Mapping[str, Any]) -> Found:
    """What the configuration says of it, or where the rows themselves said it, what they said."""
    kind = made.get("source_format", "")
    try:
        files = find_files(source.options, source.load_path, source.split)
        kind = files.kind if files else kind
    except (DataError, OSError):
        pass
    given = source.options.row_format
    return Found(kind, given or ("text" if kind == "text" else made.get("row_format", "text")))


def other_places(folder: FolderToMake, manifest: Manifest) -> list[str]:
    """Sources that are named otherwise; whether they hold the same, only their contents tell."""
    if len(manifest.sources) != len(folder.sources):
        return []
    return [
        f"load_path was {made.load_path} and is {source.load_path}"
        for made, source in zip(manifest.sources, folder.sources, strict=True)
        if not (_same_place(made.load_path, source.load_path) or _moved(made, source))
    ]


def _same_place(one: str, other: str) -> bool:
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def _moved(made: SourceCounts, source: Drawn) -> bool:
    """Of the same name, and as far as it is there, of the same size: a project that was copied."""
    if os.path.basename(made.load_path) != os.path.basename(source.load_path):
        return False
    try:
        files = find_files(source.options, source.load_path, source.split)
        return files is None or made.bytes == sum(path.stat().st_size for path in files.files)
    except (DataError, OSError):
        return True


def refuse_if_changed(config: Config, folder: str, manifest: Manifest) -> None:
    """Before a run: it would learn what the file does not say."""
    reasons = "; ".join(changed_since(config, folder, manifest))
    if reasons:
        raise DataError(
            f"{folder}: was prepared otherwise than dataset_preprocess says now: {reasons}; "
            "prepare it again, or set that back: vectorlm preprocess --config <your config.yaml>"
        )
