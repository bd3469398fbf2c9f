"""Attention per document: windows, shared heads, and when documents cannot be laid end to end."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import COMMON, FAMILIES
from vectorlm.batch import Batch, Row
from vectorlm.errors import ModelError
from vectorlm.model import attention

LENGTHS = (5, 1, 12, 3)
TOKENS, HEADS, KEY_HEADS, SIZE = sum(LENGTHS), 4, 2, 8


def batch(lengths: tuple[int, ...] = LENGTHS) -> Batch:
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int32)
    ids = np.zeros(sum(lengths), np.int32)
    return Batch.from_rows([Row(ids, ids, starts)], -100)


def lines(key_heads: int = KEY_HEADS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(1, heads, TOKENS, SIZE) for heads in (HEADS, key_heads, key_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scale: float
) -> torch.Tensor:
    """Softmax over what each token may see: its own document, itself and before, the window."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None]
    seen = (document[:, None] == document[None]) & (distance >= 0)
    if window:
        seen &= distance < window
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: Batch | None = None, **more: Any
) -> torch.Tensor:
    attention.register(attention.Attention(attention.NAME, "sdpa", "a test"))
    with attention.documents(given or batch()):
        return attention._per_document(torch.nn.Module(), q, k, v, None, **more)[0]


@pytest.mark.parametrize("window", [None, 1, 2, 4, 11, 12, 13, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_per_document_attention(window: int | None, key_heads: int) -> None:
    q, k, v = lines(key_heads)
    found = ours(q, k, v, sliding_window=window, scaling=0.3)
    torch.testing.assert_close(found, by_hand(q, k, v, window, 0.3))
    assert found.is_contiguous()


def test_the_scale_is_that_of_the_head_by_default() -> None:
    q, k, v = lines()
    torch.testing.assert_close(ours(q, k, v), by_hand(q, k, v, None, SIZE**-0.5))


def test_windows_and_documents_matter() -> None:
    """Guards the comparison above."""
    q, k, v = lines()
    merged = batch((TOKENS,))
    assert not torch.allclose(ours(q, k, v), ours(q, k, v, merged))
    assert not torch.allclose(ours(q, k, v), ours(q, k, v, sliding_window=4))


def test_no_token_sees_a_later_or_foreign_one() -> None:
    q, k, v = lines()
    base = ours(q, k, v)
    for changed in range(TOKENS):
        other = v.clone()
        other[:, :, changed] += 1
        moved = (ours(q, k, other) - base).abs().amax(dim=(0, 2, 3)) > 0
        end = next(b for b in batch().bounds[1:] if b > changed)
        assert moved.nonzero().flatten().tolist() == list(range(changed, end))


@pytest.mark.parametrize(
    "asked",
    [{"softcap": 30.0}, {"s_aux": torch.zeros(HEADS)}, {"attention_mask": torch.ones(1)}],
)
def test_what_the_kernels_lack_is_refused(asked: dict[str, Any]) -> None:
    q, k, v = lines()
    given = {"attention_mask": None, **asked}
    with attention.documents(batch()), pytest.raises(ModelError, match="Module asks for"):
        attention._per_document(torch.nn.Module(), q, k, v, **given)


def test_outside_a_batch_it_fails() -> None:
    with pytest.raises(AssertionError, match="inside"):
        attention._per_document(torch.nn.Module(), *lines(), None)


def test_another_batchs_tokens_are_noticed() -> None:
    with pytest.raises(AssertionError, match="not this batch's tokens"):
        ours(*lines(), batch((3, 4)))


def test_the_batch_is_forgotten_after_an_error() -> None:
    with pytest.raises(KeyError), attention.documents(batch()):
        raise KeyError
    assert attention._current is None


def choice(family: str, gpu: tuple[int, int] | None = None, flash: bool = True, **own: Any) -> Any:
    name, settings = FAMILIES[family]
    config = AutoConfig.for_model(name, **COMMON | settings | own)
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    return attention.choose(kind, config, flash, gpu, torch.bfloat16)


def test_flash_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[Any] = [SimpleNamespace()]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",  # transformers asks for other packages with it
        lambda name, *rest: installed[0] if name == "flash_attn" else find_spec(name, *rest),
    )
    assert choice("llama", (8, 0)).kernel == "flash-attn"
    installed[0] = None
    chosen = choice("llama", (8, 0))
    assert (chosen.kernel, "not installed" in chosen.reason) == ("torch-varlen", True)
    chosen = choice("llama", (7, 0))
    assert (chosen.kernel, "Ampere" in chosen.reason) == ("sdpa", True)


@pytest.mark.parametrize(
    ("family", "given", "kernel", "reason"),
    [
        ("llama", {}, "sdpa", "there is no GPU"),
        ("llama", {"flash": False}, "sdpa", "use_flash_attention is false"),
        ("gemma2", {}, "eager", "caps its attention scores"),
        ("gemma2", {"attn_logit_softcapping": None}, "eager", "has parts that SDPA lacks"),
        ("gemma", {}, "sdpa", "there is no GPU"),
        ("falcon", {}, "sdpa", "cannot be replaced"),
    ],
)
def test_the_reason_is_said(family: str, given: dict[str, Any], kernel: str, reason: str) -> None:
    chosen = choice(family, **given)
    assert chosen.kernel == kernel
    assert reason in chosen.reason
    assert chosen.padded == ("one document a padded row" in chosen.reason)


def test_models_with_a_state_are_padded() -> None:
    """Recurrent layers would carry one document's state into the next."""
    config = AutoConfig.for_model(
        "lfm2", hidden_size=32, num_hidden_layers=2, layer_types=["conv", "full_attention"]
    )
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    chosen = attention.choose(kind, config, True, None, torch.float32)
    assert chosen.padded
    assert "conv" in chosen.reason
