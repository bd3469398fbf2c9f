"""Optimizers and schedules: what is refused is what the libraries refuse."""

from __future__ import annotations

from typing import Any

import pytest

from tests.check.project import Project, says
from vectorlm.check.arguments import look

SOUND: list[dict[str, Any]] = [
    {"optimizer": {"name": "AdamW", "betas": [0.9, 0.95], "eps": 1e-6}},
    {"optimizer": {"name": "AdamW", "kwargs": {"foreach": True, "fused": False}}},
    {"optimizer": {"name": "SGD", "kwargs": {"momentum": 0.9, "nesterov": True}}},
    {"optimizer": {"name": "AdamW", "kwargs": {"amsgrad": True, "foreach": None}}},
    {"optimizer": {"name": "RMSprop", "kwargs": {"alpha": 0.9, "momentum": 0, "centered": True}}},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
    {"lr_scheduler_type": "plateau-with-warmup", "lr_scheduler_kwargs": {"patience": 3}},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
]


@pytest.mark.parametrize("train", SOUND, ids=str)
def test_sound(train: dict[str, Any], project: Project) -> None:
    project.train.update(train)
    project.config["dataset"]["eval_ds"] = "elsewhere"
    assert project.find(look) == []


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"optimizer": {"name": "Adamw"}}, "name: Adamw is no optimizer", "did you mean AdamW"),
    ({"optimizer": {"name": "LBFGS"}}, "LBFGS is no optimizer", "allowed: .*AdamW.*SGD"),
    ({"optimizer": {"name": "Adafactor"}}, "Adafactor cannot work on sharded", "AdamW"),
    ({"optimizer": {"name": "Muon"}}, "Muon takes matrices only", "AdamW"),
    ({"optimizer": {"name": "SGD", "betas": [0.9, 0.9]}}, "SGD has no betas", "remove"),
    (
        {"optimizer": {"kwargs": {"momentum": 0.9}}},
        "kwargs.momentum: AdamW has no argument momentum",
        "remove it; allowed: amsgrad",
    ),
    ({"optimizer": {"kwargs": {"foreach": True}}}, "fused, which excludes foreach", "remove"),
    (
        {"optimizer": {"name": "SGD", "kwargs": {"nesterov": True}}},
        "nesterov needs a momentum",
        "momentum: 0.9",
    ),
    (
        {"optimizer": {"kwargs": {"amsgrad": "yes"}}},
        "kwargs.amsgrad: is the text 'yes', which AdamW cannot use",
        "give true or false, without quotes",
    ),
    (
        {"optimizer": {"kwargs": {"fused": "no"}}},
        "kwargs.fused: is the text 'no'",
        "give true or false",
    ),
    (
        {"optimizer": {"name": "SGD", "kwargs": {"momentum": -0.9}}},
        "kwargs.momentum: is the number -0.9, which SGD cannot use",
        "give a number, at least 0",
    ),
    (
        {"optimizer": {"name": "SGD", "kwargs": {"momentum": "0.9"}}},
        "kwargs.momentum: is the text '0.9'",
        "give a number",
    ),
    (
        {"optimizer": {"name": "SGD", "kwargs": {"dampening": True}}},
        "kwargs.dampening: is the boolean true",
        "give a number",
    ),
    (
        {"optimizer": {"name": "SGD", "kwargs": {"differentiable": True}}},
        "kwargs.differentiable: cannot train weights",
        "remove",
    ),
    (
        {"lr_scheduler_kwargs": {"min_lr": 1e-6}},
        "kwargs.min_lr: cosine has no argument min_lr",
        "lr_scheduler_type: cosine_.*min_lr",
    ),
    ({"lr_scheduler_kwargs": {"last_epoch": 3}}, "no argument last_epoch", "remove it; allowed"),
    (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"decay_type": "x"}},
        "decay_type x is unknown",
        "1-sqrt",
    ),
    (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
        "lr_end 1.0 is not below",
        "less",
    ),
    (
        {"lr_scheduler_type": "plateau-with-warmup", "lr_scheduler_kwargs": {"foo": 0.1}},
        "no argument foo",
        "factor",
    ),
    (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 2.0}},
        "factor 2.0 would not lower",
        "below 1",
    ),
]


@pytest.mark.parametrize(("train", "text", "cure"), WRONG, ids=[text for _, text, _ in WRONG])
def test_wrong(train: dict[str, Any], text: str, cure: str, project: Project) -> None:
    project.train.update(train)
    project.config["dataset"]["eval_ds"] = "elsewhere"
    assert says(project.one(look), text, cure)


@pytest.mark.parametrize(
    ("optimizer", "text", "cure"),
    [
        ({"name": "SGD", "kwargs": {"momentum": 9}}, "the number 9, .* does not settle", "0.9"),
        ({"name": "SGD", "kwargs": {"maximize": True}}, "makes the loss grow", "remove"),
    ],
)
def test_values_that_torch_takes(
    optimizer: dict[str, Any], text: str, cure: str, project: Project
) -> None:
    project.train.update(optimizer=optimizer)
    assert says(project.one(look, "warning"), text, cure)


def test_muon_has_rounds_and_coefficients(project: Project) -> None:
    for kwargs, said in (
        ({"ns_steps": 2.5}, "a whole number"),
        ({"ns_coefficients": [1.0, -2.0]}, "a list of 3 numbers"),
    ):
        project.train.update(
            optimizer={"name": "Muon", "kwargs": kwargs}, lora_peft_config={"r": 4}
        )
        assert says(project.one(look), "which Muon cannot use", said)
    project.train["optimizer"]["kwargs"] = {"ns_steps": 3, "ns_coefficients": [3.0, -4.7, 2.0]}
    assert project.find(look) == []


def test_arguments_that_are_dropped_without_a_word(project: Project) -> None:
    project.train.update(lr_scheduler_type="constant", lr_scheduler_kwargs={"num_cycles": 1})
    assert says(project.one(look, "warning"), "constant takes no arguments", "remove")


def test_muon_can_train_adapters(project: Project) -> None:
    project.train.update(optimizer={"name": "Muon"}, lora_peft_config={"r": 4})
    assert project.find(look) == []
