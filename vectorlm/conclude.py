"""What a job script calls when its ranks have ended: says what ended them, and has the job start
again where that can help. Floor 4.

    python -m vectorlm.conclude --config FILE --code N --script "$0"

Its exit code is the job's: 0 finished; 75 stopped or failed, and the run goes on in another start;
else what the ranks left with.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vectorlm.cli import add_config_arguments, run_door
from vectorlm.cluster import requeue, slurm
from vectorlm.cluster.causes import diagnose
from vectorlm.cluster.evidence import evidence_of_job
from vectorlm.cluster.journal import past_starts
from vectorlm.config.load import load_config
from vectorlm.config.schema import Slurm
from vectorlm.errors import EXIT_OK, EXIT_STOPPED, ClusterError, ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vectorlm.conclude", description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("--code", type=int, required=True, help="what srun left with")
    parser.add_argument("--script", required=True, help="the job script, to be submitted again")
    arguments = parser.parse_args(argv)
    return run_door(lambda: conclude(arguments.config, arguments.code, arguments.script))


def conclude(config_path: str, code: int, script: str) -> int:
    try:
        config = load_config(config_path)
    except ConfigError:
        _say("vectorlm: not started again: it would end the same way again, with this mistake:")
        raise
    output_dir = config.train_parameters.output_dir
    job = _job()
    cause = diagnose(evidence_of_job(output_dir, code, _log(), job))
    if cause.name == "finished":
        return EXIT_OK
    _say(f"vectorlm: {cause.sentence}")
    if requeue.is_requeued(job):
        _say("vectorlm: Slurm starts the job again")
        return EXIT_STOPPED
    decision = requeue.decide(
        config.slurm or Slurm(), cause.may_pass, past_starts(output_dir), slurm.restarts(), job
    )
    if not decision.again:
        _say(f"vectorlm: not started again: {decision.reason}. {cause.cure}")
        return code or EXIT_STOPPED
    _say(f"vectorlm: starting again ({decision.reason})")
    _say(f"vectorlm: {requeue.start_again(script, config_path)}")
    return EXIT_STOPPED


def _job() -> dict[str, str] | None:
    own = slurm.own_job()
    try:
        return slurm.show_job(own) if own else None
    except ClusterError:
        return None


def _log() -> Path | None:
    """The job's log is where this process prints."""
    try:
        path = Path(os.readlink("/proc/self/fd/1"))
    except OSError:
        return None
    return path if path.is_file() else None


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
