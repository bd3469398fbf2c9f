"""The keys of the job: sections `slurm` and `sweep`. Floor 0; everyone takes them from `schema`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from vectorlm.config.job_text import (
    A_DURATION,
    A_SIZE,
    ADDRESS,
    FEATURES,
    IMAGE,
    INTERFACES,
    LONGEST_TEXT,
    MAIL_TYPES,
    NAME,
    NAMES,
    NODE_LIST,
    Duration,
    Flag,
    Gres,
    Memory,
    Mount,
    ShellLine,
    duration_s,
)
from vectorlm.config.section import Count, Section, said

Launcher = Literal["sbatch", "submitit"]
ContainerRuntime = Literal["apptainer", "pyxis"]
SweepMetric = Literal["eval_loss", "loss", "tokens_per_s", "mfu", "memory_gib"]


def _text(pattern: str, allowed: str, description: str, default: Any = None) -> Any:
    """A text that ends up in a job script; `allowed` says in words what the pattern admits."""
    return Field(
        default,
        pattern=pattern,
        max_length=LONGEST_TEXT,
        description=description,
        json_schema_extra={"allowed": allowed},
    )


class SlurmPreprocess(Section):
    """The job that prepares the data, without GPUs (`vectorlm submit --with-preprocess`)."""

    partition: str | None = _text(
        NAMES, "a name such as cpu, or several as cpu,long", "Partition of nodes without GPUs."
    )
    cpus: Count = Field(8, description="CPU cores.")
    mem: Memory = said("32G", A_SIZE, "Host memory; `0`: all the node has.")
    time: Duration = said("04:00:00", A_DURATION, "Time limit.")

    @property
    def time_s(self) -> int:
        return duration_s(self.time)


class Slurm(Section):
    """The job: what is asked of Slurm, and what happens when it is interrupted."""

    launcher: Launcher = Field(
        "sbatch", description="Who submits: `sbatch` with a script to read, or `submitit`."
    )
    job_name: str = _text(
        NAME, "a name of letters, digits and _ . @ + -", "Name of the job.", "vectorlm"
    )
    partition: str | None = _text(
        NAMES, "a name such as gpu, or several as gpu,gpu-long", "Partition; by default the site's."
    )
    account: str | None = _text(NAME, "a name such as def-prof_gpu", "Account that pays.")
    qos: str | None = _text(NAME, "a name such as normal", "Quality of service.")
    nodes: Count = Field(1, description="Nodes.")
    gpus_per_node: int = Field(
        1, ge=0, le=64, description="GPUs a node; one process is started for each."
    )
    gpu_type: str | None = _text(
        NAME,
        "a type such as a100",
        "Type of GPU, as `sinfo -o %G` names it behind `gpu:`; by default any.",
    )
    processes_per_node: Count | None = Field(
        None,
        description="Processes a node, where there are no GPUs; by default one for each GPU.",
    )
    cpus_per_gpu: Count = Field(
        8, description="CPU cores for each process, also where there are no GPUs."
    )
    mem: Memory = said("0", A_SIZE, "Host memory a node; `0`: all the node has.")
    time: Duration = said(
        "08:00:00",
        A_DURATION,
        "Time limit of one start, as Slurm reads it: `90` is minutes, `1:30` minutes and seconds, "
        "`1-0` days and hours.",
    )
    constraint: str | None = _text(
        FEATURES, "features such as a100&ib or [a100|h100], in quotes", "Features of the nodes."
    )
    exclude: str | None = _text(
        NODE_LIST, "nodes such as gpu03 or gpu[03,07-09]", "Nodes to avoid."
    )
    reservation: str | None = _text(
        NAMES, "a name, or several with commas and no blanks", "Reservation."
    )
    mail_user: str | None = _text(
        ADDRESS, "an address such as you@example.org", "Where Slurm's mails go."
    )
    mail_type: str = _text(
        MAIL_TYPES,
        "NONE, ALL, or some of BEGIN, END, FAIL, REQUEUE, TIME_LIMIT, ... as END,FAIL",
        "What Slurm mails about, when there is a `mail_user`.",
        "END,FAIL",
    )
    signal_lead_s: int = Field(
        180,
        ge=30,
        le=65535,
        description="Seconds before the time limit at which the run is asked to save and stop. "
        "Slurm looks every 30 s; give a step and two saves enough.",
    )
    requeue: bool = Field(
        True, description="Start again after a time limit, a preemption or a fault that may pass."
    )
    max_requeues: int = Field(
        50, ge=0, description="A run that was started again this often is not started again."
    )
    network_interface: str | None = _text(
        INTERFACES,
        "an interface such as eth0, or several as ib0,ib1",
        "Network interface between nodes, for NCCL and gloo; by default found.",
    )
    node_gbit_per_s: int = Field(
        100,
        ge=1,
        le=100_000,
        description="What a node sends to other nodes, in Gbit/s; `vectorlm plan` counts with it.",
    )
    disable_infiniband: bool = Field(
        False, description="Set NCCL_IB_DISABLE=1, where InfiniBand is there but does not work."
    )
    setup: list[ShellLine] = said(
        [],
        'a list of shell lines such as ["module load cuda/12.4"]; none may end in a backslash',
        "Shell lines run before anything else.",
    )
    container_image: str | None = _text(
        IMAGE,
        "an image such as /scratch/x.sif or docker://nvcr.io/nvidia/pytorch:25.01-py3",
        "Container that the processes run in.",
    )
    container_runtime: ContainerRuntime = Field(
        "apptainer",
        description="What runs the container: `apptainer`, or `pyxis` (srun --container-image).",
    )
    container_mounts: list[Mount] = said(
        [],
        "a list of folders such as [/scratch, /host/x:/x, /host/y:/y:ro]",
        "Folders the container sees, each from its root: `/host/folder:/container/folder`.",
    )
    extra_flags: list[Flag] = said(
        [],
        "a list of long flags such as [--exclusive, --nice=100]",
        "Further flags of sbatch; not those that have a key here.",
    )
    extra_gres: list[Gres] = said(
        [],
        "a list of resources such as [lscratch:100]",
        "Further generic resources a node, beside the GPUs, as `sinfo -o %G` names them.",
    )
    preprocess: SlurmPreprocess = Field(SlurmPreprocess(), description="See below.")

    @property
    def gres(self) -> str:
        """What `--gres` asks for: GPUs a node, and the rest; empty where nothing is asked for."""
        kind = f":{self.gpu_type}" if self.gpu_type else ""
        gpus = [f"gpu{kind}:{self.gpus_per_node}"] if self.gpus_per_node else []
        return ",".join([*gpus, *self.extra_gres])

    @property
    def ranks_per_node(self) -> int:
        return self.processes_per_node or max(self.gpus_per_node, 1)

    @property
    def node_bytes_per_s(self) -> float:
        return self.node_gbit_per_s * 1e9 / 8

    @property
    def time_s(self) -> int:
        return duration_s(self.time)


class Sweep(Section):
    """Many runs that differ in some keys: one job array, a folder each."""

    grid: dict[str, list[Any]] = said(
        {},
        "a mapping from keys such as train_parameters.seed to lists such as [1, 2]",
        "Values for each key, as `train_parameters.optimizer.lr: [1.0e-5, 2.0e-5]`; every "
        "combination is a run.",
    )
    runs: list[dict[str, Any]] = said(
        [],
        "a list of mappings such as {train_parameters.seed: 1}",
        "Runs one by one, each a mapping from keys to values; with `grid`, each is combined with "
        "every point of the grid.",
    )
    at_once: Count | None = Field(
        None, description="How many runs may be active at a time; by default any number."
    )
    metric: SweepMetric = Field(
        "eval_loss", description="Logged value that `vectorlm status` sorts by."
    )
    goal: Literal["min", "max"] = Field("min", description="Whether less of it is better, or more.")
