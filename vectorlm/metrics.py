"""What the person sees and what is kept of a run: progress, metrics.jsonl, TensorBoard, W&B.
Floor 2.

Only the first rank writes. The other ranks hold a log too, which does nothing.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vectorlm.config.schema import Config
from vectorlm.errors import ConfigError

METRICS = "metrics.jsonl"
WANDB_ID = "wandb_run_id"
TOLD_WAIT = 0.01  # share of the time that training waits for data, above which the line says so


@dataclass(frozen=True)
class Work:
    """What MFU is measured against: operations a token, and the peak of all devices (None:
    unknown).
    """

    flops_per_token: float
    peak_flops: float | None


class Metrics:
    def __init__(
        self,
        config: Config,
        config_dict: dict[str, Any],
        first: bool,
        ranks: int,
        work: Work,
        before_writing: Callable[[], None] = lambda: None,
    ) -> None:
        self.first, self.ranks, self.work = first, ranks, work
        self._before_writing = before_writing
        self.folder = Path(config.train_parameters.output_dir)
        self._tokens = self._steps = 0
        self._since = time.monotonic()
        self._sinks: list[Any] = []
        self._progress: Progress | None = None
        self._total = 0
        self._mend = ""
        if not first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if config.enable_tensorboard_logging:
            self._sinks.append(_TensorBoard(self.folder))
        if config.enable_wandb_logging:
            self._sinks.append(_WandB(config, config_dict, self.folder))

    def say(self, text: str) -> None:
        """A line for the person, once for all ranks."""
        if self.first:
            console = self._progress.console if self._progress else _console()
            console.print(text, soft_wrap=True, markup=False, highlight=False)

    def start(self, done: int, total: int) -> None:
        """Begin at step `done`; lines of later steps, from a run that was cut off, are dropped."""
        self._total = total
        self._since = time.monotonic()
        if not self.first:
            return
        _keep_until(self.folder / METRICS, done)
        if _console().is_terminal:
            self._progress = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=_console(),
            )
            self._task = self._progress.add_task("train", total=total, completed=done, facts="")
            self._progress.start()

    def step(self, step: int, loss: float, lr: float, norm: float, tokens: int) -> None:
        self._tokens += tokens
        self._steps += 1
        if self._progress:
            rate = self._tokens / (time.monotonic() - self._since)
            facts = f"loss {loss:.4f}  lr {lr:.3g}  grad norm {norm:.3g}  {rate:,.0f} tokens/s"
            self._progress.update(self._task, completed=step, facts=facts)

    def lap(self) -> dict[str, Any]:
        """Throughput since the last logged step; taken before an evaluation, whose time does not
        count.
        """
        seconds = time.monotonic() - self._since
        rate = self._tokens / seconds
        lap = {"tokens_per_s": round(rate, 1), "seconds": round(seconds, 3), "steps": self._steps}
        if self.work.peak_flops:
            lap["mfu"] = round(rate * self.work.flops_per_token / self.work.peak_flops, 4)
        return lap

    def log(self, values: dict[str, Any]) -> None:
        """Write a logged step, with its lap."""
        self._tokens = self._steps = 0
        self._since = time.monotonic()
        if not self.first:
            return
        self._before_writing()
        self._append(json.dumps(values))
        for sink in self._sinks:
            sink.log(values)
        self.say(self._line(values))

    def _append(self, line: str) -> None:
        """A run of days does not end for a line of its log; the next save says what is wrong."""
        try:
            with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                file.write(self._mend + line + "\n")
            self._mend = ""
        except OSError as error:
            self._mend = "\n"  # part of the line may stand there
            self.say(f"{self.folder / METRICS}: a step could not be logged: {error}")

    def _line(self, values: dict[str, Any]) -> str:
        step, rate = values["step"], values["tokens_per_s"]
        parts = [
            f"step {step}/{self._total}",
            f"epoch {values['epoch']:.2f}",
            f"loss {values['loss']:.4f}",
        ]
        if "eval_loss" in values:
            parts.append(f"eval loss {values['eval_loss']:.4f}")
        parts += [f"lr {values['lr']:.3g}", f"grad norm {values['grad_norm']:.3g}"]
        parts.append(f"{rate:,.0f} tokens/s")
        if self.ranks > 1:
            parts.append(f"{rate / self.ranks:,.0f} a rank")
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        if "memory_gib" in values:
            parts.append(f"memory {values['memory_gib']:.1f} GiB")
        if values.get("data_wait_s", 0) > TOLD_WAIT * values["seconds"]:
            parts.append(f"waited {values['data_wait_s']:.1f} s for data")
        if values["steps"] and step < self._total:
            left = values["seconds"] / values["steps"] * (self._total - step)
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        return "  ".join(parts)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def _console() -> Console:
    return Console(file=sys.stdout)


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) != len(lines):
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(rewritten, path)


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a crash belongs to no step that is kept."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "enable_tensorboard_logging: tensorboard is not installed; pip install "
                "'vectorlm[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if key != "step":
                self._writer.add_scalar(key, value, values["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, config: Config, config_dict: dict[str, Any], folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "enable_wandb_logging: wandb is not installed; pip install 'vectorlm[wandb]', or "
                "set it to false"
            ) from error
        server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        mode = os.environ.get("WANDB_MODE") or ("online" if _reaches(server) else "offline")
        settings = {
            "dir": str(folder),
            "mode": mode,
            "config": config_dict,
            "id": _run_id(folder),
            "resume": "allow",  # a run that is started again goes on in the same graph
            **config.wandb_config,
        }
        self._run = wandb.init(**settings)

    def log(self, values: dict[str, Any]) -> None:
        self._run.log(values, step=values["step"])

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path) -> str:
    path = folder / WANDB_ID
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text().strip()


def _reaches(url: str) -> bool:
    found = urlsplit(url)
    port = found.port or (80 if found.scheme == "http" else 443)
    try:
        socket.create_connection((found.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True
