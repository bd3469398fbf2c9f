"""Dataset: every row once an epoch on any number of ranks, from any position; and refusals."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.tiny import write_rows
from vectorlm.batch import Batch, Row
from vectorlm.dataset import Dataset, Rows
from vectorlm.errors import DataError
from vectorlm.steps import Position, Steps

MAX_SEQ_LEN = 8
ROWS = 23
BATCH = 6  # 3 whole steps and a partial one of 5 rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row i holds the token 10 + i, twice, then a document of three tokens."""
    rows = [[[10 + i, 10 + i], [1, 2, 3]] for i in range(ROWS)]
    return write_rows(tmp_path_factory.mktemp("rows") / "data", rows, MAX_SEQ_LEN)


def opened(
    folder: Path, rank: int = 0, ranks: int = 1, micro_batch: int = 2, **given: int
) -> Dataset:
    settings = {"max_seq_len": MAX_SEQ_LEN, "ignore_index": -100, "seed": 7, **given}
    return Dataset(folder, micro_batch=micro_batch, rank=rank, ranks=ranks, **settings)


def rows_of_groups(data: Dataset, steps: Steps, position: Position) -> list[list[int]]:
    """The rows this rank learns, a list a step."""
    return [
        [number for batch in group.batches for number in rows_of(batch.input_ids[0].tolist())]
        for group in data.groups(steps, position)
    ]


def rows_of(tokens: list[int]) -> list[int]:
    return [token - 10 for token in tokens[::5]] if len(tokens) > 1 else []


def epoch_on(folder: Path, ranks: int, epoch: int = 0, **given: int) -> list[list[int]]:
    """The rows of each step of an epoch, over all ranks, sorted."""
    steps = Steps(ROWS, BATCH, epochs=3)
    each = [
        rows_of_groups(opened(folder, rank, ranks, **given), steps, Position(epoch, 0))
        for rank in range(ranks)
    ]
    return [sorted(row for part in parts for row in part) for parts in zip(*each, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_every_row_once_an_epoch(folder: Path, ranks: int, micro_batch: int) -> None:
    learned = epoch_on(folder, ranks, micro_batch=micro_batch)
    assert Counter(row for step in learned for row in step) == Counter(range(ROWS))
    assert [len(step) for step in learned] == [6, 6, 6, 5]


def test_the_order_does_not_depend_on_ranks(folder: Path) -> None:
    alone = epoch_on(folder, 1)
    assert all(epoch_on(folder, ranks) == alone for ranks in (2, 3, 4, 5))


def test_the_order_differs_by_epoch_and_seed(folder: Path) -> None:
    orders = [epoch_on(folder, 1, epoch) for epoch in (0, 1, 2)] + [epoch_on(folder, 1, seed=8)]
    assert len({str(order) for order in orders}) == 4
    assert epoch_on(folder, 2, epoch=1) == orders[1]


def test_all_ranks_run_as_many_batches(folder: Path) -> None:
    steps = Steps(ROWS, BATCH, epochs=1)
    each = [
        [len(group.batches) for group in opened(folder, rank, 4, 1).groups(steps, Position())]
        for rank in range(4)
    ]
    assert each == [[2, 2, 2, 2]] * 4
    last = list(opened(folder, 3, 4, 1).groups(steps, Position()))[-1]
    assert last.batches[1].tokens == 0  # no row is left for this rank, yet it takes part


def test_starting_at_a_position_is_continuing_to_it(folder: Path) -> None:
    steps = Steps(ROWS, BATCH, epochs=2)
    data = opened(folder)
    for epoch in (0, 1):
        whole = list(data.groups(steps, Position(epoch, 0)))
        learned = rows_of_groups(data, steps, Position(epoch, 0))
        for done, group in enumerate(whole[:-1], start=1):
            assert group.after == Position(epoch, done * BATCH)
            assert rows_of_groups(data, steps, group.after) == learned[done:]
        assert whole[-1].after == Position(epoch + 1, 0)


def test_a_late_position_reads_no_earlier_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = Rows.__getitem__

    def counting(self: Rows, index: int) -> Row:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(Rows, "__getitem__", counting)
    data = opened(folder)
    assert read == []
    groups = data.groups(Steps(ROWS, BATCH, epochs=1), Position(0, 18))
    assert read == []
    assert len(list(groups)) == 1
    assert len(read) == 5


def test_a_group_is_read_only_when_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Rows.__getitem__
    monkeypatch.setattr(Rows, "__getitem__", lambda s, i: (read.append(i), original(s, i))[1])
    next(opened(folder).groups(Steps(ROWS, BATCH, epochs=1), Position()))
    assert len(read) == BATCH


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_evaluation_sees_every_row_once(folder: Path, ranks: int) -> None:
    each = [list(opened(folder, rank, ranks)) for rank in range(ranks)]
    assert len({len(batches) for batches in each}) == 1
    seen = [n for batches in each for b in batches for n in rows_of(b.input_ids[0].tolist())]
    assert sorted(seen) == list(range(ROWS))


def test_rows_across_record_batches(tmp_path: Path) -> None:
    """Random access finds a row whichever record batch and shard file it lies in."""
    import pyarrow as pa

    from vectorlm.data.store import SCHEMA

    def part(numbers: range) -> pa.RecordBatch:
        values = [[n] * (n + 1) for n in numbers]
        columns = [values, values, list(numbers), [[0]] * len(numbers)]
        return pa.record_batch(columns, schema=SCHEMA)

    table = pa.Table.from_batches([part(range(3)), part(range(3, 4)), part(range(4, 9))])
    rows = Rows(table)
    assert len(rows) == 9
    assert [rows[i].input_ids.tolist() for i in range(9)] == [[i] * (i + 1) for i in range(9)]
    assert rows.lengths().tolist() == rows.longest_documents().tolist() == list(range(1, 10))
    later = Rows(table.slice(2, 5))
    assert [later[i].labels.tolist() for i in range(5)] == [[i] * (i + 1) for i in range(2, 7)]
    assert later.longest_documents().tolist() == list(range(3, 8))


def test_the_fingerprint_is_that_of_the_data(folder: Path, tmp_path: Path) -> None:
    same = write_rows(tmp_path / "same", [[[1, 2]]], MAX_SEQ_LEN)
    moved = shutil.copytree(same, tmp_path / "moved")
    other = write_rows(tmp_path / "other", [[[1, 2]]], MAX_SEQ_LEN, source_sha256="1" * 64)
    prints = [opened(f).fingerprint for f in (same, moved, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(("key", "value"), [("max_seq_len", 16), ("ignore_index", -1)])
def test_data_prepared_otherwise_is_refused(folder: Path, key: str, value: int) -> None:
    prepared = {"max_seq_len": 8, "ignore_index": -100}[key]
    with pytest.raises(DataError) as raised:
        opened(folder, **{key: value})
    message = str(raised.value)
    assert str(folder) in message
    assert f"{key} {prepared}" in message
    assert f"the configuration says {value}" in message
    assert f"set it to {prepared}" in message
    assert "vectorlm preprocess" in message


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nowhere: there is no such folder.*\n.*vectorlm preprocess"
    ):
        opened(tmp_path / "nowhere")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json.*\n.*vectorlm preprocess"):
        opened(tmp_path)


def test_an_empty_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """`preprocess` writes none; a folder made otherwise may hold no rows."""
    import pyarrow as pa

    from vectorlm.data.store import SCHEMA

    empty = shutil.copytree(folder, tmp_path / "empty")
    for shard in empty.glob("*.arrow"):
        with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_stream(file, SCHEMA):
            pass
    manifest = json.loads((empty / "manifest.json").read_text())
    (empty / "manifest.json").write_text(json.dumps(manifest | {"rows": 0}))
    with pytest.raises(DataError, match="holds no rows"):
        opened(empty)


# --- the order by length ---------------------------------------------------------------------


LENGTHS = [1 + (7 * i) % 8 for i in range(ROWS)]  # each of 1 to 8


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row i holds the token 10 + i, as often as `LENGTHS` says."""
    rows = [[[10 + i] * length] for i, length in enumerate(LENGTHS)]
    return write_rows(tmp_path_factory.mktemp("uneven") / "data", rows, MAX_SEQ_LEN)


def learned_rows(data: Dataset, position: Position) -> list[list[int]]:
    """The rows of each step from `position`."""
    return [
        [int(row[0]) - 10 for batch in group.batches for row in documents(batch)]
        for group in data.groups(Steps(ROWS, BATCH, epochs=2), position)
    ]


def documents(batch: Batch) -> list[list[int]]:
    tokens = batch.input_ids[0].tolist()
    return [tokens[a:b] for a, b in pairwise(batch.bounds)] if batch.tokens else []


def test_the_longest_rows_come_first(uneven: Path) -> None:
    data = opened(uneven, longest_first=True)
    first, *others = learned_rows(data, Position())
    assert [LENGTHS[row] for row in first] == sorted(LENGTHS, reverse=True)[:BATCH]
    assert sorted(row for step in [first, *others] for row in step) == list(range(ROWS))
    plain = [row for step in learned_rows(opened(uneven), Position()) for row in step]
    assert [row for step in others for row in step] == [row for row in plain if row not in first]
    assert learned_rows(data, Position(1)) == learned_rows(opened(uneven), Position(1))


def test_of_rows_as_long_the_longest_document_counts(tmp_path: Path) -> None:
    cuts = (4, 1, 3, 2, 7, 6)
    rows = [[[10 + i] * cut, [10 + i] * (8 - cut)] for i, cut in enumerate(cuts)]
    data = opened(write_rows(tmp_path / "data", rows, MAX_SEQ_LEN), longest_first=True)
    assert data.rows.longest_documents().tolist() == [4, 7, 5, 6, 7, 6]
    order = data.order(0, 4).tolist()
    assert set(order[:2]) == {1, 4}
    assert set(order[2:4]) == {3, 5}


@pytest.mark.parametrize("ranks", [2, 3])
def test_grouped_rows_do_not_depend_on_ranks(uneven: Path, ranks: int) -> None:
    settings = {"group_by_length": True, "longest_first": True}
    alone = learned_rows(opened(uneven, **settings), Position())
    each = [learned_rows(opened(uneven, r, ranks, **settings), Position()) for r in range(ranks)]
    together = [sorted(n for part in parts for n in part) for parts in zip(*each, strict=True)]
    assert together == [sorted(step) for step in alone]
    spans = [
        max(found) - min(found) for step in alone[:-1] for found in [[LENGTHS[n] for n in step]]
    ]
    assert max(spans) <= 3
    assert sorted(row for step in alone for row in step) == list(range(ROWS))


def test_a_grouped_order_goes_on_at_a_position(uneven: Path) -> None:
    data = opened(uneven, group_by_length=True, longest_first=True)
    whole = learned_rows(data, Position())
    for done in range(1, len(whole)):
        assert learned_rows(data, Position(0, done * BATCH)) == whole[done:]


def test_the_run_goes_on_over_epochs(uneven: Path) -> None:
    data, steps = opened(uneven, longest_first=True), Steps(ROWS, BATCH, epochs=3)
    places = [group.after for group in data.groups_to_the_end(steps, Position(0, 18))]
    assert len(places) == 1 + 2 * steps.per_epoch == steps.remaining(Position(0, 18))
    assert places[-1] == Position(3, 0)
    assert not list(data.groups_to_the_end(steps, Position(3, 0)))


def test_lengths_are_known_without_reading_rows(
    uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rows, "__getitem__", None)
    rows = opened(uneven).rows
    assert rows.lengths().tolist() == rows.longest_documents().tolist() == LENGTHS
