"""What ranks do in the tests of this folder, and the plain loop they are compared with.

A `Case` is a configuration in short; `train_all` trains each with the real parts, `plain_loop` is
what a textbook would do on one process without any of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from tests.tiny import VOCABULARY, write_rows
from vectorlm.config.schema import Config
from vectorlm.distributed import Ranks
from vectorlm.libraries import loading
from vectorlm.stop import StopFlag

MAX_SEQ_LEN = 48
ROWS = 11  # with 4 rows a step: two whole steps and a partial one
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "init_lora_weights": False,
}


@dataclass(frozen=True)
class Case:
    model: str
    data: str
    output: str
    train: dict[str, Any] = field(default_factory=dict)
    train_bs: int = 1

    def config(self) -> Config:
        train = {
            "output_dir": self.output,
            "max_seq_len": MAX_SEQ_LEN,
            "logging_steps": 1,
            "checkpointing_enabled": False,
            "max_grad_norm": 0.5,
            # Far from rounding: with a tiny eps Adam turns noise in a gradient into a whole step.
            "optimizer": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1},
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.3,
            **self.train,
        }
        dataset = {"train_ds": self.data, "train_bs": self.train_bs, "longest_first": False}
        return Config.model_validate(
            {"model": self.model, "train_parameters": train, "dataset": dataset}
        )


def make_rows(rows: int = ROWS, seed: int = 0) -> list[list[list[int]]]:
    """Rows of one to four documents of very uneven lengths."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        lengths = generator.integers(1, 1 + MAX_SEQ_LEN // 4, size=generator.integers(1, 5))
        made.append([generator.integers(3, VOCABULARY, n).tolist() for n in lengths])
    return made


def prepared(folder: Path, model: Path, rows: list[list[list[int]]]) -> Path:
    from vectorlm.data.tokenize import load_tokenizer

    return write_rows(folder, rows, MAX_SEQ_LEN, tokenizer_sha256=load_tokenizer(str(model)).sha256)


def train_all(ranks: Ranks, cases: dict[str, Case]) -> dict[str, Any]:
    return {name: train(ranks, case) for name, case in cases.items()}


def train(ranks: Ranks, case: Case) -> dict[str, Any]:
    """Train with the real parts: logged steps, and the final parameters, whole."""
    with loading():
        from vectorlm.assemble import assemble
        from vectorlm.attempt import Attempt

    config = case.config()
    assert config.dataset is not None
    with Attempt(ranks, config.train_parameters.output_dir, "config.yaml") as attempt:
        trainer = assemble(config, config.dataset, attempt, StopFlag())
        trainer.fit()
        trainer.metrics.close()
    parameters = {
        name: whole(param).clone() for name, param in trainer.model.module.named_parameters()
    }
    log = Path(case.output) / "metrics.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()] if ranks.first else []
    return {"steps": steps, "parameters": parameters}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_loop(case: Case, rows: list[list[list[int]]], batch: int) -> dict[str, Any]:
    """One process, one document at a time, the optimizer and schedule of the libraries."""
    from transformers import get_scheduler

    config = case.config()
    train = config.train_parameters
    model = _plain_model(case.model, train.lora_peft_config, train.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(torch.optim, train.optimizer.name)(
        parameters, lr=train.optimizer.lr, **_extra(train.optimizer)
    )
    total = -(-len(rows) // batch) * train.epochs
    schedule = get_scheduler(
        train.lr_scheduler_type, optimizer, -int(-total * train.warmup_ratio // 1), total
    )
    steps = []
    for epoch in range(train.epochs):
        order = epoch_order(len(rows), train.seed, epoch)
        for start in range(0, len(rows), batch):
            documents = [d for i in order[start : start + batch] for d in rows[i]]
            loss, norm = _plain_step(model, documents, parameters, train.max_grad_norm or 1e9)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            steps.append({"loss": loss, "grad_norm": norm})
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"steps": steps, "parameters": named}


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    from vectorlm.data.sampler import epoch_order as order

    return order(rows, seed, epoch).tolist()


def _plain_model(folder: str, lora: dict[str, Any] | None, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora is None:
        return model
    return _with_first_adapters(model, folder, lora, seed)


def _with_first_adapters(model: Any, folder: str, lora: dict[str, Any], seed: int) -> Any:
    """PEFT's own model, beginning with the adapters that a run begins with."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from vectorlm.model.lora import add_adapters, first_values, lora_config, needs_base_weights

    if needs_base_weights(lora_config(lora, folder)):
        torch.manual_seed(seed)
        return add_adapters(model, lora_config(lora, folder))
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(model.config)
        first = first_values(add_adapters(empty, lora_config(lora, folder)), seed)
    adapted = add_adapters(model, lora_config(lora, folder))
    adapted.load_state_dict(first, strict=False)
    return adapted


def _extra(optimizer: Any) -> dict[str, Any]:
    if optimizer.name == "SGD":
        return {"weight_decay": optimizer.weight_decay, **optimizer.kwargs}
    return {
        "weight_decay": optimizer.weight_decay,
        "eps": optimizer.eps,
        "betas": optimizer.betas,
        **optimizer.kwargs,
    }


def _plain_step(
    model: Any, documents: list[list[int]], parameters: list[Any], max_norm: float
) -> tuple[float, float]:
    total = torch.zeros(())
    learned = 0
    for document in documents:
        ids = torch.tensor([document])
        logits = model(input_ids=ids).logits.float()
        total = total + torch.nn.functional.cross_entropy(
            logits[0, :-1], ids[0, 1:], reduction="sum"
        )
        learned += len(document) - 1
    loss = total / learned
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return loss.item(), norm.item()
