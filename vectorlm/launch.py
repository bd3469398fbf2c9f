"""Starts the ranks of one machine: `vectorlm train` on a workstation. Floor 4. Under Slurm, srun starts them.

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
from types import FrameType

from vectorlm.errors import ClusterError
from vectorlm.stop import STOP_SIGNALS
from vectorlm.train import LAUNCHER_VARIABLE
from vectorlm.train import main as train_main

GRACE_S = 10.0
POLL_S = 0.05


def launch(config: str, overrides: Sequence[str], nproc_per_node: int | None) -> int:
    """Train with one process a GPU (or as many as asked for); a process that already is a rank just trains."""
    arguments = ["--config", config, *(f"--set={item}" for item in overrides)]
    if "RANK" in os.environ:
        return train_main(arguments)
    count = nproc_per_node or _gpu_count() or 1
    return _Ranks(arguments, count).wait()


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
        self._stop: int | None = None
        # Ranks are started with the handlers in place, so that no signal falls between.
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)
        port = _free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(count):
            self._processes.append(_start(arguments, rank, count, port))
        if self._stop is not None:
            self._send(self._stop)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._stop = number
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Until every rank has ended; a rank that fails ends the others after a grace period."""
        failed: int | None = None
        deadline = float("inf")
        while any(process.poll() is None for process in self._processes):
            codes = [process.returncode for process in self._processes]
            if failed is None and any(codes):
                failed = next(rank for rank, code in enumerate(codes) if code)
                deadline = time.monotonic() + GRACE_S
            if time.monotonic() > deadline:
                self._end_others(failed)
            time.sleep(POLL_S)
        codes = [process.returncode for process in self._processes]
        first = failed if failed is not None else next((r for r, c in enumerate(codes) if c), 0)
        return _exit_code(codes[first])

    def _end_others(self, failed: int | None) -> None:
        left = [rank for rank, process in enumerate(self._processes) if process.poll() is None]
        print(
            f"rank {failed} ended ({_describe(self._processes[failed or 0].returncode)}); "
            f"ending rank {', '.join(map(str, left))}, which would wait for it",
            file=sys.stderr,
            flush=True,
        )
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
    command = [sys.executable, "-m", "vectorlm.train", *arguments]
    try:
        # A session of its own: Ctrl-C reaches a rank once, through the launcher.
        return subprocess.Popen(command, env=environment, start_new_session=True)
    except OSError as error:
        raise ClusterError(f"rank {rank} could not be started: {error}") from error


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _exit_code(code: int | None) -> int:
    if code is None:
        return 1
    return 128 - code if code < 0 else code


def _describe(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
