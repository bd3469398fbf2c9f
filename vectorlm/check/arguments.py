"""What torch and transformers would refuse of the optimizer and the schedule. Floor 1, called by
`everything`. Names and arguments are read from their source (`libraries`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from vectorlm.check import libraries
from vectorlm.check.finding import Finding, Surroundings, error, warning
from vectorlm.config.argument_values import allowed_instead
from vectorlm.config.schema import PLATEAU_SCHEDULERS, Optimizer, TrainParameters
from vectorlm.config.suggest import shown
from vectorlm.plan.optimizers import FUSED, NOT_ON_SHARDS, NOT_USABLE

PLATEAUS = set(PLATEAU_SCHEDULERS) - {"greedy"}  # which has arguments of its own
# transformers drops their arguments without a word.
DEAF = {"constant", "constant_with_warmup"}
OPTIMIZER = "train_parameters.optimizer"
SCHEDULE = "train_parameters.lr_scheduler_kwargs"
# Shares of the past that are kept: of all of it or more, nothing new is learned.
SHARES = ("momentum", "dampening", "rho")
# Arguments that only some values are allowed for.
CHOICES = {
    "decay_type": ("linear", "cosine", "1-sqrt"),
    "warmup_type": ("linear", "cosine", "1-sqrt"),
}


def look(here: Surroundings) -> Iterator[Finding]:
    train = here.config.train_parameters
    yield from _optimizer(train.optimizer, train.lora_peft_config is not None)
    yield from _schedule(train)


# --- optimizer ------------------------------------------------------------------------------------


def _optimizer(given: Optimizer, adapters: bool) -> Iterator[Finding]:
    known = libraries.optimizers()
    if known is None:
        return
    usable = sorted(known.keys() - set(NOT_USABLE))
    if given.name not in usable:
        yield error(
            f"{OPTIMIZER}.name",
            f"{given.name} is no optimizer of torch.optim that can be used here",
            f"{meant(given.name, usable)}allowed: {', '.join(usable)}",
        )
        return
    if given.name in NOT_ON_SHARDS or (given.name == "Muon" and not adapters):
        why = "takes matrices only" if given.name == "Muon" else "cannot work on sharded tensors"
        cure = "take another, such as AdamW, or SGD where memory is short"
        yield error(f"{OPTIMIZER}.name", f"{given.name} {why}", cure)
    accepted = libraries.optimizer_arguments(given.name)
    if accepted is None:
        return
    taken = {n for n, default in accepted.items() if n != "eps" or isinstance(default, float)}
    for name in ("lr", "weight_decay", "betas", "eps"):
        if name in given.model_fields_set and name not in taken:
            yield error(f"{OPTIMIZER}.{name}", f"{given.name} has no {name}", "remove the line")
    yield from _unknown(f"{OPTIMIZER}.kwargs", given.name, given.kwargs, accepted)
    yield from _optimizer_values(given, accepted)
    yield from _combinations(given)


def _optimizer_values(given: Optimizer, defaults: Mapping[str, Any]) -> Iterator[Finding]:
    for name in [one for one in given.kwargs if one in defaults]:
        value, key = given.kwargs[name], f"{OPTIMIZER}.kwargs.{name}"
        instead = allowed_instead(name, value, defaults[name])
        if instead:
            yield error(key, f"is {shown(value)}, which {given.name} cannot use", f"give {instead}")
        elif name in SHARES and value >= 1:
            text = f"is {shown(value)}, and with 1 or more {given.name} does not settle"
            yield warning(key, text, "give a number below 1, such as 0.9")
        elif name == "maximize" and value:
            yield warning(key, "makes the loss grow", "remove it")
        elif name == "differentiable" and value and given.name not in FUSED:
            yield error(key, "cannot train weights", "remove it")


def _combinations(given: Optimizer) -> Iterator[Finding]:
    kwargs = given.kwargs
    for name in ("foreach", "differentiable"):
        if given.name in FUSED and kwargs.get(name) and kwargs.get("fused", True):
            text = f"{given.name} is run fused, which excludes {name}"
            yield error(f"{OPTIMIZER}.kwargs.{name}", text, "remove it")
    still = not kwargs.get("momentum") or kwargs.get("dampening")
    if given.name == "SGD" and kwargs.get("nesterov") and still:
        text = "nesterov needs a momentum, and no dampening"
        yield error(f"{OPTIMIZER}.kwargs.nesterov", text, "give momentum: 0.9, or remove nesterov")


# --- schedule -------------------------------------------------------------------------------------


def _schedule(train: TrainParameters) -> Iterator[Finding]:
    kind, given = train.lr_scheduler_type, train.lr_scheduler_kwargs
    if kind in DEAF:
        for name in given:
            yield warning(f"{SCHEDULE}.{name}", f"{kind} takes no arguments", "remove it")
        return
    accepted: Collection[str] | None
    if kind in PLATEAUS:
        accepted = libraries.plateau_arguments()
    else:
        accepted = libraries.scheduler_arguments(kind)
    if accepted is not None:
        # The trainer puts the schedule where the run is.
        accepted = set(accepted) - {"last_epoch", "optimizer"}
        yield from _unknown(SCHEDULE, kind, given, accepted)
    yield from _values(train)


def _values(train: TrainParameters) -> Iterator[Finding]:
    given, lr = train.lr_scheduler_kwargs, train.optimizer.lr
    for name, allowed in CHOICES.items():
        if name in given and given[name] not in allowed:
            text = f"{name} {given[name]} is unknown"
            yield error(f"{SCHEDULE}.{name}", text, f"allowed: {', '.join(allowed)}")
    end, factor = given.get("lr_end"), given.get("factor")
    if train.lr_scheduler_type == "polynomial" and _number(end, 1e-7) >= lr:
        text = f"lr_end {_number(end, 1e-7)} is not below the learning rate, {lr}"
        yield error(f"{SCHEDULE}.lr_end", text, "give less")
    if train.lr_scheduler_type in PLATEAUS and _number(factor, 0.1) >= 1:
        text = f"factor {factor} would not lower the learning rate"
        yield error(f"{SCHEDULE}.factor", text, "give a number below 1")


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


def _unknown(
    where: str, whose: str, given: Mapping[str, Any], accepted: Collection[str]
) -> Iterator[Finding]:
    for name in given:
        if name not in accepted:
            allowed = ", ".join(sorted(accepted)) or "none"
            cure = f"{meant(name, accepted)}remove it{_takers(where, name)}; allowed: {allowed}"
            yield error(f"{where}.{name}", f"{whose} has no argument {name}", cure)


def _takers(where: str, name: str) -> str:
    """The schedules that do have an argument."""
    makers = libraries.schedulers() if where == SCHEDULE else ()
    found = [kind for kind in makers if name in (libraries.scheduler_arguments(kind) or ())]
    takes = f", or take lr_scheduler_type: {found[0]}" if found else ""
    return takes if name != "last_epoch" else ""


def meant(name: str, known: Iterable[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), by_lower, n=1)
    return f"did you mean {by_lower[near[0]]}? " if near else ""
