"""One reader a file kind: an open file becomes a stream of texts and bad rows. Floor 2; called by
`data.sources`.

Every reader keeps at most a chunk, a line or a record batch in memory, and names each row as
`file:line`, or `file: row N` (from 1) where lines mean nothing. What is wrong with a single row is
handed on as a `BadRow`, for the caller to stop at or to count; what makes the rest of a file
unreadable is a DataError.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from vectorlm.errors import DataError

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


class TextRow(NamedTuple):
    text: str
    where: str


class BadRow(NamedTuple):
    """`reason` is what rows are counted by, `detail` the sentence for this one."""

    where: str
    reason: str
    detail: str


Item = TextRow | BadRow
Reader = Callable[[Path, BinaryIO, str], Iterator[Item]]


# --- one value ----------------------------------------------------------------------


def check_text(text: Any, field: str, where: str) -> Item:
    if not isinstance(text, str):
        found = "null" if text is None else f"of type {type(text).__name__}"
        return BadRow(where, NOT_TEXT, f"field '{field}' is {found}, not a string")
    if not text.strip():
        return BadRow(where, EMPTY, f"field '{field}' is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRow(
            where, NOT_UTF8, f"field '{field}' is not valid UTF-8 (at character {error.start + 1})"
        )
    return TextRow(text, where)


def check_object(value: Any, field: str, where: str) -> Item:
    if not isinstance(value, dict):
        return BadRow(
            where, BROKEN_JSON, f"a JSON object is expected, not a {type(value).__name__}"
        )
    if field not in value:
        return BadRow(where, ABSENT, absent(field, list(value)))
    return check_text(value[field], field, where)


def absent(field: str, fields: list[str]) -> str:
    have = ", ".join(map(str, fields)) or "none"
    cure = "dataset_preprocess.data_field names the one to read"
    return f"there is no field '{field}' (fields here: {have}); {cure}"


# --- lines --------------------------------------------------------------------------


def read_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(LONGEST_BYTES):
        number += 1
        if len(line) >= LONGEST_BYTES:
            raise DataError(
                f"{path}:{number}: a line longer than {LONGEST_BYTES >> 20} MiB.\n"
                "Is it text, one row a line?"
            )
        yield number, line.removeprefix(UTF8_BOM) if number == 1 else line


def decode(line: bytes, where: str) -> str | BadRow:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        hint = "convert it, for example with iconv -f ISO-8859-1 -t UTF-8"
        return BadRow(
            where, NOT_UTF8, f"not valid UTF-8 (at byte {error.start + 1} of the line); {hint}"
        )


def read_jsonl(path: Path, file: BinaryIO, field: str) -> Iterator[Item]:
    for number, line in read_lines(path, file):
        if not line.isspace():
            yield parse_line(decode(line, where := f"{path}:{number}"), field, where)


def parse_line(line: str | BadRow, field: str, where: str) -> Item:
    if isinstance(line, BadRow):
        return line
    try:
        return check_object(json.loads(line), field, where)
    except (ValueError, RecursionError) as error:
        return BadRow(where, BROKEN_JSON, f"broken JSON: {error}")


def read_text_lines(path: Path, file: BinaryIO, field: str) -> Iterator[Item]:
    for number, line in read_lines(path, file):
        if not line.isspace():
            text = decode(line.rstrip(b"\r\n"), where := f"{path}:{number}")
            yield text if isinstance(text, BadRow) else check_text(text, "text", where)


def read_paragraphs(path: Path, file: BinaryIO, field: str) -> Iterator[Item]:
    """Blocks between blank lines, each named by its first line."""
    block: list[bytes] = []
    first = 1
    for number, line in read_lines(path, file):
        if not line.isspace():
            first = first if block else number
            block.append(line)
        elif block:
            yield join_block(block, f"{path}:{first}")
            block = []
    if block:
        yield join_block(block, f"{path}:{first}")


def read_whole(path: Path, file: BinaryIO, field: str) -> Iterator[Item]:
    yield join_block([line for _, line in read_lines(path, file)], f"{path}:1")


def join_block(block: list[bytes], where: str) -> Item:
    text = decode(b"".join(block).rstrip(b"\r\n").replace(b"\r\n", b"\n"), where)
    return text if isinstance(text, BadRow) else check_text(text, "text", where)


# --- JSON arrays --------------------------------------------------------------------


def read_json(path: Path, file: Any, field: str) -> Iterator[Item]:
    """An array of objects, or one object a line: the first character tells."""
    start = file.peek(4096).removeprefix(UTF8_BOM).lstrip()
    return (read_json_array if start.startswith(b"[") else read_jsonl)(path, file, field)


def read_json_array(path: Path, file: BinaryIO, field: str) -> Iterator[Item]:
    for number, value in enumerate(JsonArray(path, file), start=1):
        yield check_object(value, field, f"{path}: row {number}")


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


def read_csv(path: Path, file: BinaryIO, field: str) -> Iterator[Item]:
    rows = csv_rows(path, file)
    header = next(rows, None)
    if header is None or header[1] is None:
        raise DataError(f"{path}: no header line; the first line of a CSV file names its fields")
    fields = header[1]
    if fields.count(field) != 1:
        raise DataError(
            f"{path}:1: "
            + (absent(field, fields) if field not in fields else f"'{field}' stands twice")
        )
    column = fields.index(field)
    for line, values, problem in rows:
        yield check_csv_row(values, problem, fields, column, f"{path}:{line}")


def check_csv_row(
    values: list[str] | None, problem: str, fields: list[str], column: int, where: str
) -> Item:
    if values is None:
        return BadRow(where, BROKEN_CSV, f"broken CSV: {problem}")
    if len(values) != len(fields):
        return BadRow(where, FIELD_COUNT, f"{len(values)} fields, but the header has {len(fields)}")
    return check_text(values[column], fields[column], where)


def csv_rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, list[str] | None, str]]:
    """(first line, values, "") a row; (line, None, problem) where the quoting is broken. Blank
    lines are skipped."""
    # The module's default, 128 KiB, is less than a long document; no limit would let a quote that
    # is never
    # closed swallow the whole file.
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


def read_parquet(path: Path, file: BinaryIO, field: str) -> Iterator[Item]:
    import pyarrow.parquet as pq

    # Buffered, so that a huge row group is not held at once.
    table = pq.ParquetFile(file, buffer_size=CHUNK_BYTES, pre_buffer=False)
    check_column(path, table.schema_arrow, field)
    batches = table.iter_batches(ROWS_AT_ONCE, columns=[field], use_threads=False)
    return read_batches(path, batches, field)


def read_arrow(path: Path, file: BinaryIO, field: str) -> Iterator[Item]:
    """A shard of a folder saved by `datasets`; read, not mapped: mapped pages count as this
    process's memory."""
    schema = pa.ipc.open_stream(file).schema
    check_column(path, schema, field)
    file.seek(0)
    only = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(field)])
    stream = pa.ipc.open_stream(file, options=only)
    return read_batches(path, stream, field)


def read_batches(name: Path | str, batches: Any, field: str) -> Iterator[Item]:
    number = 0
    for batch in batches:
        column = batch.column(field)
        for start in range(0, len(column), ROWS_AT_ONCE):
            for value in column.slice(start, ROWS_AT_ONCE).to_pylist():
                number += 1
                yield check_text(value, field, f"{name}: row {number}")


def check_column(name: Path | str, schema: pa.Schema, field: str) -> None:
    if field not in schema.names:
        raise DataError(f"{name}: {absent(field, schema.names)}")


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
