"""Runs that cannot go on: all ranks stop, the message says why, and the last checkpoint is good."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.cases import epoch_order, make_rows, prepared
from tests.distributed.runs import Run
from vectorlm import checkpoint
from vectorlm.errors import EXIT_OK, EXIT_USER

ROWS = 40
BAD_TOKEN = 5


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("failures")
    model = model_folder("llama")
    return {
        "model": model,
        "data": prepared(folder / "data", model, make_rows(ROWS)),
        "eval": prepared(folder / "eval", model, make_rows(4, seed=1)),
    }


def test_a_loss_that_is_no_number(shared: dict[str, Any], tmp_path: Path) -> None:
    """One row, learned in step 4 by rank 1, holds a token whose embedding is not finite."""
    rows = [[[BAD_TOKEN + 1 if t == BAD_TOKEN else t for t in d] for d in r] for r in make_rows()]
    order = epoch_order(len(rows), seed=42, epoch=0)
    rows[order[3 * 2 + 1]] = [[7, BAD_TOKEN, 9, 10]]
    model = tmp_path / "model"
    shutil.copytree(shared["model"], model)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD_TOKEN] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    bad = {
        "model": model,
        "data": prepared(tmp_path / "data", model, rows),
        "eval": shared["eval"],
    }
    run = Run(tmp_path, bad, gradient_accumulation_steps=1, logging_steps=100, epochs=1)
    assert run.finish(2, "dataset.longest_first=false") == EXIT_USER, run.log
    message = "step 4: the loss is not a finite number on rank 1; all ranks stopped before the"
    assert run.log.count(message) == 1, run.log
    assert "Traceback" not in run.log
    newest = checkpoint.newest(run.output)
    assert newest is not None
    assert str(newest) in run.log
    assert checkpoint.read_state(newest)["step"] == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tiny model (about 0.5 MB), not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=900k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(shared: dict[str, Any], small_disk: Path) -> None:
    run = Run(small_disk, shared, epochs=1, logging_steps=100)
    began = time.monotonic()
    assert run.finish() == EXIT_USER, run.log
    assert time.monotonic() - began < 60
    assert run.log.count("the checkpoint could not be saved: the disk is full") == 1, run.log
    assert "Traceback" not in run.log
    assert [f.name for f in (run.output / "checkpoints").iterdir()] == ["step_00000002"]
    checkpoint.verify(run.output / "checkpoints" / "step_00000002")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_other_precisions_learn_and_resume(
    shared: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    """Interrupted by an end of epoch, then gone on with: the losses fall, the scaler comes back."""
    run = Run(tmp_path, shared, precision=precision, epochs=6, lr_scheduler_type="constant")
    assert run.finish(2, "train_parameters.epochs=3") == EXIT_OK, run.log
    assert run.finish() == EXIT_OK, run.log
    losses = [step["loss"] for step in run.steps()]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    newest = checkpoint.newest(run.output)
    assert newest is not None
    scaler = checkpoint.read_state(newest)["scaler"]
    assert bool(scaler) == (precision == "16-mixed")
    if scaler:
        assert scaler["_growth_tracker"] + 1 >= 60, "the scaler began anew at the second start"
    wanted = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {tensor.dtype for tensor in run.model().values()} == {wanted}
