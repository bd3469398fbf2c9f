"""What may change between a checkpoint and its continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vectorlm.config.continuity import FIXED, STEERING, among, changes
from vectorlm.config.load import config_to_dict, load_config
from vectorlm.config.schema import Config


def config(folder: Path, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_text("model: m\ntrain_parameters: {output_dir: o, max_seq_len: 8}\n")
    return load_config(path, overrides)


def state(before: Config) -> dict[str, Any]:
    train = before.train_parameters
    return {"config": config_to_dict(before), "precision": train.effective_precision}


def test_nothing(tmp_path: Path) -> None:
    assert changes(config(tmp_path), state(config(tmp_path))) == {}


def test_fixed_and_steering(tmp_path: Path) -> None:
    now = config(
        tmp_path, "model=n", "train_parameters.epochs=3", "train_parameters.optimizer.lr=1"
    )
    found = changes(now, state(config(tmp_path)))
    assert among(found, FIXED) == ["model (was m, is n)"]
    steering = ["train_parameters.epochs (was 1, is 3)", "train_parameters.optimizer.lr (was 2e-05"]
    told = among(found, STEERING)
    assert told[0] == steering[0]
    assert told[1].startswith(steering[1])


def test_two_ways_to_say_one_precision(tmp_path: Path) -> None:
    before = config(tmp_path, "train_parameters.use_mp=true")
    now = config(tmp_path, "train_parameters.precision=bf16-mixed")
    assert among(changes(now, state(before)), FIXED) == []
    assert among(changes(config(tmp_path), state(before)), FIXED)


def test_a_run_begun_before_there_was_a_key(tmp_path: Path) -> None:
    """Its rows came in the order that the key's absence stood for."""
    data = ["dataset.train_ds=d"]
    before = state(config(tmp_path, *data))
    del before["config"]["dataset"]["longest_first"]
    assert changes(config(tmp_path, *data, "dataset.longest_first=false"), before) == {}
    assert among(changes(config(tmp_path, *data), before), FIXED) == [
        "dataset.longest_first (was False, is True)"
    ]
