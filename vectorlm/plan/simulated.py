"""What a simulation found, and how it is asked for: in a process of its own, since it needs torch
and a process group. Floor 1, called by `plan_door`; `vectorlm.simulate` is what runs there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from vectorlm.config.schema import Config
from vectorlm.errors import ModelError

LIMIT_S = 1800.0


@dataclass(frozen=True)
class Job:
    """What is simulated: this configuration on so many ranks, seen from the first.

    `gpu_capability`: CUDA's (major, minor), which decides on the attention kernel; None: as on a
    CPU.
    """

    config: Config
    ranks: int
    ranks_per_node: int
    gpu_capability: tuple[int, int] | None = (8, 0)


@dataclass(frozen=True)
class Simulated:
    peak_bytes: int
    breakdown: dict[str, int]  # bytes at the peak
    moment: str  # of the peak
    moments: dict[str, int]  # the peak within each moment of a step


def simulate_apart(job: Job) -> Simulated:
    """Simulate in another process, which sees nothing of this one's torch or process group."""
    command = [sys.executable, "-m", "vectorlm.simulate"]
    try:
        done = subprocess.run(
            command, input=job_to_json(job), capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"plan --simulate: took longer than {LIMIT_S / 60:.0f} minutes; plan without it"
        ) from error
    answer = _answer(done.stdout)
    if "refused" in answer:
        raise ModelError(f"plan --simulate: {answer['refused']}")
    if done.returncode or not answer:
        raise ModelError(f"plan --simulate: ended with {done.returncode}:\n{done.stderr.strip()}")
    return Simulated(**answer)


def _answer(output: str) -> dict[str, Any]:
    """The last line that the process wrote, if it came so far; libraries may write before it."""
    last = output.strip().rpartition("\n")[2]
    answer: dict[str, Any] = json.loads(last) if last.startswith("{") else {}
    return answer


def job_to_json(job: Job) -> str:
    given = {key: value for key, value in vars(job).items() if key != "config"}
    # What was not given stays so: an optimizer is given only the arguments that the user wrote.
    return json.dumps({"config": job.config.model_dump_json(exclude_unset=True), **given})


def job_from_json(text: str) -> Job:
    given = json.loads(text)
    capability = given["gpu_capability"]
    given["gpu_capability"] = None if capability is None else (capability[0], capability[1])
    return Job(**given | {"config": Config.model_validate_json(given["config"])})


def to_json(result: Simulated) -> str:
    return json.dumps(asdict(result))
