"""What a job that submitit started runs in each of its processes: the same training, as submitit's
protocol wants it told. Floor 4, called by submitit in the job.

submitit's own handler would requeue at once, in the middle of a step. Here a signal sets the flag
that the trainer asks for, and the handler is called when everything is saved.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from vectorlm.cluster import env, requeue, slurm
from vectorlm.cluster.journal import past_starts
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config, Slurm
from vectorlm.errors import (
    EXIT_FAULT,
    EXIT_OK,
    EXIT_STOPPED,
    ClusterError,
    RankLostError,
    VectorLMError,
)
from vectorlm.stop import STOP_SIGNALS, StopFlag
from vectorlm.train import leave, train

Handler = Callable[[int, Any], Any]


@dataclass(frozen=True)
class TrainingJob:
    """`executor.submit(TrainingJob("config.yaml"))`: one process a GPU, each a rank.

    The result is a dict for each process: outcome (finished or stopped), output_dir, step.
    """

    config: str
    overrides: Sequence[str] = ()

    def __call__(self) -> dict[str, Any]:
        by_srun = env.started_by_srun()
        hand_over = _handler_of_submitit()
        stop = StopFlag()
        stop.arm()
        code = EXIT_FAULT
        try:
            result = self._train(stop, hand_over)
            code = EXIT_OK
            return result
        except VectorLMError as error:
            code = error.exit_code
            if isinstance(error, RankLostError) and _ends_for_another_reason():
                leave(code)
            raise error.with_traceback(None) from None  # submitit shows it: the message is enough
        finally:
            if by_srun:  # submitit writes the result first; the interpreter's own exit may abort
                atexit.register(leave, code)

    def checkpoint(self) -> DelayedSubmission:
        """What the next start of the job runs: the same, which goes on from what is saved."""
        return DelayedSubmission(self)

    def _train(self, stop: StopFlag, hand_over: Handler | None) -> dict[str, Any]:
        code = train(self.config, self.overrides, stop)
        config = load_config(self.config, self.overrides)
        if code != EXIT_OK and hand_over is not None:
            _start_again(config, code == EXIT_STOPPED, stop, hand_over)
        return {
            "outcome": "finished" if code == EXIT_OK else "stopped",
            "output_dir": config.train_parameters.output_dir,
            "step": _last_step(config.train_parameters.output_dir),
        }


def _signal_of_submitit() -> signal.Signals:
    return signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]


def _handler_of_submitit() -> Handler | None:
    handler = signal.getsignal(_signal_of_submitit())
    return handler if callable(handler) else None


def _start_again(config: Config, saved: bool, stop: StopFlag, hand_over: Handler) -> None:
    """Hand over to submitit; or return, where the configuration says that the job ends here.

    Only the first process asks Slurm and requeues. Of a job that starts again, or that Slurm ends,
    no process leaves a result: it would be taken for the run's.
    """
    section, first = config.slurm or Slurm(), os.environ.get("RANK", "0") == "0"
    decision = requeue.decide(section, saved, (), slurm.restarts(), None)
    result_counts = not decision.again
    if first:
        decision = requeue.decide(section, saved, (), slurm.restarts(), _own_job())
        verb = "starting again" if decision.again else "not started again"
        print(f"vectorlm: {verb}: {decision.reason}", flush=True)
    if result_counts:
        return
    if not first or not decision.again:
        leave(EXIT_OK)
    # scontrol inherits this: Slurm ends the job while it still waits for the answer.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    hand_over(stop.received or _signal_of_submitit(), None)


def _ends_for_another_reason() -> bool:
    """Whether a process that lost the others leaves without a result: another one's counts, or
    Slurm has lost a node, and starts the job again.
    """
    first = os.environ.get("RANK", "0") == "0"
    return not first or not requeue.decide(Slurm(), True, (), 0, _own_job()).again


def _own_job() -> dict[str, str] | None:
    own = slurm.own_job()
    try:
        return slurm.show_job(own) if own else None
    except ClusterError:  # then Slurm's refusal to requeue tells
        return None


def _last_step(output_dir: str) -> int | None:
    """As this start of the job has written it down."""
    for past in reversed(past_starts(output_dir)):
        if (past.start.job, past.start.restart) == (slurm.own_job(), slurm.restarts()):
            return past.end.step if past.end else None
    return None
