"""Metrics: what is kept of a run after a crash, and what never reaches a file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from vectorlm.config.load import REDACTED, config_to_dict
from vectorlm.config.schema import Config
from vectorlm.errors import ConfigError
from vectorlm.metrics import METRICS, Metrics, Work

SECRET = "hf_verysecret"
UNKNOWN = Work(flops_per_token=6e9, peak_flops=None)


def config(folder: Path, **given: Any) -> Config:
    train = {"output_dir": str(folder), "max_seq_len": 8}
    return Config.model_validate({"model": "somewhere", "train_parameters": train, **given})


def metrics(
    folder: Path, first: bool = True, ranks: int = 1, work: Work = UNKNOWN, **given: Any
) -> Metrics:
    made = config(folder, **given)
    return Metrics(made, config_to_dict(made), first, ranks, work)


def values(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 8,
        "loss": 2.0 / step,
        "grad_norm": 0.5,
        "lr": 1e-5,
        "tokens": 100 * step,
        "tokens_per_s": 1234.0,
        "seconds": 2.0,
        "steps": 1,
        **more,
    }


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS).read_text().splitlines()]


def run(folder: Path, done: int, until: int, **given: Any) -> None:
    """Log steps `done + 1` to `until`, as a run that resumes at `done`."""
    made = metrics(folder, **given)
    made.start(done, until)
    for step in range(done + 1, until + 1):
        made.step(step, 1.0, 1e-5, 0.5, 100)
        made.log(values(step))
    made.close()


def test_a_line_a_step(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [values(step) for step in (1, 2, 3)]


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    run(tmp_path, 3, 5)
    assert logged(tmp_path) == [1, 2, 3, 4, 5]


def test_later_steps_of_a_run_that_was_cut_off_are_dropped(tmp_path: Path) -> None:
    run(tmp_path, 0, 5)
    run(tmp_path, 2, 4)
    assert logged(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("end", ['{"step": 2, "lo', "\0\0\0\0", "2", "[]", '{"loss": 1}', "x\n\n"])
def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path, end: str) -> None:
    run(tmp_path, 0, 2)
    with open(tmp_path / METRICS, "a") as file:
        file.write(end)
    run(tmp_path, 2, 3)
    assert logged(tmp_path) == [1, 2, 3]


def test_starting_over_drops_everything(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    run(tmp_path, 0, 1)
    assert logged(tmp_path) == [1]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "output"
    run(folder, 0, 2, first=False, enable_tensorboard_logging=True)
    assert not folder.exists()
    assert capsys.readouterr().out == ""


def test_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = metrics(tmp_path, ranks=2)
    made.start(0, 8)
    made.say("[bold]model/7B[/bold] " + "x" * 300)
    made.step(1, 2.0, 1e-5, 0.5, 100)
    made.log(values(1, eval_loss=1.5, mfu=0.41, memory_gib=3.25))
    made.close()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    said, line = out.splitlines()
    assert said == "[bold]model/7B[/bold] " + "x" * 300  # neither styled nor wrapped
    assert line == (
        "step 1/8  epoch 0.12  loss 2.0000  eval loss 1.5000  lr 1e-05  grad norm 0.5  "
        "1,234 tokens/s  617 a rank  MFU 41.0%  memory 3.2 GiB  ETA 0:00:14"
    )


@pytest.mark.parametrize(("waited_s", "told"), [(0.0, False), (0.019, False), (0.16, True)])
def test_waiting_for_data_is_told_where_it_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], waited_s: float, told: bool
) -> None:
    made = metrics(tmp_path)
    made.start(0, 8)
    made.log(values(1, data_wait_s=waited_s))  # of 2 seconds
    made.close()
    assert ("  waited 0.2 s for data  ETA" in capsys.readouterr().out) == told


def test_the_last_line_promises_no_more_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, 0, 2)
    first, last = capsys.readouterr().out.splitlines()
    assert "ETA" in first
    assert "ETA" not in last


def test_a_lap_counts_since_the_last_logged_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("vectorlm.metrics.time.monotonic", lambda: now[0])
    made = metrics(tmp_path, work=Work(flops_per_token=10.0, peak_flops=4000.0))
    made.start(0, 8)
    for step in (1, 2):
        made.step(step, 1.0, 1e-5, 0.5, 300)
    now[0] += 4.0
    lap = {"tokens_per_s": 150.0, "seconds": 4.0, "steps": 2, "mfu": 0.375}
    assert made.lap() == lap
    now[0] += 50.0  # an evaluation, whose time does not count
    made.log(values(2) | lap)
    made.step(3, 1.0, 1e-5, 0.5, 300)
    now[0] += 1.0
    assert made.lap()["tokens_per_s"] == 300.0


def test_tensorboard_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, 0, 3, enable_tensorboard_logging=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [event.value for event in losses] == pytest.approx([2.0, 1.0, 2 / 3])


@pytest.mark.parametrize(
    ("module", "key", "extra"),
    [
        ("wandb", "enable_wandb_logging", "vectorlm[wandb]"),
        ("torch.utils.tensorboard", "enable_tensorboard_logging", "vectorlm[tensorboard]"),
    ],
)
def test_a_missing_logger_is_told_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, key: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{key}: .*pip install '{re.escape(extra)}'"):
        metrics(tmp_path, **{key: True})


def test_secrets_reach_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is handed on or written holds the configuration without its secrets."""
    handed: dict[str, Any] = {}

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            handed[f"step {step}"] = values

        def finish(self) -> None:
            handed["finished"] = True

    class WandB:
        @staticmethod
        def init(**settings: Any) -> Run:
            handed.update(settings)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", WandB)
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = {"project": "p", "settings": {"api_key": SECRET}}
    made = config(tmp_path, enable_wandb_logging=True, wandb_config=given)
    without = config_to_dict(made)
    written = Metrics(made, without, True, 1, UNKNOWN)
    written.start(0, 1)
    written.log(values(1))
    written.close()
    assert handed["mode"] == "offline"
    assert handed["project"] == "p"
    assert handed["settings"] == {"api_key": SECRET}  # the user's own words, for wandb alone
    assert handed["config"]["wandb_config"]["settings"]["api_key"] == REDACTED
    assert handed["step 1"] == values(1)
    assert handed["finished"]
    assert SECRET not in json.dumps(without)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert all(SECRET.encode() not in path.read_bytes() for path in files)
