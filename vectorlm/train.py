"""The training door: `torchrun ... -m vectorlm.train --config F`, one process a rank. Floor 4.

Under Slurm srun starts it likewise, without torchrun. Exit codes: 0 finished; 2 the user's mistake;
3 and 75 stopped on request, which under srun is 0, too.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from vectorlm.cli import add_config_arguments, run_door
from vectorlm.cluster import env
from vectorlm.config.load import load_config, required_section
from vectorlm.config.schema import Config, DatasetConfig
from vectorlm.errors import EXIT_OK, EXIT_STOPPED, EXIT_STOPPED_UNSAVED, ConfigError
from vectorlm.libraries import loading
from vectorlm.stop import StopFlag

FIRST_RANK_SPEAKS_S = 10.0
LAUNCHER_VARIABLE = "VECTORLM_LAUNCHER_PID"


def main(argv: Sequence[str] | None = None) -> int:
    stop = StopFlag()
    stop.arm()  # before anything slow: a signal may come while libraries load
    _leave_with_launcher()
    parser = argparse.ArgumentParser(
        prog="vectorlm.train", description="Train on the ranks that were started."
    )
    add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    by_srun = env.started_by_srun()
    code = run_door(lambda: train(arguments.config, arguments.overrides, stop))
    # To srun a clean stop must be no fault: it would end the ranks that are not out yet.
    return EXIT_OK if by_srun and code in (EXIT_STOPPED, EXIT_STOPPED_UNSAVED) else code


def train(config_path: str, overrides: Sequence[str], stop: StopFlag) -> int:
    with env.as_rank():
        with first_rank_speaks():
            config = load_config(config_path, overrides)
            dataset = required_section(config, "dataset", config_path)
        _quiet_libraries()
        return _train(config, dataset, config_path, stop)


@contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Every rank reads the same file: the first one says what is wrong, and ends the others."""
    try:
        yield
    except ConfigError:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(FIRST_RANK_SPEAKS_S)
        raise


def _train(config: Config, dataset: DatasetConfig, config_path: str, stop: StopFlag) -> int:
    if "SLURM_JOB_ID" in os.environ:
        env.record_flights(config.train_parameters.output_dir)
    with loading():
        from vectorlm.assemble import run

    if run(config, dataset, stop, config_path):
        return EXIT_OK
    if config.train_parameters.checkpointing_enabled:
        _say(
            f"stopped by {_name(stop)}: everything is saved; start the same command again to go on"
        )
        return EXIT_STOPPED
    _say(f"stopped by {_name(stop)}: checkpointing_enabled is false, so nothing was saved")
    return EXIT_STOPPED_UNSAVED


def _name(stop: StopFlag) -> str:
    return stop.received.name if stop.received else "another rank"


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _quiet_libraries() -> None:
    """Nothing is fetched while training, and libraries' progress bars stay out of the log."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _leave_with_launcher() -> None:
    """A rank whose launcher was killed has nobody to tell it; it ends itself."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if not launcher:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()


def leave(code: int) -> NoReturn:
    """End this rank, now that all is written: gloo's threads may abort an orderly exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
