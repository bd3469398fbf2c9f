"""What families do to their logits is found out, and learned through; what is not known is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tests.model.test_families import (
    ROWS,
    assert_same,
    batch_of,
    learn,
    load,
    one_by_one,
)
from tests.tiny import COMMON, FAMILIES, GATED, perturb
from vectorlm.batch import Batch
from vectorlm.distributed import Ranks
from vectorlm.model import load as loading
from vectorlm.model.head import WHOLE, Head, choose, find_transform, output_layer
from vectorlm.model.loss import Transform

MORE: dict[str, dict[str, Any]] = {
    "cohere": GATED | {"logit_scale": 0.0625},
    "granite": GATED | {"logits_scaling": 8.0},
    "gptj": {"rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
KNOWN = {
    "llama": Transform(),
    "gpt2": Transform(),
    "opt": Transform(),
    "gemma2": Transform(cap=30.0),
    "cohere": Transform(scale=0.0625),
    "granite": Transform(scale=0.125),
    "gptj": Transform(),
}


def empty(family: str) -> Any:
    name, own = FAMILIES.get(family, (family, MORE.get(family, {})))
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **COMMON | own))


@pytest.mark.parametrize("family", KNOWN)
def test_transforms_are_found(family: str) -> None:
    assert find_transform(empty(family)) == KNOWN[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_without_logits(family: str) -> None:
    model = empty(family)
    assert choose(model, output_layer(model)).transform is not None


class Odd(LlamaForCausalLM):
    """Does to its logits what nobody knows of."""

    def forward(self, **given: Any) -> Any:
        output = super().forward(**given)
        output.logits = output.logits.sin()
        return output


def test_an_unknown_change_is_not_guessed() -> None:
    with init_empty_weights(include_buffers=False):
        model = Odd(AutoConfig.for_model("llama", **COMMON | GATED))
    head = choose(model, output_layer(model))
    assert (head.transform, head.way) == (None, WHOLE)
    assert head.reason == "what Odd does to its logits is not known"


@pytest.mark.parametrize("family", MORE)
def test_families_that_change_their_logits(family: str, tmp_path: Path, one_rank: Ranks) -> None:
    """Scales, and a head with a bias."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **COMMON | MORE[family])
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    perturb(plain)
    plain.save_pretrained(tmp_path)
    model = load(tmp_path, one_rank)
    assert model.head.transform == KNOWN[family]
    documents = [document for row in ROWS for document in row]
    assert_same(learn(model, batch_of(ROWS)), one_by_one(family, tmp_path, documents))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_whole_logits_give_the_same(
    family: str, model_folder: Any, one_rank: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows end to end (only learned tokens have logits there), and of padded rows."""
    folder = model_folder(family)
    expected = learn(load(folder, one_rank), batch_of(ROWS))
    monkeypatch.setattr("vectorlm.model.head.choose", lambda *_: Head(None, "a test"))
    model = load(folder, one_rank)
    found = learn(model, batch_of(ROWS))
    assert_same(found, expected)
    assert learn(model, Batch.from_rows([], -100))[0] == 0.0


def test_adapters_on_the_head_take_whole_logits(model_folder: Any, one_rank: Ranks) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "lm_head"]}
    model = load(model_folder("llama", False), one_rank, lora_peft_config=lora)
    assert model.head.reason == "its output layer is no plain linear layer (Linear)"
    plain = load(model_folder("llama", False), one_rank)
    loss, gradients = learn(model, batch_of(ROWS))
    assert loss == pytest.approx(plain.evaluate(batch_of(ROWS)), rel=1e-6)
    assert any("lm_head" in name and gradient.any() for name, gradient in gradients.items())


def test_a_saved_head_beside_adapters_goes_without_logits(
    model_folder: Any, one_rank: Ranks
) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = load(model_folder("llama", False), one_rank, lora_peft_config=lora)
    assert model.head.transform == Transform()
    _, gradients = learn(model, batch_of(ROWS))
    assert [name for name in gradients if "lm_head" in name and gradients[name].any()]


def test_the_model_is_asked_once(model_folder: Any, one_rank: Ranks) -> None:
    """The output layer never multiplies: it only hands over."""
    model = load(model_folder("llama"), one_rank)
    layer = output_layer(loading._base(model.module))
    assert layer is not None
    assert layer(torch.ones(1, 3, 32)).shape == (1, 3, 1)
