"""Rules that concern several keys, or the inside of a free mapping. Floor 0; called by `load`.

Only what cannot be meant is a problem; nothing here looks at the file system. The message says what
is wrong and what to do, and stands behind the first of `keys` that was given.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Any

from vectorlm.config.data_checks import source_rules
from vectorlm.config.job_checks import slurm_rules, sweep_rules
from vectorlm.config.problem import Problem
from vectorlm.config.schema import (
    PLATEAU_SCHEDULERS,
    Config,
)
from vectorlm.config.suggest import shown

SECRET_NAME = re.compile(
    r"(^|_)(api_?key|password|passwd|secret|access_token|auth_token)$|^token$", re.I
)


def problems(config: Config) -> list[Problem]:
    """Every contradiction in the configuration, in the order of the rules."""
    return [problem for rule in RULES for problem in rule(config)]


# --- training -------------------------------------------------------------------------------------


def _precision(config: Config) -> Iterator[Problem]:
    train = config.train_parameters
    if train.use_mp and train.precision not in (None, "bf16-mixed"):
        yield Problem(
            ("train_parameters.precision", "train_parameters.use_mp"),
            f"precision {train.precision} contradicts use_mp: true, which is short for precision: "
            "bf16-mixed; remove use_mp",
        )


def _sharding(config: Config) -> Iterator[Problem]:
    train = config.train_parameters
    if train.shard_group_size is not None and train.sharding_strategy != "HYBRID_SHARD":
        yield Problem(
            ("train_parameters.shard_group_size", "train_parameters.sharding_strategy"),
            f"shard_group_size has no meaning under sharding_strategy {train.sharding_strategy}; "
            "remove it or take HYBRID_SHARD",
        )


def _optimizer(config: Config) -> Iterator[Problem]:
    named = {"name", "lr", "weight_decay", "betas", "eps", "kwargs"}
    for name in sorted(named & config.train_parameters.optimizer.kwargs.keys()):
        yield Problem(
            (f"train_parameters.optimizer.kwargs.{name}",),
            f"{name} has a key of its own; give it as train_parameters.optimizer.{name}",
        )


def _scheduler(config: Config) -> Iterator[Problem]:
    train = config.train_parameters
    prefix = "train_parameters.lr_scheduler_kwargs"
    for name, source in (("num_warmup_steps", "warmup_ratio"), ("num_training_steps", "epochs")):
        if name in train.lr_scheduler_kwargs:
            yield Problem(
                (f"{prefix}.{name}",), f"follows from train_parameters.{source}; remove it"
            )
    floors = [name for name in ("min_lr", "min_lr_rate") if name in train.lr_scheduler_kwargs]
    if "with_min_lr" in train.lr_scheduler_type and len(floors) != 1:
        yield Problem(
            ("train_parameters.lr_scheduler_type", prefix),
            f"{train.lr_scheduler_type} needs either min_lr or min_lr_rate in lr_scheduler_kwargs; "
            f"{'both are' if floors else 'neither is'} given",
        )


def _plateau(config: Config) -> Iterator[Problem]:
    kind = config.train_parameters.lr_scheduler_type
    if kind in PLATEAU_SCHEDULERS and config.dataset is not None and config.dataset.eval_ds is None:
        yield Problem(
            ("train_parameters.lr_scheduler_type", "dataset.eval_ds"),
            f"{kind} follows the evaluation loss; give dataset.eval_ds or take another scheduler",
        )


def _lora(config: Config) -> Iterator[Problem]:
    lora = config.train_parameters.lora_peft_config or {}
    for name, (is_sound, message) in LORA_RULES.items():
        if name in lora and not is_sound(lora[name]):
            message = f"is {shown(lora[name])}; {message}"
            yield Problem((f"train_parameters.lora_peft_config.{name}",), message)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


LORA_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        "must be a whole number, at least 1",
    ),
    "lora_alpha": (lambda value: _is_number(value) and value > 0, "must be a number above 0"),
    "lora_dropout": (
        lambda value: _is_number(value) and 0 <= value < 1,
        "must be a number, at least 0 and below 1",
    ),
    "task_type": (
        lambda value: value in (None, "CAUSAL_LM"),
        "must be CAUSAL_LM; language models are all that is trained here",
    ),
    "inference_mode": (
        lambda value: value is False,
        "must be false; under inference_mode no adapter is trained",
    ),
}


def _wandb(config: Config) -> Iterator[Problem]:
    for path in _secrets(config.wandb_config, "wandb_config"):
        yield Problem(
            (path,),
            "is a secret, and configurations are shared and logged; remove it, and run `wandb "
            "login` or set WANDB_API_KEY in the environment",
        )


def _secrets(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, entry in value.items():
            if SECRET_NAME.search(str(name)) and isinstance(entry, str) and entry:
                yield f"{path}.{name}"
            else:
                yield from _secrets(entry, f"{path}.{name}")


# --- data -----------------------------------------------------------------------------------------


def _ignore_index(config: Config) -> Iterator[Problem]:
    if config.dataset is None or config.dataset_preprocess is None:
        return
    trained, written = config.dataset.ignore_index, config.dataset_preprocess.ignore_index
    if trained != written:
        yield Problem(
            ("dataset.ignore_index", "dataset_preprocess.ignore_index"),
            f"ignore_index is {trained} in dataset and {written} in dataset_preprocess; "
            "they must be equal",
        )


def _packing(config: Config) -> Iterator[Problem]:
    prepare = config.dataset_preprocess
    if prepare is None:
        return
    if prepare.truncate and prepare.packing_type not in (None, "truncate"):
        yield Problem(
            ("dataset_preprocess.truncate", "dataset_preprocess.packing_type"),
            f"truncate: true contradicts packing_type {prepare.packing_type}; keep one of the two",
        )
    elif prepare.overlap and prepare.effective_packing != "partial":
        yield Problem(
            ("dataset_preprocess.overlap", "dataset_preprocess.packing_type"),
            "overlap is only for packing_type partial, and the packing is "
            f"{prepare.effective_packing}; set it to 0",
        )
    if prepare.overlap >= config.train_parameters.max_seq_len:
        yield Problem(
            ("dataset_preprocess.overlap", "train_parameters.max_seq_len"),
            f"overlap {prepare.overlap} must be below max_seq_len "
            f"{config.train_parameters.max_seq_len}",
        )


def _source(config: Config) -> Iterator[Problem]:
    prepare = config.dataset_preprocess
    if prepare and prepare.from_disk and prepare.file_kind not in ("auto", "hf", "text"):
        yield Problem(
            ("dataset_preprocess.from_disk", "dataset_preprocess.dataset_format"),
            "from_disk: true says a folder saved by `datasets`, dataset_format says "
            f"{prepare.dataset_format}; keep one of the two",
        )


def _folders(config: Config) -> Iterator[Problem]:
    """A prepared folder is replaced as a whole, so nothing else may be it or lie inside it."""
    prepare = config.dataset_preprocess
    if prepare is None:
        return
    prefix = "dataset_preprocess."
    written = {prefix + name: getattr(prepare, name) for name in ("save_path", "eval_save_path")}
    kept = {
        "model": config.model,
        "train_parameters.output_dir": config.train_parameters.output_dir,
        prefix + "load_path": prepare.load_path,
        prefix + "eval_load_path": prepare.eval_load_path,
    }
    sources = [(prefix + "datasets", str(one.get("load_path") or "")) for one in prepare.datasets]
    if prepare.eval_save_path and _folder(prepare.eval_save_path) == _folder(prepare.save_path):
        del written[prefix + "eval_save_path"]  # as the other way round, which is said anyway
        kept[prefix + "eval_save_path"] = prepare.eval_save_path
    for target, folder in written.items():
        for other, path in [*(kept | written).items(), *sources]:
            if other != target and folder and path and _holds(folder, path):
                yield Problem(
                    (target, other),
                    f"{target} is replaced as a whole when data is prepared, and {other} "
                    f"({path}) is it or lies in it; choose separate folders",
                )


def _training_folders(config: Config) -> Iterator[Problem]:
    data, prepare = config.dataset, config.dataset_preprocess
    if data is None or prepare is None:
        return
    sources = {_folder(path) for path in (prepare.load_path, prepare.eval_load_path) if path}
    sources -= {_folder(path) for path in (prepare.save_path, prepare.eval_save_path) if path}
    for name in ("train_ds", "eval_ds"):
        path = getattr(data, name)
        if path is not None and _folder(path) in sources:
            yield Problem(
                (f"dataset.{name}", "dataset_preprocess.load_path"),
                f"{path} is the source that preprocessing reads; must be the prepared folder, "
                "such as save_path",
            )
    if data.eval_ds is None or prepare.eval_save_path is None:
        return
    used = (_folder(data.train_ds), _folder(data.eval_ds))
    if used == (_folder(prepare.eval_save_path), _folder(prepare.save_path)):
        yield Problem(
            ("dataset.train_ds", "dataset.eval_ds"),
            "train_ds is eval_save_path and eval_ds is save_path; swap them",
        )


def _folder(path: str) -> str:
    return posixpath.normpath(path)


def _holds(folder: str, path: str) -> bool:
    outer, inner = _folder(folder), _folder(path)
    return outer == inner or inner.startswith(outer.rstrip("/") + "/")


RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _precision,
    _sharding,
    _optimizer,
    _scheduler,
    _plateau,
    _lora,
    _wandb,
    _ignore_index,
    _packing,
    _source,
    source_rules,
    _folders,
    _training_folders,
    slurm_rules,
    sweep_rules,
)
