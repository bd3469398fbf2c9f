"""What is refused of the adapters' arguments, before PEFT fails over it."""

from __future__ import annotations

from typing import Any

import pytest

from vectorlm.errors import ConfigError
from vectorlm.model.lora import lora_config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4 .*gaussian"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights: orthogonal .*gaussian"),
        ({"bias": "yes"}, "bias: yes is unknown; allowed: none, all, lora_only"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: .*remove it"),
        ({"rank": 8}, "rank is unknown, did you mean r"),
    ],
)
def test_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"train_parameters.lora_peft_config.*{said}"):
        lora_config(given, "base")


def test_taken() -> None:
    for start in (True, False, "gaussian"):
        assert lora_config({"init_lora_weights": start}, "base").init_lora_weights == start
