"""What metrics.jsonl and checkpoints/ say, whole or damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cluster.actor import log, metrics_of, save
from vectorlm.cluster.progress import METRICS, best, newest_checkpoint, read_progress


def logged(folder: Path, *losses: float) -> Path:
    metrics = metrics_of(folder)
    for step, loss in enumerate(losses, 1):
        log(metrics, step, eval_loss=loss)
    return folder / METRICS


def test_the_last_step_and_the_recent_speed(tmp_path: Path) -> None:
    metrics = metrics_of(tmp_path)
    log(metrics, 10, seconds=1000.0)  # too long ago to count
    for step in range(12, 22, 2):
        log(metrics, step, seconds=float(step), steps=2)
    found = read_progress(tmp_path)
    assert found.values["step"] == 20
    assert found.values["loss"] == 1.0
    assert found.seconds_per_step == (12 + 14 + 16 + 18 + 20) / 10
    assert found.interval_s == 20
    assert found.written == (tmp_path / METRICS).stat().st_mtime
    assert found.note is None


def test_nothing_logged_yet(tmp_path: Path) -> None:
    assert read_progress(tmp_path).values == {}
    (tmp_path / METRICS).touch()
    assert read_progress(tmp_path).values == {}


def test_a_long_file_is_not_read_whole(tmp_path: Path) -> None:
    """It is mostly a hole: larger than this machine's memory, but of no size on disk."""
    path = logged(tmp_path)
    with open(path, "wb") as file:
        file.truncate(1 << 38)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 7, "loss": 1.5, "seconds": 1, "steps": 1}\n')
    found = read_progress(tmp_path)
    assert found.values["step"] == 7
    assert found.note is None


@pytest.mark.parametrize(
    "damage",
    [b"\0\0\0\0", b'{"step": 3, "lo', b"\xff\xfe", b"[1, 2]", b'{"loss": 1}', b"[" * 5000, b""],
)
def test_damaged_lines_are_passed_over(tmp_path: Path, damage: bytes) -> None:
    path = logged(tmp_path, 3.0, 2.0)
    path.write_bytes(path.read_bytes() + damage + b'\n{"step": 4, "loss": 0.5}\n')
    found = read_progress(tmp_path)
    assert found.values["step"] == 4
    assert found.note == f"1 of the last 4 lines of {METRICS} are damaged"
    assert best(tmp_path, "eval_loss", "min") == (2.0, 2)


def test_a_line_in_the_making_is_no_damage(tmp_path: Path) -> None:
    path = logged(tmp_path, 3.0)
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    found = read_progress(tmp_path)
    assert (found.values["step"], found.note) == (1, None)


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    numbers = {"step": 1, "loss": float("nan"), "lr": float("inf"), "seconds": "2", "steps": True}
    path.write_text(json.dumps(numbers | {"tokens": 10**400}) + "\n")
    found = read_progress(tmp_path)
    assert found.values == {"step": 1}
    assert found.seconds_per_step is None


def test_the_best_value_and_its_step(tmp_path: Path) -> None:
    path = logged(tmp_path, 3.0, 1.5, 2.0, 1.5, float("nan"))
    assert best(tmp_path, "eval_loss", "min") == (1.5, 2)
    assert best(tmp_path, "eval_loss", "max") == (3.0, 1)
    assert best(tmp_path, "accuracy", "max") is None
    with open(path, "a") as file:
        file.write('{"step": 6, "eval_loss": 0.5}\n')
    assert best(tmp_path, "eval_loss", "min") == (0.5, 6)
    assert best(tmp_path / "absent", "loss", "min") is None


def test_the_newest_published_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (8, 12, 100_000_000):
        save(tmp_path, step)
    root = tmp_path / "checkpoints"
    found = newest_checkpoint(tmp_path)
    assert found
    assert found.step == 100_000_000
    (root / "step_100000000" / "MANIFEST.json").unlink()  # was never finished
    (root / ".unfinished-step_00000099-abc").mkdir()
    (root / "step_x").mkdir()
    (root / "step_00000050").touch()
    os.utime(root / "step_00000012" / "MANIFEST.json", (1000, 1000))
    found = newest_checkpoint(tmp_path)
    assert found
    assert (found.step, found.time) == (12, 1000)
