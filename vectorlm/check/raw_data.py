"""Can the data be prepared: is its source there, and do its first rows read? Floor 1, called by
`data_folder` where there is no prepared data yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from vectorlm.chat.formats import COLUMNAR, detect
from vectorlm.check.chat_rows import SKIP, Rows, look_at_chats
from vectorlm.check.finding import Finding, Surroundings, error, note, warning
from vectorlm.check.places import cannot_write
from vectorlm.config.data_parts import parts_of
from vectorlm.config.schema import DatasetPreprocess
from vectorlm.errors import DataError
from vectorlm.hub_cache import find_dataset
from vectorlm.manifest import MANIFEST_NAME, Manifest
from vectorlm.readers import BadValue, Wanted, check_object, reading
from vectorlm.row_batch import BadRow, Position
from vectorlm.source_files import (
    SourceFiles,
    contents_sha256,
    find_files,
    joined_sha256,
    unread_cure,
)

ROWS_WITH_COLUMNS = 20  # that say what the rows are, as in preprocessing
ROWS_RENDERED = 100
LAST_BYTES = 1 << 20
MOST_ENDS = 500  # files whose end is read: on a slow file system a few milliseconds each
SMALL_BYTES = 64 << 20  # hashed in a moment


@dataclass(frozen=True)
class Source:
    """One prepared folder to make: where from, where to."""

    key: str
    load_path: str
    split: str | None
    save_key: str
    save_path: str
    options: DatasetPreprocess
    weight: float = 1.0


def sources(prepare: DatasetPreprocess) -> list[Source]:
    prefix = "dataset_preprocess."
    key = prefix + ("datasets" if prepare.datasets else "load_path")
    save = (prefix + "save_path", prepare.save_path)
    found = [
        Source(key, part.load_path, part.split, *save, part, weight)
        for part, weight in parts_of(prepare)
    ]
    if prepare.eval_save_path:
        save = (prefix + "eval_save_path", prepare.eval_save_path)
        if prepare.val_split is not None:
            return found + [replace(one, save_key=save[0], save_path=save[1]) for one in found]
        key = prefix + ("eval_load_path" if prepare.eval_load_path else "load_path")
        path = prepare.eval_load_path or prepare.load_path
        found.append(Source(key, path, prepare.eval_split, *save, prepare))
    return found


def look_at_sources(here: Surroundings, prepare: DatasetPreprocess) -> Iterator[Finding]:
    seen: set[tuple[str, Path]] = set()
    for source in sources(prepare):
        if (Path(source.save_path) / MANIFEST_NAME).exists():
            if not here.prepares:
                continue
        else:
            yield from _save_path(source)
        try:
            files = find_files(source.options, source.load_path, source.split)
        except DataError as problem:
            yield _no_source(source, problem)
            continue
        except OSError as problem:
            text = f"{source.load_path} cannot be read ({problem.strerror})"
            yield error(source.key, text, "make it readable for you")
            continue
        if files is None:
            yield from _of_the_hub(here, source)
        else:
            yield from _twice(source, files, seen)
            cut = _cut_files(files)
            yield from _first_rows(here, source, files, cut)
            yield from _last_rows(source, cut)


def gone_sources(here: Surroundings, prepare: DatasetPreprocess) -> Iterator[Finding]:
    """Sources that are not there any more, of data that is: it trains, but cannot be made again."""
    for source in sources(prepare):
        if not (Path(source.save_path) / MANIFEST_NAME).exists():
            continue
        try:
            files = find_files(source.options, source.load_path, source.split)
            found = list(_of_the_hub(here, source)) if files is None else []
        except DataError as problem:
            found = [_no_source(source, problem)]
        except OSError:
            found = [error(source.key, f"{source.load_path} cannot be read", "")]
        for finding in found:
            yield note(
                source.key,
                f"{finding.text}; what was prepared from it is in {source.save_path}, and training "
                "needs no more",
                "put it back, or mend the path, before the data is prepared again",
            )


def _twice(source: Source, files: SourceFiles, seen: set[tuple[str, Path]]) -> Iterator[Finding]:
    """`seen`: the files of sources before this one, by where their rows go."""
    found = {(source.save_path, path.resolve()) for path in files.files}
    again = sorted(path for _, path in found & seen)
    seen |= found
    if again:
        text = f"{again[0]} is in two sources: its rows go into {source.save_path} twice"
        yield warning(source.key, text, "list it once, with a weight of 2 if that is meant")


def _no_source(source: Source, problem: DataError) -> Finding:
    text, _, cure = str(problem).partition("\n")
    text = text.removeprefix("load_path: ")
    if not cure:
        text, _, cure = text.partition(": ") if "choose one with" in text else (text, "", "")
    return error(source.key, text, cure or "mend the path")


def _of_the_hub(here: Surroundings, source: Source) -> Iterator[Finding]:
    if find_dataset(source.load_path, here.environ):
        return
    text = (
        f"there is no file or folder {source.load_path} here, and no dataset of that name in the "
        "local Hugging Face cache; jobs have no internet"
    )
    cure = f"mend the path, or fetch it: {here.command('prefetch')}"
    offline = here.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    yield (error if offline else warning)(source.key, text, cure)


def _save_path(source: Source) -> Iterator[Finding]:
    folder = Path(os.path.realpath(source.save_path))
    if folder.exists() and not folder.is_dir():
        text = f"{source.save_path} is a file"
        yield error(source.save_key, text, "give another save_path, or remove it")
    elif folder.is_dir() and any(folder.iterdir()):
        text = f"{source.save_path} holds something that is no prepared data of ours"
        yield error(source.save_key, text, "give another save_path, or remove it yourself")
    else:
        reason = cannot_write(folder.parent)
        if reason:
            text = f"{source.save_path} cannot be written ({reason})"
            yield error(source.save_key, text, "give another save_path")


# --- the first rows -------------------------------------------------------------------------------


def _first_rows(
    here: Surroundings, source: Source, files: SourceFiles, cut: Sequence[Path]
) -> Iterator[Finding]:
    """As preprocessing reads them; `cut`: files of which something else is said already."""
    options = source.options
    if not files.files or (files.kind == "text" and options.text_rows == "file"):
        return
    path = files.files[0]
    wanted = Wanted(options.data_field if files.kind == "text" else None)
    try:
        with reading(path, files.kind, options.text_rows, wanted, Position()) as file:
            batch = next(file.batches, None)
    except DataError as problem:
        yield _unreadable(source, problem)
        return
    if batch is None:
        if len(files.files) == 1:
            yield error(source.key, f"{path} holds no rows", "give a file that has some")
        return
    bad = batch.bad
    if path in cut and batch.after.place >= path.stat().st_size:
        bad = bad[:-1]
    if bad:
        yield _bad_row(source, bad[0])
        if not options.skip_bad_rows:
            return
    if files.kind != "text":
        rows = [(batch.where[at], value) for at, value in enumerate(batch.values)]
        yield from _rows(here, source, files, rows)


def _unreadable(source: Source, problem: DataError) -> Finding:
    text, _, cure = str(problem).partition("\n")
    text, question, _ = text.partition(" Is the file whole")
    whole = "is the file whole, and of the kind it says? copy it again"
    return error(source.key, text, whole if question else cure or "mend the file")


def _bad_row(source: Source, bad: BadRow) -> Finding:
    kind = warning if source.options.skip_bad_rows else error
    return kind(source.key, f"{bad.where}: {bad.detail}", SKIP)


def _rows(here: Surroundings, source: Source, files: SourceFiles, rows: Rows) -> Iterator[Finding]:
    """Records: what they are, and whether they can be learned."""
    options = source.options
    fields = list(dict.fromkeys(name for _, row in rows[:ROWS_WITH_COLUMNS] for name in row))
    if not fields:
        return
    row_format = options.row_format or detect(fields, options.columns, options.data_field)
    if row_format not in (None, "text"):
        nulls = files.kind in COLUMNAR
        first = rows[:ROWS_RENDERED]
        yield from look_at_chats(here, source.key, options, str(row_format), fields, first, nulls)
    elif options.data_field not in fields:
        have = ", ".join(fields[:10]) or "none"
        yield error(
            "dataset_preprocess.data_field",
            f"{files.files[0]} has no field {options.data_field!r}; its fields: {have}",
            unread_cure(fields, options.columns) or f"set data_field to one of {have}",
        )
    else:
        wanted = Wanted(options.data_field)
        checked = ((where, check_object(row, wanted)) for where, row in rows)
        bad = (BadRow(where, *one) for where, one in checked if isinstance(one, BadValue))
        yield from (_bad_row(source, one) for one in islice(bad, 1))


# --- the last row ---------------------------------------------------------------------------------


def _cut_files(files: SourceFiles) -> list[Path]:
    """A copy that was broken off has its first row; what is missing is its end."""
    if files.kind != "jsonl":
        return []
    plain = [path for path in files.files if path.suffix != ".gz"][:MOST_ENDS]
    # A file that is one line may be the first row alone, which is looked at for itself.
    return [path for path in plain if _is_cut(path, of_one_line=path != files.files[0])]


def _last_rows(source: Source, cut: Sequence[Path]) -> Iterator[Finding]:
    if cut:
        more = f", and {len(cut) - 1} more look so" if len(cut) > 1 else ""
        kind = warning if source.options.skip_bad_rows else error
        text = f"{cut[0]} looks cut: its last line is no whole JSON{more}"
        yield kind(source.key, text, "copy it again, and compare the sizes; or remove that line")


def _is_cut(path: Path, of_one_line: bool) -> bool:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LAST_BYTES))
            end = file.read(LAST_BYTES).rstrip(b" \t\r\n")
    except OSError:
        return False
    _, newline, last = end.rpartition(b"\n")
    if not newline and size > LAST_BYTES:  # a row longer than what was read
        return not end.endswith(b"}")
    if not last or not (newline or of_one_line):
        return False
    try:
        json.loads(last)
    except ValueError:
        return True
    return False


# --- is prepared data still that of its source ----------------------------------------------------


def changed_since(manifest: Manifest, made_by: list[Source]) -> str | None:
    """What in the sources is not what was prepared; None where it is, or cannot be told quickly."""
    prepared_at = (Path(made_by[0].save_path) / MANIFEST_NAME).stat().st_mtime
    try:
        found = [find_files(one.options, one.load_path, one.split) for one in made_by]
        if None in found:
            return None
        all_files = [files for files in found if files is not None]
        states = {path: path.stat() for files in all_files for path in files.files}
        newer = [path for path, state in states.items() if state.st_mtime >= prepared_at]
        small = sum(state.st_size for state in states.values()) <= SMALL_BYTES
        if newer and small:
            hashes = [contents_sha256(files.root, files.files) for files in all_files]
            if joined_sha256(hashes, [one.weight for one in made_by]) == manifest.source_sha256:
                return None
    except (OSError, DataError):
        return None  # the source may be gone once data is prepared
    return str(newer[0]) if newer else None
