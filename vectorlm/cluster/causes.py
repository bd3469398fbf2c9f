"""The one table of causes: how each is recognized, what to change, and whether starting again can
help. Floor 1, used by `why`; docs/slurm.md shows it.

    python -m vectorlm.cluster.causes     prints the table as docs/slurm.md must have it
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vectorlm.cluster import collectives, endings, faults, underway
from vectorlm.cluster.evidence import Evidence, Finding
from vectorlm.cluster.joblog import Line


@dataclass(frozen=True)
class Cause:
    """What ended a start, or keeps it from beginning or going on."""

    name: str
    sentence: str
    cure: str
    may_pass: bool  # starting again can succeed
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    proof: Sequence[Line] = ()


@dataclass(frozen=True)
class Entry:
    name: str
    meaning: str
    cure: str
    may_pass: bool
    find: Callable[[Evidence], Finding | None]


# The most certain first: what a rank says of itself, then what Slurm did, then what is left to tell
# from the noise at the end.
TABLE = (
    Entry(
        "finished",
        "The final model is written.",
        "Nothing: export it with `vectorlm convert`",
        False,
        endings.finished,
    ),
    Entry(
        "waiting",
        "The job is in the queue; the reason is Slurm's, in words.",
        "Nothing: it starts by itself",
        True,
        underway.waits,
    ),
    Entry(
        "superseded",
        "Another start of the run has taken the output folder: this one was cut off, or two were "
        "started.",
        "Nothing, if the other one is yours: it goes on. Else give each run a "
        "`train_parameters.output_dir` of its own",
        False,
        faults.superseded,
    ),
    Entry(
        "gpu-out-of-memory",
        "A rank asked for more memory than its GPU has; the batch is named.",
        "Set `train_parameters.use_activation_checkpointing: true`; or lower `dataset.train_bs` "
        "and raise `train_parameters.gradient_accumulation_steps` by the same factor; or set "
        "`train_parameters.sharding_strategy: FULL_SHARD`, use more GPUs, lower "
        "`train_parameters.max_seq_len`, or train adapters (`train_parameters.lora_peft_config`)",
        False,
        faults.gpu_memory,
    ),
    Entry(
        "host-out-of-memory",
        "The memory of a node was used up: it was refused to a rank, or the kernel killed one.",
        "Raise `slurm.mem` (`0` is all the node has), leave "
        "`train_parameters.low_cpu_mem_usage: true`, or use fewer processes a node; without a GPU, "
        "or where a batch is named, lower `dataset.train_bs`",
        False,
        lambda evidence: faults.host_memory(evidence) or endings.kernel_killed(evidence),
    ),
    Entry(
        "loss-not-finite",
        "The loss or the gradient became NaN or infinite; the step was not applied.",
        "Lower `train_parameters.optimizer.lr` or raise `train_parameters.warmup_ratio`; look at "
        "the data of that step; with `bf16-true`, try `bf16-mixed`",
        False,
        faults.not_finite,
    ),
    Entry(
        "shared-memory-full",
        "`/dev/shm` of a node is full, or a file that a process maps was cut (a bus error).",
        "Remove what earlier jobs left in `/dev/shm` of that node, or leave it out with "
        "`slurm.exclude`; in a container, give it more (`--shm-size`)",
        True,
        faults.shared_memory,
    ),
    Entry(
        "disk-full",
        "A disk is full, or your quota of bytes or files is used up.",
        "Make room, lower `train_parameters.keep_checkpoints`, or give another "
        "`train_parameters.output_dir`; then submit again: earlier checkpoints are intact",
        False,
        faults.disk,
    ),
    Entry(
        "file-system",
        "A file system did not answer, or lost a file while it was in use.",
        "Nothing, if it was a passing fault; if it comes again, ask those who run the cluster",
        True,
        faults.files,
    ),
    Entry(
        "gpu-broken",
        "A GPU reported a hardware fault (ECC, NVLink, lost from the bus).",
        "It may pass on another node: leave that one out with `slurm.exclude`, and report it to "
        "those who run the cluster",
        True,
        faults.gpu_broken,
    ),
    Entry(
        "driver-too-old",
        "The GPU or its driver is not one that this build of torch can use.",
        "Install torch for the driver that `nvidia-smi` shows there, or choose other nodes with "
        "`slurm.constraint` or `slurm.gpu_type`",
        False,
        faults.driver,
    ),
    Entry(
        "no-gpu",
        "A rank saw no GPU, or fewer than there are ranks on its node.",
        "Set `slurm.gpus_per_node` and `slurm.partition` so that each process has a GPU; on such "
        "a node `nvidia-smi` must list them",
        False,
        faults.no_gpu,
    ),
    Entry(
        "gpu-fault",
        "A GPU kernel failed: an illegal access, an assertion on the device.",
        "Run once with `CUDA_LAUNCH_BLOCKING=1` to see where; try "
        "`train_parameters.use_flash_attention: false`. If one node alone fails, leave it out with "
        "`slurm.exclude`",
        False,
        faults.gpu_fault,
    ),
    Entry(
        "software-missing",
        "Python, a package, a library or a module of the cluster is missing or does not fit.",
        "Activate the environment before you submit, or have `slurm.setup` do so; a missing GLIBC "
        "needs another build or a container (`slurm.container_image`)",
        False,
        faults.software,
    ),
    Entry(
        "mistake",
        "The configuration, the data, the model or a checkpoint was refused.",
        "Mend what the message names; docs/troubleshooting.md has them all",
        False,
        faults.mistake,
    ),
    Entry(
        "rank-failed",
        "A rank raised an exception; the ranks that failed because of it are named, too. Python's "
        "own words for a fault in the program (`KeyError`, `TypeError`, ...) come again.",
        "Read its traceback in the log, or in `starts/` of the output folder; if it comes again, "
        "please report it",
        True,
        lambda evidence: _if_recorded(evidence),
    ),
    Entry(
        "stuck",
        "The job runs, but nothing was heard of it for long.",
        "Look at it: srun --overlap --jobid JOB nvidia-smi; ranks that wait for each other give up "
        "after `train_parameters.collective_timeout_minutes`. scancel --signal=USR1 JOB asks it to "
        "save and stop",
        True,
        underway.stuck,
    ),
    Entry(
        "running",
        "The job runs.",
        "Nothing: `vectorlm status --watch` follows it",
        True,
        underway.runs,
    ),
    Entry(
        "preempted",
        "Another job took the nodes.",
        "Nothing: it goes on when Slurm starts it again. What is lost each time can be lessened "
        "with `train_parameters.save_frequency`, or with a partition that gives a grace time",
        True,
        endings.preempted,
    ),
    Entry(
        "node-failed",
        "A node went down or away.",
        "Nothing: it goes on elsewhere. If the same node fails again, leave it out with "
        "`slurm.exclude`",
        True,
        endings.node_failed,
    ),
    Entry(
        "time-limit",
        "The time limit came before the run had saved.",
        "Raise `slurm.signal_lead_s` so that a step and a save fit in, or `slurm.time`; lower "
        "`train_parameters.save_frequency`",
        True,
        endings.time_limit,
    ),
    Entry(
        "requeued",
        "Somebody requeued the job.",
        "Nothing: it goes on when Slurm starts it again",
        True,
        endings.requeued,
    ),
    Entry(
        "step-not-started",
        "srun could not start the ranks in the job's allocation; if that lacks what was asked for, "
        "it comes again.",
        "Ask for what the nodes have: `slurm.cpus_per_gpu`, `slurm.mem`, `slurm.gpus_per_node`",
        True,
        endings.no_step,
    ),
    Entry(
        "cancelled",
        "Somebody cancelled the job or its step.",
        "Nothing: submit it again to go on",
        False,
        endings.cancelled,
    ),
    Entry(
        "stopped",
        "A signal asked the run to save and stop, and it did: its time limit was near, it was "
        "preempted with a grace time, or somebody sent one.",
        "Nothing: started again, it goes on where it was",
        True,
        endings.stopped,
    ),
    Entry(
        "stopped-unsaved",
        "A signal asked the run to stop, and it was configured not to save.",
        "Set `train_parameters.checkpointing_enabled: true`, or a longer `slurm.time`",
        False,
        endings.stopped_unsaved,
    ),
    Entry(
        "rank-killed",
        "A signal from outside ended a rank: somebody, the system, or a crash of a native library.",
        "SIGKILL without a word of Slurm's is most often the kernel's, for lack of memory: raise "
        "`slurm.mem`, and ask for the node's kernel log",
        True,
        lambda evidence: _unless_network(evidence),
    ),
    Entry(
        "network-failed",
        "The network between nodes failed under NCCL.",
        "Set `slurm.network_interface`; try `slurm.disable_infiniband: true`; leave a suspicious "
        "node out with `slurm.exclude`. NCCL_DEBUG=WARN in `slurm.setup` says more",
        True,
        collectives.network,
    ),
    Entry(
        "collective-timeout",
        "Ranks waited for others longer than allowed; which rank was not there is named.",
        "Look at what the named rank did: a slow disk, a full node, a hung process. If it only "
        "needs longer, raise `train_parameters.collective_timeout_minutes`; if it is always the "
        "same node, leave that out with `slurm.exclude`",
        True,
        collectives.timed_out,
    ),
    Entry(
        "ranks-cannot-meet",
        "The ranks could not reach each other at the beginning.",
        "Set `slurm.network_interface` to the one that connects the nodes (`ip addr` lists them); "
        "a firewall may be between them",
        True,
        collectives.no_meeting,
    ),
    Entry(
        "rank-silent",
        "Ranks lost another one, which left no word.",
        "Look at the log and the node of that rank; if it is always the same node, leave it out "
        "with `slurm.exclude`",
        True,
        collectives.silent,
    ),
    Entry(
        "unknown",
        "Nothing that is known says why it ended; the last lines of the log are shown.",
        "Read the log; `sacct -j JOB` and the kernel's log of the node may say more",
        True,
        endings.unknown,
    ),
)


def _if_recorded(evidence: Evidence) -> Finding | None:
    """An exception in the log alone may be an echo of what Slurm did."""
    fault = evidence.fault
    if fault and not fault.recorded and endings.ended_by_slurm(evidence):
        return None
    return faults.rank_failed(evidence)


def _unless_network(evidence: Evidence) -> Finding | None:
    """NCCL's watchdog aborts its process: then what it saw is the cause."""
    found = endings.rank_killed(evidence)
    if found and "SIGABRT" in found.sentence:
        for recognizer in (collectives.network, collectives.timed_out):
            if recognizer(evidence):
                return None
    return found


def diagnose(evidence: Evidence) -> Cause:
    for entry in TABLE:
        found = entry.find(evidence)
        if found:
            may_pass = entry.may_pass if found.may_pass is None else found.may_pass
            return Cause(
                entry.name,
                found.sentence,
                _cure(found.cure or entry.cure, evidence.job),
                may_pass,
                found.rank,
                found.host,
                found.step,
                found.proof,
            )
    raise AssertionError("the last entry recognizes everything")


def _cure(text: str, job: str | None) -> str:
    """As it is printed: without the marks of docs/slurm.md, and with the job's number."""
    plain = text.replace("`", "")
    return re.sub(r"\bJOB\b", job, plain) if job else plain


def as_markdown() -> str:
    """The table of docs/slurm.md."""
    rows = ["| cause | what happened | what to do | started again |", "|---|---|---|---|"]
    for entry in TABLE:
        again = "yes" if entry.may_pass else "no"
        rows.append(f"| `{entry.name}` | {entry.meaning} | {entry.cure}. | {again} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(as_markdown())
