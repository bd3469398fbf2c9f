"""The prepared folder: what is in it, and that nothing but a whole one ever has its name."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pytest

from vectorlm.data import store, workplace
from vectorlm.data.store import (
    MANIFEST_NAME,
    Manifest,
    RowWriter,
    existing_manifest,
    open_rows,
    read_manifest,
)
from vectorlm.errors import DataError
from vectorlm.row import Row

IGNORE = -100
FACTS: dict[str, Any] = {
    "documents": 3,
    "skipped": {"b": 1, "a": 2},
    "tokenizer_sha256": "t",
    "source_sha256": "s",
    "options": {"max_seq_len": 8},
}


def some_rows(count: int, seed: int = 0) -> list[Row]:
    random = np.random.default_rng(seed)
    made = []
    for length in random.integers(1, 9, size=count):
        ids = random.integers(0, 1000, size=length, dtype=np.int32)
        labels = np.where(random.random(length) < 0.5, ids, np.int32(IGNORE)).astype(np.int32)
        starts = np.flatnonzero(random.random(length) < 0.3).astype(np.int32)
        made.append(Row(ids, labels, np.union1d(np.zeros(1, np.int32), starts)))
    return made


def write(folder: Path, rows: list[Row]) -> Manifest:
    with RowWriter(folder, max_seq_len=8, ignore_index=IGNORE) as writer:
        for row in rows:
            writer.add_row(row)
        return writer.publish(**FACTS)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and shards so small that a few rows make several."""
    monkeypatch.setattr(store, "BATCH_TOKENS", 40)
    monkeypatch.setattr(store, "SHARD_BYTES", 1500)


@pytest.mark.usefixtures("small")
def test_what_is_written_is_what_datasets_opens(tmp_path: Path) -> None:
    rows = some_rows(200)
    write(tmp_path / "d", rows)
    opened = datasets.load_from_disk(tmp_path / "d")
    assert opened.column_names == ["input_ids", "labels", "id", "boundaries"]
    assert opened.features["id"].dtype == "int64"
    assert {opened.features[name].feature.dtype for name in Row._fields} == {"int32"}
    assert opened["id"][:] == list(range(200))
    for name in Row._fields:
        assert opened[name][:] == [getattr(row, name).tolist() for row in rows]
    assert len(list((tmp_path / "d").glob("*.arrow"))) > 3


@pytest.mark.usefixtures("small")
def test_the_manifest_counts_what_is_there(tmp_path: Path) -> None:
    rows = some_rows(200)
    manifest = write(tmp_path / "d", rows)
    assert read_manifest(tmp_path / "d") == manifest
    labels = np.concatenate([row.labels for row in rows])
    ids = np.concatenate([row.input_ids for row in rows])
    assert manifest.rows == 200
    assert (manifest.tokens, manifest.max_token_id) == (len(ids), ids.max())
    assert manifest.supervised_tokens == (labels != IGNORE).sum()
    assert manifest.longest_row == max(len(row.input_ids) for row in rows)
    assert manifest.fill == pytest.approx(len(ids) / (200 * 8))
    assert (manifest.documents, manifest.skipped) == (3, {"a": 2, "b": 1})
    assert manifest.options_sha256 == store.options_sha256({"max_seq_len": 8})


@pytest.mark.usefixtures("small")
def test_rows_are_opened_as_they_were(tmp_path: Path) -> None:
    rows = some_rows(200)
    write(tmp_path / "d", rows)
    table = open_rows(tmp_path / "d")
    assert table.num_rows == 200
    assert table["input_ids"][123].values.to_numpy().tolist() == rows[123].input_ids.tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.usefixtures("small")
def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, some_rows(100))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- replacing ----------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_own_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path / "d", some_rows(5))
    assert write(tmp_path / "d", some_rows(7)).rows == read_manifest(tmp_path / "d").rows == 7
    assert names(tmp_path) == ["d"]


def test_leaving_midway_keeps_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "d", some_rows(5))
    before = contents(tmp_path / "d")
    with RowWriter(tmp_path / "d", max_seq_len=8, ignore_index=IGNORE) as writer:
        writer.add_row(some_rows(1)[0])
        writer.flush()
        assert writer.temporary.is_dir()
        assert names(tmp_path) == [".d.lock", ".d.tmp", "d"]
    assert contents(tmp_path / "d") == before
    assert names(tmp_path) == ["d"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_ours_is_left_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "d"
    if kind == "folder":
        path.mkdir()
    (path / "thesis.tex" if kind == "folder" else path).write_text("mine")
    with pytest.raises(DataError, match="left alone"):
        write(path, some_rows(1))
    assert (path / "thesis.tex" if kind == "folder" else path).read_text() == "mine"
    assert names(tmp_path) == ["d"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    assert existing_manifest(tmp_path / "d") is None
    assert write(tmp_path / "d", some_rows(2)).rows == 2


def test_a_link_keeps_pointing_where_it_does(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch" / "d")
    for count in (2, 3):
        write(tmp_path / "link", some_rows(count))
    assert (tmp_path / "link").is_symlink()
    assert read_manifest(tmp_path / "scratch" / "d").rows == 3


def test_the_old_folder_comes_back_if_a_run_died_between_the_renames(tmp_path: Path) -> None:
    write(tmp_path / "d", some_rows(5))
    os.rename(tmp_path / "d", tmp_path / ".d.old-1")
    found = existing_manifest(tmp_path / "d")
    assert found is not None
    assert (found.rows, names(tmp_path)) == (5, ["d"])


# --- interruptions ------------------------------------------------------------------

MADE_FROM = {"options": {"max_seq_len": 8}, "source_sha256": "s"}
STATE = {"packer": {"ids": np.arange(3, dtype=np.int32), "counts": [1, 2]}, "position": [0, 5, 7]}


class Killed(BaseException):
    """Leaves the block as a signal does."""


def interrupted(folder: Path, rows: list[Row]) -> int:
    """Writes some, records, writes more, and dies; how many rows were recorded."""
    recorded = 0
    with suppress(Killed), RowWriter(folder, max_seq_len=8, ignore_index=IGNORE) as writer:
        for number, row in enumerate(rows, start=1):
            writer.add_row(row)
            if writer.rest() and number < 150:
                writer.record(MADE_FROM, STATE)
                recorded = number
        raise Killed
    return recorded


def go_on(folder: Path, rows: list[Row], made_from: dict[str, Any]) -> dict[str, Any] | None:
    with RowWriter(folder, max_seq_len=8, ignore_index=IGNORE) as writer:
        state = writer.resume(lambda: made_from)
        for row in rows[writer.rows :]:
            writer.add_row(row)
            writer.rest()
        writer.publish(**FACTS)
        return state


@pytest.mark.usefixtures("small")
def test_an_interrupted_folder_is_gone_on_with_to_the_byte(tmp_path: Path) -> None:
    rows = some_rows(200)
    write(tmp_path / "whole", rows)
    recorded = interrupted(tmp_path / "d", rows)
    assert 50 < recorded < 150
    assert names(tmp_path) == [".d.tmp", "whole"]
    state = go_on(tmp_path / "d", rows, MADE_FROM)
    assert state is not None
    assert state["writer"]["rows"] == recorded
    assert state["position"] == STATE["position"]
    assert state["packer"]["ids"].tolist() == [0, 1, 2]
    assert state["packer"]["ids"].dtype == np.int32
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")
    assert names(tmp_path) == ["d", "whole"]


def spoil(folder: Path, how: str) -> None:
    first = folder / "data-00000.arrow"
    if how == "cut shard":
        first.write_bytes(first.read_bytes()[:-1])
    elif how == "no shard":
        first.unlink()
    elif how == "cut progress":
        path = folder / "progress.npz"
        path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("how", ["options", "version", "cut shard", "no shard", "cut progress"])
def test_what_is_of_another_making_or_damaged_is_begun_anew(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some_rows(200)
    write(tmp_path / "whole", rows)
    interrupted(tmp_path / "d", rows)
    if how == "version":
        monkeypatch.setattr(workplace, "__version__", "0.0.0")
    spoil(tmp_path / ".d.tmp", how)
    made_from = {"options": {"max_seq_len": 9}} if how == "options" else {}
    assert go_on(tmp_path / "d", rows, MADE_FROM | made_from) is None
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")
    assert names(tmp_path) == ["d", "whole"]


def test_nothing_is_asked_where_nothing_was_begun(tmp_path: Path) -> None:
    def refuse() -> dict[str, Any]:
        raise AssertionError("the source was hashed in vain")

    with RowWriter(tmp_path / "d", max_seq_len=8, ignore_index=IGNORE) as writer:
        assert writer.resume(refuse) is None


def test_an_interruption_before_the_first_record_leaves_nothing(tmp_path: Path) -> None:
    assert interrupted(tmp_path / "d", some_rows(3)) == 0
    assert names(tmp_path) == []


# --- the disk -----------------------------------------------------------------------


class FullDisk:
    """A file that takes a few bytes and then has no room, not even when it is closed."""

    def __init__(self, file: BinaryIO, number: int) -> None:
        self.file, self.number, self.room = file, number, 600

    def write(self, content: Any) -> int:
        self.room -= len(content)
        if self.room < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.file.write(content)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "your quota is used up")],
)
def test_a_full_disk_is_one_clear_error(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "open_shard", lambda path: FullDisk(path.open("wb"), number))
    with pytest.raises(DataError, match=rf"/d: {message} \(.* MiB free[\s\S]*another file system"):
        write(tmp_path / "d", some_rows(500))
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "d", some_rows(1))


# --- reading what is wrong ----------------------------------------------------------


def test_a_missing_folder_says_how_to_prepare_it(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(DataError, match=r"vectorlm preprocess --config"):
            read_manifest(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "broken"),
        ({"format": 2, "else": 1}, "format 2 by a newer VectorLM"),
        ({"rows": "5"}, "broken: rows: .*integer"),
        ({"rows": 6}, "5 rows are there but manifest.json says 6"),
        ({"unknown": 1}, "broken: unknown"),
    ],
)
def test_a_broken_manifest_is_named(change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "d", some_rows(5))
    path = tmp_path / "d" / MANIFEST_NAME
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    with pytest.raises(DataError, match=message):
        open_rows(tmp_path / "d")


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "d", some_rows(5))
    shard = tmp_path / "d" / "data-00000-of-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"data-00000-of-00001.arrow|rows are there"):
        open_rows(tmp_path / "d")
    shard.unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001.arrow: cannot be read"):
        open_rows(tmp_path / "d")
