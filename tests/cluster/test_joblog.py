"""A log is told apart start by start, its lines are cleaned, and little of it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vectorlm.cluster.joblog import LINE_CHARACTERS, SCANNED_BYTES, clean, sections

FIRST = "== vectorlm: job 11_2, start 1, 2026-11-03T08:12:44+01:00, on n1"
SECOND = "== vectorlm: job 11_2, start 2, 2026-11-03T09:12:44+01:00, on n2"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vectorlm-11_2.log"


def test_each_start_has_its_lines_and_their_numbers(path: Path) -> None:
    path.write_text(f"module loaded\n{FIRST}\na\nb\n{SECOND}\nsaid: == vectorlm: job 9, start 9\nc")
    one, two = sections(path)
    assert (one.job, one.number, two.number) == ("11_2", 1, 2)
    assert two.time is not None
    assert two.time - (one.time or 0) == 3600
    assert [line.text for line in one.lines()] == [FIRST, "a", "b"]
    assert [line.source for line in two.lines()] == [f"{path.name}:{n}" for n in (5, 6, 7)]


def test_log_without_banners_is_one(path: Path) -> None:
    path.write_text("a\nb\n")
    [section] = sections(path)
    assert section.job is None
    assert [line.text for line in section.lines()] == ["a", "b"]


def test_tail_keeps_the_numbers_of_lines(path: Path) -> None:
    path.write_text(FIRST + "\n" + "".join(f"line {n}\n" for n in range(2, 1001)))
    [section] = sections(path)
    lines = section.lines(tail_bytes=200)
    assert 10 < len(lines) < 30
    for line in lines[1:]:
        assert line.source == f"{path.name}:{line.text.split()[1]}"


def test_of_a_very_long_log_the_beginning_is_not_looked_at(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(FIRST.encode() + b"\n")
        file.seek(SCANNED_BYTES + 4096)  # a hole: it takes no room
        file.write(b"\n" + SECOND.encode() + b"\nlast\n")
    [section] = sections(path)
    assert section.number == 2
    assert [line.text for line in section.lines()] == [SECOND, "last"]
    assert section.lines()[0].source == path.name


@pytest.mark.parametrize("kind", ["absent", "empty", "folder", "fifo"])
def test_what_is_no_log_has_no_sections(path: Path, kind: str) -> None:
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    assert sections(path) == []


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"step 1\rstep 2\r", "step 2"),
        (b"\x1b[1;31mred\x1b[0m", "red"),
        (b"\x1b]0;a title\x07text", "text"),
        (b"\x1b]8;;http://x\x1b\\link", "link"),
        (b"a\tb\x00c\x9b2J", "a b?c\ufffd2J"),
        ("\u202egpj.exe\u2028".encode(), "?gpj.exe?"),
        (b"x" * 10_000, "x" * LINE_CHARACTERS),
        (b"cut \xe2\x82", "cut \ufffd"),
    ],
)
def test_clean(data: bytes, text: str) -> None:
    assert clean(data) == text
