"""Rules across keys: each broken once, and each sound configuration beside it is silent."""

from __future__ import annotations

from typing import Any

import pytest

from vectorlm.config import checks
from vectorlm.config.job_checks import KEY_OF_FLAG
from vectorlm.config.keys import find
from vectorlm.config.schema import Config

Values = dict[str, Any]
EVAL = {"eval_save_path": "prepared_eval"}


def found(
    train: Values | None = None,
    dataset: Values | None = None,
    prepare: Values | None = None,
    **top: Any,
) -> list[tuple[str, ...]]:
    """The keys of each problem of a sound configuration with these changes."""
    values: Values = {
        "model": "model",
        "train_parameters": {"output_dir": "out", "max_seq_len": 128} | (train or {}),
        "dataset": {"train_ds": "prepared"} | (dataset or {}),
        "dataset_preprocess": {"load_path": "raw", "save_path": "prepared"} | (prepare or {}),
    }
    return [problem.keys for problem in checks.problems(Config.model_validate(values | top))]


def job(**values: Any) -> dict[str, Any]:
    return {"slurm": values}


HYBRID = {"sharding_strategy": "HYBRID_SHARD", "shard_group_size": 4}


def lora(**values: Any) -> Values:
    return {"lora_peft_config": values}


BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("train_parameters.precision", {"train": {"use_mp": True, "precision": "32-true"}}),
    ("train_parameters.precision", {"train": {"use_mp": True, "precision": "16-mixed"}}),
    ("train_parameters.precision", {"train": {"use_mp": True, "precision": "bf16-true"}}),
    ("train_parameters.shard_group_size", {"train": {"shard_group_size": 2}}),
    (
        "train_parameters.optimizer.kwargs.betas",
        {"train": {"optimizer": {"kwargs": {"betas": [0.9, 0.9]}}}},
    ),
    (
        "train_parameters.lr_scheduler_kwargs.num_warmup_steps",
        {"train": {"lr_scheduler_kwargs": {"num_warmup_steps": 3}}},
    ),
    ("train_parameters.lr_scheduler_type", {"train": {"lr_scheduler_type": "cosine_with_min_lr"}}),
    (
        "train_parameters.lr_scheduler_type",
        {
            "train": {
                "lr_scheduler_type": "cosine_warmup_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-6, "min_lr_rate": 0.1},
            }
        },
    ),
    ("train_parameters.lr_scheduler_type", {"train": {"lr_scheduler_type": "greedy"}}),
    ("train_parameters.lr_scheduler_type", {"train": {"lr_scheduler_type": "plateau-with-warmup"}}),
    ("train_parameters.lr_scheduler_type", {"train": {"lr_scheduler_type": "plataeu-with-warmup"}}),
    ("train_parameters.lora_peft_config.r", {"train": lora(r=0)}),
    ("train_parameters.lora_peft_config.r", {"train": lora(r=8.0)}),
    ("train_parameters.lora_peft_config.r", {"train": lora(r=True)}),
    ("train_parameters.lora_peft_config.r", {"train": lora(r="8")}),
    ("train_parameters.lora_peft_config.lora_alpha", {"train": lora(lora_alpha=0)}),
    ("train_parameters.lora_peft_config.lora_dropout", {"train": lora(lora_dropout=1)}),
    ("train_parameters.lora_peft_config.task_type", {"train": lora(task_type="SEQ_CLS")}),
    ("train_parameters.lora_peft_config.inference_mode", {"train": lora(inference_mode=True)}),
    ("wandb_config.api_key", {"wandb_config": {"api_key": "abc"}}),
    ("wandb_config.settings.apikey", {"wandb_config": {"settings": {"apikey": "abc"}}}),
    ("dataset.ignore_index", {"dataset": {"ignore_index": -1}}),
    ("dataset.ignore_index", {"prepare": {"ignore_index": -1}}),
    ("dataset_preprocess.truncate", {"prepare": {"truncate": True, "packing_type": "full"}}),
    ("dataset_preprocess.truncate", {"prepare": {"truncate": True, "packing_type": "partial"}}),
    ("dataset_preprocess.truncate", {"prepare": {"truncate": True, "packing_type": "none"}}),
    ("dataset_preprocess.overlap", {"prepare": {"overlap": 8, "packing_type": "full"}}),
    ("dataset_preprocess.overlap", {"prepare": {"overlap": 8}}),
    ("dataset_preprocess.overlap", {"prepare": {"overlap": 128, "packing_type": "partial"}}),
    ("dataset_preprocess.from_disk", {"prepare": {"from_disk": True, "dataset_format": "csv"}}),
    ("dataset_preprocess.eval_split", {"prepare": {"eval_split": "validation"}}),
    ("dataset_preprocess.eval_load_path", {"prepare": {"eval_load_path": "raw_eval"}}),
    ("dataset_preprocess.eval_save_path", {"prepare": EVAL}),
    ("dataset_preprocess.eval_save_path", {"prepare": EVAL | {"eval_load_path": "./raw/"}}),
    (
        "dataset_preprocess.eval_save_path",
        {"prepare": EVAL | {"split": "train", "eval_split": "train"}},
    ),
    ("dataset_preprocess.save_path", {"prepare": {"load_path": "./prepared/"}}),
    ("dataset_preprocess.save_path", {"prepare": {"load_path": "prepared/raw.jsonl"}}),
    ("dataset_preprocess.save_path", {"model": "prepared/model"}),
    ("dataset_preprocess.save_path", {"train": {"output_dir": "prepared"}}),
    (
        "dataset_preprocess.save_path",
        {"prepare": {"eval_save_path": "prepared", "eval_split": "validation"}},
    ),
    (
        "dataset_preprocess.eval_save_path",
        {"prepare": {"save_path": "a/b", "eval_save_path": "a", "eval_split": "validation"}},
    ),
    ("dataset.train_ds", {"dataset": {"train_ds": "raw"}}),
    ("dataset.eval_ds", {"dataset": {"eval_ds": "raw"}}),
    (
        "dataset.train_ds",
        {
            "dataset": {"train_ds": "prepared_eval", "eval_ds": "prepared"},
            "prepare": EVAL | {"eval_split": "validation"},
        },
    ),
    ("slurm.gpu_type", job(gpu_type="a100", gpus_per_node=0)),
    ("slurm.processes_per_node", job(processes_per_node=2)),
    ("slurm.processes_per_node", job(processes_per_node=2, gpus_per_node=4)),
    ("train_parameters.shard_group_size", {"train": HYBRID} | job(nodes=3, gpus_per_node=2)),
    ("train_parameters.shard_group_size", {"train": HYBRID} | job(gpus_per_node=2)),
    (
        "train_parameters.shard_group_size",
        {"train": HYBRID} | job(nodes=3, gpus_per_node=0, processes_per_node=2),
    ),
    ("slurm.container_mounts", job(container_mounts=["/scratch"])),
    ("slurm.time", job(time="0")),
    ("slurm.time", job(time="0-0:00")),
    ("slurm.preprocess.time", job(preprocess={"time": "00:00:00"})),
    ("slurm.signal_lead_s", job(time="3")),
    ("slurm.signal_lead_s", job(time="1:30", signal_lead_s=90)),
    ("slurm.mem", job(mem="64")),
    ("slurm.mem", job(mem="999")),
    ("slurm.preprocess.mem", job(preprocess={"mem": "32"})),
    *(
        ("slurm.setup", job(setup=["true", line]))
        for line in (
            "export HF_TOKEN=hf_abc",
            "WANDB_API_KEY='abc' wandb login",
            'export A=1 PASSWORD="abc"',
            "login --token=abc",
        )
    ),
]


@pytest.mark.parametrize(("key", "changes"), BROKEN, ids=str)
def test_contradiction(key: str, changes: dict[str, Any]) -> None:
    (keys,) = found(**changes)
    assert keys[0] == key


SOUND: list[dict[str, Any]] = [
    {},
    {"train": {"use_mp": True, "precision": "bf16-mixed"}},
    {"train": {"use_mp": False, "precision": "16-mixed"}},
    {"train": {"shard_group_size": 2, "sharding_strategy": "HYBRID_SHARD"}},
    {"train": {"optimizer": {"name": "SGD", "kwargs": {"momentum": 0.9}}}},
    {
        "train": {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        }
    },
    {"train": {"lr_scheduler_type": "greedy"}, "dataset": {"eval_ds": "prepared_eval"}},
    {"train": lora()},
    {"train": lora(r=1, lora_alpha=0.5, lora_dropout=0, task_type=None, inference_mode=False)},
    {"wandb_config": {"project": "p", "config": {"max_tokens": 3, "token_count": 5}}},
    {"wandb_config": {"tags": ["token"]}, "enable_wandb_logging": False},
    {"dataset": {"ignore_index": -1}, "prepare": {"ignore_index": -1}},
    {"prepare": {"truncate": True}},
    {"prepare": {"truncate": True, "packing_type": "truncate"}},
    {"prepare": {"overlap": 127, "packing_type": "partial"}},
    {"prepare": {"from_disk": True, "dataset_format": "hf"}},
    {"prepare": EVAL | {"eval_split": "validation"}},
    {"prepare": EVAL | {"eval_load_path": "raw_eval"}},
    {"prepare": {"load_path": "prepared_raw"}},
    {"model": "prepared_model", "train": {"output_dir": "prepared_out"}},
    {"prepare": {"save_path": "raw/prepared"}},
    {"train": {"output_dir": "run"}, "prepare": {"save_path": "run/data"}},
    {"dataset": {"train_ds": "elsewhere", "eval_ds": "prepared"}},
    job(),
    job(gpu_type="a100", gpus_per_node=4, processes_per_node=4),
    job(gpus_per_node=0, processes_per_node=3),
    {"train": HYBRID} | job(nodes=2, gpus_per_node=4),
    {"train": HYBRID} | job(nodes=4, gpus_per_node=2),
    {"train": HYBRID} | job(nodes=2, gpus_per_node=0, processes_per_node=2),
    {"train": HYBRID},
    job(container_mounts=["/scratch"], container_image="/x.sif"),
    job(time="1:31", signal_lead_s=90),
    job(mail_type="ALL"),
    job(mem="1000", preprocess={"mem": "0"}),
    *(
        job(setup=[line])
        for line in (
            "export HF_TOKEN=$(cat ~/.token)",
            'export HF_TOKEN="$TOKEN"',
            "export WANDB_API_KEY=`cat ~/.key`",
            "export TOKENIZERS_PARALLELISM=false HF_TOKEN_PATH=/x",
            "module load token=",
        )
    ),
]


@pytest.mark.parametrize("changes", SOUND, ids=str)
def test_no_false_alarm(changes: dict[str, Any]) -> None:
    assert found(**changes) == []


def test_plateau_without_a_dataset_section() -> None:
    """A file for preprocessing alone need not say what is evaluated."""
    train = {"output_dir": "out", "max_seq_len": 128, "lr_scheduler_type": "greedy"}
    config = Config.model_validate({"model": "model", "train_parameters": train})
    assert checks.problems(config) == []


def test_a_secret_is_not_printed() -> None:
    config = Config.model_validate(
        {
            "model": "m",
            "train_parameters": {"output_dir": "o", "max_seq_len": 8},
            "wandb_config": {"api_key": "hunter2"},
        }
    )
    (problem,) = checks.problems(config)
    assert "hunter2" not in problem.message
    assert "WANDB_API_KEY" in problem.message


def test_a_secret_of_the_setup_is_not_printed() -> None:
    config = Config.model_validate(
        {
            "model": "m",
            "train_parameters": {"output_dir": "o", "max_seq_len": 8},
            "slurm": {"setup": ["export HF_TOKEN=hunter2"]},
        }
    )
    (problem,) = checks.problems(config)
    assert "hunter2" not in problem.message


# --- flags of sbatch ------------------------------------------------------------------------------

KEPT = (
    "--exclusive",
    "--nice=100",
    "--licenses=fs:1",
    "--time-min=30",
    "--nodelist=gpu01",
    "--comment=x",
    "--chdir=/scratch",
    "--export=NONE",
    "--gres-flags=enforce-binding",
    "--gpu-bind=none",
    "--mem-bind=local",
    "--switches=1",
    "--wait-all-nodes=1",
    "--begin=now+1hour",
    "--hold",
    "--prefer=ib",
    "--mincpus=8",
    "--tmp=100G",
)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--time=5", "--time has a key of its own; give it as slurm.time"),
        ("--partition=x", "give it as slurm.partition"),
        ("--account=x", "give it as slurm.account"),
        ("--nodes=2", "give it as slurm.nodes"),
        ("--gres=gpu:2", "give it as slurm.gpus_per_node or slurm.extra_gres"),
        ("--gpus-per-node=2", "give it as slurm.gpus_per_node"),
        ("--gpus=2", "give it as slurm.gpus_per_node"),
        ("--ntasks-per-node=2", "give it as slurm.gpus_per_node or slurm.processes_per_node"),
        ("--cpus-per-task=2", "give it as slurm.cpus_per_gpu"),
        ("--mem=2G", "give it as slurm.mem"),
        ("--mem-per-cpu=2G", "give it as slurm.mem"),
        ("--job-name=x", "give it as slurm.job_name"),
        ("--signal=USR1@5", "give it as slurm.signal_lead_s"),
        ("--requeue", "give it as slurm.requeue"),
        ("--no-requeue", "give it as slurm.requeue"),
        ("--array=1-3", "--array has a key of its own; give it as sweep"),
        ("--container-image=x", "give it as slurm.container_image"),
        ("--output=x", "--output is set by the job script; remove it"),
        ("--error=x", "--error is set by the job script"),
        ("--open-mode=append", "--open-mode is set by the job script"),
        ("--wrap=x", "--wrap is for a call of sbatch, not a script; remove it"),
        ("--dependency=afterok:1", "--dependency is for a call of sbatch"),
        ("--wait", "--wait is for a call of sbatch"),
        ("--test-only", "--test-only is for a call of sbatch"),
        ("--tim=5", "--tim, short for --time, has a key of its own"),
        ("--part=x", "--part, short for --partition,"),
        ("--gpus-per-n=2", "--gpus-per-n, short for --gpus-per-node,"),
        ("--outp=x", "--outp, short for --output, is set by the job script"),
        ("--tasks-per-node=2", "give it as slurm.gpus_per_node or slurm.processes_per_node"),
        ("--par", "--par, short for --parsable, is for a call"),
    ],
)
def test_flags_that_something_else_stands_for(flag: str, said: str) -> None:
    config = Config.model_validate(
        {
            "model": "m",
            "train_parameters": {"output_dir": "o", "max_seq_len": 8},
            "slurm": {"extra_flags": [KEPT[0], flag, *KEPT[1:]]},
        }
    )
    (problem,) = checks.problems(config)
    assert problem.keys == ("slurm.extra_flags",)
    assert said in problem.message


def test_other_flags_are_kept() -> None:
    assert found(**job(extra_flags=list(KEPT))) == []


def test_gpus_are_no_further_resource() -> None:
    assert found(**job(extra_gres=["lscratch:100", "gpumem:1"])) == []
    assert "slurm.extra_gres" in str(found(**job(extra_gres=["lscratch:100", "gpu:2"])))


def test_every_refused_flag_names_a_key_that_there_is() -> None:
    for names in KEY_OF_FLAG.values():
        for name in names.split(" or "):
            assert find(tuple(name.split("."))), name
