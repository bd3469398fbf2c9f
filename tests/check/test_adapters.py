"""LoRA: arguments that PEFT lacks, and layers that the model lacks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.check.project import Project, says
from vectorlm.check.adapters import look

SOUND: list[dict[str, Any]] = [
    {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    {"target_modules": "all-linear", "use_rslora": True},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r"model\.layers\.0\.self_attn\.q_proj"},
    {"modules_to_save": ["lm_head", "embed_tokens"]},
    {"init_lora_weights": "gaussian", "bias": "all"},
]


@pytest.mark.parametrize("given", SOUND, ids=str)
def test_sound(given: dict[str, Any], project: Project) -> None:
    project.train["lora_peft_config"] = given
    assert project.find(look) == []


def test_none(project: Project) -> None:
    assert project.find(look) == []


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"rank": 8}, "rank is no argument of peft.LoraConfig", "did you mean r\\?"),
    ({"lora_aplha": 8}, "lora_aplha is no argument", "did you mean lora_alpha\\?"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base", "gaussian"),
    ({"init_lora_weights": "zzz"}, "zzz is no way to begin", "gaussian"),
    ({"bias": "some"}, "bias: some is unknown", "lora_only"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices", "remove"),
    ({"target_modules": ["query"]}, "query matches no layer", "k_proj.*q_proj"),
    ({"target_modules": []}, "is empty", "all-linear"),
    ({"target_modules": ["input_layernorm"]}, "input_layernorm is no matrix", "q_proj"),
    ({"target_modules": "q_proj"}, "q_proj matches no layer", "q_proj"),
    ({"target_modules": "(q"}, "no regular expression", "list"),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": 2},
        "no layer 2: the model has 2 layers",
        "the last 1",
    ),
    (
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        "only with a list of target_modules",
        "list",
    ),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
        "no layer's name has h",
        "remove",
    ),
]


@pytest.mark.parametrize(("given", "text", "cure"), WRONG, ids=[str(one[0]) for one in WRONG])
def test_wrong(given: dict[str, Any], text: str, cure: str, project: Project) -> None:
    project.train["lora_peft_config"] = given
    assert says(project.one(look), text, cure)


DOUBTFUL: list[tuple[dict[str, Any], str, str]] = [
    ({"target_modules": ["q_proj", "v_porj"]}, "v_porj matches no layer", "did you mean v_proj"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0, 9]}, "no layer 9", "last 1"),
    ({"modules_to_save": ["head"]}, "head is no part of the model", "remove"),
]


@pytest.mark.parametrize(("given", "text", "cure"), DOUBTFUL, ids=[one[1] for one in DOUBTFUL])
def test_doubtful(given: dict[str, Any], text: str, cure: str, project: Project) -> None:
    project.train["lora_peft_config"] = given
    assert says(project.one(look, "warning"), text, cure)


def test_a_family_that_peft_has_no_choice_for(project: Project) -> None:
    project.train["lora_peft_config"] = {"r": 4}
    project.edit("config.json", model_type="olmo2")
    assert says(project.one(look), "no choice of its own for olmo2", "all-linear, or .*q_proj")


def test_without_weights_layers_are_not_known(project: Project) -> None:
    project.train["lora_peft_config"] = {"target_modules": ["query"]}
    (project.model / "model.safetensors").unlink()
    assert project.find(look) == []
