"""Preprocessing from end to end: rows from every source, bad rows, doing nothing, dying, memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.data.conftest import TEXTS, MakeConfig
from vectorlm import preprocess
from vectorlm.config.schema import Config
from vectorlm.data.store import Manifest, read_manifest
from vectorlm.data.tokenize import TextTokenizer
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
    expected = [[BOS, *ids.tolist(), EOS] for ids in tokenizer.encode(TEXTS * 3)]
    rows = rows_of(config)
    assert flat(rows, "input_ids") == [token for document in expected for token in document]
    learned = sum(label != IGNORE for label in flat(rows, "labels"))
    assert manifest.supervised_tokens == learned
    assert (manifest.documents, manifest.tokens) == (15, len(flat(rows, "input_ids")))


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
    assert ("cut off" in said) == (packing == "truncate")


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
    assert all(f"c.jsonl:{line}: " in said for line in (2, 3, 4))
    assert "2 empty" in said


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

    monkeypatch.setattr(TextTokenizer, "encode", refuse)
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
    monkeypatch.setattr(
        preprocess.Progress, "show", lambda *_: jsonl(corpus, [{"text": "another"}])
    )
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
    without = TextTokenizer(tokenizer.backend, None, tokenizer.eos_id, "other")
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
    monkeypatch.setattr(preprocess, "PLAIN_EVERY_S", 0.0)
    prepare_config(make_config(corpus))
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "left" in x)
    assert line.startswith("training data: 100%, ")
    assert "documents/s, " in line
    assert line.endswith("tokens/s, about 0:00:00 left")


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

# Loads tokenizer.json by itself: importing transformers would cost seconds and hide the memory.
SCRIPT = """
import re, sys
from pathlib import Path
from tokenizers import Tokenizer
from vectorlm import preprocess
from vectorlm.config.schema import Config
from vectorlm.data import readers, store, tokenize
from vectorlm.data.tokenize import TextTokenizer

load_path, save_path, packing, model = sys.argv[1:]
backend = Tokenizer.from_file(model + "/tokenizer.json")
preprocess.load_tokenizer = lambda name: TextTokenizer(backend, 0, 1, "t")
preprocess.PLAIN_EVERY_S = 0.0
# Small, so that a small corpus fills every buffer.
readers.CHUNK_BYTES = tokenize.BATCH_CHARACTERS = store.BATCH_TOKENS = 1 << 16
preprocess.prepare_config(Config.model_validate({
    "model": model,
    "train_parameters": {"output_dir": "out", "max_seq_len": 128},
    "dataset_preprocess": {
        "load_path": load_path, "save_path": save_path, "packing_type": packing},
}))
# Not getrusage: its peak includes that of the process that started this one.
print("peak_kib", *re.findall(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()))
"""


def start(*arguments: Path | str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, *map(str, arguments)],
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
    """About 600 characters a row, as JSON or JSON lines."""
    line = json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 13})
    inner = ",\n" if path.suffix == ".json" else "\n"
    content = inner.join([line] * rows)
    path.write_text(f"[{content}]" if path.suffix == ".json" else content)
    return path


def peak_mib(path: Path, rows: int, model: Path) -> float:
    out = finished(start(big(path, rows), path.parent / f"out{rows}", "full", model))
    return int(out.split("peak_kib")[1]) / 1024


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_memory_does_not_grow_with_the_corpus(
    suffix: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    path = tmp_path / f"c.{suffix}"
    once = peak_mib(path, 1000, tokenizer_folder)
    eightfold = peak_mib(path, 8000, tokenizer_folder)
    # The larger corpus is 5 MiB of text and, prepared, 20 MiB of rows.
    assert eightfold < once + 4


def test_a_killed_run_leaves_nothing_half_and_the_next_one_works(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    path = big(tmp_path / "c.jsonl", 40_000)
    arguments = (path, tmp_path / "d", "truncate", tokenizer_folder)
    process = start(*arguments)
    assert process.stdout is not None
    assert "left" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [p.name for p in tmp_path.iterdir() if p != path] == [f".d.tmp-{process.pid}"]
    big(path, 100)
    finished(start(*arguments))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "d"]
    assert read_manifest(tmp_path / "d").rows == 100


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
