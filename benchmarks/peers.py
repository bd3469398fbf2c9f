"""One rank of a training run by HF Trainer or TRL, as their documentation tells; started by
`benchmarks/train.py`, which watches the log that it writes: real tokens so far, a line a step."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)


class Tokens:
    """Counts what is no padding while batches are made, and tells it at the end of each step."""

    def __init__(self, collate: Any, log: Path) -> None:
        self.collate, self.log = collate, log
        self.seen = 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.collate(rows)
        mask = batch.get("attention_mask")
        self.seen += int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        return batch


class Told(TrainerCallback):  # type: ignore[misc]
    def __init__(self, tokens: Tokens, ranks: int) -> None:
        self.tokens, self.ranks = tokens, ranks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:  # the other ranks' batches are alike on average
            line = json.dumps({"step": state.global_step, "tokens": self.tokens.seen * self.ranks})
            with open(self.tokens.log, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def read(path: Path) -> list[dict[str, list[int]]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def grouped(rows: list[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    """As run_clm's group_texts: joined and cut, whatever document a token is of."""
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in row["labels"]]
    return [
        {"input_ids": ids[at : at + length], "labels": labels[at : at + length]}
        for at in range(0, len(ids) - length + 1, length)
    ]


def common(given: argparse.Namespace, precision: str, ranks: int) -> dict[str, Any]:
    on_cpu = not torch.cuda.is_available()
    return {
        "output_dir": str(given.out),
        "per_device_train_batch_size": given.batch,
        "num_train_epochs": 1000,
        "bf16": precision == "bf16",
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and ranks > 1 else None,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=("dynamic", "packed", "trl"))
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    given = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments, rows = common(given, given.precision, ranks), read(given.data)
    log = given.out / "metrics.jsonl"
    if given.peer == "trl":
        trainer = trl_trainer(given, arguments, model, tokenizer, rows)
        tokens = trainer.data_collator = Tokens(trainer.data_collator, log)
    else:
        packed = given.peer == "packed"
        tokens = Tokens(
            default_data_collator if packed else DataCollatorForSeq2Seq(tokenizer, padding=True),
            log,
        )
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=Dataset.from_list(grouped(rows, given.length) if packed else rows),
            data_collator=tokens,
        )
    trainer.add_callback(Told(tokens, ranks))
    trainer.train()


def trl_trainer(
    given: argparse.Namespace, arguments: dict[str, Any], model: Any, tokenizer: Any, rows: Any
) -> Any:
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        **arguments, packing=True, max_length=given.length, gradient_checkpointing=False
    )
    return SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
