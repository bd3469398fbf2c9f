"""The peer of `benchmarks/gpu.py`: HF Trainer on the model, rows and settings that a VectorLM YAML
names, as its documentation tells. Writes what it measured as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.data.store import open_rows


class Clock(TrainerCallback):
    """When the steps that are measured begin and end, all that was asked of the GPU being done;
    and a line for each step, for `gpu.py` to see how far it is.
    """

    def __init__(self, warm_up: int, steps: int, log: Path) -> None:
        self.ends, self.log = (warm_up, warm_up + steps), log
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.ends:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seen.append(time.perf_counter())
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step}) + "\n")


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows end to end, as run_clm's group_texts leaves them: ids, and the same as labels."""

    def __init__(self, folder: str) -> None:
        self.rows = open_rows(folder).column("input_ids").combine_chunks()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.rows[index].values.to_numpy(), dtype=torch.long)
        return {"input_ids": ids, "labels": ids}


def load(config: Config, attention: str) -> Any:
    """Frozen weights in 16 bits, trained ones as `precision` says."""
    train = config.train_parameters
    lora = train.lora_peft_config
    halved = lora is not None or train.effective_precision == "bf16-true"
    place = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(
        config.model,
        dtype=torch.bfloat16 if halved else torch.float32,
        attn_implementation=attention,
        **place,
    )
    model.config.use_cache = False
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def arguments_of(config: Config, steps: int) -> TrainingArguments:
    train, data = config.train_parameters, config.dataset
    assert data
    return TrainingArguments(
        output_dir=train.output_dir,
        per_device_train_batch_size=data.train_bs,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_steps=steps,
        learning_rate=train.optimizer.lr,
        lr_scheduler_type="constant",
        max_grad_norm=train.max_grad_norm or 0.0,
        optim="adamw_torch_fused",
        bf16=True,
        gradient_checkpointing=train.use_activation_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--attention", required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    assert config.dataset
    log = Path(config.train_parameters.output_dir) / "metrics.jsonl"
    log.parent.mkdir()
    clock = Clock(given.warm_up, given.steps, log)
    trainer = Trainer(
        model=load(config, given.attention),
        args=arguments_of(config, clock.ends[1]),
        train_dataset=Rows(config.dataset.train_ds),
        callbacks=[clock],
    )
    trainer.train()
    began, ended = clock.seen
    rows = config.dataset.train_bs * config.train_parameters.gradient_accumulation_steps
    tokens = given.steps * rows * config.train_parameters.max_seq_len
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    found = {"tokens_per_s": tokens / (ended - began), "memory_gib": peak}
    given.result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
