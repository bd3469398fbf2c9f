"""The optimizer, the learning-rate schedule and the gradient scaler.
Floor 2, built by `assemble`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from transformers import get_scheduler

from vectorlm.config.argument_values import allowed_instead
from vectorlm.config.schema import PLATEAU_SCHEDULERS, TrainParameters
from vectorlm.config.schema import Optimizer as OptimizerConfig
from vectorlm.config.suggest import shown
from vectorlm.errors import ConfigError
from vectorlm.plan.optimizers import FUSED, NOT_ON_SHARDS, NOT_USABLE

# Arguments of a schedule that the file already gives under other names.
_GIVEN = {"num_warmup_steps": "warmup_ratio", "num_training_steps": "epochs"}
WSD_DECAY_SHARE = 0.1


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    kind = getattr(torch.optim, config.name, None)
    unusable = (*NOT_USABLE, *NOT_ON_SHARDS)
    if config.name in unusable or not (
        inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    ):
        names = [name for name in dir(torch.optim) if name[0].isupper() and name not in unusable]
        raise ConfigError(
            f"train_parameters.optimizer.name: {config.name!r} is no optimizer of torch.optim "
            f"that can be used here; allowed: {', '.join(names)}"
        )
    accepted = inspect.signature(kind).parameters
    _refuse_values(config, {name: accepted[name].default for name in accepted})
    arguments = _arguments(config, set(accepted))
    try:
        return kind(list(parameters), **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"train_parameters.optimizer: {config.name}: {error}") from error


def _refuse_values(config: OptimizerConfig, defaults: dict[str, Any]) -> None:
    for name in config.kwargs.keys() & defaults:
        value = config.kwargs[name]
        instead = allowed_instead(name, value, defaults[name])
        if instead:
            raise ConfigError(
                f"train_parameters.optimizer.kwargs.{name}: is {shown(value)}; must be {instead}"
            )
        if name == "differentiable" and value:
            raise ConfigError(
                "train_parameters.optimizer.kwargs.differentiable: cannot train weights; remove it"
            )


def _arguments(config: OptimizerConfig, accepted: set[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for key in ("lr", "weight_decay", "betas", "eps"):
        if key in accepted:
            given[key] = getattr(config, key)
        elif key in config.model_fields_set:
            raise ConfigError(
                f"train_parameters.optimizer.{key}: {config.name} has no such argument; remove the "
                "line"
            )
    if config.name in FUSED:
        given["fused"] = True
    return {**given, **config.kwargs}


class Schedule:
    """The learning rate: once an optimizer step, and, for those on a plateau, at evaluations."""

    def __init__(
        self,
        train: TrainParameters,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        warmup: int,
    ) -> None:
        name = train.lr_scheduler_type
        self._watches_loss = name in PLATEAU_SCHEDULERS
        self._warmup = warmup if name in ("plateau-with-warmup", "plataeu-with-warmup") else 0
        self._optimizer = optimizer
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._steps = 0
        self._inner = _scheduler(train, optimizer, total_steps, warmup)
        self._warm()

    def step(self) -> None:
        """After an optimizer step."""
        self._steps += 1
        if self._watches_loss:
            self._warm()
        else:
            self._inner.step()

    def evaluated(self, loss: float) -> None:
        if self._watches_loss and self._steps >= self._warmup:
            self._inner.step(loss)

    def _warm(self) -> None:
        if self._steps < self._warmup:
            for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = peak * (self._steps + 1) / self._warmup

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def state(self) -> dict[str, Any]:
        inner = {
            key: value
            for key, value in self._inner.state_dict().items()
            if isinstance(value, (int, float, str, bool, list, dict, type(None)))
        }
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        return {"steps": self._steps, "rates": rates, "peaks": self._peaks, "inner": inner}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there; if the file asks for another peak rate now, in proportion to it."""
        self._steps = state["steps"]
        # A schedule keeps the peak it was begun with, and would go back to it at its next step.
        self._inner.load_state_dict({k: v for k, v in state["inner"].items() if k != "base_lrs"})
        groups = zip(
            self._optimizer.param_groups, state["rates"], state["peaks"], self._peaks, strict=True
        )
        for group, rate, old, new in groups:
            group["lr"] = rate if old == new else rate * new / old
        if isinstance(self._inner, lr_scheduler.LambdaLR):
            # The rate of this step as the file has it now: the stored one is that of the former
            # length, whose last rate may be 0.
            for group, base, factor in zip(
                self._optimizer.param_groups,
                self._inner.base_lrs,
                self._inner.lr_lambdas,
                strict=True,
            ):
                group["lr"] = base * factor(self._inner.last_epoch)


def _scheduler(
    train: TrainParameters, optimizer: torch.optim.Optimizer, total_steps: int, warmup: int
) -> Any:
    name, kwargs = train.lr_scheduler_type, dict(train.lr_scheduler_kwargs)
    for key in _GIVEN.keys() & kwargs:
        raise ConfigError(
            f"train_parameters.lr_scheduler_kwargs.{key}: follows from "
            f"train_parameters.{_GIVEN[key]}; remove it"
        )
    if "last_epoch" in kwargs:
        raise ConfigError(
            "train_parameters.lr_scheduler_kwargs.last_epoch: the trainer sets it when it resumes; "
            "remove it"
        )
    try:
        if name in ("plateau-with-warmup", "plataeu-with-warmup"):
            return lr_scheduler.ReduceLROnPlateau(optimizer, **kwargs)
        if name == "warmup_stable_decay":
            kwargs.setdefault("num_decay_steps", math.ceil(total_steps * WSD_DECAY_SHARE))
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train_parameters.lr_scheduler_kwargs: {name}: {error}") from error


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss for fp16's narrow range; for other precisions it changes nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")
