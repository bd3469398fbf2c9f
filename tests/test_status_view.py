"""`vectorlm status` as a person, a pipe and a program see it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import actor
from tests.cluster.actor import ROOT, log, metrics_of, save
from tests.cluster.test_status import make_sweep, run_of
from tests.cluster.test_verdict import begin, failure
from tests.test_layout import HEAVY
from vectorlm import status_view
from vectorlm.cli import main
from vectorlm.cluster import journal
from vectorlm.cluster.journal import EndRecord
from vectorlm.errors import EXIT_OK, EXIT_USER

LIMIT_S = 30


@pytest.fixture(autouse=True)
def _no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine, only the Python in use; notes of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def status(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str | Path) -> str:
        capsys.readouterr()
        assert main(["status", *map(str, words)]) == EXIT_OK
        return capsys.readouterr().out

    return run


def finished(folder: Path, job: str | None = None) -> Path:
    diary = begin(folder, total_steps=3, job=job)
    metrics = metrics_of(folder)
    for step in (1, 2, 3):
        log(metrics, step, mfu=0.412, memory_gib=61.25)
    save(folder, 3)
    (folder / "final-model").mkdir()
    diary.ended(EndRecord(time.time(), "finished", 3))
    return folder


def rows(text: str) -> list[str]:
    return [re.sub(r" {2,}", "  ", line).strip() for line in text.splitlines()]


# --- what is printed ------------------------------------------------------------------------------


def test_one_run(tmp_path: Path, status: Callable[..., str]) -> None:
    found = rows(status(finished(tmp_path / "out")))
    wanted = ("state finished", "loss 2.7000", "tokens/s 1,500", "MFU 41.2%", "memory 61.2 GiB")
    assert {line.replace("  ", " ", 1) for line in found} >= {*wanted, "results final-model"}
    assert any(line.startswith("step  3/3, ") for line in found)
    assert any(line.startswith("checkpoint  step 3, ") for line in found)
    assert not any(line.startswith("ETA") for line in found)


def test_a_run_with_a_past(tmp_path: Path, status: Callable[..., str]) -> None:
    begin(tmp_path, job="17").failed(failure(1, 1.0, "OSError", "\x1b[2J[red]gone\x07"))
    begin(tmp_path, total_steps=10, resumed_from=4)
    text = status(tmp_path)
    assert "state  running" in [line.replace("    ", " ") for line in rows(text)]
    assert re.search(r"1 .* 17 .* failed rank 1 on n1: OSError:  \[2J\[red\]gone", text)
    assert re.search(r"2 .* 4 +lasts", text)
    assert "\x1b" not in text
    assert "\x07" not in text


def test_what_ended_a_run(tmp_path: Path, status: Callable[..., str]) -> None:
    """As `vectorlm why` has it, which has tests of its own."""
    begin(tmp_path, total_steps=7).ended(EndRecord(time.time(), "stopped", 4, "SIGUSR1"))
    cause = json.loads(status(tmp_path, "--json"))["cause"]
    assert cause["sentence"]
    found = rows(status(tmp_path))
    assert "state  stopped: by SIGUSR1 at step 4, saved" in found
    assert f"cause  {cause['sentence']}" in found
    assert f"what to do  {cause['cure']}" in found
    assert json.loads(status(finished(tmp_path / "out"), "--json"))["cause"] is None


def test_the_users_runs(tmp_path: Path, status: Callable[..., str]) -> None:
    assert "No jobs of yours are known" in status()
    assert json.loads(status("--json")) == []
    journal.remember_job("17", tmp_path / "out", None)
    finished(tmp_path / "out", job="17")
    journal.remember_job("16", tmp_path / "later", None)
    sweep = make_sweep(tmp_path / "sweep", runs=3)
    run_of(sweep / "001", 2.0).ended(EndRecord(time.time(), "finished", 1))
    journal.remember_job("18", sweep, None)
    text = status()
    assert f"18  sweep: 1 finished, 2 unknown  {sweep}" in rows(text)
    assert re.search(rf"17 +finished +3/3 +2\.7000 +1,500 +1 +step 3, .* {tmp_path}/out", text)
    assert rows(text)[-1] == "note: there is no Slurm on this machine; told by their files alone"
    kinds = [entry["kind"] for entry in json.loads(status("--json"))]
    assert kinds == ["sweep", "run", "run"]


def test_the_run_of_a_file(tmp_path: Path, status: Callable[..., str]) -> None:
    finished(tmp_path / "out")
    train = f"{{output_dir: {tmp_path}/out, max_seq_len: 8}}"
    (tmp_path / "c.yaml").write_text(f"model: m\ntrain_parameters: {train}\n")
    assert status("--config", tmp_path / "c.yaml") == status(tmp_path / "out")
    other = f"train_parameters.output_dir={tmp_path}/gone"
    assert main(["status", "--config", str(tmp_path / "c.yaml"), "--set", other]) == EXIT_USER


def test_a_sweep(tmp_path: Path, status: Callable[..., str]) -> None:
    sweep = make_sweep(tmp_path / "sweep", runs=3)
    run_of(sweep / "000", 2.0).failed(failure(0, 1.0, "OSError", "no room"))
    run_of(sweep / "001", 2.0, 1.0).ended(EndRecord(time.time(), "finished", 2))
    run_of(sweep / "002", 1.5).ended(EndRecord(time.time(), "finished", 1))
    found = rows(status(sweep))
    assert found[1] == "Run  lr  lowest eval_loss  at step  Step  ETA  State"
    assert found[2] == "001  0.0002  1.0000  2  2/2  finished"
    assert found[3] == "002  0.0003  1.5000  1  1/1  finished"
    assert found[4] == "000  0.0001  2.0000  1  1/1  failed: rank 0 on n0: OSError: no room"
    best = json.loads(status(sweep, "--json"))["runs"][0]
    assert (best["best"], best["best_step"], best["run"]["state"]) == (1.0, 2, "finished")


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_narrow_terminal(
    columns: int, tmp_path: Path, status: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be spared is left out, and names are whole, if need be over two lines."""
    folder = tmp_path / "a-folder-with-a-name-that-is-quite-long" / "out"
    folder.parent.mkdir()
    journal.remember_job("481234", folder, None)
    begin(folder, job="481233").failed(failure(1, 1.0, "OSError", "there is no room at all"))
    finished(folder, job="481234")
    monkeypatch.setenv("COLUMNS", str(columns))
    text, of_one = status(), status(folder)
    assert max(map(len, (text + of_one).splitlines())) <= columns
    assert "481234" in text
    assert "finished" in text
    for shown in (text, of_one):
        assert str(folder) in re.sub(r"\s+", "", shown)
    assert ("no room for Tokens/s, Starts" in text) == (columns <= 60)
    assert ("Checkpoint  " in text) == (columns >= 60)
    assert "481233" in of_one
    assert "OSError:" in of_one


def test_a_sweep_on_a_narrow_terminal(
    tmp_path: Path, status: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(tmp_path / "sweep", runs=2)
    run_of(sweep / "000", 2.0).failed(failure(0, 1.0, "OSError", "there is no room at all"))
    monkeypatch.setenv("COLUMNS", "50")
    text = status(sweep)
    assert re.search(r"^000  0\.0001  2\.0000 +failed: rank 0 on ", text, re.M)
    assert "no room for at step, Step, ETA" in text


def test_a_run_for_programs(tmp_path: Path, status: Callable[..., str]) -> None:
    found = json.loads(status(finished(tmp_path / "out"), "--json"))
    assert found["kind"] == "run"
    assert (found["state"], found["over"], found["step"]) == ("finished", True, 3)
    assert found["metrics"]["loss"] == pytest.approx(2.7)
    assert found["starts"][0]["ended"] == "finished"


def test_what_is_wrong_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "absent")]) == EXIT_USER
    assert "no such folder" in capsys.readouterr().err
    assert main(["status", "17", "--watch"]) == EXIT_USER
    assert "job 17: nothing is noted" in capsys.readouterr().err


def test_it_starts_without_heavy_libraries(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    block = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
    code = f"from vectorlm.cli import main\nsys.exit(main(['status', {str(tmp_path / 'out')!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_OK, done.stderr
    assert "finished" in done.stdout


# --- watching -------------------------------------------------------------------------------------


def test_watching_into_a_file_tells_each_change_and_ends(
    tmp_path: Path, status: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_view, "REFRESH_S", 0.05)
    process = actor.start(tmp_path, total=9, wait_s=1)
    try:
        text = status(tmp_path, "--watch", "--json")
    finally:
        process.wait(timeout=LIMIT_S)
    views = [json.loads(line) for line in text.splitlines()]
    assert [(view["state"], view["step"]) for view in views] == [("running", 4), ("finished", 9)]


def watch(folder: Path, **streams: Any) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "vectorlm.cli", "status", str(folder), "--watch"]
    return subprocess.Popen(words, cwd=ROOT, **streams)


def read_until(stream: int, text: bytes) -> bytes:
    got = b""
    deadline = time.monotonic() + LIMIT_S
    while text not in got:
        ready, _, _ = select.select([stream], [], [], max(deadline - time.monotonic(), 0))
        assert ready, got
        got += os.read(stream, 4096)
    return got


def test_watching_is_ended_by_ctrl_c(tmp_path: Path) -> None:
    begin(tmp_path, total_steps=7)
    process = watch(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    read_until(process.stdout.fileno(), b"running")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (EXIT_OK, b"")


def test_watching_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown is drawn over; the end of the run is seen, too."""
    monkeypatch.setattr(status_view, "REFRESH_S", 0.05)
    diary = begin(tmp_path, total_steps=7)
    controller, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with open(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        watching = threading.Thread(
            target=main, args=[["status", str(tmp_path), "--watch"]], daemon=True
        )
        watching.start()
        shown = read_until(controller, b"running")
        log(metrics_of(tmp_path), 5)
        shown += read_until(controller, b"5/7")
        diary.ended(EndRecord(time.time(), "finished", 7))
        watching.join(LIMIT_S)
        assert not watching.is_alive()
    shown += read_until(controller, b"finished")
    os.close(controller)
    assert b"\x1b[2K" in shown


def test_watching_on_a_terminal_is_ended_by_ctrl_c(tmp_path: Path) -> None:
    begin(tmp_path, total_steps=7)
    controller, terminal = pty.openpty()
    process = watch(tmp_path, stdout=terminal, stderr=subprocess.PIPE)
    os.close(terminal)
    read_until(controller, b"running")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT_S)
    os.close(controller)
    assert (process.returncode, errors) == (EXIT_OK, b"")
