"""Models that do not fit the GPU that is asked for, and runs that the time limit cuts to pieces."""

from __future__ import annotations

from tests.doomed.case import Case
from tests.doomed.entry import doomed
from tests.doomed.large import large_model

MEMORY = r"(memory|fit|GiB)"
LESS = r"use_activation_checkpointing|train_bs|lora|FULL_SHARD|gpus_per_node|vectorlm plan"
NO_MEMORY = "torch.OutOfMemoryError: CUDA out of memory"


@doomed(MEMORY, LESS, NO_MEMORY, seen=False)
def seven_billion_on_one_gpu(case: Case) -> None:
    large_model(case, "7b")
    case.rows(512)
    case.train.update(precision="bf16-mixed", use_activation_checkpointing=True)
    case.slurm(gpus_per_node=1, gpu_type="h100")


@doomed(MEMORY, LESS, NO_MEMORY, seen=False)
def thirteen_billion_with_two_moments(case: Case) -> None:
    large_model(case, "13b")
    case.rows(512)
    case.train.update(precision="bf16-true", use_activation_checkpointing=True)
    case.slurm(gpus_per_node=1, gpu_type="h100")


@doomed(MEMORY, r"use_activation_checkpointing|train_bs", NO_MEMORY, seen=False)
def a_micro_batch_without_checkpointing(case: Case) -> None:
    large_model(case, "1b")
    case.rows(512)
    case.train.update(precision="32-true")
    case.dataset["train_bs"] = 64
    case.slurm(gpus_per_node=1, gpu_type="h100")


@doomed(MEMORY, r"FULL_SHARD", NO_MEMORY, seen=False)
def a_whole_copy_on_every_gpu(case: Case) -> None:
    large_model(case, "7b")
    case.rows(512)
    case.train.update(
        precision="bf16-mixed", use_activation_checkpointing=True, sharding_strategy="NO_SHARD"
    )
    case.slurm(nodes=2, gpus_per_node=8, gpu_type="h100")


@doomed(MEMORY, r"FULL_SHARD|shard_group_size|gpus_per_node", NO_MEMORY, seen=False)
def a_copy_on_every_two_gpus(case: Case) -> None:
    large_model(case, "13b")
    case.rows(512)
    case.train.update(
        precision="bf16-mixed", use_activation_checkpointing=True, sharding_strategy="HYBRID_SHARD"
    )
    case.slurm(nodes=4, gpus_per_node=2, gpu_type="h100")


@doomed(MEMORY, r"train_bs", NO_MEMORY, seen=False)
def logits_of_a_large_vocabulary(case: Case) -> None:
    """Adapters in the head ask for whole logits."""
    large_model(case, "128k")
    case.rows(4096)
    case.train.update(precision="bf16-mixed", use_activation_checkpointing=True)
    case.train["lora_peft_config"] = {"r": 8, "target_modules": ["q_proj", "lm_head"]}
    case.dataset["train_bs"] = 16
    case.slurm(gpus_per_node=8, gpu_type="h100")


@doomed(MEMORY, LESS, NO_MEMORY, seen=False)
def adapters_on_a_base_that_does_not_fit(case: Case) -> None:
    large_model(case, "70b")
    case.rows(512)
    case.train.update(
        precision="bf16-mixed", use_activation_checkpointing=True, lora_peft_config={"r": 8}
    )
    case.slurm(gpus_per_node=1, gpu_type="h100")


@doomed(
    r"bf16.*[Vv]100|[Vv]100.*bf16",
    r"16-mixed",
    "has no bf16; use `precision: 16-mixed`",
    seen=False,
)
def bf16_on_a_v100(case: Case) -> None:
    case.train["use_mp"] = True
    case.slurm(gpus_per_node=1, gpu_type="v100")


@doomed(
    r"slurm\.mem.*(host|GiB|G\b)",
    r"slurm\.mem|low_cpu_mem_usage",
    "Killed by the kernel: out of memory (exit code 137)",
    seen=False,
)
def a_whole_model_in_little_host_memory(case: Case) -> None:
    large_model(case, "7b")
    case.rows(512)
    case.train.update(
        precision="bf16-mixed", use_activation_checkpointing=True, low_cpu_mem_usage=False
    )
    case.slurm(gpus_per_node=8, gpu_type="h100", mem="16G")


@doomed(
    r"slurm\.(time|signal_lead_s).*(step|start|save)",
    r"slurm\.time|signal_lead_s",
    "its time limit was ",
    verb="job",
    severities=("error", "warning"),
    on_cluster=True,
)
def a_time_limit_without_room_for_a_step(case: Case) -> None:
    """Asked to stop as soon as it has started, and started again 50 times to do the same."""
    case.train["epochs"] = 2000
    case.slurm(gpus_per_node=0, cpus_per_gpu=1, mem="8G", time="00:01:00", signal_lead_s=58)
    case.slurm(max_requeues=1)


@doomed(
    r"slurm\.(requeue|time|max_requeues).*(hours|h\b|days|finish|starts)",
    r"slurm\.(time|requeue|max_requeues)|requeue|epochs|more GPUs",
    "CANCELLED DUE TO TIME LIMIT",
    seen=False,
    severities=("error", "warning"),
)
def a_run_that_is_cut_off_and_not_started_again(case: Case) -> None:
    large_model(case, "7b")
    case.rows(512, rows=256)
    case.train.update(precision="bf16-mixed", use_activation_checkpointing=True, epochs=20000)
    case.slurm(gpus_per_node=8, gpu_type="h100", time="02:00:00", requeue=False)


@doomed(
    r"checkpointing_enabled.*(time|requeue|hours|h\b)|time.*checkpointing_enabled",
    r"checkpointing_enabled: true|checkpointing_enabled",
    "checkpointing_enabled is false, so nothing was saved",
    seen=False,
    severities=("error", "warning"),
)
def a_run_that_begins_anew_at_every_start(case: Case) -> None:
    """Requeued at each time limit, and without a checkpoint to go on from."""
    large_model(case, "7b")
    case.rows(512, rows=256)
    case.train.update(
        precision="bf16-mixed",
        use_activation_checkpointing=True,
        epochs=20000,
        checkpointing_enabled=False,
    )
    case.slurm(gpus_per_node=8, gpu_type="h100", time="02:00:00")
