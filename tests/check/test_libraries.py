"""What is read from the libraries' source is what they have when they are imported."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from vectorlm.check import libraries


def test_model_types() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert libraries.model_types() is not None
    assert set(libraries.model_types() or ()) == set(CONFIG_MAPPING_NAMES)


def test_causal_types() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    classes = {CONFIG_MAPPING_NAMES.get(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    wanted = {name for name, kind in CONFIG_MAPPING_NAMES.items() if kind in classes}
    assert libraries.causal_types() == wanted
    assert {"llama", "gpt2", "gemma3_text"} <= wanted
    assert "clip" not in wanted


def test_optimizers() -> None:
    import torch

    found = libraries.optimizers()
    assert found
    for name in found:
        kind = getattr(torch.optim, name)
        arguments = libraries.optimizer_arguments(name)
        real = inspect.signature(kind).parameters
        assert arguments is None or set(arguments) == set(real) - {"params"}, name
        for key in arguments or ():
            if real[key].default is not inspect.Parameter.empty:
                assert arguments[key] == real[key].default, f"{name}: {key}"


def test_schedules() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    assert libraries.schedulers() == sorted(kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION)
    given = {"optimizer", "num_warmup_steps", "num_training_steps"}
    for kind, maker in TYPE_TO_SCHEDULER_FUNCTION.items():
        found = libraries.scheduler_arguments(kind.value)
        real = set(inspect.signature(maker).parameters)
        assert found is None or found == real - given
        assert (found is None) == ("kwargs" in real)


def test_plateau() -> None:
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    real = set(inspect.signature(ReduceLROnPlateau).parameters) - {"optimizer"}
    assert set(libraries.plateau_arguments() or ()) - {"optimizer"} == real


def test_peft() -> None:
    from peft import LoraConfig
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    real = {field.name for field in fields(LoraConfig) if field.init}
    assert real <= set(libraries.lora_arguments() or ())
    assert libraries.lora_default_types() == set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)


def test_torch_build() -> None:
    import torch

    build = libraries.torch_build()
    assert build
    assert build["__version__"] == torch.__version__
    assert build["cuda"] == torch.version.cuda


def test_packages() -> None:
    assert libraries.package_folder("yaml")
    assert libraries.package_folder("no_such_package") is None
    assert libraries.version("no-such-package") is None


@pytest.mark.parametrize(
    ("there", "least", "answer"),
    [("2.9.1+cu12", "2.11", True), ("2.11.0", "2.11", False), ("5.23", "5.17.2", False)],
)
def test_versions(there: str, least: str, answer: bool) -> None:
    assert libraries.older(there, least) is answer
