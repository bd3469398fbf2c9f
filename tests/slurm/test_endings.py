"""Jobs that fail for real: each ends within a minute, says why, and starts again only when that can
help.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.cases import MAX_SEQ_LEN, make_rows, prepared
from tests.slurm.lab import Lab
from tests.slurm.runs import JobRun

SETTINGS = {"epochs": 20, "logging_steps": 1000, "save_frequency": 0.25}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("endings")
    model = model_folder("llama")
    return {
        "model": model,
        "data": prepared(folder / "data", model, make_rows(160)),
        "eval": prepared(folder / "eval", model, make_rows(4, seed=1)),
    }


def why(run: JobRun, what: str) -> str:
    return run.lab.run("vectorlm", "why", what, cwd=run.folder).stdout


def test_a_killed_rank(slurm: Lab, shared: dict[str, Any], tmp_path: Path) -> None:
    """`slurm.requeue: false`, so that the end can be looked at."""
    run = JobRun(slurm, tmp_path, shared, {"requeue": False}, **SETTINGS)
    run.submit()
    run.until_saved()
    killed = time.monotonic()
    run.kill(1)
    assert slurm.wait(run.job) == "FAILED"
    assert time.monotonic() - killed < 60
    assert not list(run.pids())
    assert "not started again: slurm.requeue is false" in run.log
    for what in (run.job, str(run.output)):
        said = why(run, what)
        assert "rank 1" in said.splitlines()[0], said
        assert "SIGKILL" in said.splitlines()[0], said


def test_what_would_fail_again_is_not_started_again(
    slurm: Lab, shared: dict[str, Any], tmp_path: Path
) -> None:
    """A wrong configuration, a loss that is no number, a full disk."""
    broken = JobRun(slurm, tmp_path / "config", shared, {}, **SETTINGS)
    nan = JobRun(slurm, tmp_path / "nan", not_a_number(shared, tmp_path), {}, **SETTINGS)
    disk = JobRun(slurm, tmp_path / "disk", shared, {}, **SETTINGS)
    full = disk.output / "checkpoints"
    full.mkdir(parents=True)
    disk.change(slurm={**disk.slurm, "setup": [f"mount -t tmpfs -o size=100k none {full}"]})
    for run in (broken, nan, disk):
        run.submit("--hold")
    broken.change(train_parameters={"output_dir": str(broken.output), "max_seq_len": "many"})
    expected = {
        broken: ("max_seq_len", "docs/troubleshooting.md"),
        nan: ("the loss is not a finite number on rank", "optimizer.lr"),
        disk: ("disk", "room"),
    }
    for run, (cause, cure) in expected.items():
        slurm.run("scontrol", "release", run.job)
        assert slurm.wait(run.job) == "FAILED", slurm.account(run.job)
        assert run.restarts() == 0
        assert "not started again: it would end the same way again" in run.log, run.log
        said = why(run, run.job)
        assert cause in said, said
        assert cure in said, said


def not_a_number(shared: dict[str, Any], folder: Path) -> dict[str, Any]:
    model = folder / "nan model"
    shutil.copytree(shared["model"], model)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][:] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return {**shared, "model": model}


def test_out_of_memory(slurm: Lab, shared: dict[str, Any], tmp_path: Path) -> None:
    """What one layer makes of a micro-batch (24 GB) is refused: named with the batch, and for
    good.
    """
    large = {**shared, **wide_layers(shared, tmp_path)}
    run = JobRun(slurm, tmp_path, large, {"setup": ["ulimit -v 20000000"]}, **SETTINGS)
    run.change(dataset={"train_ds": str(large["data"]), "train_bs": 512})
    run.submit()
    assert slurm.wait(run.job) == "FAILED", slurm.account(run.job)
    assert run.restarts() == 0
    assert "not started again: it would end the same way again" in run.log, run.log
    said = why(run, run.job)
    assert "memory" in said.splitlines()[0], said
    assert f"{512 * MAX_SEQ_LEN} tokens" in said, said
    assert "dataset.train_bs" in said, said


def wide_layers(shared: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Layers 240,000 wide inside, and rows that are full."""
    model = folder / "wide model"
    shutil.copytree(shared["model"], model)
    described = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    width = described["intermediate_size"]
    for name, tensor in weights.items():
        short = [0 if size != width else 240_000 - width for size in tensor.shape]
        if any(short):
            by = [0, short[1], 0, short[0]]
            weights[name] = torch.nn.functional.pad(tensor, by).contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    described["intermediate_size"] = 240_000
    (model / "config.json").write_text(json.dumps(described))
    rows = [[[3] * MAX_SEQ_LEN]] * 1024
    return {"model": model, "data": prepared(folder / "full rows", model, rows)}


def test_a_cancelled_job_stays_cancelled(
    slurm: Lab, shared: dict[str, Any], tmp_path: Path
) -> None:
    run = JobRun(slurm, tmp_path, shared, {}, **SETTINGS)
    run.submit()
    run.until_saved()
    slurm.cancel(run.job)
    assert slurm.wait(run.job) == "CANCELLED"
    time.sleep(8)  # a requeued job would be back by now
    assert slurm.state(run.job) == "CANCELLED"
    assert not slurm.queue()
    assert "cancelled" in why(run, run.job).splitlines()[0]
