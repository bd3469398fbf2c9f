"""`python -m vectorlm.prepared` says what preprocessing would do, without doing it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.conftest import ModelFolder
from vectorlm import prepared
from vectorlm.config.load import load_config
from vectorlm.prepared import why_not
from vectorlm.preprocess import prepare_config


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def config_path(tmp_path: Path, model_folder: ModelFolder) -> Path:
    shutil.copytree(model_folder("llama"), tmp_path / "model")
    write_texts(tmp_path / "raw.jsonl", ["the fox", "the dog"])
    write_texts(tmp_path / "eval.jsonl", ["the river"])
    prepare = {
        "load_path": str(tmp_path / "raw.jsonl"),
        "save_path": str(tmp_path / "rows"),
        "eval_load_path": str(tmp_path / "eval.jsonl"),
        "eval_save_path": str(tmp_path / "eval"),
    }
    train = {"output_dir": str(tmp_path / "out"), "max_seq_len": 16}
    content = {"model": str(tmp_path / "model"), "train_parameters": train}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**content, "dataset_preprocess": prepare}))
    return path


def test_what_is_prepared_needs_nothing(config_path: Path) -> None:
    config = load_config(config_path)
    assert why_not(config) == f"{config_path.parent}/rows is not there yet"
    prepare_config(config)
    assert why_not(config) is None
    shutil.rmtree(config_path.parent / "eval")
    assert why_not(config) == f"{config_path.parent}/eval is not there yet"


def test_what_changed_is_told(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config_path.parent
    prepare_config(load_config(config_path))
    other = load_config(config_path, ["train_parameters.max_seq_len=8"])
    assert why_not(other) == f"{folder}/rows was prepared with other options"

    write_texts(folder / "eval.jsonl", ["the lake"])
    assert why_not(load_config(config_path)) == f"{folder}/eval: the source's contents changed"
    write_texts(folder / "eval.jsonl", ["the river"])

    tokenizer = json.loads((folder / "model/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new"] = len(tokenizer["model"]["vocab"]) + 3
    (folder / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    assert why_not(load_config(config_path)) == f"{folder}/rows: the tokenizer changed"

    monkeypatch.setattr(prepared, "SLOW_HASH_BYTES", 10)
    reason = why_not(load_config(config_path))
    assert reason is not None
    assert "is too large to be compared here" in reason


def test_the_door(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--config", str(config_path)]
    assert prepared.main(command) == 1
    assert capsys.readouterr().out == f"{config_path.parent}/rows is not there yet\n"
    prepare_config(load_config(config_path))
    capsys.readouterr()
    assert prepared.main(command) == 0
    assert capsys.readouterr().out == "The prepared data is up to date\n"
    (config_path.parent / "raw.jsonl").unlink()
    assert prepared.main(command) == 2
    assert "load_path: there is no file or folder" in capsys.readouterr().err
