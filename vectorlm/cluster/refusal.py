"""sbatch's refusals: its words, the key to change, and what there is to choose from. Floor 1, used
by `submit`.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vectorlm.cluster import slurm
from vectorlm.errors import ClusterError

MOST_SHOWN = 20
_FAILED = re.compile(r"`sbatch .*` failed with exit code \d+: (?P<words>.*)", re.S)


@dataclass(frozen=True)
class Refusal:
    """Words of Slurm's, the keys to look at, and a command that prints the choice there is."""

    words: str
    keys: str
    choice: tuple[str, ...] = ()


def _associations(column: str) -> tuple[str, ...]:
    who = f"user={getpass.getuser()}"
    return ("sacctmgr", "-n", "-P", "show", "assoc", who, f"format={column}")


def _refusals() -> Sequence[Refusal]:
    """The first whose words are found counts."""
    nodes = ("sinfo", "-h", "-o", "%R: %D node(s) of %c CPUs, %m MB, %G")
    limits = ("sinfo", "-h", "-o", "%R: at most %l")
    return (
        Refusal(r"policy", "slurm.time, nodes or gpus_per_node: less, or wait for other jobs"),
        Refusal(r"[Ii]nvalid account", "slurm.account", _associations("account")),
        Refusal(r"[Ii]nvalid qos", "slurm.qos", _associations("qos")),
        Refusal(r"time limit|--time", "slurm.time", limits),
        Refusal(r"feature", "slurm.constraint", ("sinfo", "-h", "-o", "%f")),
        Refusal(r"reservation", "slurm.reservation"),
        Refusal(r"node name", "slurm.exclude", ("sinfo", "-h", "-N", "-o", "%N")),
        Refusal(r"gres|GRES", "slurm.gpus_per_node or slurm.gpu_type", ("sinfo", "-h", "-o", "%G")),
        Refusal(r"--mail", "slurm.mail_user or slurm.mail_type"),
        Refusal(r"array", "sweep: more runs than Slurm's MaxArraySize; split it"),
        Refusal(r"unrecognized option|licen[sc]e", "slurm.extra_flags"),
        Refusal(r"[Mm]emory|--mem", "slurm.mem", nodes),
        Refusal(
            r"node configuration|[Nn]ode count|processors",
            "slurm.nodes, gpus_per_node, gpu_type, cpus_per_gpu, mem, constraint or partition",
            nodes,
        ),
        Refusal(r"partition", "slurm.partition", ("sinfo", "-h", "-o", "%R")),
    )


def explained(error: ClusterError) -> ClusterError:
    """The same in few words, where sbatch was asked and refused; else the error itself."""
    found = _FAILED.fullmatch(str(error))
    if found is None:
        return error
    words = _words(found["words"])
    for refusal in _refusals():
        if re.search(refusal.words, words):
            return ClusterError(
                f"sbatch refused the job: {words}\nchange {refusal.keys}{_choice(refusal.choice)}"
            )
    return ClusterError(f"sbatch refused the job: {words}")


def _words(text: str) -> str:
    """Without the name of the program before each sentence."""
    sentences = re.sub(r"sbatch: (error: )?(Batch job submission failed: )?", "", text).split("; ")
    own = [sentence for sentence in sentences if not sentence.startswith("Try ")]
    return "; ".join(dict.fromkeys(own))


def _choice(command: Sequence[str]) -> str:
    if not command:
        return ""
    try:
        lines = slurm.call(command).split("\n")
    except ClusterError:  # no accounting: there is nothing to choose
        return ""
    there = sorted({line.strip() for line in lines} - {"", "(null)"})
    more = f", and {len(there) - MOST_SHOWN} more" if len(there) > MOST_SHOWN else ""
    return f"; there is: {'; '.join(there[:MOST_SHOWN])}{more}" if there else ""
