"""The preflight alone: `srun ... python -m vectorlm.preflight_door --config F`, one process a rank,
and `vectorlm preflight`, which starts those ranks wherever it is called. Floor 4.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from vectorlm.cli import add_config_arguments, run_door
from vectorlm.cluster import env
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.errors import EXIT_OK, ClusterError, VectorLMError
from vectorlm.libraries import loading
from vectorlm.stop import STOP_SIGNALS

MODULE = "vectorlm.preflight_door"
MEETING_MINUTES = 2
SRUN_S = 300.0
ENDING_S = 30.0
INTERACTIVE_STEP = "4294967290"  # of salloc, where it opens a shell on the first node
ONLY_HERE = (
    "this was this machine alone. In an allocation `vectorlm preflight` looks at all of its nodes: "
    "salloc --nodes=2 ..., then the same command"
)


def main(argv: Sequence[str] | None = None) -> int:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the launcher
    parser = argparse.ArgumentParser(
        prog=MODULE, description="Look at the machines and links of the ranks that were started."
    )
    add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_door(lambda: _as_rank(arguments.config, arguments.overrides))


def _as_rank(config_path: str, overrides: Sequence[str]) -> int:
    from vectorlm.train import first_rank_speaks

    with env.as_rank():
        with first_rank_speaks():
            config = load_config(config_path, overrides)
        return _preflight(config)


def _preflight(config: Config) -> int:
    with loading():
        from vectorlm.distributed import connect, disconnect, rank_left
        from vectorlm.measure import preflight

    ranks = connect(MEETING_MINUTES)
    try:
        preflight(config, ranks)
    except VectorLMError as error:
        if not error.said:
            ranks.say_once(str(error), lambda text: print(text, file=sys.stderr, flush=True))
        error.said = True
        raise
    except RuntimeError as error:
        if not rank_left(error):
            raise
        raise ClusterError(
            f"rank {ranks.rank}: another rank has left or does not answer; its log says why"
        ) from error
    disconnect()  # not after a failure: a link that hangs would hang this
    return EXIT_OK


# --- starting the ranks ---------------------------------------------------------------------------


def start(config_path: str, overrides: Sequence[str]) -> int:
    """As a rank, in all of an allocation, or on this machine: whatever this process is."""
    arguments = ["--config", config_path, *(f"--set={item}" for item in overrides)]
    if "RANK" in os.environ or (env.started_by_srun() and not is_shell(os.environ)):
        return main(arguments)
    config = load_config(config_path, overrides)
    if "SLURM_JOB_ID" in os.environ:
        return _run([*srun_command(config, os.environ), sys.executable, "-m", MODULE, *arguments])
    from vectorlm.launch import start_ranks

    code = start_ranks(MODULE, arguments)
    print(ONLY_HERE)
    return code


def is_shell(environ: Mapping[str, str]) -> bool:
    """Whether this step is a shell to type into, not a rank."""
    return environ.get("SLURM_STEP_ID") == INTERACTIVE_STEP or "SLURM_PTY_PORT" in environ


def srun_command(config: Config, environ: Mapping[str, str]) -> list[str]:
    """One process for each GPU of the allocation."""
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    ranks = _ranks_per_node(config, environ)
    command = [
        "srun",
        "--kill-on-bad-exit=1",
        "--overlap",  # a shell's own step holds what it was given
        "--immediate=30",
        f"--nodes={nodes}",
        f"--ntasks={int(nodes) * ranks}",
        f"--ntasks-per-node={ranks}",
    ]
    cpus = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_JOB_CPUS_PER_NODE", ""))  # 8(x2),4
    if cpus:
        share = min(map(int, cpus)) // ranks
        command += [f"--cpus-per-task={share}"] if share else ["--overcommit"]
    return command


def _ranks_per_node(config: Config, environ: Mapping[str, str]) -> int:
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        count = environ.get(name, "").rpartition(":")[2]  # a100:4
        if count.isdecimal() and int(count):
            return int(count)
    if config.slurm:
        return config.slurm.ranks_per_node
    tasks = environ.get("SLURM_NTASKS_PER_NODE", "")
    return int(tasks) if tasks.isdecimal() and int(tasks) else 1


def _run(command: Sequence[str]) -> int:
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise ClusterError(f"srun could not be started: {error}") from error
    try:
        return process.wait(timeout=SRUN_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # srun ends its ranks, too
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=ENDING_S)
        raise ClusterError(
            f"the preflight's ranks were not done within {SRUN_S:.0f} s and were ended; what they "
            "said stands above"
        ) from None


if __name__ == "__main__":
    from vectorlm.train import leave

    leave(main())
