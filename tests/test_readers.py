"""Readers: every row by its name, every bad row by its place and reason."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import TEXTS, texts
from vectorlm import readers
from vectorlm.errors import DataError
from vectorlm.readers import Opened, Wanted, reader_for
from vectorlm.row_batch import BadRow, Position, RowBatch

HERE = Path("f")
TEXT = Wanted("text")
RECORD = Wanted(None)


Item = tuple[str, Any]  # where, and the value or the BadRow


def batches(
    kind: str, content: bytes, text_rows: str = "line", wanted: Wanted = TEXT, **start: int
) -> list[RowBatch]:
    file: Any = io.BufferedReader(io.BytesIO(content))
    opened = Opened(HERE, file, wanted, Position(**start))
    return list(reader_for(kind, text_rows)(opened))


def items(found: list[RowBatch]) -> list[Item]:
    """All rows by their place in the file."""
    rows: list[Item] = []
    for batch in found:
        rows += [(batch.where[at], value) for at, value in enumerate(batch.values)]
        rows += [(bad.where, bad) for bad in batch.bad]
    return sorted(rows, key=lambda row: int(re.split(r"\D+", row[0])[-1]))


def read(kind: str, content: bytes, text_rows: str = "line", wanted: Wanted = TEXT) -> list[Item]:
    return items(batches(kind, content, text_rows, wanted))


def reasons(found: list[Item]) -> list[tuple[str, str | None]]:
    return [(where, value.reason if isinstance(value, BadRow) else None) for where, value in found]


GOOD = b'{"text": "good"}'
BAD_JSONL = [
    (b'{"text": ', "broken JSON", "broken JSON"),
    (b"[" * 100_000, "broken JSON", "recursion"),
    (b"[1]", "broken JSON", "a list"),
    (b'{"txt": "a", "id": 3}', "field absent", "no field 'text' (fields here: txt, id)"),
    (b'{"text": 3}', "not a string", "of type int"),
    (b'{"text": null}', "not a string", "null"),
    (b'{"text": " \\n"}', "empty", "is empty"),
    (b'{"text": "\xff"}', "not UTF-8", "at byte 11"),
    (b'{"text": "a\\ud800"}', "not UTF-8", "at character 2"),
]


@pytest.mark.parametrize(("line", "reason", "detail"), BAD_JSONL)
def test_a_bad_json_line_is_named_and_the_next_is_read(
    line: bytes, reason: str, detail: str
) -> None:
    first, bad, last = read("jsonl", GOOD + b"\n" + line + b"\n" + GOOD)
    assert (first, last) == (("f:1", "good"), ("f:3", "good"))
    assert reasons([bad]) == [("f:2", reason)]
    assert detail in bad[1].detail


def test_json_lines_may_hold_a_mark_blank_lines_and_nan() -> None:
    found = read("jsonl", b'\xef\xbb\xbf{"text": "a", "x": NaN}\r\n\n{"text": "b"}\n\n')
    assert found == [("f:1", "a"), ("f:3", "b")]


def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_BYTES", 100)
    with pytest.raises(DataError, match="f:2: a line longer"):
        read("jsonl", GOOD + b"\n" + b" " * 200)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
def test_a_json_array_reads_the_same_whatever_the_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk)
    rows = [{"n": [-1.5e3, 120, {"a": "\\"}], "ok": True, "text": text} for text in TEXTS]
    for indent, ascii_only in [(None, True), (2, False)]:
        content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
        found = read("json", b"\xef\xbb\xbf \n" + content + b"\n")
        assert found == [(f"f: row {n}", text) for n, text in enumerate(TEXTS, start=1)]


def test_an_empty_json_array_has_no_rows() -> None:
    assert read("json", b" [ ] \n") == []


def test_a_json_file_may_hold_an_object_a_line() -> None:
    assert read("json", GOOD + b"\n" + GOOD) == [("f:1", "good"), ("f:2", "good")]


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_bad_elements_of_a_json_array_are_rows(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk)
    found = read("json", b'[{"text": "a"}, 12, {"x": 1}, {"text": "b"}]')
    assert reasons(found) == [
        ("f: row 1", None),
        ("f: row 2", "broken JSON"),
        ("f: row 3", "field absent"),
        ("f: row 4", None),
    ]


BROKEN_ARRAYS = [
    (b'[{"text": "a"}\n{"text": "b"}]', "f:2: broken JSON array: expected ] but found {"),
    (b'[{"text": "a"},\n{"text": nul}]', "f:2: broken JSON array: Expecting value"),
    (b'[{"text": "a"},\n\n{"text": "b"', "f:3: broken JSON array"),
    (b'[{"text": "a"},\n]', "f:2: broken JSON array: Expecting value"),
    (b'[{"text": "a"}', "expected ] but found the end of the file"),
    (b'[{"text": "a"}]\n[]', "f:2: .*after the end"),
    (b'[{"text": "a"},\n{"text": "\xff"}]', "f:2: not valid UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN_ARRAYS)
@pytest.mark.parametrize("chunk", [5, 1 << 20])
def test_a_broken_json_array_is_named_by_line(
    content: bytes, message: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk)
    with pytest.raises(DataError, match=message.replace("[", r"\[")):
        read("json", content)


def test_an_error_early_in_a_json_array_does_not_read_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 64)
    file: Any = io.BufferedReader(io.BytesIO(b'[{"text" 1}, ' + GOOD * 10_000), buffer_size=64)
    with pytest.raises(DataError, match="f:1: broken"):
        list(readers.read_json(Opened(HERE, file, TEXT)))
    assert file.tell() < 1000


def test_csv_rows_are_named_by_their_first_line() -> None:
    found = read("csv", b'\xef\xbb\xbfid,text\r\n1,"a ""b""\nc"\n\n2,d\n')
    assert found == [("f:2", 'a "b"\nc'), ("f:5", "d")]


BAD_CSV = [
    (b"1", "wrong number of fields", "1 fields, but the header has 2"),
    (b"1,a,b", "wrong number of fields", "3 fields"),
    (b'1,"a"b', "broken CSV", "expected after"),
    (b"1, ", "empty", "is empty"),
    (b"1,\xff", "not UTF-8", "UTF-8"),
]


@pytest.mark.parametrize(("line", "reason", "detail"), BAD_CSV)
def test_a_bad_csv_row_is_named_and_the_next_is_read(line: bytes, reason: str, detail: str) -> None:
    bad, last = read("csv", b"id,text\n" + line + b"\n2,good\n")
    assert last == ("f:3", "good")
    assert reasons([bad]) == [("f:2", reason)]
    assert detail in bad[1].detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header line"),
        (b"a;text\n1;2\n", r"f:1: there is no field 'text' .*: a;text\); its fields .* semicolons"),
        (b"q,answer\n1,2\n", "data_field names the one to read"),
        (b"query,answer\n1,2\n", "dataset_format: alpaca and columns: {instruction: query, outp"),
        (b"a,b\n1,2\n", r"f:1: there is no field 'text' \(fields here: a, b\)"),
        (b"text,text\n1,2\n", "stands twice"),
        (b'text,b\na,b\n"c,d\ne,f\n', "f:3: a quote is opened here and never closed"),
    ],
)
def test_a_csv_file_that_cannot_be_read(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read("csv", content)


def test_csv_takes_a_long_document() -> None:
    assert texts(batches("csv", b"text,b\n" + b"a" * 1_000_000 + b",1\n")) == ["a" * 1_000_000]


PLAIN = b"\xef\xbb\xbfone\ntwo  \r\n\n \n  three\nfour"


@pytest.mark.parametrize(
    ("text_rows", "expected"),
    [
        ("line", [("one", 1), ("two  ", 2), ("  three", 5), ("four", 6)]),
        ("paragraph", [("one\ntwo  ", 1), ("  three\nfour", 5)]),
        ("file", [("one\ntwo  \n\n \n  three\nfour", 1)]),
    ],
)
def test_plain_text_has_lines_paragraphs_or_one_document(
    text_rows: str, expected: list[tuple[str, int]]
) -> None:
    found = read("text", PLAIN, text_rows)
    assert found == [(f"f:{line}", text) for text, line in expected]


@pytest.mark.parametrize("text_rows", ["line", "paragraph", "file"])
def test_plain_text_that_is_not_utf8_is_a_bad_row(text_rows: str) -> None:
    assert reasons(read("text", b"caf\xe9\n", text_rows)) == [("f:1", "not UTF-8")]


def table_bytes(kind: str, values: list[Any], column: str = "text") -> bytes:
    table = pa.table({"other": list(range(len(values))), column: values})
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_columnar_rows_are_numbered_through(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROWS_AT_ONCE", 2)
    found = read(kind, table_bytes(kind, ["a", "b", None, " ", "c"]))
    assert reasons(found) == [
        ("f: row 1", None),
        ("f: row 2", None),
        ("f: row 3", "not a string"),
        ("f: row 4", "empty"),
        ("f: row 5", None),
    ]


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_a_columnar_file_without_the_field_lists_its_fields(kind: str) -> None:
    with pytest.raises(DataError, match=r"no field 'text' \(fields here: other, body\)"):
        read(kind, table_bytes(kind, ["a"], "body"))


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_a_column_of_numbers_is_not_text(kind: str) -> None:
    (bad,) = read(kind, table_bytes(kind, [1]))
    assert bad[1] == BadRow("f: row 1", "not a string", "field 'text' is of type int, not a string")


# --- records, batches, going on -----------------------------------------------------

RECORDS: list[dict[str, Any]] = [
    {"n": 1, "messages": [{"role": "user", "content": "Grüße"}], "text": " "},
    {"n": 2, "messages": [], "text": "b"},
]


def content_of(kind: str, records: list[dict[str, Any]]) -> bytes:
    if kind == "jsonl":
        return b"".join(json.dumps(record).encode() + b"\n" for record in records)
    if kind == "json":
        return json.dumps(records).encode()
    table, sink = pa.Table.from_pylist(records), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "hf"])
def test_records_are_whole_or_have_the_columns_that_are_asked_for(kind: str) -> None:
    content = content_of(kind, RECORDS)
    assert [value for _, value in read(kind, content, wanted=RECORD)] == RECORDS
    some = [{"n": 1, "text": " "}, {"n": 2, "text": "b"}]
    chosen = Wanted(None, ("n", "text", "absent"))
    assert [value for _, value in read(kind, content, wanted=chosen)] == some


def test_records_of_csv_are_texts() -> None:
    found = read("csv", b"q,a\n1,\n2,caf\xe9\n3\n", wanted=RECORD)
    assert found[0] == ("f:2", {"q": "1", "a": ""})
    assert reasons(found[1:]) == [("f:3", "not UTF-8"), ("f:4", "wrong number of fields")]
    with pytest.raises(DataError, match="'a' stands twice"):
        read("csv", b"a,a\n", wanted=RECORD)


@pytest.mark.parametrize("line", [b"[1]", b'"text"', b"3", b"{"])
def test_a_line_that_is_no_object_is_no_record(line: bytes) -> None:
    assert reasons(read("jsonl", line, wanted=RECORD)) == [("f:1", "broken JSON")]


MANY = [f"row {n} " + "x" * (n % 7) for n in range(100)]


def content_of_texts(kind: str) -> bytes:
    if kind == "text":
        return "\n".join(MANY).encode()
    if kind == "csv":
        return ("text\n" + "\n".join(MANY)).encode()
    return content_of(kind, [{"text": text} for text in MANY])


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "hf", "text"])
def test_reading_goes_on_behind_any_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 300)
    monkeypatch.setattr(readers, "ROWS_AT_ONCE", 7)
    content = content_of_texts(kind)
    whole = batches(kind, content)
    assert len(whole) > 3
    assert [value for _, value in items(whole)] == MANY
    for at, batch in enumerate(whole, start=1):
        rest = batches(kind, content, **batch.after._asdict())
        assert items(rest) == items(whole[at:])
        assert [b.after for b in rest] == [b.after for b in whole[at:]]


@pytest.mark.parametrize("text_rows", ["line", "paragraph"])
def test_a_long_line_is_read_whole(text_rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 10)
    lines = ["a" * 25, "b", "c" * 100]
    content = "\n\n".join(lines).encode()
    assert [value for _, value in read("text", content, text_rows)] == lines


def test_a_bad_line_costs_its_batch_only_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fast way and the careful way give is the same."""
    rows = [json.dumps({"text": text, "n": 2**70}).encode() for text in TEXTS]
    fast = read("jsonl", b"\n".join(rows))
    careful = read("jsonl", b"\n".join([*rows, b"{"]))
    assert careful[:-1] == fast
    monkeypatch.setattr(readers, "parse_lines", lambda lines, wanted: None)
    assert read("jsonl", b"\n".join(rows)) == fast


def test_rows_of_long_documents_come_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 5000)
    found = batches(
        "parquet", content_of("parquet", [{"text": "x" * 1000 + str(n)} for n in range(50)])
    )
    assert max(len(batch.values) for batch in found) <= 5
