"""A run without a model: a process that claims a folder, keeps its journal and logs steps through
the package's own means, as training does. Started by the tests of `status`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vectorlm.cluster import claim, journal
from vectorlm.config.schema import Config
from vectorlm.metrics import Metrics, Work

ROOT = Path(__file__).resolve().parents[2]


def command(folder: Path, **given: Any) -> list[str]:
    words = [sys.executable, "-m", "tests.cluster.actor", str(folder)]
    return words + [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def start(folder: Path, **given: Any) -> subprocess.Popen[bytes]:
    """It is there when its last step is saved."""
    process = subprocess.Popen(command(folder, **given), cwd=ROOT, env={**os.environ})
    deadline = time.monotonic() + 30
    last = manifest(folder, given.get("steps", 4))
    while not last.exists():
        assert process.poll() is None, "it has ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def manifest(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json"


def log(metrics: Metrics, step: int, **more: Any) -> None:
    values = {"step": step, "epoch": step / 10, "loss": 3 - step / 10, "lr": 1e-4, "tokens": 99}
    lap = {"grad_norm": 0.5, "tokens_per_s": 1500.0, "seconds": 2.0, "steps": 1}
    metrics.log({**values, **lap, **more})


def metrics_of(folder: Path) -> Metrics:
    train = {"output_dir": str(folder), "max_seq_len": 8}
    config = Config.model_validate({"model": "somewhere", "train_parameters": train})
    return Metrics(config, {}, first=True, ranks=1, work=Work(1.0, None))


def save(folder: Path, step: int) -> None:
    path = manifest(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def act(folder: Path, steps: int, total: int, wait_s: float, end: str) -> None:
    record = replace(journal.new_start("config.yaml"), hosts=["n1", "n1"])
    holder = claim.take(folder, record)
    holder.watch(lambda loss: os._exit(1))
    diary, record = journal.Journal.begin(folder, record)
    if record.job:
        journal.remember_job(record.job, folder, None)
    done = 0
    diary.started(replace(record, total_steps=total))
    metrics = metrics_of(folder)
    metrics.start(done, total)
    for step in range(1, steps + 1):
        log(metrics, step)
    save(folder, steps)
    time.sleep(wait_s)
    if end == "finished":
        (folder / "final-model").mkdir()
        diary.ended(journal.EndRecord(time.time(), "finished", total))
    holder.release()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--total", type=int, default=100)
    parser.add_argument("--wait-s", type=float, default=60)
    parser.add_argument("--end", default="finished")
    act(**vars(parser.parse_args()))
