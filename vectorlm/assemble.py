"""Puts the parts of a training run together and runs it, on every rank.
Floor 4, called by `train`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import vectorlm
from vectorlm.attempt import Attempt
from vectorlm.checkpoint import Checkpoints
from vectorlm.config.load import config_to_dict
from vectorlm.config.schema import Config, DatasetConfig, TrainParameters
from vectorlm.data.tokenize import load_tokenizer
from vectorlm.dataset import Dataset
from vectorlm.distributed import Ranks, connect, disconnect, rank_left
from vectorlm.errors import DataError, RankLostError, VectorLMError
from vectorlm.final_model import save_final_model
from vectorlm.manifest import refuse_other_tokenizer
from vectorlm.measure import preflight
from vectorlm.metrics import Metrics, Work
from vectorlm.model.causal import CausalModel
from vectorlm.model.load import Place, load_model, model_folder, read_config
from vectorlm.optim import Schedule, build_optimizer, build_scaler
from vectorlm.plan.flops import peak_flops, train_flops_per_token
from vectorlm.recipe import refuse_if_changed
from vectorlm.resume import Start, find_start
from vectorlm.steps import warmup_steps
from vectorlm.stop import StopFlag
from vectorlm.trainer import Trainer

# OPT and Phi return views from their blocks; transformers never changes them in place, which is all
# FSDP fears.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def run(config: Config, dataset: DatasetConfig, stop: StopFlag, config_path: str) -> bool:
    """Train; True if finished (the final model is written), False if stopped on request."""
    ranks = connect(config.train_parameters.collective_timeout_minutes)
    try:
        with Attempt(ranks, config.train_parameters.output_dir, config_path) as attempt:
            with _lost_ranks_named(ranks):
                if ranks.world > ranks.local_world:
                    preflight(config, ranks)
                finished = _fit(config, dataset, attempt, stop)
                _record_end(attempt, finished, config, stop)
    except VectorLMError as error:
        if not error.said:
            ranks.say_once(str(error), lambda text: print(text, file=sys.stderr, flush=True))
        error.said = True
        if ranks.world == 1:
            disconnect()
        raise
    disconnect()  # after a failure only if alone: what hangs would hang this
    return finished


@contextmanager
def _lost_ranks_named(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not rank_left(error):
            raise
        raise RankLostError(
            f"rank {ranks.rank}: another rank has left or does not answer, and this one cannot go "
            "on without it; the log of that rank says why. Start again to go on from the last "
            "checkpoint"
        ) from error


def _record_end(attempt: Attempt, finished: bool, config: Config, stop: StopFlag) -> None:
    signals = [name for name in attempt.ranks.gather(stop.received and stop.received.name) if name]
    saved = finished or config.train_parameters.checkpointing_enabled
    attempt.ended("finished" if finished else "stopped", None if finished else signals[0], saved)


def _fit(config: Config, dataset: DatasetConfig, attempt: Attempt, stop: StopFlag) -> bool:
    train = config.train_parameters
    trainer = assemble(config, dataset, attempt, stop)
    try:
        finished = trainer.fit()
        if finished:
            attempt.require_folder()
            folder = save_final_model(trainer.model, config.model, train.output_dir, trainer.ranks)
            trainer.metrics.say(f"finished: {folder}")
    finally:
        trainer.metrics.close()
    return finished


def assemble(config: Config, dataset: DatasetConfig, attempt: Attempt, stop: StopFlag) -> Trainer:
    train, ranks = config.train_parameters, attempt.ranks
    data, evaluation = ranks.together(lambda: open_data(config, dataset, ranks))
    checkpoints = None
    if train.checkpointing_enabled:
        checkpoints = Checkpoints(
            train.output_dir,
            ranks,
            train.keep_checkpoints,
            train.allow_foreign_checkpoints,
            attempt.require_folder,
        )
    start, notes = find_start(config, dataset, data, checkpoints, ranks)

    model = load_model(
        config.model, train, Place(ranks.rank, ranks.world, ranks.local_world, ranks.device)
    )
    optimizer = build_optimizer(train.optimizer, model.trainable().values())
    schedule = Schedule(
        train, optimizer, start.total_steps, warmup_steps(start.total_steps, train.warmup_ratio)
    )
    description = describe(config, dataset, data, model, ranks)
    work = _work(model, data, ranks)
    metrics = ranks.together(
        lambda: Metrics(
            config, description["config"], ranks.first, ranks.world, work, attempt.require_folder
        )
    )
    torch.manual_seed(train.seed + ranks.rank)
    trainer = Trainer(
        train=train,
        ranks=ranks,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        scaler=build_scaler(train.effective_precision, ranks.device),
        data=data,
        evaluation=evaluation,
        steps=start.steps,
        checkpoints=checkpoints,
        metrics=metrics,
        stop=stop,
        description=description,
    )
    attempt.step = lambda: trainer.steps_done
    attempt.located(start.steps_done or None, start.total_steps)
    for line in [*notes, *_facts(config, dataset, trainer, start)]:
        metrics.say(line)
    if start.folder:
        trainer.restore(start.folder, start.state)
        trainer.position = start.position
    return trainer


def open_data(
    config: Config, dataset: DatasetConfig, ranks: Ranks
) -> tuple[Dataset, Dataset | None]:
    train = config.train_parameters

    def opened(folder: str, micro_batch: int) -> Dataset:
        return Dataset(
            folder,
            micro_batch=micro_batch,
            rank=ranks.rank,
            ranks=ranks.world,
            max_seq_len=train.max_seq_len,
            ignore_index=dataset.ignore_index,
            seed=train.seed,
            longest_first=dataset.longest_first,
            group_by_length=dataset.group_by_length,
            pinned=ranks.device.type == "cuda",
        )

    data = opened(dataset.train_ds, dataset.train_bs)
    evaluation = opened(dataset.eval_ds, dataset.eval_bs) if dataset.eval_ds else None
    if ranks.first:
        opened_data = [d for d in (data, evaluation) if d]
        for one in opened_data:
            refuse_if_changed(config, str(one.folder), one.manifest)
        _check_vocabulary(config, opened_data)
    return data, evaluation


def _check_vocabulary(config: Config, datasets: list[Dataset]) -> None:
    """Refuse data that was made with another tokenizer than the model's."""
    folder = model_folder(config.model)
    vocab_size = read_config(folder).get_text_config().vocab_size
    fingerprint = load_tokenizer(str(folder)).sha256
    for data in datasets:
        refuse_other_tokenizer(data.folder, data.manifest, fingerprint, config.model)
        if data.manifest.max_token_id >= vocab_size:
            raise DataError(
                f"{data.folder}: holds token {data.manifest.max_token_id}, but {config.model} has "
                f"a vocabulary of {vocab_size}; its tokenizer has tokens that the model does not "
                "know: resize the model's embeddings"
            )


def describe(
    config: Config, dataset: DatasetConfig, data: Dataset, model: CausalModel, ranks: Ranks
) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    train = config.train_parameters
    return {
        "vectorlm": vectorlm.__version__,
        "torch": torch.__version__,
        "kind": "lora" if model.adapters else "full",
        "config": config_to_dict(config),
        "peft_config": _jsonable(model.adapters.to_dict()) if model.adapters else None,
        "names": model.result_names(),
        "data": data.fingerprint,
        "precision": train.effective_precision,
        "rank_batch": dataset.train_bs * train.gradient_accumulation_steps,
        "device": ranks.device.type,
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_jsonable(item) for item in (sorted(value) if isinstance(value, set) else value)]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _work(model: CausalModel, data: Dataset, ranks: Ranks) -> Work:
    config = model.module.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    weights = sum(p.numel() for p in model.module.parameters())
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * hidden  # looked up, not multiplied
    context = data.manifest.tokens / max(data.manifest.documents, data.manifest.rows)
    flops = train_flops_per_token(weights, layers, hidden, context, model.adapters is None)
    peak = None
    if ranks.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(ranks.device))
    return Work(flops, peak * ranks.world if peak else None)


def _facts(config: Config, dataset: DatasetConfig, trainer: Trainer, start: Start) -> list[str]:
    train, ranks, model = config.train_parameters, trainer.ranks, trainer.model
    every = sum(p.numel() for p in model.module.parameters())
    trained = sum(p.numel() for p in model.trainable().values())
    device = "CPU" if ranks.device.type == "cpu" else torch.cuda.get_device_name(ranks.device)
    steps = trainer.steps
    return [
        f"model {config.model}: {every:,} parameters, {trained:,} trained",
        f"{ranks.world} ranks on {device}: {train.sharding_strategy}, {train.effective_precision}",
        f"attention: {model.attention.kernel}, {model.attention.reason}",
        f"loss: {model.head.way}, {model.head.reason}",
        f"data {dataset.train_ds}: {steps.rows:,} rows, {trainer.data.manifest.tokens:,} tokens",
        f"{start.total_steps:,} steps of {steps.global_batch} rows, {train.epochs} epochs of "
        f"{steps.per_epoch:,} steps",
        *_unusual(train, dataset),
        *_idle_gpus(ranks),
    ]


def _unusual(train: TrainParameters, dataset: DatasetConfig) -> Iterator[str]:
    """What is chosen otherwise than by default, and is not seen in the other lines."""
    if train.compile:
        yield (
            "compile: blocks are compiled at the first steps, which may take some minutes without "
            "a line"
        )
    if train.use_liger_kernel:
        yield "use_liger_kernel: norms, rotary positions and gated layers are liger-kernel's"
    if train.reduce_dtype == "compute" and train.effective_precision != "32-true":
        yield "reduce_dtype: gradients are added up in the type of computation"
    if dataset.group_by_length:
        yield "group_by_length: each step learns rows about as long as one another"
    if not dataset.longest_first:
        yield "longest_first: false, so the longest rows may come late"
    if train.checkpointing_enabled and not train.async_checkpointing:
        yield "async_checkpointing: false, so training waits while a checkpoint is written"
    if not train.checkpointing_enabled:
        yield "checkpointing_enabled: false, so a stop loses the run"


def _idle_gpus(ranks: Ranks) -> Iterator[str]:
    held = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if ranks.device.type == "cpu" and held not in ("", "0"):
        yield (
            f"warning: the job holds {held} GPUs a node and computes on the CPU, for torch "
            f"{torch.__version__} finds none: take a build with CUDA, or set slurm.gpus_per_node: 0"
        )
