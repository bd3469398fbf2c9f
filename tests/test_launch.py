"""The launcher: exit codes, and that no rank is left behind whoever is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import make_rows, prepared
from tests.distributed.runs import Run, rank_pid
from vectorlm import launch
from vectorlm.cluster import journal, status
from vectorlm.cluster.journal import Journal
from vectorlm.cluster.queue import Queue
from vectorlm.cluster.why import explain
from vectorlm.stop import STOP_SIGNALS

LIMIT_S = 15.0
STOPS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
UNBLOCK = "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]); "
SLEEPS = "import time; time.sleep(60)"


@pytest.fixture(autouse=True)
def unchanged_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., launch._Ranks]:
    """Ranks that run a line of Python each, instead of training."""

    def started(*codes: str) -> launch._Ranks:
        def start(
            arguments: Sequence[str], rank: int, count: int, port: int
        ) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-S", "-c", codes[rank]])

        monkeypatch.setattr(launch, "_start", start)
        return launch._Ranks([], len(codes))

    return started


def exits(code: int, after_s: float = 0.0) -> str:
    return f"import sys, time; time.sleep({after_s}); sys.exit({code})"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), 0),
        ((2, 2), 2),
        ((75, 75), 75),
        ((0, 2), 2),
        ((2, 0), 2),
        ((1, 0, 3), 1),
    ],
)
def test_the_exit_code_is_that_of_the_ranks(
    ranks: Any, codes: tuple[int, ...], expected: int
) -> None:
    assert ranks(*(exits(code) for code in codes)).wait() == expected


def test_a_killed_rank_is_named(ranks: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """And blamed, although the others fail for lack of it, perhaps earlier seen."""
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert ranks(exits(1, 0.3), killed).wait() == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err


def test_ranks_that_wait_for_a_failed_one_are_ended(
    ranks: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    began = time.monotonic()
    started = ranks(SLEEPS, exits(2), SLEEPS)
    assert started.wait() == 2
    assert time.monotonic() - began < LIMIT_S
    assert "rank 1 has ended; ending rank 0, 2" in capfd.readouterr().err
    assert [process.returncode for process in started._processes] == [-9, 2, -9]


def test_slow_ranks_are_given_time(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may still be writing when another has stopped."""
    monkeypatch.setattr(launch, "GRACE_S", 20.0)
    started = ranks(exits(75), exits(75, 1.0))
    assert started.wait() == 75
    assert [process.returncode for process in started._processes] == [75, 75]


def test_a_signal_reaches_every_rank(ranks: Any) -> None:
    """Also one that comes while ranks are starting: it waits until they can take it."""
    waiting = STOPS + UNBLOCK + "time.sleep(60)"
    started = ranks(waiting, waiting)
    os.kill(os.getpid(), signal.SIGTERM)
    assert started.wait() == 75
    assert [process.returncode for process in started._processes] == [75, 75]


def test_a_process_that_is_a_rank_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under srun or torchrun the same command starts no further processes."""
    seen: list[list[str]] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(launch, "train_main", lambda arguments: seen.append(arguments) or 75)
    assert launch.launch("c.yaml", ["a.b=1", "c=2"], 4) == 75
    assert seen == [["--config", "c.yaml", "--set=a.b=1", "--set=c=2"]]


def gpus(monkeypatch: pytest.MonkeyPatch, folder: Path, listed: str | None) -> int:
    if listed is not None:
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin")
    return launch._gpu_count()


def test_a_rank_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus(monkeypatch, tmp_path, None) == 0
    assert gpus(monkeypatch, tmp_path, "GPU 0: A (UUID: x)\\nGPU 1: A (UUID: y)\\n") == 2
    assert gpus(monkeypatch, tmp_path, "no devices found\\n") == 0
    for visible, count in (("", 0), ("3", 1), ("0,1,2", 3), ("GPU-aa,GPU-bb,", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launch._gpu_count() == count


def test_the_port_is_free() -> None:
    port = launch._free_port()
    assert port > 1024
    with socket.socket() as found:
        found.bind(("127.0.0.1", port))


# --- with ranks that train -----------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, model_folder: Any) -> Run:
    """Long enough to be killed in the middle."""
    model = model_folder("llama")
    data = prepared(tmp_path / "data", model, make_rows(40))
    return Run(tmp_path, {"model": model, "data": data, "eval": data}, epochs=1000)


def pids_of_ranks(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], limit_s: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s
        time.sleep(0.05)
    return time.monotonic() - began


def started(run: Run) -> subprocess.Popen[str]:
    """A run of two ranks that has learned some steps."""
    process = run.start(2)
    log = run.output / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or log.exists(), 120)
    assert process.poll() is None, run.log
    return process


def test_killing_a_rank_ends_the_run(run: Run) -> None:
    process = started(run)
    pids = pids_of_ranks(process.pid)
    os.kill(pids[1], signal.SIGKILL)
    assert process.wait(timeout=LIMIT_S) == 128 + signal.SIGKILL
    assert not any(map(alive, pids))
    # The others lose it with errors of their own: the last line says whom to blame.
    assert "rank 1 was ended by SIGKILL" in run.log.splitlines()[-1]
    # And it is known afterwards, when the terminal is gone.
    host = socket.gethostname()
    told = explain(str(run.output))
    assert f"start 1: rank 1 on {host} was ended by SIGKILL (Killed)" in told
    assert "lack of memory" in told
    assert "slurm" not in told
    assert "killed.json: rank 1 was ended by SIGKILL" in told
    found = status.read_run(run.output, Queue(), [])
    assert (found.state, found.why) == ("failed", f"rank 1 on {host} was ended by SIGKILL")


def test_a_killed_first_rank_is_known_afterwards(run: Run) -> None:
    process = started(run)
    pid = rank_pid(process.pid, rank=0)
    os.kill(pid, signal.SIGSEGV)
    assert process.wait(timeout=LIMIT_S) == 128 + signal.SIGSEGV
    assert "start 1: rank 0 on " in explain(str(run.output))
    assert "was ended by SIGSEGV" in explain(str(run.output))


def test_the_start_of_another_process_is_not_written_into(tmp_path: Path, run: Run) -> None:
    """A rank that dies before it has claimed the folder leaves the last start alone."""
    diary, _ = Journal.begin(run.output, journal.new_start(str(run.config)))
    launch._record(str(run.config), [], os.getpid() + 1, 0, "SIGKILL")
    assert not (diary.folder / "killed.json").exists()
    launch._record(str(run.config), [], os.getpid(), 0, "SIGKILL")
    assert (diary.folder / "killed.json").exists()
    launch._record(str(tmp_path / "absent.yaml"), [], os.getpid(), 0, "SIGKILL")


def test_killing_the_launcher_ends_the_ranks(run: Run) -> None:
    process = started(run)
    pids = pids_of_ranks(process.pid)
    assert len(pids) == 2
    process.kill()
    process.wait()
    assert wait_until(lambda: not any(map(alive, pids)), LIMIT_S) < LIMIT_S
