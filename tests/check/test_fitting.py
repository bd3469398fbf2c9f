"""Memory, host memory and time, as `plan` has them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.check.project import Project, says
from vectorlm.check.fitting import look

SEVEN_BILLION = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def large(project: Project) -> Project:
    """Llama-2-7B on eight H100; only its config.json is looked at."""
    project.edit("config.json", **SEVEN_BILLION)
    project.train.update(use_mp=True, use_activation_checkpointing=True)
    project.slurm(gpus_per_node=8, gpu_type="h100")
    return project


def test_what_fits(project: Project, large: Project) -> None:
    assert large.find(look) == []


def test_a_model_that_does_not_fit(large: Project) -> None:
    large.slurm(gpus_per_node=1)
    assert says(large.one(look), "memory: the run does not fit: .* h100 has 79", "vectorlm plan")
    large.slurm(gpu_type="quantum9")
    said = "quantum9 is not known, so .* was not looked at"
    assert says(large.one(look, "note"), said, "a GPU needs about")


def test_a_copy_on_every_gpu(large: Project) -> None:
    large.train["sharding_strategy"] = "NO_SHARD"
    assert says(large.one(look), "does not fit", "FULL_SHARD")


def test_a_v100_may_be_the_larger_one(large: Project) -> None:
    large.train.pop("use_mp")
    large.train["precision"] = "16-mixed"
    large.slurm(gpu_type="v100")  # 14 GiB of states: too much for 16 GB, not for 32
    assert says(large.one(look, "note"), "v100 is taken for V100-16GB", "vectorlm plan")
    large.slurm(gpu_type="v100-16gb", gpus_per_node=4)
    assert says(large.one(look), "does not fit", "plan")


def test_host_memory(large: Project) -> None:
    large.slurm(mem="64G")
    assert large.find(look) == []
    large.train["low_cpu_mem_usage"] = False
    large.slurm(mem="16G")
    assert says(large.one(look), "slurm.mem: a node takes about .* 16G", "raise it")


def test_processors_take_less(project: Project) -> None:
    project.slurm(processes_per_node=2, mem="2G")
    assert project.find(look) == []


RUNS: list[tuple[dict[str, Any], dict[str, Any], str, str, str]] = [
    ({"time": "00:03:10"}, {}, "warning", "slurm.time: .* leaves 10 s", "raise"),
    (
        {"time": "02:00:00", "requeue": False},
        {"epochs": 2000000},
        "warning",
        "slurm.requeue: is false: the run takes about [\\d,]+ hours",
        "requeue: true",
    ),
    (
        {"time": "02:00:00"},
        {"epochs": 2000000, "checkpointing_enabled": False},
        "error",
        "checkpointing_enabled: is false: .* would begin anew",
        "checkpointing_enabled: true",
    ),
    (
        {"time": "02:00:00", "max_requeues": 1},
        {"epochs": 2000000},
        "warning",
        "at most 1 are allowed",
        "raise",
    ),
    ({"time": "02:00:00", "max_requeues": 10**6}, {"epochs": 20000}, "note", "requeues", "nothing"),
]


@pytest.mark.parametrize(
    ("slurm", "train", "severity", "text", "cure"), RUNS, ids=[run[3] for run in RUNS]
)
def test_time(
    slurm: dict[str, Any],
    train: dict[str, Any],
    severity: str,
    text: str,
    cure: str,
    large: Project,
) -> None:
    large.slurm(**slurm)
    large.train.update(train)
    assert says(large.one(look, severity), text, cure)


def test_no_room_for_a_step_without_gpus(project: Project) -> None:
    project.slurm(time="00:01:00", signal_lead_s=58)
    assert says(project.one(look, "warning"), "leaves 2 s", "raise slurm.time")
