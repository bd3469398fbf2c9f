"""Where `vectorlm preflight` starts its ranks."""

from __future__ import annotations

from typing import Any

import pytest

from vectorlm import preflight_door
from vectorlm.config.schema import Config
from vectorlm.errors import ClusterError
from vectorlm.preflight_door import is_shell, srun_command

TRAIN = {"output_dir": "out", "max_seq_len": 48}
ALLOCATED = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_CPUS_PER_NODE": "32(x2)"}


def config(**slurm: Any) -> Config:
    sections = {"slurm": slurm} if slurm else {}
    return Config.model_validate({"model": "m", "train_parameters": TRAIN, **sections})


def flags(environ: dict[str, str], **slurm: Any) -> list[str]:
    command = srun_command(config(**slurm), {**ALLOCATED, **environ})
    assert command[:4] == ["srun", "--kill-on-bad-exit=1", "--overlap", "--immediate=30"]
    return command[4:]


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "a100:8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({}, 1),
    ],
)
def test_a_rank_a_gpu_of_the_allocation(environ: dict[str, str], ranks: int) -> None:
    assert flags(environ) == [
        "--nodes=2",
        f"--ntasks={2 * ranks}",
        f"--ntasks-per-node={ranks}",
        f"--cpus-per-task={32 // ranks}",
    ]


def test_the_configuration_counts_where_there_are_no_gpus() -> None:
    asked = {"gpus_per_node": 0, "processes_per_node": 3}
    assert "--ntasks-per-node=3" in flags({"SLURM_NTASKS_PER_NODE": "2"}, **asked)
    assert "--ntasks-per-node=4" in flags({"SLURM_GPUS_ON_NODE": "4"}, **asked)


def test_cores_are_those_of_the_smallest_node() -> None:
    uneven = {"SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_CPUS_PER_NODE": "32,8(x3)"}
    assert flags(uneven)[-1] == "--cpus-per-task=4"
    few = {"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_CPUS_PER_NODE": "1(x2)"}
    assert flags(few)[-1] == "--overcommit"


def test_shell_is_no_rank() -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
    assert not is_shell(step)
    assert is_shell({**step, "SLURM_PTY_PORT": "40000"})
    assert is_shell({**step, "SLURM_STEP_ID": preflight_door.INTERACTIVE_STEP})


def test_srun_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_door, "SRUN_S", 0.2)
    assert preflight_door._run(["true"]) == 0
    with pytest.raises(ClusterError, match="were not done within 0 s and were ended"):
        preflight_door._run(["sleep", "60"])
    with pytest.raises(ClusterError, match="srun could not be started"):
        preflight_door._run(["/no/srun"])
