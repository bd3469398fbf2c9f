"""Attention that keeps the documents of a row apart. Floor 2, registered with transformers by
`load`.

Rows are laid end to end in one line of T tokens; `documents(batch)` says where each document starts
while the batch runs forward and backward (activation checkpointing runs the forward again). Legend:
q, k, v [1, H, T, D].
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from vectorlm.batch import Batch
from vectorlm.errors import ModelError

NAME = "vectorlm"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Attention:
    """What was chosen, and why: `implementation` is transformers' name, `kernel` ours."""

    implementation: str
    kernel: str
    reason: str

    @property
    def padded(self) -> bool:
        return self.implementation != NAME


def choose(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    use_flash: bool,
    gpu_capability: tuple[int, int] | None,
    dtype: torch.dtype,
) -> Attention:
    obstacle = _obstacle(model_class, config)
    if obstacle:
        plain = _plain_implementation(model_class, config)
        return Attention(plain, plain, f"one document a padded row, because {obstacle}")
    kernel, reason = _kernel(use_flash, gpu_capability, dtype)
    return Attention(NAME, kernel, reason)


def _obstacle(model_class: type[PreTrainedModel], config: PretrainedConfig) -> str | None:
    """Why documents cannot be laid end to end in this model, or None."""
    text = config.get_text_config()
    other = set(getattr(text, "layer_types", None) or ()) - _PLAIN_LAYERS
    if not getattr(model_class, "_supports_attention_backend", False):
        return "this model's attention cannot be replaced"
    if "position_ids" not in inspect.signature(model_class.forward).parameters:
        return "this model takes no positions"
    if getattr(model_class, "_is_stateful", False) or other:
        kinds = f" ({', '.join(sorted(other))})" if other else ""
        return f"this model has layers with a state or mask of their own{kinds}"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "this model caps its attention scores"
    if not getattr(model_class, "_supports_sdpa", False):
        return "this model's attention has parts that SDPA lacks"
    return None


def _plain_implementation(model_class: type[PreTrainedModel], config: PretrainedConfig) -> str:
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) and not capped else "eager"


def gpu_capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _kernel(
    use_flash: bool, gpu_capability: tuple[int, int] | None, dtype: torch.dtype
) -> tuple[str, str]:
    if not use_flash:
        return "sdpa", "use_flash_attention is false"
    if gpu_capability is None:
        return "sdpa", "there is no GPU"
    if dtype == torch.float32:
        return "sdpa", "flash kernels take bf16 or fp16, this run computes in 32 bits"
    if gpu_capability < (8, 0):
        return "sdpa", "flash kernels need an Ampere GPU or newer"
    if importlib.util.find_spec("flash_attn"):
        return "flash-attn", "flash-attn is installed"
    return "torch-varlen", "flash-attn is not installed; torch has a variable-length kernel"


_current: Batch | None = None
_kernel_name = "sdpa"


@contextmanager
def documents(batch: Batch) -> Iterator[None]:
    global _current
    _current = batch
    try:
        yield
    finally:
        _current = None


def register(attention: Attention) -> None:
    global _kernel_name
    _kernel_name = attention.kernel
    # Left out of compiled blocks, which would else be compiled again for each set of documents.
    AttentionInterface.register(NAME, torch.compiler.disable(_per_document))
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Documents are kept apart by their starts; there is no mask to build."""


def _per_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if softcap is not None or s_aux is not None or attention_mask is not None:
        raise ModelError(
            f"{type(module).__name__} asks for capped scores, attention sinks or a mask of its "
            "own, which packed documents cannot have yet; please report this model"
        )
    assert _current is not None, "attention runs inside `documents(batch)`"
    assert (query.shape[0], query.shape[2]) == (1, _current.bounds[-1]), "not this batch's tokens"
    kernel = _KERNELS[_kernel_name] if value.shape[-1] == query.shape[-1] else _sdpa
    return kernel(query, key, value, _current, dropout, scaling, sliding_window), None


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: Batch,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    if query.shape[1] != key.shape[1]:
        # With `enable_gqa` in 32 bits, or with a mask, SDPA would build the whole score matrix.
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    lengths = [stop - start for start, stop in pairwise(batch.bounds)]
    queries, keys, values = (t.split(lengths, 2) for t in (query, key, value))
    outputs = [
        scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_window_mask(length, window, query.device),
            dropout_p=dropout,
            is_causal=not window or length <= window,
            scale=scaling,
        ).transpose(1, 2)
        for q, k, v, length in zip(queries, keys, values, lengths, strict=True)
    ]
    return torch.cat(outputs, dim=1)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Causal, and no further back than `window` tokens; None where plain causal says the same."""
    if not window or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ~ones.tril(-window)


def _lines(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[1, H, T, D] -> [T, H, D], as the variable-length kernels take it."""
    return [tensor[0].transpose(0, 1).contiguous() for tensor in tensors]


def _bounds(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return batch.starts, batch.starts, batch.longest, batch.longest


def _torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: Batch,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention import varlen

    if dropout:
        return _sdpa(query, key, value, batch, dropout, scaling, window)
    options: dict[str, Any] = {"scale": scaling}
    if "window_size" in inspect.signature(varlen.varlen_attn).parameters:
        options["window_size"] = ((window or 0) - 1, 0)
    else:  # torch 2.11 has `is_causal` instead
        options["is_causal"] = True
        if window and batch.longest > window:
            return _sdpa(query, key, value, batch, dropout, scaling, window)
    q, k, v = _lines(query, key, value)
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    out = varlen.varlen_attn(q, k, v, *_bounds(batch), **options)
    return cast(torch.Tensor, out)[None]


def _flash_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: Batch,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    q, k, v = _lines(query, key, value)
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        *_bounds(batch),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
    )
    return out[None]


_KERNELS = {"sdpa": _sdpa, "torch-varlen": _torch_varlen, "flash-attn": _flash_attn}
