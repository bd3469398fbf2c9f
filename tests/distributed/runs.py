"""Runs started through the user's door, to be watched, interrupted and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.distributed.cases import MAX_SEQ_LEN
from tests.distributed.ranks import LIMIT_S, ROOT
from vectorlm import checkpoint

STEPS = 20  # 2 epochs of 40 rows, 4 a step


class Run:
    """One configuration on disk, which tests start as often as they like."""

    def __init__(self, folder: Path, shared: dict[str, Any], **train: Any) -> None:
        self.folder = folder
        self.output = folder / "output"
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "output_dir": str(self.output),
            "max_seq_len": MAX_SEQ_LEN,
            "epochs": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 2,
            "save_frequency": 0.2,
            "optimizer": {"lr": 5e-3},
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            **train,
        }
        dataset = {"train_ds": str(shared["data"]), "eval_ds": str(shared["eval"])}
        config = {"model": str(shared["model"]), "train_parameters": settings, "dataset": dataset}
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config))

    def start(self, ranks: int = 2, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-m", "vectorlm.cli", "train"]
        command += ["--config", str(self.config), "--nproc-per-node", str(ranks)]
        command += [f"--set={override}" for override in overrides]
        with open(self.folder / "log", "a") as log:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, text=True, env=_environment()
            )

    def finish(self, ranks: int = 2, *overrides: str) -> int:
        return self.start(ranks, *overrides).wait(timeout=LIMIT_S)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def steps(self) -> list[dict[str, Any]]:
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def facts(self) -> list[tuple[Any, ...]]:
        """What must not depend on interruptions, exactly."""
        keys = ("step", "epoch", "loss", "grad_norm", "lr", "tokens", "eval_loss")
        return [tuple(step[key] for key in keys) for step in self.steps()]

    def model(self) -> dict[str, torch.Tensor]:
        return torch.load(self.output / "final-model" / "model.bin", weights_only=True)

    def last_files(self) -> dict[str, str]:
        """The hashes of the last checkpoint's tensors: parameters, optimizer state, RNG."""
        return self.files(self.output / "checkpoints" / f"step_{STEPS:08d}")

    def files(self, folder: Path) -> dict[str, str]:
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        return {n: e["sha256"] for n, e in manifest["files"].items() if n.endswith(".distcp")}


def _environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} too early"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def logged(run: Run, step: int) -> Callable[[], bool]:
    path = run.output / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step},' in path.read_text()


def saving(run: Run) -> Callable[[], bool]:
    return lambda: any((run.output / "checkpoints").glob(f"{checkpoint.UNFINISHED}*"))


def saved(run: Run, step: int) -> Callable[[], bool]:
    return lambda: (run.output / "checkpoints" / f"step_{step:08d}").exists()


def children(launcher: int) -> list[str]:
    return Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()


def rank_pid(launcher: int, rank: int = 1) -> int:
    for child in children(launcher):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"rank {rank} is not among {children(launcher)}")
