"""Does the run fit its GPUs, its host memory and its time limit, as it is planned? Floor 1, called
by `everything`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vectorlm.check.finding import Finding, Surroundings, error, note, warning
from vectorlm.check.places import gib
from vectorlm.config.job_text import megabytes
from vectorlm.config.schema import Slurm
from vectorlm.plan.changes import find_changes
from vectorlm.plan.disk import CUDA_HOST_BYTES, PIECES_BYTES
from vectorlm.plan.duration import DISK_BYTES, START_S
from vectorlm.plan.gpus import Gpu, find_gpu
from vectorlm.plan.outlook import Outlook, counted, make_outlook

MOST_CHANGES = 3
QUICK_START_S = 15.0  # libraries alone, and a model that processors can train
# Slurm calls both sizes of it `v100`; what is too much for this one is too much for either.
LARGEST = {"V100-16GB": "V100-32GB"}
# Of what the plan counts for a process, this may be too much.
HOST_DOUBT_BYTES = CUDA_HOST_BYTES + PIECES_BYTES


def look(here: Surroundings) -> Iterator[Finding]:
    outlook, slurm = here.outlook, here.config.slurm
    if outlook is None or slurm is None:
        return
    if outlook.obstacle:
        return  # said elsewhere, where it stands
    if slurm.gpu_type and outlook.hardware.gpu:
        yield from _memory(here, outlook, outlook.hardware.gpu, slurm.gpu_type)
    elif slurm.gpus_per_node:
        why = f"{slurm.gpu_type} is not known" if slurm.gpu_type else "is not given"
        text = f"{why}, so whether the run fits the GPU's memory was not looked at"
        cure = f"give it; a GPU needs about {gib(outlook.needed_bytes)}"
        yield note("slurm.gpu_type", text, cure)
    yield from _host(outlook, slurm)
    yield from _time(here, outlook, slurm)


# --- memory ---------------------------------------------------------------------------------------


def _memory(here: Surroundings, outlook: Outlook, gpu: Gpu, kind: str) -> Iterator[Finding]:
    if gpu.assumed:
        yield note("slurm.gpu_type", gpu.assumed, "as --gpu of vectorlm plan, to be sure")
    larger = find_gpu(LARGEST.get(gpu.name, ""))
    if larger and not outlook.fits and "16" not in kind:
        gpu = larger
        outlook = make_outlook(here.planned, gpu, shape=here.shape)
    if outlook.fits:
        return
    needed = gib(outlook.needed_bytes)
    has = f"an {kind}" if kind[:1] in "aehlm" else f"a {kind}"
    plan = f"{here.command('plan')} says more"
    if outlook.fits is None:
        text = f"a GPU needs about {needed} of memory, and {has} has {gib(gpu.memory_bytes)}"
        yield warning("memory", f"{text}: too close to call", f"{_cures(here, outlook, gpu)}{plan}")
        return
    # Of a family that is not known, the estimate is too rough to stop a job.
    rough = here.shape is not None and here.shape.rough
    text = (
        f"the run does not fit: a GPU needs about {needed} of memory, and {has} has "
        f"{gib(gpu.memory_bytes)}"
    )
    yield (warning if rough else error)("memory", text, f"{_cures(here, outlook, gpu)}{plan}")


def _cures(here: Surroundings, outlook: Outlook, gpu: Gpu) -> str:
    changes = [change for change in find_changes(here.planned, outlook, gpu) if change.fits]
    words = "; or ".join(list(dict.fromkeys(change.words for change in changes))[:MOST_CHANGES])
    return f"{words}; " if words else "no single change helps: more GPUs, or a smaller model; "


def _host(outlook: Outlook, slurm: Slurm) -> Iterator[Finding]:
    given = megabytes(slurm.mem) << 20
    sure = outlook.host_bytes - slurm.ranks_per_node * HOST_DOUBT_BYTES > given
    if not given or outlook.host_bytes <= given or not (sure or slurm.gpus_per_node):
        return
    text = f"a node takes about {gib(outlook.host_bytes)} of host memory, and the job asks for "
    cure = "raise it, or set 0 for all the node has; train_parameters.low_cpu_mem_usage: true"
    yield (error if sure else warning)("slurm.mem", f"{text}{slurm.mem}", cure)


# --- time -----------------------------------------------------------------------------------------


def _time(here: Surroundings, outlook: Outlook, slurm: Slurm) -> Iterator[Finding]:
    train = here.config.train_parameters
    step_s = outlook.seconds_per_step or 0.0
    save_s = outlook.checkpoint_bytes / DISK_BYTES if train.checkpointing_enabled else 0.0
    start_s = START_S if slurm.gpus_per_node else QUICK_START_S
    if slurm.time_s - slurm.signal_lead_s < start_s + step_s:
        text = (
            f"{slurm.time} less signal_lead_s leaves {slurm.time_s - slurm.signal_lead_s} s, and "
            f"to start and do a step takes about {start_s + step_s:,.0f} s"
        )
        yield warning("slurm.time", text, "raise slurm.time")
        return
    if slurm.gpus_per_node and outlook.hardware.gpu:
        if slurm.signal_lead_s < step_s + save_s:
            text = f"{slurm.signal_lead_s} s may be too few for a step and a save, "
            text += f"about {step_s + save_s:,.0f} s"
            yield warning("slurm.signal_lead_s", text, "raise it")
    if outlook.hours is not None and outlook.requeues is None:
        text = "no start gets past its own start-up and save, so the run would never end"
        yield warning("slurm.time", text, "raise slurm.time")
    elif outlook.hours is not None and outlook.requeues:
        yield from _too_long(here, outlook, slurm)


def _too_long(here: Surroundings, outlook: Outlook, slurm: Slurm) -> Iterator[Finding]:
    takes = f"the run takes about {outlook.hours:,.0f} hours, and a start has {slurm.time}"
    again = outlook.requeues or 0
    times = counted(again, "requeue")
    if not slurm.requeue:
        cure = "set slurm.requeue: true, raise slurm.time, or take more GPUs or fewer epochs"
        yield warning("slurm.requeue", f"is false: {takes}, so it would be cut off", cure)
    elif not here.config.train_parameters.checkpointing_enabled:
        yield error(
            "train_parameters.checkpointing_enabled",
            f"is false: {takes}, so every start would begin anew and none would end",
            "set checkpointing_enabled: true, or raise slurm.time",
        )
    elif again > slurm.max_requeues:
        text = f"{takes}: about {times}, and at most {slurm.max_requeues} are allowed"
        yield warning("slurm.max_requeues", text, "raise it, or slurm.time, or take more GPUs")
    else:
        yield note("slurm.time", f"{takes}: about {times}", "nothing needs to be done")
