"""A file of the original VectorLM goes through all doors, unchanged but for its paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = ROOT / "tests" / "config" / "original.yaml"
LIMIT_S = 180


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("original")
    rows = {"text": [f"number {i}### Response: {i} and {i + 1}" for i in range(40)]}
    splits = {name: datasets.Dataset.from_dict(rows) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(folder / "raw")
    return {
        "path/to/model/save/dir": folder / "output",
        "path/to/model/": model_folder("llama"),
        "path/to/train/ds": folder / "train",
        "path/to/eval/ds": folder / "test",
        "path/to/unprocessed/dataset": folder / "raw",
        "path/to/processed/dataset/save": folder / "train",
    }


@pytest.fixture(scope="module")
def config(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = ORIGINAL.read_text()
    for placeholder, path in paths.items():
        text = text.replace(f" {placeholder}\n", f" {path}\n")
    text = text.replace("max_seq_len: 1024", "max_seq_len: 48")  # what the tiny model has room for
    assert "path/to" not in text
    file = tmp_path_factory.mktemp("config") / "original.yaml"
    file.write_text(text)
    return file


def door(*words: str) -> str:
    """What a door of the original says; its two names for the file's flag are used."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_doors(config: Path, paths: dict[str, Path]) -> None:
    door("preprocess_data.py", "--config_path", str(config))
    evaluation = [
        "--set=dataset_preprocess.split=test",
        f"--set=dataset_preprocess.save_path={paths['path/to/eval/ds']}",
    ]
    door("preprocess_data.py", "--config_path", str(config), *evaluation)
    prepared = datasets.load_from_disk(str(paths["path/to/train/ds"]))
    assert {"input_ids", "labels", "id"} <= set(prepared.column_names)

    said = door("examples/llama_example.py", "--yaml_path", str(config))
    output = paths["path/to/model/save/dir"]
    assert "bf16-mixed" in said
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == 1.0
    assert {"loss", "eval_loss", "grad_norm", "lr", "tokens", "tokens_per_s", "seconds"} <= set(
        last
    )

    door("-m", "vectorlm.utils.convert_to_hf", "--config_path", str(config))
    assert (output / "hf-model" / "adapter_model.safetensors").exists()
