"""Sources: which files, kind and split a path means, and what is said when it means none."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import TEXTS, options_of, texts
from vectorlm import readers
from vectorlm.data.sources import Source, find_source
from vectorlm.errors import DataError

FLAT = [text.replace("\n", " ").rstrip() for text in TEXTS]  # what a line of plain text can hold


def jsonl(path: Path, values: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return path


def write(kind: str, folder: Path) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(jsonl(folder / "plain" / "x", FLAT).read_bytes()))
    elif kind in ("jsonl", "ndjson"):
        jsonl(path, FLAT)
    elif kind == "json":
        path.write_text(json.dumps([{"text": value} for value in FLAT]))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["n", "text"], *enumerate(FLAT)])
    elif kind == "parquet":
        pq.write_table(pa.table({"text": FLAT}), path)
    elif kind == "hf":
        datasets.Dataset.from_dict({"text": FLAT}).save_to_disk(path)
    elif kind == "hf_dict":
        one = datasets.Dataset.from_dict({"text": FLAT})
        datasets.DatasetDict({"train": one}).save_to_disk(path)
    else:
        path.write_text("\n".join(FLAT))
    return path


KINDS = ["jsonl", "ndjson", "jsonl.gz", "json", "csv", "parquet", "txt", "md", "hf", "hf_dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    source = find_source(options_of(write(kind, tmp_path)))
    assert texts(source.texts()) == FLAT
    assert source.fraction() == 1.0


def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.ndjson"):
        content = json.dumps({"text": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for name in ("README.md", "LICENSE", ".hidden.jsonl", "_SUCCESS"):
        (tmp_path / name).write_text("not data")
    assert texts(find_source(options_of(tmp_path)).texts()) == ["a.jsonl.gz", "b.jsonl", "c.ndjson"]


def test_a_pattern_names_files(tmp_path: Path) -> None:
    for name in ("train.jsonl", "deep/test.jsonl", "other.csv"):
        jsonl(tmp_path / name, [name])
    found = find_source(options_of(tmp_path / "**/*.jsonl"))
    assert texts(found.texts()) == ["deep/test.jsonl", "train.jsonl"]
    with pytest.raises(DataError, match="matches no file"):
        find_source(options_of(tmp_path / "*.parquet"))


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train-00000-of-00002.jsonl", "train_a.jsonl", "train/part.jsonl"]
)
def test_a_split_of_a_folder_is_its_files_of_that_name(name: str, tmp_path: Path) -> None:
    jsonl(tmp_path / name, ["wanted"])
    jsonl(tmp_path / "test.jsonl", ["other"])
    jsonl(tmp_path / "trainer.jsonl", ["other"])
    assert texts(find_source(options_of(tmp_path, split="train")).texts()) == ["wanted"]


def test_a_folder_with_several_splits_needs_the_key(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ["a"])
    jsonl(tmp_path / "test" / "x.jsonl", ["b"])
    with pytest.raises(DataError, match=r"several splits \(train, test\)"):
        find_source(options_of(tmp_path))
    with pytest.raises(DataError, match=r"no split 'valid' \(it has: train, test\)"):
        find_source(options_of(tmp_path, split="valid"))


def test_a_folder_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "test" / "train.jsonl", ["a"])
    jsonl(tmp_path / "dev" / "part.jsonl", ["b"])
    assert texts(find_source(options_of(tmp_path / "test")).texts()) == ["a"]
    assert texts(find_source(options_of(tmp_path / "dev", split="dev")).texts()) == ["b"]


def test_a_single_file_has_the_split_of_its_name_only(tmp_path: Path) -> None:
    assert find_source(options_of(jsonl(tmp_path / "train.jsonl", ["a"]), split="train")).files
    with pytest.raises(DataError, match=r"no split 'train'.*it has no splits: remove the key"):
        find_source(options_of(jsonl(tmp_path / "data.jsonl", ["a"]), split="train"))


def saved_dict(folder: Path) -> Path:
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def test_a_saved_dict_gives_the_split_that_is_asked_for(tmp_path: Path) -> None:
    path = saved_dict(tmp_path / "saved")
    found = find_source(options_of(path, split="test", from_disk=True))
    assert texts(found.texts()) == ["test"]
    with pytest.raises(DataError, match=r"several splits \(train, test\)"):
        find_source(options_of(path))
    with pytest.raises(DataError, match=r"no split 'dev' \(it has: train, test\)"):
        find_source(options_of(path, split="dev"))


def test_a_saved_dataset_is_its_own_split(tmp_path: Path) -> None:
    nameless = datasets.Dataset.from_dict({"text": ["a"]})
    nameless.save_to_disk(tmp_path / "nameless")
    named = datasets.Dataset.from_dict({"text": ["a"]}, split=datasets.Split.TEST)
    named.save_to_disk(tmp_path / "named")
    assert find_source(options_of(tmp_path / "nameless", split="train")).files
    with pytest.raises(DataError, match=r"no split 'train' \(it has: test\)"):
        find_source(options_of(tmp_path / "named", split="train"))


def test_a_saved_dataset_of_several_shards_is_read_through(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(50)]})
    whole.select(range(49, 9, -1)).save_to_disk(tmp_path / "d", num_shards=3)
    batches = list(find_source(options_of(tmp_path / "d")).texts())
    assert texts(batches) == [f"row {n}" for n in range(49, 9, -1)]
    assert batches[0].where[0].endswith("data-00000-of-00003.arrow: row 1")


def test_a_saved_dataset_that_lacks_a_shard_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    next((tmp_path / "d").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="missing, although"):
        find_source(options_of(tmp_path / "d"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nothing.jsonl", {}, "no file or folder"),
        ("a/b/c", {}, "no file or folder"),
        ("nothing", {"from_disk": True}, "does not exist"),
        ("folder", {"from_disk": True}, "is no folder saved by `datasets`"),
        ("folder", {"dataset_format": "hf"}, "is no folder saved by `datasets`"),
        ("folder", {}, "several kinds .*1 csv, 1 jsonl"),
        ("odd.xyz", {}, "no file of a known kind.*found: odd.xyz"),
        ("hf", {"dataset_format": "csv"}, "was saved by `datasets`"),
    ],
)
def test_a_path_that_means_nothing_says_so(
    name: str,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "folder" / "a.jsonl", ["a"])
    jsonl(tmp_path / "folder" / "a.csv", ["a"])
    jsonl(tmp_path / "odd.xyz", ["a"])
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "hf")
    with pytest.raises(DataError, match=message):
        find_source(options_of(name, **options))


def test_the_format_chooses_where_endings_do_not(tmp_path: Path) -> None:
    jsonl(tmp_path / "d" / "a.jsonl", ["a"])
    jsonl(tmp_path / "d" / "b.csv", ["b"])
    chosen = find_source(options_of(tmp_path / "d", dataset_format="jsonl"))
    assert texts(chosen.texts()) == ["a"]
    odd = find_source(options_of(jsonl(tmp_path / "odd.xyz", ["c"]), dataset_format="jsonl"))
    assert texts(odd.texts()) == ["c"]


def test_a_hub_name_without_network_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"nobody/nothing[\s\S]*save_to_disk"):
        find_source(options_of("nobody/nothing"))


def test_where_there_is_no_network_nothing_is_tried_again_and_again() -> None:
    script = (
        "from vectorlm.config.schema import DatasetPreprocess\n"
        "from vectorlm.data.sources import find_source\n"
        "find_source(DatasetPreprocess(load_path='nobody/nothing', save_path='x'))"
    )
    unset = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "http_proxy", "https_proxy", "all_proxy")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    env |= {"HF_ENDPOINT": "https://hub.invalid"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "no file or folder nobody/nothing here" in done.stderr
    assert "thrown while requesting" not in done.stderr
    assert "etry" not in done.stderr


def test_a_hub_dataset_is_read_like_a_saved_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_dict(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: loaded[split])
    source = find_source(options_of("some/name", split="test"))
    (batch,) = source.texts()
    assert (batch.values, batch.where[0]) == (["test"], "some/name: row 1")
    (batch,) = source.batches()
    assert batch.values == [{"text": "test"}]
    assert list(source.texts(batch.after)) == []
    assert (source.fraction(), len(source.sha256())) == (1.0, 64)


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "hf"])
def test_a_cut_file_is_named(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    file = next(path.glob("*.arrow")) if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:-60])
    cannot = re.escape(f"{file.name}: cannot be read")
    with pytest.raises(DataError, match=cannot):
        list(find_source(options_of(path)).texts())


def sha256(path: Path) -> str:
    return find_source(options_of(path)).sha256()


def test_the_hash_is_of_contents_and_names(tmp_path: Path) -> None:
    jsonl(tmp_path / "a" / "x.jsonl", ["1"])
    jsonl(tmp_path / "a" / "y.jsonl", ["2"])
    first = sha256(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "x.jsonl", (1, 1))
    assert sha256(tmp_path / "b") == first
    jsonl(tmp_path / "b" / "x.jsonl", ["3"])
    assert sha256(tmp_path / "b") != first
    os.rename(tmp_path / "a" / "y.jsonl", tmp_path / "a" / "z.jsonl")
    assert sha256(tmp_path / "a") != first


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source: Source = find_source(options_of(jsonl(tmp_path / "x.jsonl", ["1"])))
    source.check_unchanged()
    jsonl(tmp_path / "x.jsonl", ["1", "2"])
    with pytest.raises(DataError, match=r"x.jsonl: changed while it was read"):
        source.check_unchanged()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "hf", "txt"])
def test_reading_goes_on_behind_any_batch_of_any_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 100)
    for name in "ab":
        (tmp_path / name).mkdir()
        path = write(kind, tmp_path / name)
        if kind != "hf":
            path.rename(tmp_path / f"{name}.{kind}")
    if kind == "hf":
        whole = datasets.Dataset.from_dict({"text": FLAT * 2})
        whole.save_to_disk(tmp_path / "hf", num_shards=2)
    place = tmp_path / "hf" if kind == "hf" else tmp_path / f"*.{kind}"
    source = find_source(options_of(place))
    batches = list(source.texts())
    assert texts(batches) == FLAT * 2
    assert {batch.after.file for batch in batches} == {0, 1}
    for at, batch in enumerate(batches, start=1):
        rest = list(source.texts(batch.after))
        assert [(b.values, b.after) for b in rest] == [(b.values, b.after) for b in batches[at:]]


def test_records_come_from_every_file(tmp_path: Path) -> None:
    for name in "ab":
        jsonl(tmp_path / f"{name}.jsonl", [name])
    found = find_source(options_of(tmp_path)).batches(["text"])
    assert [batch.values for batch in found] == [[{"text": "a"}], [{"text": "b"}]]
