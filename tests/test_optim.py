"""Optimizers and schedules: each builds and resumes exactly, and mistakes name the line."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import nn

from vectorlm.config.schema import Optimizer, SchedulerType, TrainParameters
from vectorlm.errors import ConfigError
from vectorlm.optim import Schedule, build_optimizer, build_scaler

TOTAL, WARMUP, PEAK = 20, 4, 0.5
# What some schedules cannot do without.
NEEDED = {"cosine_with_min_lr": {"min_lr": 0.1}, "cosine_warmup_with_min_lr": {"min_lr": 0.1}}
OPTIMIZERS = (
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
)


def parameters() -> TrainParameters:
    return TrainParameters(output_dir="out", max_seq_len=8)


class Run:
    """A schedule on an optimizer, stepped as the trainer does: an evaluation every second step."""

    def __init__(
        self,
        name: str,
        warmup: int = WARMUP,
        peak: float = PEAK,
        total: int = TOTAL,
        **kwargs: Any,
    ) -> None:
        train = parameters().model_copy(
            update={
                "lr_scheduler_type": name,
                "lr_scheduler_kwargs": NEEDED.get(name, {}) | kwargs,
            }
        )
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=peak)
        self.schedule = Schedule(train, self.optimizer, total, warmup)

    def rates(self, losses: list[float], steps: range) -> list[float]:
        """The rate of each step; the evaluation after step n gives `losses[n]`."""
        rates = []
        for step in steps:
            rates.append(self.schedule.lr)
            self.optimizer.step()
            self.schedule.step()
            if step % 2:
                self.schedule.evaluated(losses[step])
        return rates


def stagnating(steps: int = TOTAL) -> list[float]:
    return [1.0] * steps


def whole(name: str, **kwargs: Any) -> list[float]:
    return Run(name, **kwargs).rates(stagnating(), range(TOTAL))


@pytest.mark.parametrize("name", get_args(SchedulerType))
def test_every_schedule_resumes_exactly(name: str) -> None:
    """Stopped after any step, its state through JSON: the rates go on as if it had not been."""
    patience = {"patience": 1} if name in ("reduce_lr_on_plateau", "greedy") else {}
    losses = [1.0, 1.0, 0.5, 0.5, 0.9, 0.9, 0.4, 0.4, 0.7, 0.7] * 2
    expected = Run(name, **patience).rates(losses, range(TOTAL))
    assert all(rate >= 0 for rate in expected)
    for done in (1, 3, 6, 11):
        first = Run(name, **patience)
        before = first.rates(losses, range(done))
        state = json.loads(json.dumps(first.schedule.state()))
        second = Run(name, **patience)
        second.schedule.restore(state)
        assert before + second.rates(losses, range(done, TOTAL)) == expected


def test_a_smoothed_schedule_resumes_exactly() -> None:
    """`greedy` with smoothing keeps a running average, which is state too."""
    kwargs = {"smooth": True, "patience": 1, "window_size": 4, "min_lr": 1e-6}
    losses = [1.0, 0.2, 0.9, 0.8, 0.1, 0.7, 0.3, 0.9, 0.2, 0.1] * 2
    expected = Run("greedy", **kwargs).rates(losses, range(TOTAL))
    first, second = Run("greedy", **kwargs), Run("greedy", **kwargs)
    before = first.rates(losses, range(9))
    second.schedule.restore(json.loads(json.dumps(first.schedule.state())))
    assert before + second.rates(losses, range(9, TOTAL)) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("name", sorted(set(get_args(SchedulerType)) - {"greedy", *NEEDED}))
@pytest.mark.parametrize("done", [2, 9])
def test_a_new_peak_holds_from_the_resume_on(name: str, done: int) -> None:
    """Whoever lowers the rate in the file means all of what follows. (Some have absolute rates.)"""
    patience = {"patience": 1} if "plat" in name else {}
    as_before = Run(name, **patience).rates(stagnating(), range(TOTAL))
    first, second = Run(name, **patience), Run(name, peak=PEAK / 2, **patience)
    first.rates(stagnating(), range(done))
    second.schedule.restore(json.loads(json.dumps(first.schedule.state())))
    halved = second.rates(stagnating(), range(done, TOTAL))
    assert halved == pytest.approx([rate / 2 for rate in as_before[done:]], abs=1e-6)


@pytest.mark.parametrize("name", sorted(set(get_args(SchedulerType)) - {"greedy"}))
@pytest.mark.parametrize("done", [7, TOTAL])
def test_a_new_length_holds_from_the_resume_on(name: str, done: int) -> None:
    """After the end of the shorter schedule, too: its last rate, perhaps 0, is not taken along."""
    patience = {"patience": 100} if "plat" in name else {}
    longer = Run(name, total=2 * TOTAL, **patience)
    expected = longer.rates(stagnating(2 * TOTAL), range(2 * TOTAL))
    first = Run(name, **patience)
    first.rates(stagnating(), range(done))
    second = Run(name, total=2 * TOTAL, **patience)
    second.schedule.restore(json.loads(json.dumps(first.schedule.state())))
    assert second.rates(stagnating(2 * TOTAL), range(done, 2 * TOTAL)) == expected[done:]


@pytest.mark.parametrize("name", get_args(SchedulerType))
def test_schedules_are_not_all_constant(name: str) -> None:
    """Guards the comparison above: constant rates would resume however badly."""
    kwargs = {"patience": 1} if "plat" in name else {}
    if name == "greedy":
        kwargs = {"patience": 1, "min_lr": 1e-6}
    changes = len(set(whole(name, **kwargs))) > 1
    assert changes == (name != "constant")


def test_linear_rises_and_falls() -> None:
    rates = whole("linear")
    assert rates[:5] == pytest.approx([0, PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK])
    assert rates[-1] == pytest.approx(PEAK / 16)


def test_warmup_stable_decay_falls_in_the_last_tenth() -> None:
    rates = whole("warmup_stable_decay")
    assert rates[:4] == pytest.approx([0, PEAK / 4, PEAK / 2, PEAK * 3 / 4])
    assert rates[4:19] == [PEAK] * 15
    assert rates[19] == pytest.approx(PEAK / 2)


def test_warmup_stable_decay_as_asked() -> None:
    rates = whole("warmup_stable_decay", num_decay_steps=8)
    assert rates[4:13] == [PEAK] * 9
    assert all(later < earlier for earlier, later in pairwise(rates[12:]))


@pytest.mark.parametrize("name", ["plateau-with-warmup", "plataeu-with-warmup"])
def test_plateau_warms_up_then_lowers(name: str) -> None:
    rates = Run(name, factor=0.5, patience=1).rates(stagnating(), range(TOTAL))
    assert rates[:4] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK])
    # Evaluations count from the end of the warm-up: after steps 4, 6 and 8; two do not improve.
    assert rates[4:8] == [PEAK] * 4
    assert rates[8] == PEAK / 2
    assert rates[-1] < PEAK / 2


def test_plateau_keeps_its_rate_while_the_loss_falls() -> None:
    falling = [1.0 - step / 100 for step in range(TOTAL)]
    rates = Run("plateau-with-warmup", factor=0.5, patience=1).rates(falling, range(TOTAL))
    assert rates[3:] == [PEAK] * 17


def test_plateau_without_warmup_begins_at_the_peak() -> None:
    rates = Run("plateau-with-warmup", warmup=0, patience=1).rates(stagnating(), range(TOTAL))
    assert rates[:6] == [PEAK] * 6
    assert rates[-1] < PEAK


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("cosine", {"bogus": 1}, "bogus"),
        ("cosine_with_min_lr", {"min_lr": None}, "min_lr"),
        ("plateau-with-warmup", {"bogus": 1}, "bogus"),
        ("linear", {"num_warmup_steps": 3}, "warmup_ratio"),
        ("cosine", {"last_epoch": 3}, "last_epoch.*sets it when it resumes"),
        ("linear", {"num_training_steps": 3}, "epochs"),
        ("reduce_lr_on_plateau", {"factor": 2.0}, "[Ff]actor"),
    ],
)
def test_wrong_schedule_arguments(name: str, kwargs: dict[str, Any], said: str) -> None:
    pattern = rf"train_parameters\.lr_scheduler_kwargs.*{said}"
    with pytest.raises(ConfigError, match=pattern):
        Run(name, **kwargs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_learn(name: str) -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = build_optimizer(Optimizer(name=name, lr=1e-2), [parameter])
    for _ in range(2):
        parameter.grad = torch.ones(4, 4)
        optimizer.step()
    assert (parameter < 1).all()


def test_the_list_of_optimizers_is_that_of_torch() -> None:
    """An optimizer that a new torch brings is tried above, or refused by name."""
    with pytest.raises(ConfigError) as raised:
        build_optimizer(Optimizer(name="Nonsense"), [nn.Parameter(torch.ones(1))])
    message = str(raised.value)
    assert message.startswith("train_parameters.optimizer.name: 'Nonsense'")
    assert message.split("allowed: ")[1].split(", ") == list(OPTIMIZERS)


def test_arguments_reach_the_optimizer() -> None:
    given = Optimizer(
        lr=0.3, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.2, kwargs={"amsgrad": True}
    )
    defaults = build_optimizer(given, [nn.Parameter(torch.ones(1))]).defaults
    wanted = {"lr": 0.3, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.2, "amsgrad": True}
    assert {key: defaults[key] for key in wanted} == wanted


def test_defaults_are_those_of_the_schema() -> None:
    """AdamW's own weight decay would be 0.01, the documented default is 0."""
    defaults = build_optimizer(Optimizer(), [nn.Parameter(torch.ones(1))]).defaults
    assert (defaults["lr"], defaults["weight_decay"], defaults["eps"]) == (2e-5, 0.0, 1e-8)


def test_momentum_for_sgd() -> None:
    given = Optimizer(name="SGD", lr=0.1, kwargs={"momentum": 0.9})
    assert build_optimizer(given, [nn.Parameter(torch.ones(1))]).defaults["momentum"] == 0.9


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "SGD", "betas": (0.9, 0.99)}, r"optimizer\.betas: SGD has no such .*remove"),
        ({"name": "SGD", "eps": 1e-6}, r"optimizer\.eps: SGD has no such argument"),
        ({"name": "Adafactor"}, r"optimizer\.name: 'Adafactor' is no optimizer"),
        ({"name": "LBFGS"}, r"optimizer\.name: 'LBFGS' is no optimizer .*allowed: .*AdamW"),
        ({"name": "SparseAdam"}, r"optimizer\.name: 'SparseAdam'"),
        ({"name": "adamw"}, r"optimizer\.name: 'adamw'"),
        ({"name": "lr_scheduler"}, r"optimizer\.name: 'lr_scheduler'"),
        ({"kwargs": {"bogus": 1}}, r"optimizer: AdamW: .*bogus"),
        ({"kwargs": {"foreach": True}}, r"optimizer: AdamW: .*foreach"),
        (
            {"name": "SGD", "kwargs": {"momentum": -1.0}},
            r"optimizer\.kwargs\.momentum: is the number -1\.0; must be a number, at least 0",
        ),
        ({"name": "SGD", "kwargs": {"momentum": "0.9"}}, r"optimizer\.kwargs\.momentum: .*'0\.9'"),
        (
            {"kwargs": {"amsgrad": "yes"}},
            r"optimizer\.kwargs\.amsgrad: is the text 'yes'; must be true or false, without",
        ),
        ({"kwargs": {"fused": 1}}, r"optimizer\.kwargs\.fused: .*true or false"),
        (
            {"name": "SGD", "kwargs": {"differentiable": True}},
            r"optimizer\.kwargs\.differentiable: cannot train weights; remove it",
        ),
        ({"name": "Adadelta", "kwargs": {"rho": 1.5}}, r"optimizer: Adadelta: .*rho"),
    ],
)
def test_wrong_optimizers(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"train_parameters\.{said}"):
        build_optimizer(Optimizer(**given), [nn.Parameter(torch.ones(1))])


def test_only_fp16_scales_the_loss() -> None:
    precisions = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
    scalers = [build_scaler(precision, torch.device("cpu")) for precision in precisions]
    assert [scaler.is_enabled() for scaler in scalers] == [False, False, False, True]
