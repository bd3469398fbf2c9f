"""Trainer: the loop, nothing else. Floor 3; its parts are made and put together by `assemble`.

The loss of a step is the sum of token losses over ALL supervised tokens of the step (ranks x
micro-batches) divided by their count, so it does not matter how rows fall on ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vectorlm.background import Ahead
from vectorlm.batch import Batch
from vectorlm.checkpoint import Checkpoints
from vectorlm.config.schema import TrainParameters
from vectorlm.dataset import Dataset, Group
from vectorlm.distributed import Ranks
from vectorlm.errors import DataError, TrainingError
from vectorlm.metrics import Metrics
from vectorlm.model.causal import CausalModel
from vectorlm.optim import Schedule
from vectorlm.saver import Saver
from vectorlm.steps import Position, Steps
from vectorlm.stop import StopFlag

Item = TypeVar("Item")
AHEAD = 2  # steps, or batches of an evaluation, that are made before they are needed


@dataclass(frozen=True)
class Done:
    """An optimizer step: the mean loss and the tokens of all ranks, the norm before clipping."""

    loss: float
    tokens: int
    lr: float
    norm: float


@dataclass
class Trainer:
    train: TrainParameters
    ranks: Ranks
    model: CausalModel
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    data: Dataset
    evaluation: Dataset | None
    steps: Steps
    checkpoints: Checkpoints | None
    metrics: Metrics
    stop: StopFlag
    description: dict[str, Any]  # what a checkpoint says of its run: config, names, data

    def __post_init__(self) -> None:
        self.position = Position()
        self.steps_done = 0
        self.tokens_seen = 0
        self.report_due: dict[str, Any] | None = (
            None  # a logged step whose evaluation was interrupted
        )
        self.stopping = False
        self.saver: Saver | None = None
        if self.checkpoints is not None:
            in_background = self.train.async_checkpointing
            self.saver = Saver(self.checkpoints, in_background, self.metrics.say)
        self.model.module.train()

    def fit(self) -> bool:
        """Train to the end; False if asked to stop before it (everything is saved then)."""
        try:
            self._fit()
            if self.saver:
                self.saver.wait()
        except Exception:
            if self.saver:
                self.saver.settle()
            raise
        return self.finished and self.report_due is None

    def _fit(self) -> None:
        self.metrics.start(self.steps_done, self.total_steps)
        self.stopping = self.stop_requested()
        if self.report_due and not self.stopping:
            self.report(self.report_due)
        if self.stopping or self.finished:
            return
        with self._ahead(self.data.groups_to_the_end(self.steps, self.position)) as groups:
            for group in groups:
                before = self.position
                done = self.step(group)
                if self.saver:
                    self.saver.look(self.tensors)
                self.metrics.step(self.steps_done, done.loss, done.lr, done.norm, done.tokens)
                if self.steps_done % self.train.logging_steps == 0 or self.finished:
                    self.report(self.measured(done, groups))
                due = self.steps.save_due(before, self.position, self.train.save_frequency)
                if self.stopping or due:
                    self.save()
                if self.stopping:
                    break

    @property
    def finished(self) -> bool:
        return self.position.epoch >= self.train.epochs

    @property
    def total_steps(self) -> int:
        return self.steps_done + self.steps.remaining(self.position)

    def _ahead(self, items: Iterator[Item]) -> Ahead[Item]:
        """Batches, made by a thread while the model computes."""
        limit_s = self.ranks.timeout.total_seconds()
        return Ahead(items, AHEAD, limit_s, lambda: self._no_data(limit_s))

    def _no_data(self, limit_s: float) -> DataError:
        return DataError(
            f"rank {self.ranks.rank}: no rows could be read for {limit_s / 60:g} min; look "
            "whether the file system of dataset.train_ds and eval_ds answers, or raise "
            "train_parameters.collective_timeout_minutes"
        )

    def step(self, group: Group) -> Done:
        """Forward and backward of the micro-batches, and one update."""
        batches = group.batches
        own = [sum(b.supervised_tokens for b in batches), sum(b.tokens for b in batches)]
        learned, tokens = self.ranks.sum(own)
        total = self._accumulate(batches, self.ranks.world / max(learned, 1))
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.module.parameters() if p.grad is not None]
        spread_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss, norm = self._agree(total, _whole(spread_norm), parameters)
        if self.train.max_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.train.max_grad_norm, spread_norm)
        lr = self.schedule.lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position = group.after
        self.steps_done += 1
        self.tokens_seen += int(tokens)
        return Done(loss / max(learned, 1), int(tokens), lr, norm)

    def _accumulate(self, batches: list[Batch], weight: float) -> torch.Tensor:
        """The loss sum of this rank, where it was computed; gradients add up in the parameters."""
        # FSDP averages gradients over ranks; a sum is wanted, which `weight` takes care of.
        factor = weight * self.scaler.get_scale()
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for i, batch in enumerate(batches):
            with self._naming_lack_of_memory(batch, f"micro-batch {i + 1}"):
                last = i == len(batches) - 1
                with self.model.micro_batch(batch, last, factor) as loss:
                    self.scaler.scale(loss * weight).backward()
                total += loss.detach()
        return total

    def _agree(
        self, total: torch.Tensor, norm: torch.Tensor, parameters: list[Any]
    ) -> tuple[float, float]:
        """(the loss sum of all ranks, the norm): waits for the device once. What ends the run ends
        it here, on all ranks and before the update; a request to stop is heard.
        """
        flags = bool(self.stop), self.saver is not None and self.saver.failed
        everywhere = torch.stack([total, *(torch.full_like(total, flag) for flag in flags)])
        self.ranks.add_up(everywhere)
        numbers = torch.cat([everywhere, torch.stack([total, norm.to(total)])]).tolist()
        loss_sum, stops, failures, own, whole_norm = numbers
        self.stopping = stops > 0
        if failures and self.saver:
            self.saver.wait()
        self._refuse_non_finite("loss", own, loss_sum)
        if not self.scaler.is_enabled():  # a scaler skips such a step by itself, on all ranks
            if not math.isfinite(whole_norm):
                own = sum(float(_local(p.grad).sum()) for p in parameters)
            self._refuse_non_finite("gradient", own, whole_norm)
        return loss_sum, whole_norm

    @contextmanager
    def _naming_lack_of_memory(self, batch: Batch, which: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            raise TrainingError(
                f"out of memory on rank {self.ranks.rank}, step {self.steps_done + 1}, {which}: "
                f"{batch.tokens} tokens, the longest document {batch.longest} "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). Set "
                "train_parameters.use_activation_checkpointing: true, lower dataset.train_bs (and "
                "raise gradient_accumulation_steps), or train on more GPUs"
            ) from error

    def _refuse_non_finite(self, what: str, own: float, everywhere: float) -> None:
        if math.isfinite(everywhere):
            return
        bad = [
            rank for rank, value in enumerate(self.ranks.gather(own)) if not math.isfinite(value)
        ]
        raise TrainingError(
            f"step {self.steps_done + 1}: the {what} is not a finite number on rank "
            f"{', '.join(map(str, bad))}; all ranks stopped before the update. {self._last_good()} "
            "Lower train_parameters.optimizer.lr, or look for a bad row among the step's data"
        )

    def _last_good(self) -> str:
        if self.saver:
            self.saver.settle()
        found = self.checkpoints.find().folder if self.checkpoints else None
        return f"The last good checkpoint is {found}." if found else "There is no checkpoint yet."

    def measured(self, done: Done, groups: Ahead[Group]) -> dict[str, Any]:
        waited_s, groups.waited_s = groups.waited_s, 0.0
        values = {
            "step": self.steps_done,
            "epoch": round(self.steps.epoch_at(self.position), 6),
            "loss": done.loss,
            "grad_norm": done.norm,
            "lr": done.lr,
            "tokens": self.tokens_seen,
            **self.metrics.lap(),
            "data_wait_s": round(max(self.ranks.gather(waited_s)), 3),
        }
        if self.ranks.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values

    def report(self, values: dict[str, Any]) -> None:
        """Evaluate and log; a stop during the evaluation leaves the report for the next start."""
        self.report_due = values
        if self.evaluation is not None:
            loss = self.evaluate(self.evaluation)
            if loss is None:
                return
            self.schedule.evaluated(loss)
            values["eval_loss"] = loss
        self.metrics.log(values)
        self.report_due = None

    def evaluate(self, data: Dataset) -> float | None:
        """The mean loss of all supervised tokens of `data`; None if asked to stop on the way."""
        self.model.module.eval()
        total, learned = 0.0, 0
        with self._ahead(iter(data)) as batches:
            for batch in batches:
                with self._naming_lack_of_memory(batch, "an evaluation batch"):
                    total += self.model.evaluate(batch)
                learned += batch.supervised_tokens
                if self.stop_requested():
                    self.stopping = True
                    return None
        self.model.module.train()
        total, learned_everywhere = self.ranks.sum([total, learned])
        return total / max(learned_everywhere, 1)

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop: all ranks get the same answer."""
        return self.ranks.sum([bool(self.stop)])[0] > 0

    def save(self) -> None:
        """Training goes on while it is written, unless it is over."""
        if self.saver is None:
            return
        wait = self.stopping or self.finished
        self.saver.save(self.steps_done, self.tensors(), self.state(), wait)
        self.stopping = self.stopping or self.stop_requested()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint, by name, as they lie on this rank."""
        tensors = {f"model.{name}": value.detach() for name, value in self.model.result().items()}
        for name, param in self.model.trainable().items():
            for key, value in self.optimizer.state[param].items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
        return tensors | self.random_state()

    def random_state(self) -> dict[str, torch.Tensor]:
        states = {f"rng.{self.ranks.rank}.cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            states[f"rng.{self.ranks.rank}.cuda"] = torch.cuda.get_rng_state()
        return states

    def state(self) -> dict[str, Any]:
        return {
            "step": self.steps_done,
            "epoch": self.position.epoch,
            "row": self.position.row,
            "tokens_seen": self.tokens_seen,
            "global_batch": self.steps.global_batch,
            "world": self.ranks.world,
            "schedule": self.schedule.state(),
            "scaler": self.scaler.state_dict(),
            "report_due": self.report_due,
            **self.description,
        }

    def restore(self, folder: Any, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was made, perhaps on another number of ranks."""
        assert self.checkpoints is not None
        self._make_optimizer_state()
        tensors = self.tensors()
        random = self.random_state()
        if state["world"] != self.ranks.world or state["device"] != self.ranks.device.type:
            tensors = {name: value for name, value in tensors.items() if name not in random}
        self.checkpoints.load(folder, tensors)
        for name in random.keys() & tensors.keys():
            (torch.cuda.set_rng_state if name.endswith("cuda") else torch.set_rng_state)(
                tensors[name]
            )
        self.schedule.restore(state["schedule"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.position = Position(state["epoch"], state["row"])
        self.steps_done, self.tokens_seen = state["step"], state["tokens_seen"]
        self.report_due = state["report_due"]

    def _make_optimizer_state(self) -> None:
        """Let the optimizer lay out its state, for a checkpoint to fill: what a first step does is
        overwritten.
        """
        for param in self.model.trainable().values():
            param.grad = torch.zeros_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def lacks_memory(error: BaseException) -> bool:
    """Whether an allocation was refused, on a GPU or on the host."""
    refused = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in refused
    )


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
