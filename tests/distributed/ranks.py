"""Runs a test's function on real ranks: processes that meet over gloo.

`run_ranks(2, cases.train_all, argument)` starts two processes, calls `train_all(ranks, argument)`
in each, and returns what the first rank returned.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vectorlm.libraries import loading

with loading():
    import torch

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300


def run_ranks(world: int, function: Callable[..., Any], argument: Any) -> Any:
    with TemporaryDirectory() as folder, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        torch.save(argument, Path(folder) / "argument")
        name = f"{function.__module__}:{function.__name__}"
        processes = [_start(rank, world, port, name, folder) for rank in range(world)]
        try:
            codes = [process.wait(timeout=LIMIT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * world, f"ranks ended with {codes}"
        return torch.load(Path(folder) / "result", weights_only=False)


def _start(rank: int, world: int, port: int, name: str, folder: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.distributed.ranks",
        name,
        folder,
    ]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def _rank(name: str, folder: str) -> None:
    with loading():
        from vectorlm.distributed import connect, disconnect
        from vectorlm.train import leave

        module, function = name.split(":")
        work = getattr(import_module(module), function)
    argument = torch.load(Path(folder) / "argument", weights_only=False)
    ranks = connect(timeout_minutes=4)
    result = work(ranks, argument)
    if ranks.first:
        torch.save(result, Path(folder) / "result")
    disconnect()
    leave(0)


if __name__ == "__main__":
    _rank(sys.argv[1], sys.argv[2])
