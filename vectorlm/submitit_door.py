"""`vectorlm submit` with `slurm.launcher: submitit`: the section `slurm` as submitit takes it, and
the job through its executor. Floor 4, called by `cli`.

submitit pickles what a job runs (cloudpickle): a TrainingJob, which holds nothing but a path.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from vectorlm.cluster.refusal import explained
from vectorlm.cluster.script import FLAGS, around, before_ranks, word
from vectorlm.cluster.submit import CONFIG, SUBMITTED, Plan, Staged, Submitted, environment
from vectorlm.config.schema import Slurm
from vectorlm.errors import ClusterError
from vectorlm.submitit_job import TrainingJob

FOLDER = "submitit"
HELD = "-m vectorlm.stop"  # until a process has loaded, no signal ends it


def with_submitit(plan: Plan) -> Plan:
    """The same with the script that submitit would submit, which is refused where it cannot be."""
    folder = plan.output_dir / SUBMITTED / "NNNN" / FOLDER
    return replace(plan, script=_Executor(plan, folder).text(len(plan.points)))


def submit_through_submitit(staged: Staged, earlier: str | None) -> Submitted:
    """Start the plan's runs, when the job `earlier` has succeeded."""
    plan = staged.plan
    folder = staged.folder / FOLDER
    executor = _Executor(plan, folder, earlier)
    configs = [point.folder / CONFIG for point in plan.points] or [staged.config]
    with _outside_of_jobs(), _in_plain_words():
        folder.mkdir(mode=0o700)
        jobs = executor.submit_array([TrainingJob(str(path)) for path in configs])
    names = tuple(job.job_id for job in jobs)

    def log(name: str) -> Path:
        """Of the first process, with what srun says; those of the others stand beside it."""
        return (folder / f"{name}_0_log.out").absolute()

    return Submitted(names[0].split("_")[0], names if plan.points else (), log)


class _Executor(submitit.SlurmExecutor):
    def __init__(self, plan: Plan, folder: Path, earlier: str | None = None) -> None:
        section, sweep = plan.section, plan.config.sweep
        _require_plain(folder)
        super().__init__(folder, section.max_requeues, python=_python(section))
        wanted = parameters(section, earlier)
        wanted["array_parallelism"] = (sweep and sweep.at_once) or max(len(plan.points), 1)
        self.update_parameters(**wanted)

    @classmethod
    def affinity(cls) -> int:
        return 2  # without Slurm a script can still be printed; squeue's absence is told before

    def text(self, runs: int) -> str:
        """What is submitted for so many runs."""
        if runs > 1:
            self.parameters["map_count"] = runs
        return self._make_submission_file_text(self._submitit_command_str, "")


def _require_plain(folder: Path) -> None:
    """It stands in the script's directives, and in submitit's own patterns."""
    path = str(folder.absolute())
    if not path.isprintable() or "%" in path:
        raise ClusterError(
            f"{path!r}: submitit cannot work in this folder, for % and what cannot be printed have "
            "a meaning of their own in job scripts; give another train_parameters.output_dir, or "
            "set slurm.launcher: sbatch"
        )


# --- the section slurm, for submitit --------------------------------------------------------------


def parameters(section: Slurm, earlier: str | None = None) -> dict[str, Any]:
    """What SlurmExecutor.update_parameters takes; what is None is not asked for."""
    texts = {
        "job_name": section.job_name,
        "partition": section.partition,
        "account": section.account,
        "qos": section.qos,
        # GPUs a node, not a task: --gpus-per-task hides them from srun's processes.
        "gres": section.gres or None,
        "mem": section.mem,
        "constraint": section.constraint,
        "exclude": section.exclude,
        "mail_user": section.mail_user,
        "mail_type": section.mail_type if section.mail_user else None,
        "dependency": f"afterok:{earlier}" if earlier else None,
        "wckey": None,  # else submitit names one, which the site need not have
    }
    return {
        **{name: None if text is None else word(text) for name, text in texts.items()},
        "nodes": section.nodes,
        "ntasks_per_node": section.ranks_per_node,
        "cpus_per_task": section.cpus_per_gpu,
        "time": math.ceil(section.time_s / 60),
        "signal_delay_s": section.signal_lead_s,
        "additional_parameters": _without_a_name(section, earlier),
        "setup": before_ranks(section).splitlines(),
        "srun_args": list(FLAGS),
        "stderr_to_stdout": True,  # one log for a process, as `vectorlm why` reads it
    }


def _without_a_name(section: Slurm, earlier: str | None) -> dict[str, str | bool]:
    """Flags of sbatch that submitit has no parameter for."""
    flags: dict[str, str | bool] = {"requeue" if section.requeue else "no-requeue": True}
    if section.reservation:
        flags["reservation"] = word(section.reservation)
    if earlier:
        flags["kill-on-invalid-dep"] = "yes"
    for flag in section.extra_flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        flags[word(name)] = word(value) if equals else True
    return flags


def _python(section: Slurm) -> str:
    """What stands between srun's flags and `-m submitit...`, as a shell reads it."""
    python = "python" if section.container_image else shlex.quote(sys.executable)
    return " ".join([*around(section, gpus=bool(section.gpus_per_node)), python, HELD])


# --- the call -------------------------------------------------------------------------------------


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """submitit hands all variables to sbatch."""
    hidden = {name: os.environ.pop(name) for name in os.environ.keys() - environment().keys()}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _in_plain_words() -> Iterator[None]:
    try:
        yield
    except FailedJobError as error:  # so submitit calls sbatch's refusal, too
        call = error.__cause__
        if not isinstance(call, CalledProcessError):
            raise
        command, said = " ".join(call.cmd), str(error).strip().replace("\n", "; ")
        raise explained(
            ClusterError(f"`{command}` failed with exit code {call.returncode}: {said}")
        ) from None
    except FailedSubmissionError as error:
        raise ClusterError(f"submitit cannot read what sbatch answered: {error}") from None
    except OSError as error:
        raise ClusterError(
            f"{error.filename}: cannot be written ({error.strerror}); give another "
            "train_parameters.output_dir"
        ) from None
