"""Starts the ranks of one machine: `vectorlm train` and `preflight` on a workstation. Floor 4.
Under Slurm, srun starts them.

Signals go to every rank; when one rank fails, the others are ended, and its exit code is returned.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from vectorlm.cluster import journal
from vectorlm.cluster.journal import Journal, KilledRecord
from vectorlm.config.load import load_config
from vectorlm.errors import ClusterError, VectorLMError
from vectorlm.stop import STOP_SIGNALS
from vectorlm.train import LAUNCHER_VARIABLE
from vectorlm.train import main as train_main

GRACE_S = 10.0
POLL_S = 0.05


def launch(config: str, overrides: Sequence[str], nproc_per_node: int | None) -> int:
    """Train with one process a GPU (or as many as asked for); a process that already is a rank
    just trains.
    """
    arguments = ["--config", config, *(f"--set={item}" for item in overrides)]
    if "RANK" in os.environ:
        return train_main(arguments)
    ranks = _ranks("vectorlm.train", arguments, nproc_per_node)
    code = ranks.wait()
    if ranks.killed:
        _record(config, overrides, ranks.first_pid, *ranks.killed)
    return code


def start_ranks(module: str, arguments: Sequence[str], count: int | None = None) -> int:
    """Run a module as one process a GPU of this machine, or as `count`; its exit code."""
    return _ranks(module, arguments, count).wait()


def _ranks(module: str, arguments: Sequence[str], count: int | None) -> _Ranks:
    return _Ranks([module, *arguments], count or _gpu_count() or 1)


def _record(config: str, overrides: Sequence[str], pid: int, rank: int, name: str) -> None:
    """Note for `vectorlm why` what ended the start whose first rank was `pid`."""
    host = socket.gethostname()
    with suppress(OSError, VectorLMError):  # it was printed; the record is not needed to go on
        output_dir = load_config(config, overrides).train_parameters.output_dir
        for past in journal.past_starts(output_dir)[-1:]:
            if (past.start.pid, past.start.host) == (pid, host):
                Journal(past.folder).killed(KilledRecord(rank, host, time.time(), name))


def _gpu_count() -> int:
    """Without torch, whose import would cost the launcher seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


class _Ranks:
    def __init__(self, arguments: Sequence[str], count: int) -> None:
        self._ended: list[int] = []  # by this launcher
        self.killed: tuple[int, str] | None = None  # the rank that a signal ended, and the signal
        port = _free_port()
        # Ranks inherit the block, and lift it when their handlers are in place: no signal is lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self._processes = [_start(arguments, rank, count, port) for rank in range(count)]
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    @property
    def first_pid(self) -> int:
        return self._processes[0].pid

    def wait(self) -> int:
        """Until every rank has ended; a rank that fails ends the others after a grace period."""
        failed: int | None = None
        deadline = float("inf")
        while None in [process.poll() for process in self._processes]:
            if failed is None and any(process.returncode for process in self._processes):
                failed = self._first_failed()
                deadline = time.monotonic() + GRACE_S
            if time.monotonic() > deadline:
                self._end_others(self._first_failed())
            time.sleep(POLL_S)
        failed = self._first_failed()
        code = self._processes[failed].returncode
        if code < 0:
            name = signal.Signals(-code).name
            self.killed = (failed, name)
            _say(f"rank {failed} was ended by {name}, and the run with it")
        return 128 - code if code < 0 else code

    def _first_failed(self) -> int:
        """The rank to blame: one that a signal ended before those that failed for lack of it."""
        codes = [process.returncode or 0 for process in self._processes]
        own = [rank for rank in range(len(codes)) if rank not in self._ended]
        return min(own, key=lambda rank: (codes[rank] >= 0, codes[rank] == 0, rank))

    def _end_others(self, failed: int) -> None:
        left = [rank for rank, process in enumerate(self._processes) if process.poll() is None]
        _say(f"rank {failed} has ended; ending rank {', '.join(map(str, left))} that waits for it")
        self._ended = left
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait(timeout=60)


def _start(arguments: Sequence[str], rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    command = [sys.executable, "-m", *arguments]
    try:
        # A session of its own: Ctrl-C reaches a rank once, through the launcher.
        return subprocess.Popen(command, env=environment, start_new_session=True)
    except OSError as error:
        raise ClusterError(f"rank {rank} could not be started: {error}") from error


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
