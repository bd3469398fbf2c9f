"""Saver: what is written in the background is what the tensors held; no failure is silent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from vectorlm import checkpoint, saver
from vectorlm.checkpoint import MANIFEST, Checkpoints
from vectorlm.distributed import Ranks
from vectorlm.errors import CheckpointError
from vectorlm.saver import Saver

LIMIT_S = 20.0


class Run:
    """A model in short, whose checkpoints a Saver writes."""

    def __init__(self, folder: Path, ranks: Ranks, in_background: bool = True) -> None:
        self.folder, self.said = folder, list[str]()
        made = Checkpoints(str(folder), ranks, 2, False)
        self.saver = Saver(made, in_background, self.said.append)
        self.weight = torch.zeros(64, 64)
        self.state: dict[str, Any] = {"names": {"weight": "weight"}, "schedule": {}}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"model.weight": self.weight, "rng.0.cpu": torch.ones(9, dtype=torch.uint8)}

    def save(self, step: int, wait: bool = False) -> None:
        self.state["schedule"]["steps"] = step
        self.saver.save(step, self.tensors(), self.state, wait)

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step_of(folder) for folder in checkpoint.step_folders(self.folder)]

    def saved(self, step: int) -> torch.Tensor:
        folder = checkpoint.folder_of(self.folder) / f"step_{step:08d}"
        return dict(checkpoint.read_parameters(folder))["weight"]

    def hashes(self, step: int) -> dict[str, Any]:
        folder = checkpoint.folder_of(self.folder) / f"step_{step:08d}"
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {name: entry for name, entry in files.items() if name.endswith(".distcp")}


@pytest.fixture
def run(tmp_path: Path, one_rank: Ranks) -> Run:
    return Run(tmp_path, one_rank)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is published before it is set."""
    opened = threading.Event()
    publish = Checkpoints._publish

    def late(self: Checkpoints, *given: Any) -> None:
        opened.wait(LIMIT_S)
        publish(self, *given)

    monkeypatch.setattr(Checkpoints, "_publish", late)
    yield opened
    opened.set()


def test_what_the_tensors_held_is_saved(run: Run, gate: threading.Event) -> None:
    """They change at once, and so does the state."""
    run.weight += 1
    run.save(1)
    run.weight += 1
    run.state["schedule"]["steps"] = 99
    assert run.steps == []
    gate.set()
    run.saver.wait()
    assert torch.equal(run.saved(1), torch.ones(64, 64))
    folder = checkpoint.step_folders(run.folder)[0]
    assert checkpoint.read_state(folder)["schedule"] == {"steps": 1}
    run.save(2)  # from the same memory
    run.weight += 1
    run.saver.wait()
    assert torch.equal(run.saved(2), torch.full((64, 64), 2.0))
    assert [line.rsplit("/", 1)[1] for line in run.said] == ["step_00000001", "step_00000002"]


def test_the_same_bits_as_a_save_that_is_waited_for(run: Run) -> None:
    run.weight += torch.rand(64, 64)
    run.save(1, wait=True)
    run.save(2)
    run.saver.wait()
    assert run.hashes(1) == run.hashes(2)


def test_one_at_a_time(run: Run, gate: threading.Event) -> None:
    run.save(1)
    opening = threading.Timer(0.1, gate.set)
    opening.start()
    run.save(2)
    assert 1 in run.steps
    run.save(3, wait=True)
    assert run.steps == [3, 2]
    opening.join()


def test_it_is_told_when_it_is_complete(run: Run, gate: threading.Event) -> None:
    run.save(1)
    run.saver.look(run.tensors)
    assert run.said == []
    gate.set()
    deadline = time.monotonic() + LIMIT_S
    while not run.said and time.monotonic() < deadline:
        run.saver.look(run.tensors)
    assert run.said == [f"saved {run.folder}/checkpoints/step_00000001"]


def test_a_failure_is_told_and_earlier_checkpoints_stay(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1, wait=True)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Checkpoints, "_finish_files", full)
        run.save(2)
        deadline = time.monotonic() + LIMIT_S
        while not run.saver.failed and time.monotonic() < deadline:
            run.saver.look(run.tensors)  # does not raise: all ranks have to agree first
    assert run.saver.failed
    with pytest.raises(CheckpointError, match=r"step_00000002: .* the disk is full"):
        run.saver.wait()
    assert run.steps == [1]
    assert [f.name for f in (run.folder / "checkpoints").iterdir()] == ["step_00000001"]
    run.save(3)
    run.saver.wait()
    assert run.steps == [3, 1]


def test_another_error_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Checkpoints, "_finish_files", breaks)
    run.save(1)
    run.saver.settle()
    run.saver.wait()
    assert run.steps == []


def test_a_save_that_does_not_end(tmp_path: Path, one_rank: Ranks, gate: threading.Event) -> None:
    run = Run(tmp_path, replace(one_rank, timeout=timedelta(seconds=0.1)))
    run.save(1)
    with pytest.raises(CheckpointError, match="was not written within 1 min;"):
        run.saver.wait()


def test_too_little_memory_for_a_copy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "free_host_bytes", lambda: 20_000)  # a copy takes 16,393
    run.saver.look(run.tensors)
    assert run.said == [
        "training waits for each checkpoint: the copy that one is written from in the background "
        "takes 0.00 GiB of a node's memory, 0.00 GiB are free"
    ]
    run.save(1)
    assert run.steps == [1]


def test_enough_memory_for_a_copy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "free_host_bytes", lambda: 21_000)
    run.saver.look(run.tensors)
    assert run.saver.in_background
    assert run.said == []


def test_when_training_is_to_wait(tmp_path: Path, one_rank: Ranks) -> None:
    run = Run(tmp_path, one_rank, in_background=False)
    run.save(1)
    assert run.steps == [1]
