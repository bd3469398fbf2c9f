"""Findings as text and as an object."""

from __future__ import annotations

from vectorlm.check.finding import error, note, warning
from vectorlm.check.said import as_object, as_text, counted, has_errors

ERROR = error("model", "is away", "bring it back")
LONG = warning("dataset.train_ds", "holds " + "many " * 30 + "words", "vectorlm plan --config x")


def test_text() -> None:
    assert as_text([ERROR]) == "error: model: is away\n    -> bring it back"
    lines = as_text([LONG]).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith("    many")
    assert lines[-1] == "    -> vectorlm plan --config x"


def test_a_path_is_never_broken() -> None:
    path = "/a-b/" * 40
    assert path in as_text([error(path, "is away", "x")])


def test_counts() -> None:
    assert counted([]) == ""
    assert counted([note("a", "b", "c")]) == ""
    assert counted([ERROR, LONG, LONG]) == "1 error, 2 warnings"
    assert has_errors([LONG, ERROR])
    assert not has_errors([LONG])


def test_object() -> None:
    told = as_object([ERROR])
    entry = {"severity": "error", "where": "model", "text": "is away", "cure": "bring it back"}
    assert told == {"sound": False, "findings": [entry]}
    assert as_object([LONG])["sound"] is True
