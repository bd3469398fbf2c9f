"""What `load_path` means: which files, of which kind, of which split. Floor 1; `data.sources` reads
them, `check` looks whether they are there.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vectorlm.config.schema import DatasetPreprocess
from vectorlm.errors import DataError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
SPLIT_NAMES = (
    "train",
    "training",
    "validation",
    "valid",
    "val",
    "dev",
    "test",
    "eval",
    "evaluation",
)
# Beside data, not data: hidden files, and what a repository explains itself with.
NOT_DATA = re.compile(r"^[._]|^(README|LICENSE)", re.IGNORECASE)
HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class SourceFiles:
    """Files of one kind, in a fixed order; names are relative to `root`."""

    kind: str
    root: Path
    files: tuple[Path, ...]


# --- finding ------------------------------------------------------------------------


def find_files(options: DatasetPreprocess, load_path: str, split: str | None) -> SourceFiles | None:
    """None where `load_path` can only be the name of a dataset of the hub."""
    path = Path(os.path.expanduser(load_path))
    if path.is_dir() and saved_by_datasets(path):
        return saved_source(load_path, path, split, options)
    if options.from_disk:
        raise DataError(not_saved(load_path, path))
    if path.exists():
        return file_source(
            load_path,
            path if path.is_dir() else path.parent,
            folder_files(path, split),
            split,
            options,
        )
    if glob.has_magic(str(path)):
        files = sorted(
            Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)
        )
        if not files:
            raise DataError(f"load_path: {load_path} matches no file")
        return file_source(load_path, common_folder(files), files, split, options)
    if (
        options.file_kind in ("auto", "hf", "text")
        and HUB_NAME.match(load_path)
        and not kind_of(path)
    ):
        return None
    raise DataError(f"load_path: there is no file or folder {load_path}")


def not_saved(load_path: str, path: Path) -> str:
    what = "is no folder saved by `datasets`" if path.exists() else "does not exist"
    return (
        f"load_path: {load_path} {what} (dataset_preprocess.from_disk is true).\n"
        "Give the folder that `save_to_disk` wrote, or set from_disk: false to read other kinds "
        "of files."
    )


def file_source(
    name: str, root: Path, files: list[Path], split: str | None, options: DatasetPreprocess
) -> SourceFiles:
    files = files_of_kind(name, files, options.file_kind)
    files = files_of_split(name, root, files, split)
    return SourceFiles(one_kind(name, files, options.file_kind), root, tuple(files))


def folder_files(path: Path, split: str | None) -> list[Path]:
    """Those of the folder itself, and of its subfolders that are named as a split."""
    if path.is_file():
        return [path]
    names = {*SPLIT_NAMES, split}
    inner = [child for child in path.iterdir() if child.is_dir() and child.name in names]
    files = [file for folder in (path, *inner) for file in folder.iterdir() if file.is_file()]
    return sorted(file for file in files if not NOT_DATA.match(file.name))


def kind_of(path: Path) -> str | None:
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    return KINDS.get(plain.suffix.lower())


def files_of_kind(name: str, files: list[Path], wanted: str) -> list[Path]:
    """With `dataset_format`, the files whose ending says so; all of them where no ending does.
    `text` names what a row is, too: where there are no plain texts, other kinds will do."""
    if wanted == "hf":
        raise DataError(
            f"load_path: {name} is no folder saved by `datasets`, "
            "but dataset_preprocess.dataset_format is hf.\n"
            "Remove dataset_format, or give the folder that `save_to_disk` wrote."
        )
    kinds = {wanted, "jsonl"} if wanted == "json" else {wanted}
    known = [
        file for file in files if (kind_of(file) if wanted == "auto" else kind_of(file) in kinds)
    ]
    if wanted == "text":
        known = known or [file for file in files if kind_of(file)]
    known = known or ([] if wanted == "auto" else files)
    if not known:
        found = ", ".join(file.name for file in files[:5]) or "nothing"
        raise DataError(
            f"load_path: {name} holds no file of a known kind ({', '.join(KINDS)}, "
            f"also with .gz); found: {found}.\n"
            "Say what it is with dataset_preprocess.dataset_format."
        )
    return known


def one_kind(name: str, files: list[Path], wanted: str) -> str:
    if wanted not in ("auto", "text"):
        return wanted
    if wanted == "text" and not any(map(kind_of, files)):
        return wanted
    kinds = Counter(str(kind_of(file)) for file in files)
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise DataError(
            f"load_path: {name} holds files of several kinds ({counts}).\n"
            "Choose one with dataset_preprocess.dataset_format, "
            "or with a pattern such as 'folder/*.jsonl'."
        )
    return next(iter(kinds))


# --- splits -------------------------------------------------------------------------


def files_of_split(name: str, root: Path, files: list[Path], split: str | None) -> list[Path]:
    """Files named `<split>`, `<split>-...`, `<split>.…`, `<split>_...`, or in a folder of that
    name."""
    if split is not None:
        chosen = [file for file in files if in_split(file, root, split)]
        # load_path may be the split's own folder.
        chosen = chosen or (files if root.name == split else [])
        if not chosen:
            raise DataError(no_split(name, split, splits_of(root, files)))
        return chosen
    found = splits_of(root, files)
    if len(found) > 1 and not glob.has_magic(name):
        raise DataError(several_splits(name, found) + f", or read all of it with '{name}/*'")
    return files


def in_split(file: Path, root: Path, split: str) -> bool:
    start = re.match(rf"{re.escape(split)}([-._]|$)", file.name, re.IGNORECASE)
    return bool(start) or split in file.relative_to(root).parts[:-1]


def splits_of(root: Path, files: list[Path]) -> list[str]:
    return [split for split in SPLIT_NAMES if any(in_split(file, root, split) for file in files)]


def no_split(name: str, split: str, found: list[str]) -> str:
    have = f"it has: {', '.join(found)}" if found else "it has no splits: remove the key"
    return f"load_path: {name} has no split '{split}' ({have})"


def several_splits(name: str, found: list[str]) -> str:
    have = ", ".join(found)
    return f"load_path: {name} holds several splits ({have}): choose one with split (or eval_split)"


# --- folders saved by `datasets` ----------------------------------------------------


def saved_by_datasets(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def saved_source(
    name: str, path: Path, split: str | None, options: DatasetPreprocess
) -> SourceFiles:
    if options.file_kind not in ("auto", "hf", "text"):
        raise DataError(
            f"load_path: {name} was saved by `datasets`, but dataset_preprocess.dataset_format is "
            f"{options.dataset_format}. Remove dataset_format, or set it to auto or hf."
        )
    path = split_folder(name, path, split)
    files = [path / item["filename"] for item in saved_state(path)["_data_files"]]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]}: missing, although {path / 'state.json'} names it.\n"
            "Copy the folder again."
        )
    return SourceFiles("hf", path, tuple(files))


def split_folder(name: str, path: Path, split: str | None) -> Path:
    if not (path / "dataset_dict.json").is_file():
        own = saved_state(path).get("_split")
        # A dataset saved by itself often does not know its split; then the key has nothing to
        # contradict.
        if split is not None and own not in (None, split):
            raise DataError(no_split(name, split, [own]))
        return path
    found = read_json(path / "dataset_dict.json").get("splits", [])
    if split is None and len(found) == 1:
        split = found[0]
    if split is None:
        raise DataError(several_splits(name, found))
    if split not in found:
        raise DataError(no_split(name, split, found))
    return path / split


def saved_state(path: Path) -> dict[str, Any]:
    state = read_json(path / "state.json")
    if not isinstance(state.get("_data_files"), list):
        raise DataError(f"{path / 'state.json'}: broken: it names no data files")
    return state


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: broken: a JSON object is expected")
    return content


# --- columns that nothing reads -----------------------------------------------------


CONVERSATIONS = ("dialog", "dialogue", "conversation", "conversations", "chat", "messages", "turns")
QUESTIONS = ("question", "query", "instruction", "prompt", "input", "user", "problem")
ANSWERS = ("answer", "response", "output", "completion", "reply", "assistant", "solution")


def unread_cure(fields: Sequence[str], columns: Mapping[str, str]) -> str | None:
    """What to set where rows have no field of texts and yet look like something known."""
    apart = [mark for mark in (";", "\t") if len(fields) == 1 and mark in fields[0]]
    if apart:
        name = "tabs" if apart[0] == "\t" else "semicolons"
        return f"its fields look separated by {name}; convert it to commas"
    gone = [f"{role}: {name}" for role, name in columns.items() if name not in fields]
    if gone:
        return f"dataset_preprocess.columns names a field that is not there ({', '.join(gone)})"
    chat, asked, said = (
        next((field for field in fields if field.lower() in names), None)
        for names in (CONVERSATIONS, QUESTIONS, ANSWERS)
    )
    if chat:
        return (
            "for conversations, set dataset_preprocess.dataset_format: messages and columns: "
            f"{{messages: {chat}}}"
        )
    if asked and said:
        return (
            "for questions with answers, set dataset_preprocess.dataset_format: alpaca and "
            f"columns: {{instruction: {asked}, output: {said}}}"
        )
    return None


def common_folder(files: list[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


def contents_sha256(root: Path, files: Iterable[Path]) -> str:
    """Over the files' contents and relative names; where they lie and when they were written is not
    in it.
    """
    total = hashlib.sha256()
    for path in files:
        digest, size = hashlib.sha256(), 0
        with opened(path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
        name = path.relative_to(root).as_posix()
        total.update(json.dumps([name, size, digest.hexdigest()]).encode())
    return total.hexdigest()


def joined_sha256(hashes: list[str], weights: list[float]) -> str:
    """Of the sources of one prepared folder; one that is taken once is itself."""
    if weights == [1.0]:
        return hashes[0]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
