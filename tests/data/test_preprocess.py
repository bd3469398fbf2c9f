"""Preprocessing from end to end: rows from every source, bad rows, doing nothing, dying, memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.data.conftest import TEXTS, MakeConfig, changed, ids_of
from vectorlm import preprocess, readers
from vectorlm.config.schema import Config
from vectorlm.data import engine, progress
from vectorlm.data.store import Manifest, read_manifest
from vectorlm.data.tokenize import TextTokenizer, load_tokenizer
from vectorlm.errors import ConfigError, DataError
from vectorlm.preprocess import prepare_config

ROOT = Path(__file__).parents[2]
BOS, EOS, IGNORE = 0, 1, -100


def jsonl(path: Path, rows: list[Any]) -> Path:
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in TEXTS * 3])


def rows_of(config: Config) -> datasets.Dataset:
    assert config.dataset_preprocess is not None
    return datasets.load_from_disk(config.dataset_preprocess.save_path)


def flat(rows: datasets.Dataset, column: str) -> list[int]:
    return [value for row in rows[column] for value in row]


def test_full_rows_are_all_tokens_of_all_documents_in_order(
    make_config: MakeConfig, corpus: Path, tokenizer: TextTokenizer
) -> None:
    config = make_config(corpus, max_seq_len=16)
    (manifest,) = prepare_config(config)
    expected = [[BOS, *ids_of(tokenizer, text), EOS] for text in TEXTS * 3]
    rows = rows_of(config)
    assert flat(rows, "input_ids") == [token for document in expected for token in document]
    learned = sum(label != IGNORE for label in flat(rows, "labels"))
    assert manifest.supervised_tokens == learned
    assert (manifest.documents, manifest.tokens) == (15, len(flat(rows, "input_ids")))


def test_best_fit_keeps_every_token_of_every_document(
    make_config: MakeConfig, corpus: Path, tokenizer: TextTokenizer
) -> None:
    config = make_config(corpus, max_seq_len=64, packing_type="best_fit")
    (manifest,) = prepare_config(config)
    expected = [token for text in TEXTS * 3 for token in [BOS, *ids_of(tokenizer, text), EOS]]
    rows = rows_of(config)
    assert sorted(flat(rows, "input_ids")) == sorted(expected)
    assert (manifest.documents, manifest.tokens) == (15, len(expected))
    assert {"seed": 42, "memory_mb": 300}.items() <= manifest.options.items()
    starts = [row["input_ids"][at] for row in rows for at in row["boundaries"]]
    assert starts.count(BOS) == 15


def test_the_engine_and_its_reason_are_told(
    make_config: MakeConfig, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_config(make_config(corpus))
    said = capsys.readouterr().out
    assert said.count("Encoding with fastokens: ids equal to those of tokenizers") == 1


def test_an_engine_that_differs_later_on_is_left_and_all_begun_anew(
    make_config: MakeConfig,
    tmp_path: Path,
    tokenizer: TextTokenizer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [f"text {n}" for n in range(40)]
    expected = [token for text in texts for token in [BOS, *ids_of(tokenizer, text), EOS]]
    true = engine.encode_fast

    def wrong(fast: Any, some: list[str]) -> engine.Flat:
        ids, offsets = true(fast, some)
        return (ids + 1 if texts[20] in some else ids), offsets

    monkeypatch.setattr(engine, "encode_fast", wrong)
    monkeypatch.setattr(readers, "BATCH_BYTES", 1)
    fresh = replace(tokenizer)
    fresh.next_look = 21
    monkeypatch.setattr(preprocess, "load_tokenizer", lambda model: fresh)
    config = make_config(jsonl(tmp_path / "c.jsonl", [{"text": text} for text in texts]))
    prepare_config(config)
    assert flat(rows_of(config), "input_ids") == expected
    said = capsys.readouterr().out
    assert (
        "prepared is begun anew, with tokenizers: fastokens gives other ids for 'text 20'" in said
    )
    assert "Encoding with tokenizers: fastokens gives other ids" in said


@pytest.mark.parametrize("packing", ["partial", "truncate"])
def test_other_packings_reach_the_folder(
    packing: str, make_config: MakeConfig, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(corpus, max_seq_len=16, packing_type=packing)
    (manifest,) = prepare_config(config)
    rows = rows_of(config)
    assert manifest.rows == len(rows)
    assert manifest.longest_row == max(len(ids) for ids in rows["input_ids"]) == 16
    said = capsys.readouterr().out
    what = "left out (packing_type: truncate)" if packing == "truncate" else "into pieces that"
    assert what in said
    long = sum(len(text) > 100 for text in TEXTS * 3)
    assert 0 < long <= manifest.cut_documents < 15


def test_rows_that_the_model_cannot_take_are_refused_first(
    make_config: MakeConfig, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tokenizer_folder, model)
    config = make_config(corpus, max_seq_len=64, model=model)
    limit = {"max_position_embeddings": 32}
    for content in (limit, {"text_config": limit}):
        (model / "config.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=r"max_seq_len: 64 is more than the 32 positions"):
            prepare_config(config)
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    assert prepare_config(config)


def test_none_stops_at_a_long_document(make_config: MakeConfig, corpus: Path) -> None:
    with pytest.raises(DataError, match=r"corpus.jsonl:1: the document has \d+ tokens"):
        prepare_config(make_config(corpus, packing_type="none", skip_bad_rows=True))


BAD = ["{broken", {"txt": "a"}, {"text": 3}, {"text": " "}, {"text": "no mark"}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_row_stops_with_its_place(bad: Any, make_config: MakeConfig, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", [{"text": "a##b"}, bad, {"text": "c##d"}])
    with pytest.raises(DataError, match=r"c.jsonl:2: [\s\S]*skip_bad_rows: true"):
        prepare_config(make_config(path, separator="##"))
    assert not (tmp_path / "prepared").exists()


def test_bad_rows_are_skipped_counted_and_the_first_shown(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "c.jsonl", [{"text": "a##b"}, *BAD, {"text": ""}, {"text": "c##d"}])
    (manifest,) = prepare_config(make_config(path, separator="##", skip_bad_rows=True))
    assert manifest.documents == 2
    assert manifest.skipped == {
        "broken JSON": 1,
        "field absent": 1,
        "not a string": 1,
        "empty": 2,
        "separator absent": 1,
    }
    said = capsys.readouterr().out
    assert "2 empty" in said
    # One of each kind is shown; all are listed, for the user alone.
    assert sum(f"    {path}:{line}: " in said for line in range(1, 9)) == len(manifest.skipped)
    listed = tmp_path / "prepared" / "refused.jsonl"
    assert f"6 of 8 rows (75.0%), listed in {listed}" in said
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(row["line"] for row in rows) == [2, 3, 4, 5, 6, 7]
    assert rows[0]["source"] == str(path)
    assert Counter(row["reason"] for row in rows) == manifest.skipped
    assert all(row["detail"] for row in rows)
    assert listed.stat().st_mode & 0o777 == 0o600


def test_nothing_left_is_an_error(make_config: MakeConfig, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", ["{", "["])
    with pytest.raises(DataError, match=r"nothing to learn \(skipped: 2 broken JSON\)"):
        prepare_config(make_config(path, skip_bad_rows=True))
    with pytest.raises(DataError, match="it is empty"):
        prepare_config(make_config(jsonl(tmp_path / "e.jsonl", [])))
    assert not (tmp_path / "prepared").exists()


def test_evaluation_data_is_prepared_with_the_same_options(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "both"
    parts = {n: datasets.Dataset.from_dict({"text": [f"{n} text"]}) for n in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(folder)
    save = str(tmp_path / "eval")
    config = make_config(folder, split="train", eval_split="test", eval_save_path=save)
    train, evaluation = prepare_config(config)
    assert train.source_sha256 != evaluation.source_sha256
    assert {**train.options, "split": "test"} == evaluation.options
    assert read_manifest(save) == evaluation


def test_mistakes_in_evaluation_data_come_before_any_work(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    config = make_config(corpus, eval_load_path="no/such/file", eval_save_path="e")
    with pytest.raises(DataError, match="no/such/file"):
        prepare_config(config)
    assert not (tmp_path / "prepared").exists()


def test_the_section_is_needed(make_config: MakeConfig, corpus: Path) -> None:
    config = make_config(corpus).model_copy(update={"dataset_preprocess": None})
    with pytest.raises(ConfigError, match="dataset_preprocess"):
        prepare_config(config)


# --- again --------------------------------------------------------------------------


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def refuse(*_: object) -> None:
        raise AssertionError("tokenized although nothing changed")

    monkeypatch.setattr(TextTokenizer, "encode_flat", refuse)
    return monkeypatch


def test_a_second_time_does_nothing(
    make_config: MakeConfig,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    config = make_config(corpus)
    first = prepare_config(config)
    os.utime(corpus, (1, 1))
    request.getfixturevalue("no_encoding")
    capsys.readouterr()
    assert prepare_config(config) == first
    said = f"is up to date ({first[0].rows} rows, {first[0].tokens} tokens): nothing to do"
    assert said in capsys.readouterr().out


def test_a_change_of_source_options_or_tokenizer_prepares_anew(
    make_config: MakeConfig,
    corpus: Path,
    tmp_path: Path,
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = prepare_config(make_config(corpus))[0]
    jsonl(corpus, [{"text": text} for text in TEXTS])
    shorter = again(make_config(corpus), capsys, "the source's contents changed")
    assert shorter.documents == 5 < made.documents
    again(make_config(corpus, max_seq_len=8), capsys, "max_seq_len was 16 and is 8")
    model = shutil.copytree(tokenizer_folder, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"eos_token": "<s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    changed = make_config(corpus, max_seq_len=8, model=model)
    again(changed, capsys, "the tokenizer changed")
    next((tmp_path / "prepared").glob("*.arrow")).unlink()
    again(changed, capsys, "its files are damaged")


def again(config: Config, capsys: pytest.CaptureFixture[str], reason: str) -> Manifest:
    capsys.readouterr()
    (manifest,) = prepare_config(config)
    assert f"is prepared anew: {reason}\n" in capsys.readouterr().out
    assert config.dataset_preprocess is not None
    assert read_manifest(config.dataset_preprocess.save_path) == manifest
    return manifest


def test_the_same_input_gives_the_same_bytes(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    for name in "ab":
        prepare_config(make_config(corpus, save_path=str(tmp_path / name)))
    files = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert [p.name for p in files[0]] == [p.name for p in files[1]]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


@pytest.mark.parametrize("name", ["prepared", "eval"])
def test_a_folder_of_someone_else_is_refused_before_any_work(
    name: str,
    make_config: MakeConfig,
    corpus: Path,
    tmp_path: Path,
    no_encoding: pytest.MonkeyPatch,
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("mine")
    evaluation = {"eval_load_path": str(corpus), "eval_save_path": str(tmp_path / "eval")}
    with pytest.raises(DataError, match="left alone"):
        prepare_config(make_config(corpus, **evaluation))


def test_a_source_that_changes_under_the_run_is_refused(
    make_config: MakeConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.Progress, "show", lambda *_: jsonl(corpus, [{"text": "another"}]))
    with pytest.raises(DataError, match=r"corpus.jsonl: changed while it was read"):
        prepare_config(make_config(corpus))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_a_tokenizer_without_bos_is_said_once(
    make_config: MakeConfig,
    corpus: Path,
    tokenizer: TextTokenizer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without = changed(tokenizer, bos_id=None, sha256="other")
    monkeypatch.setattr(preprocess, "load_tokenizer", lambda model: without)
    config = make_config(corpus, eval_load_path=str(corpus), eval_save_path=f"{corpus}-eval")
    prepare_config(config)
    assert capsys.readouterr().out.count("no BOS token") == 1


def test_progress_says_rate_and_time_left(
    make_config: MakeConfig,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    prepare_config(make_config(corpus))
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "left" in x)
    assert line.startswith("training data: 100%, ")
    assert "documents/s, " in line
    assert line.endswith("tokens/s, about 0:00:00 left")


def test_time_left_is_of_what_this_run_has_done() -> None:
    """A run that goes on begins somewhere in the middle."""
    one = progress.Progress("data")
    one.update(1, 10, 0.7)
    assert one.first is not None
    start, begun = one.first
    assert (begun, one.left(start + 1, begun)) == (0.7, "")
    assert one.left(start + 10, 0.8) == ", about 0:00:20 left"


def test_on_a_terminal_progress_is_a_bar(
    make_config: MakeConfig,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    prepare_config(make_config(corpus))
    assert "documents/s" in capsys.readouterr().out


# --- whole processes ----------------------------------------------------------------

# Small buffers, so that a small corpus fills every one of them.
SCRIPT = """
import re, sys
from pathlib import Path
from vectorlm import preprocess
from vectorlm.config.schema import Config
from vectorlm import readers
from vectorlm.data import best_fit, progress, store

load_path, save_path, packing, model, workers = sys.argv[1:]
progress.PLAIN_EVERY_S = 0.0
readers.CHUNK_BYTES = readers.BATCH_BYTES = store.BATCH_TOKENS = 1 << 16
store.SHARD_BYTES = 1 << 18
best_fit.BYTES_A_TOKEN = 4000
preprocess.prepare_config(Config.model_validate({
    "model": model,
    "train_parameters": {"output_dir": "out", "max_seq_len": 128},
    "dataset_preprocess": {
        "load_path": load_path, "save_path": save_path, "packing_type": packing,
        "workers": int(workers), "memory_mb": 300},
}))
# Not getrusage: its peak includes that of the process that started this one.
print("peak_kib", *re.findall(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()))
"""


def start(*arguments: Path | str, workers: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, *map(str, arguments), str(workers)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return out


def big(path: Path, rows: int) -> Path:
    """About 600 characters a row, of any length, as JSON or JSON lines."""
    lengths = random.Random(0).choices(range(1, 27), k=rows)
    text = "The quick brown fox jumps over the lazy dog. "
    lines = [json.dumps({"text": f"{n} " + text * length}) for n, length in enumerate(lengths)]
    inner = ",\n" if path.suffix == ".json" else "\n"
    content = inner.join(lines)
    path.write_text(f"[{content}]" if path.suffix == ".json" else content)
    return path


@pytest.fixture
def model(tokenizer_folder: Path) -> Path:
    """Its tokenizer is in the cache, so that no process imports transformers."""
    load_tokenizer(str(tokenizer_folder))
    return tokenizer_folder


def peak_mib(path: Path, rows: int, packing: str, model: Path) -> float:
    out = finished(start(big(path, rows), path.parent / f"out{rows}", packing, model))
    return int(out.split("peak_kib")[1]) / 1024


@pytest.mark.parametrize(("suffix", "packing"), [("jsonl", "full"), ("json", "best_fit")])
def test_memory_does_not_grow_with_the_corpus(
    suffix: str, packing: str, tmp_path: Path, model: Path
) -> None:
    path = tmp_path / f"c.{suffix}"
    once = peak_mib(path, 3000, packing, model)
    fourfold = peak_mib(path, 12_000, packing, model)
    # The larger corpus has 16 MiB of rows more.
    assert fourfold < once + 8


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("packing", ["full", "best_fit"])
def test_the_number_of_workers_changes_nothing(packing: str, tmp_path: Path, model: Path) -> None:
    path = big(tmp_path / "c.jsonl", 1000)
    for workers in (1, 3):
        finished(start(path, tmp_path / f"d{workers}", packing, model, workers=workers))
    assert contents(tmp_path / "d1") == contents(tmp_path / "d3")


@pytest.mark.parametrize("packing", ["full", "best_fit", "partial"])
def test_a_run_that_is_killed_again_and_again_makes_the_same_bytes(
    packing: str, tmp_path: Path, model: Path
) -> None:
    path = big(tmp_path / "c.jsonl", 6000)
    finished(start(path, tmp_path / "whole", packing, model))
    chance = random.Random(packing)
    for _ in range(3):
        kill_midway(start(path, tmp_path / "d", packing, model), tmp_path, chance)
        assert not (tmp_path / "d").exists()
        assert {".d.lock", ".d.tmp"} <= {p.name for p in tmp_path.iterdir()}
    said = finished(start(path, tmp_path / "d", packing, model))
    assert "d: going on with an interrupted run, from " in said
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "d", "whole"]


def kill_midway(process: subprocess.Popen[str], folder: Path, chance: random.Random) -> None:
    """After it has recorded how far it is a few times, and a little more."""
    assert process.stdout is not None
    records = {state_of(folder)}
    wanted = chance.randrange(2, 5)
    while len(records) < wanted:
        assert process.poll() is None
        time.sleep(0.001)
        records.add(state_of(folder))
    time.sleep(chance.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def state_of(folder: Path) -> int | None:
    try:
        return (folder / ".d.tmp" / "progress.npz").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_an_interrupted_run_of_another_source_is_not_gone_on_with(
    tmp_path: Path, model: Path
) -> None:
    path = big(tmp_path / "c.jsonl", 6000)
    arguments = (path, tmp_path / "d", "truncate", model)
    kill_midway(start(*arguments), tmp_path, random.Random(0))
    big(path, 100)
    said = finished(start(*arguments))
    assert "going on with" not in said
    assert "d: an unfinished attempt was found; beginning again, because its source, tok" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "d"]
    assert read_manifest(tmp_path / "d").rows == 100


def test_an_attempt_that_ended_early_is_told_of(
    make_config: MakeConfig, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / ".prepared.tmp"
    left.mkdir()
    (left / "data-00000.arrow").write_bytes(b"half of it")
    prepare_config(make_config(corpus))
    words = "prepared: an unfinished attempt was found; beginning again, because it had not"
    assert words in capsys.readouterr().out
    prepare_config(make_config(corpus, max_seq_len=8))
    assert "unfinished" not in capsys.readouterr().out


def test_the_door_has_exit_codes_and_no_traceback(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {tokenizer_folder}\n"
        f"train_parameters: {{output_dir: {tmp_path}/out, max_seq_len: 16}}\n"
        f"dataset_preprocess: {{load_path: {corpus}, save_path: {tmp_path}/prepared}}\n"
    )
    door = [sys.executable, str(ROOT / "preprocess_data.py"), "--config_path", str(config), "--set"]
    bad = [*door, "dataset_preprocess.split=dev"]
    found = subprocess.run(bad, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "no split 'dev'" in found.stderr
    assert "Traceback" not in found.stderr
    packed = [*door, "dataset_preprocess.packing_type=full"]
    found = subprocess.run(packed, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert read_manifest(tmp_path / "prepared").documents == 15
