"""Rows are rendered by any number of processes, and it makes no difference."""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.data.chat.models import NAMED, PLAIN, SPECIAL, said, source, system, user
from vectorlm.chat.renderer import Recipe, Refused, Renderer
from vectorlm.data.chat import shares
from vectorlm.data.chat.shares import batches_ahead, rendered
from vectorlm.data.workers import Workers
from vectorlm.errors import DataError
from vectorlm.row_batch import BadRow, Position, RowBatch, Where


def renderer(name: str = "gemma") -> Renderer:
    template = (source(name), name, NAMED)
    return Renderer(
        Recipe("messages", {}, False, "assistant", 0, 1, 1, template, SPECIAL, SPECIAL + PLAIN)
    )


def rows(count: int) -> list[Any]:
    """Some of them are bad in one way or another."""
    rng = random.Random(count)
    found: list[Any] = []
    for number in range(count):
        kind = rng.randrange(8)
        answer = {1: "", 3: "\ud800"}.get(kind, f"Grüße {number}")
        messages = [user(f"Question {number}?"), said(answer)]
        if kind == 2:
            messages.insert(0, system("no place for it"))
        found.append({"messages": messages, "n": 2**80, "x": None, "y": 1.5} if kind else number)
    return found


def batches(*sizes: int) -> Iterator[RowBatch]:
    for number, size in enumerate(sizes):
        where = Where(f"{number}.jsonl:", range(1, size + 1))
        bad = [BadRow(f"{number}.jsonl:0", "broken", "so it is")]
        yield RowBatch(rows(size), where, bad, Position(number, 1, 1))


SIZES = (3, 0, 40, 1, 7, 8, 9, 300)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_comes_out_is_the_same_in_the_same_order(count: int) -> None:
    wanted = [batch._replace(values=renderer().render(batch.values)) for batch in batches(*SIZES)]
    with Workers(count, 300) as workers:
        found = list(rendered(batches(*SIZES), renderer(), workers))
        assert (len(workers.processes) > 1) == (count > 1)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.values == theirs.values
        assert [ours.where[at] for at in range(len(ours.where))] == [
            theirs.where[at] for at in range(len(theirs.where))
        ]
        assert (ours.bad, ours.after) == (theirs.bad, theirs.after)
    reasons = {one.reason for batch in found for one in batch.values if isinstance(one, Refused)}
    assert reasons == {
        "field absent",
        "nothing to learn",
        "refused by the template",
        "not UTF-8",
    }


def test_for_a_few_rows_no_process_is_started() -> None:
    with Workers(4, 300) as workers:
        (found,) = rendered(batches(200), renderer(), workers)
        assert len(found.values) == 200
        assert not workers.processes


def test_what_cannot_be_sent_is_rendered_here() -> None:
    """Columnar files have dates and the like."""
    messages = [user("a"), said("b") | {"at": datetime.date(2026, 1, 1)}]
    batch = RowBatch([{"messages": messages}], Where("a.parquet: row ", [1]), [])
    with Workers(2, 300) as workers:
        *_, found = rendered([*batches(1), batch], renderer(), workers)
        assert not workers.processes
    assert found.values == renderer().render(batch.values)


def test_rows_are_read_only_so_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "FEW_ROWS", 0)
    read: list[int] = []

    def noted() -> Iterator[RowBatch]:
        for number, batch in enumerate(batches(*[20] * 30)):
            read.append(number)
            yield batch

    with Workers(2, 300) as workers:
        ahead = rendered(noted(), renderer(), workers)
        next(ahead)
        assert len(read) == batches_ahead(workers) + 1 == 2


@pytest.mark.parametrize(
    ("count", "memory_mb", "wanted"),
    [(2, 300, 1), (16, 300, 4), (64, 300, 16), (64, 64, 4), (2, 1, 1)],
)
def test_memory_bounds_how_far(count: int, memory_mb: int, wanted: int) -> None:
    assert batches_ahead(Workers(count, memory_mb)) == wanted


def test_no_template_is_told_when_a_conversation_comes() -> None:
    without = Renderer(renderer().recipe._replace(template="there is none"))
    with Workers(2, 300) as workers, pytest.raises(DataError, match="there is none"):
        list(rendered(batches(1, 40), without, workers))
