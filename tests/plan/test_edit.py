"""Keys changed in a YAML file: all that is not meant stays as it is."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import pytest

from vectorlm.config.load import load_config
from vectorlm.errors import ConfigError
from vectorlm.plan.edit import apply, edited

FILE = """\
# my run
model: m                      # a model
train_parameters:
  output_dir: o
  max_seq_len:    4096        # long
  optimizer:
    lr: 1.0e-5
    betas: [0.9, 0.95]   # as they are
  # the end of it

dataset: {train_ds: d, train_bs: 4}
# a last word
"""


def changed_lines(old: str, new: str) -> list[str]:
    lines = difflib.ndiff(old.splitlines(), new.splitlines())
    return [line for line in lines if line[0] in "+-"]


@pytest.mark.parametrize(
    ("key", "value", "lines"),
    [
        (
            "train_parameters.max_seq_len",
            "2048",
            ["-   max_seq_len:    4096        # long", "+   max_seq_len:    2048        # long"],
        ),
        (
            "train_parameters.use_activation_checkpointing",
            "true",
            ["+   use_activation_checkpointing: true"],
        ),
        ("train_parameters.optimizer.name", "SGD", ["+     name: SGD"]),
        (
            "train_parameters.optimizer.betas",
            None,
            ["-     betas: [0.9, 0.95]   # as they are"],
        ),
        (
            "dataset.train_bs",
            "1",
            [
                "- dataset: {train_ds: d, train_bs: 4}",
                "+ dataset: {train_ds: d, train_bs: 1}",
            ],
        ),
        (
            "dataset.eval_bs",
            "2",
            [
                "- dataset: {train_ds: d, train_bs: 4}",
                "+ dataset: {eval_bs: 2, train_ds: d, train_bs: 4}",
            ],
        ),
        ("slurm.nodes", "2", ["+ slurm:", "+   nodes: 2"]),
        ("train_parameters.epochs", None, []),
    ],
)
def test_one_key(key: str, value: str | None, lines: list[str]) -> None:
    assert changed_lines(FILE, edited(FILE, key.split("."), value)) == lines


def test_a_section_replaced_by_a_value_keeps_the_comments_behind_it() -> None:
    new = edited(FILE, ["train_parameters", "optimizer"], "{name: SGD}")
    assert "  optimizer: {name: SGD}\n  # the end of it\n" in new
    assert "betas" not in new


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE, encoding="utf-8")
    path.chmod(0o640)
    return path


PATCH: dict[str, Any] = {
    "train_parameters.use_activation_checkpointing": True,
    "train_parameters.lora_peft_config": {"r": 16, "target_modules": "all-linear"},
    "train_parameters.optimizer.betas": None,
    "dataset.train_bs": 1,
}


def test_a_patch_is_what_is_read_back(file: Path) -> None:
    apply(str(file), [], PATCH)
    train = load_config(file).train_parameters
    assert train.use_activation_checkpointing
    assert train.lora_peft_config == {"r": 16, "target_modules": "all-linear"}
    assert train.optimizer.betas == (0.9, 0.999)
    text = file.read_text()
    for comment in ("# my run", "# a model", "# long", "# the end of it", "# a last word"):
        assert comment in text
    assert file.stat().st_mode & 0o777 == 0o640
    assert os.listdir(file.parent) == ["run.yaml"]


def test_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    apply(str(link), [], {"dataset.train_bs": 2})
    assert link.is_symlink()
    assert "train_bs: 2" in file.read_text()


def test_what_set_hides_cannot_be_written(file: Path) -> None:
    """The file would say one thing and the run do another."""
    with pytest.raises(ConfigError, match="could not be changed") as caught:
        apply(str(file), ["dataset.train_bs=8"], {"dataset.train_bs": 1})
    assert "by hand: dataset.train_bs: 1" in str(caught.value)
    assert file.read_text() == FILE
    assert os.listdir(file.parent) == ["run.yaml"]


def test_an_anchor_that_others_use_is_not_touched(tmp_path: Path) -> None:
    text = FILE.replace("dataset: {train_ds: d, train_bs: 4}", "dataset: &d {train_ds: d}")
    text = text.replace("# a last word", "slurm: {preprocess: {cpus: 1}}")
    path = tmp_path / "run.yaml"
    path.write_text(text)
    apply(str(path), [], {"dataset.train_bs": 1})
    loaded = load_config(path)
    assert loaded.dataset
    assert loaded.dataset.train_bs == 1


def test_a_patch_that_makes_no_sound_file_changes_nothing(file: Path) -> None:
    with pytest.raises(ConfigError, match="it is as it was"):
        apply(str(file), [], {"train_parameters.shard_group_size": 2})
    assert file.read_text() == FILE
