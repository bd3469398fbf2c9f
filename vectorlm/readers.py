"""One reader a file kind: an open file becomes batches of rows. Floor 1; called by `data.sources`,
and by `check` for the first rows.

Every reader keeps at most a batch in memory, cut by size and not by any setting, so that the same
file always gives the same batches. Rows are named `file:line`, or `file: row N` (from 1) where
lines mean nothing. What is wrong with a single row is handed on as a `BadRow`, for the caller to
stop at or to count; what makes the rest of a file unreadable is a DataError.

JSON lines are read many at a time by orjson; where it meets anything odd, that batch is read again
line by line, with the standard library's parser for the lines that orjson refuses.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import orjson

from vectorlm.errors import DataError
from vectorlm.row_batch import BadRow, Position, RowBatch, Where
from vectorlm.source_files import opened, unread_cure

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 2 << 20
CHUNK_BYTES = 1 << 20
LONGEST_BYTES = 256 << 20
ROWS_AT_ONCE = 1000
UTF8_BOM = b"\xef\xbb\xbf"

NOT_UTF8 = "not UTF-8"
BROKEN_JSON = "broken JSON"
BROKEN_CSV = "broken CSV"
FIELD_COUNT = "wrong number of fields"
ABSENT = "field absent"
NOT_TEXT = "not a string"
EMPTY = "empty"


class Wanted(NamedTuple):
    """What of each row is handed on: the text of `field`; or, where it is None, the record, whole
    or with `columns` only."""

    field: str | None
    columns: tuple[str, ...] | None = None


class Opened(NamedTuple):
    """A file to read, from `start` on (as a batch of the same reader had it in `after`)."""

    path: Path
    file: Any
    wanted: Wanted
    start: Position = Position()


class BadValue(NamedTuple):
    reason: str
    detail: str


Numbered = tuple[int, Any]  # a row's number, and its value or BadValue
Reader = Callable[[Opened], Iterator[RowBatch]]


# --- one value ----------------------------------------------------------------------


def check_text(text: Any, field: str) -> str | BadValue:
    if not isinstance(text, str):
        found = "null" if text is None else f"of type {type(text).__name__}"
        return BadValue(NOT_TEXT, f"field '{field}' is {found}, not a string")
    if not text or text.isspace():
        return BadValue(EMPTY, f"field '{field}' is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadValue(
            NOT_UTF8, f"field '{field}' is not valid UTF-8 (at character {error.start + 1})"
        )
    return text


def check_object(value: Any, wanted: Wanted) -> Any:
    if not isinstance(value, dict):
        return BadValue(BROKEN_JSON, f"a JSON object is expected, not a {type(value).__name__}")
    if wanted.field is None:
        return chosen(value, wanted)
    if wanted.field not in value:
        return BadValue(ABSENT, absent(wanted.field, list(value)))
    return check_text(value[wanted.field], wanted.field)


def chosen(record: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    if wanted.columns is None:
        return record
    return {name: record[name] for name in wanted.columns if name in record}


def absent(field: str, fields: list[str]) -> str:
    have = ", ".join(map(str, fields)) or "none"
    cure = unread_cure(fields, {}) or "dataset_preprocess.data_field names the one to read"
    return f"there is no field '{field}' (fields here: {have}); {cure}"


# --- batches ------------------------------------------------------------------------


def batch_of(prefix: str, rows: Iterable[Numbered], after: Position) -> RowBatch:
    """Good and bad rows told apart."""
    values, numbers, bad = [], [], []
    for number, value in rows:
        if isinstance(value, BadValue):
            bad.append(BadRow(f"{prefix}{number}", *value))
        else:
            values.append(value)
            numbers.append(number)
    return RowBatch(values, Where(prefix, numbers), bad, after)


def grouped(prefix: str, opened: Opened, rows: Iterable[Numbered]) -> Iterator[RowBatch]:
    """Batches of rows that come one by one; a start is found again by reading up to it."""
    group: list[Numbered] = []
    done = size = 0
    for row in rows:
        group.append(row)
        size += weight(row[1])
        if size >= BATCH_BYTES:
            done += len(group)
            if done > opened.start.place:
                yield batch_of(prefix, group, Position(0, done, 0))
            group, size = [], 0
    if group:
        done += len(group)
        if done > opened.start.place:
            yield batch_of(prefix, group, Position(0, done, 0))


def weight(value: Any) -> int:
    """About the bytes that a value takes; short ones count too, or a batch of them would be
    endless."""
    if isinstance(value, dict):
        return 64 + sum(map(weight, value.values()))
    if isinstance(value, list):
        return 64 + sum(map(weight, value))
    return 64 + (len(value) if isinstance(value, str) else 0)


# --- lines --------------------------------------------------------------------------


def read_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(LONGEST_BYTES):
        number += 1
        check_line(path, number, line)
        yield number, line.removeprefix(UTF8_BOM) if number == 1 else line


def check_line(path: Path, number: int, line: bytes) -> None:
    if len(line) >= LONGEST_BYTES:
        raise DataError(
            f"{path}:{number}: a line longer than {LONGEST_BYTES >> 20} MiB.\n"
            "Is it text, one row a line?"
        )


def read_many_lines(opened: Opened) -> Iterator[tuple[int, list[bytes], Position]]:
    """(number of the first, lines, position behind them): whole lines, of about a batch."""
    place, number = opened.start.place, opened.start.number
    opened.file.seek(place)
    while chunk := opened.file.read(min(BATCH_BYTES, LONGEST_BYTES)):
        if not chunk.endswith(b"\n"):
            rest = opened.file.readline(LONGEST_BYTES)
            check_line(opened.path, number + chunk.count(b"\n") + 1, rest)
            chunk += rest
        start, place = place, place + len(chunk)
        lines = (chunk if start else chunk.removeprefix(UTF8_BOM)).split(b"\n")
        if not lines[-1]:
            lines.pop()
        first, number = number + 1, number + len(lines)
        yield first, lines, Position(0, place, number)


def read_jsonl(opened: Opened) -> Iterator[RowBatch]:
    for first, lines, after in read_many_lines(opened):
        values = parse_lines(lines, opened.wanted)
        if values is None:
            yield batch_of(
                f"{opened.path}:",
                (
                    (number, parse_line(line, opened.wanted))
                    for number, line in enumerate(lines, first)
                    if line and not line.isspace()
                ),
                after,
            )
        else:
            numbers = range(first, first + len(lines))
            yield RowBatch(values, Where(f"{opened.path}:", numbers), [], after)


def parse_lines(lines: list[bytes], wanted: Wanted) -> list[Any] | None:
    """None where a line is blank or bad in any way: then each has to be looked at."""
    try:
        values = [orjson.loads(line) for line in lines]
        if wanted.field is not None:
            values = [value[wanted.field] for value in values]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    if wanted.field is None:
        good = all(type(value) is dict for value in values)
        return [chosen(value, wanted) for value in values] if good else None
    return values if all_texts(values) else None


def all_texts(values: list[Any]) -> bool:
    return all(type(text) is str and text and not text.isspace() for text in values)


def parse_line(line: bytes, wanted: Wanted) -> Any:
    try:
        value = orjson.loads(line)
    except ValueError:
        text = decode(line)
        if isinstance(text, BadValue):
            return text
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return BadValue(BROKEN_JSON, f"broken JSON: {error}")
    return check_object(value, wanted)


def decode(line: bytes) -> str | BadValue:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        hint = "convert it, for example with iconv -f ISO-8859-1 -t UTF-8"
        return BadValue(
            NOT_UTF8, f"not valid UTF-8 (at byte {error.start + 1} of the line); {hint}"
        )


def decoded_text(content: bytes) -> str | BadValue:
    text = decode(content)
    return text if isinstance(text, BadValue) else check_text(text, "text")


def read_text_lines(opened: Opened) -> Iterator[RowBatch]:
    for first, lines, after in read_many_lines(opened):
        rows = (
            (number, decoded_text(line.rstrip(b"\r\n")))
            for number, line in enumerate(lines, first)
            if line and not line.isspace()
        )
        yield batch_of(f"{opened.path}:", rows, after)


def read_paragraphs(opened: Opened) -> Iterator[RowBatch]:
    """Blocks between blank lines, each named by its first line."""
    return grouped(f"{opened.path}:", opened, paragraphs(opened))


def paragraphs(opened: Opened) -> Iterator[Numbered]:
    block: list[bytes] = []
    first = 1
    for number, line in read_lines(opened.path, opened.file):
        if not line.isspace():
            first = first if block else number
            block.append(line)
        elif block:
            yield first, join_block(block)
            block = []
    if block:
        yield first, join_block(block)


def read_whole(opened: Opened) -> Iterator[RowBatch]:
    lines = [line for _, line in read_lines(opened.path, opened.file)]
    return grouped(f"{opened.path}:", opened, [(1, join_block(lines))])


def join_block(block: list[bytes]) -> str | BadValue:
    return decoded_text(b"".join(block).rstrip(b"\r\n").replace(b"\r\n", b"\n"))


# --- JSON arrays --------------------------------------------------------------------


def read_json(opened: Opened) -> Iterator[RowBatch]:
    """An array of objects, or one object a line: the first character tells."""
    start = opened.file.peek(4096).removeprefix(UTF8_BOM).lstrip()
    return (read_json_array if start.startswith(b"[") else read_jsonl)(opened)


def read_json_array(opened: Opened) -> Iterator[RowBatch]:
    values = enumerate(JsonArray(opened.path, opened.file), start=1)
    rows = ((number, check_object(value, opened.wanted)) for number, value in values)
    return grouped(f"{opened.path}: row ", opened, rows)


class JsonArray:
    """The elements of one JSON array, decoded one by one from a buffer that is refilled as it runs
    out."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.bytes_to_text = codecs.getincrementaldecoder("utf-8-sig")()
        self.parse = json.JSONDecoder().raw_decode
        self.text = ""
        self.at = 0
        self.line = 1  # of the buffer's first character
        self.ended = False

    def __iter__(self) -> Iterator[Any]:
        self.expect("[")
        more = self.next_character() != "]"
        while more:
            yield self.element()
            more = self.next_character() == ","
            if more:
                self.expect(",")
        self.expect("]")
        if self.next_character():
            raise self.broken("there is more after the end of the array", self.at)

    def expect(self, character: str) -> None:
        found = self.next_character()
        if found != character:
            raise self.broken(
                f"expected {character} but found {found or 'the end of the file'}", self.at
            )
        self.at += 1

    def next_character(self) -> str:
        """The next that is no white space, not consumed; empty at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.fill()

    def element(self) -> Any:
        self.next_character()
        while True:
            try:
                value, end = self.parse(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended or not self.may_be_cut(error):
                    raise self.broken(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.broken(str(error), self.at) from error
            else:
                # A number that touches the buffer's end may go on behind it.
                if end < len(self.text) or self.ended:
                    self.at = end
                    return value
            self.fill()

    def may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the buffer's end explains the error; else the file would be read to its end in
        vain."""
        near_end = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")
        return near_end and len(self.text) - self.at < LONGEST_BYTES

    def fill(self) -> None:
        # At least doubled, so that an element of many chunks is not decoded from its start too
        # often.
        chunk = self.file.read(max(CHUNK_BYTES, len(self.text) - self.at))
        self.line += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :]
        self.at = 0
        self.ended = not chunk
        try:
            self.text += self.bytes_to_text.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            good = error.object[: error.start].decode()
            line = self.line + self.text.count("\n") + good.count("\n")
            raise DataError(
                f"{self.path}:{line}: not valid UTF-8; the rest cannot be read"
            ) from error

    def broken(self, problem: str, position: int) -> DataError:
        line = self.line + self.text.count("\n", 0, position)
        return DataError(
            f"{self.path}:{line}: broken JSON array: {problem}; the rest cannot be read"
        )


# --- CSV ----------------------------------------------------------------------------


def read_csv(opened: Opened) -> Iterator[RowBatch]:
    path = opened.path
    rows = csv_rows(path, opened.file)
    header = next(rows, None)
    if header is None or header[1] is None:
        raise DataError(f"{path}: no header line; the first line of a CSV file names its fields")
    fields, field = header[1], opened.wanted.field
    place, doubled = f"{path}:1", [name for name in fields if fields.count(name) > 1]
    if field is not None and field not in fields:
        raise DataError(f"{place}: {absent(field, fields)}")
    if field in doubled or (field is None and doubled):
        raise DataError(f"{place}: '{field or doubled[0]}' stands twice")
    found = (
        (line, check_csv_row(values, problem, fields, opened.wanted))
        for line, values, problem in rows
    )
    return grouped(f"{path}:", opened, found)


def check_csv_row(values: list[str] | None, problem: str, fields: list[str], wanted: Wanted) -> Any:
    if values is None:
        return BadValue(BROKEN_CSV, f"broken CSV: {problem}")
    if len(values) != len(fields):
        return BadValue(FIELD_COUNT, f"{len(values)} fields, but the header has {len(fields)}")
    record = dict(zip(fields, values, strict=True))
    if wanted.field is not None:
        return check_text(record[wanted.field], wanted.field)
    for name, text in record.items():
        if isinstance(found := check_text(text or "-", name), BadValue) and found.reason != EMPTY:
            return found
    return chosen(record, wanted)


def csv_rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, list[str] | None, str]]:
    """(first line, values, "") a row; (line, None, problem) where the quoting is broken. Blank
    lines are skipped."""
    # The module's default, 128 KiB, is less than a long document; no limit would let a quote that
    # is never closed swallow the whole file.
    csv.field_size_limit(LONGEST_BYTES)
    # Bytes that are no UTF-8 become surrogates here; `check_text` finds them where they matter.
    texts = (line.decode(errors="surrogateescape") for _, line in read_lines(path, file))
    reader = csv.reader(texts, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field limit" in str(error):
                raise DataError(
                    f"{path}:{first}: a quote is opened here and never closed"
                ) from error
            yield first, None, str(error)
            continue
        if values:
            yield first, values, ""


# --- Arrow and Parquet --------------------------------------------------------------


def read_parquet(opened: Opened) -> Iterator[RowBatch]:
    import pyarrow.parquet as pq

    # Buffered, so that a huge row group is not held at once.
    file = pq.ParquetFile(opened.file, buffer_size=CHUNK_BYTES, pre_buffer=False)
    names = column_names(opened.path, file.schema_arrow, opened.wanted)
    batches = file.iter_batches(rows_at_once(file.metadata), columns=names, use_threads=False)
    return read_batches(opened, batches)


def rows_at_once(metadata: Any) -> int:
    """As many rows as make a batch; long documents would fill the memory by the thousand."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    longest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
    return int(min(max(BATCH_BYTES / max(longest, 1), 1), ROWS_AT_ONCE))


def read_arrow(opened: Opened) -> Iterator[RowBatch]:
    """A shard of a folder saved by `datasets`; read, not mapped: mapped pages count as this
    process's memory."""
    import pyarrow as pa

    schema = pa.ipc.open_stream(opened.file).schema
    names = column_names(opened.path, schema, opened.wanted)
    opened.file.seek(0)
    indices = [schema.get_field_index(name) for name in names]
    only = pa.ipc.IpcReadOptions(included_fields=indices)
    return read_batches(opened, pa.ipc.open_stream(opened.file, options=only))


def read_batches(opened: Opened, batches: Iterable[Any]) -> Iterator[RowBatch]:
    """A row's place is its number; batches before the start are dropped as they come."""
    number = 0
    for batch in batches:
        for rows in pieces(batch):
            number += rows.num_rows
            if number > opened.start.place:
                yield read_piece(opened, rows, number)


def pieces(batch: Any) -> Iterator[Any]:
    """Slices of about a batch's size."""
    rows = int(min(max(BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1), 1), ROWS_AT_ONCE))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def read_piece(opened: Opened, rows: Any, end: int) -> RowBatch:
    prefix, field = f"{opened.path}: row ", opened.wanted.field
    numbers = range(end - rows.num_rows + 1, end + 1)
    after = Position(0, end, 0)
    if field is None:
        return RowBatch(rows.to_pylist(), Where(prefix, numbers), [], after)
    texts = rows.column(field).to_pylist()
    if all_texts(texts):
        return RowBatch(texts, Where(prefix, numbers), [], after)
    checked = (check_text(text, field) for text in texts)
    return batch_of(prefix, zip(numbers, checked, strict=True), after)


def column_names(name: Path | str, schema: pa.Schema, wanted: Wanted) -> list[str]:
    if wanted.field is None:
        return [n for n in schema.names if wanted.columns is None or n in wanted.columns]
    if wanted.field not in schema.names:
        raise DataError(f"{name}: {absent(wanted.field, schema.names)}")
    return [wanted.field]


# --- any file -----------------------------------------------------------------------


class Reading(NamedTuple):
    """`file` says how far it is read, `batches` are its rows; DataError where it cannot be read."""

    file: BinaryIO
    batches: Iterator[RowBatch]


@contextmanager
def reading(
    path: Path, kind: str, text_rows: str, wanted: Wanted, start: Position
) -> Iterator[Reading]:
    with opened(path) as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        read = reader_for(kind, text_rows)
        yield Reading(raw, explained(read, Opened(path, file, wanted, start)))


def explained(read: Reader, opened: Opened) -> Iterator[RowBatch]:
    try:
        yield from read(opened)
    except unreadable() as error:
        raise DataError(
            f"{opened.path}: cannot be read: {error}. Is the file whole, and of the kind it says?"
        ) from error


def unreadable() -> tuple[type[Exception], ...]:
    """What reading fails with; pyarrow is not imported for other files."""
    arrow = sys.modules.get("pyarrow")
    return (OSError, EOFError, zlib.error, *([arrow.ArrowException] if arrow else []))


def reader_for(kind: str, text_rows: str) -> Reader:
    texts: dict[str, Reader] = {
        "line": read_text_lines,
        "paragraph": read_paragraphs,
        "file": read_whole,
    }
    readers: dict[str, Reader] = {
        "jsonl": read_jsonl,
        "json": read_json,
        "csv": read_csv,
        "parquet": read_parquet,
        "hf": read_arrow,
    }
    return texts[text_rows] if kind == "text" else readers[kind]
