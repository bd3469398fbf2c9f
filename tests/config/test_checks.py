"""Rules across keys: each broken once, and each sound configuration beside it is silent."""

from __future__ import annotations

from typing import Any

import pytest

from vectorlm.config import checks
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
