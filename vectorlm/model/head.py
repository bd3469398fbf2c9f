"""From hidden states to the loss: the forward pass of a model that is trained.
Floor 2, installed by `load`.

The model's own forward runs, but its output layer only hands over what it is given, and the loss
is computed from that in chunks. For that, what the model does with its logits afterwards has to be
known: it is tried out on the model's own code, with stand-ins for all layers. Where it is not
known, the logits are computed whole, still of learned tokens only where the model allows it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from vectorlm.model.loss import Transform, head_loss_sum, token_loss_sum

CHUNKED, WHOLE = "chunked", "whole logits"


@dataclass(frozen=True)
class Head:
    """How the loss is computed, and why: `transform` is None where logits are computed whole."""

    transform: Transform | None
    reason: str

    @property
    def way(self) -> str:
        return WHOLE if self.transform is None else CHUNKED


def install(root: Any, model: PreTrainedModel, vocab_size: int) -> Head:
    """Makes `root` (the model, or adapters around it) return the loss sum of what it is given:
    input_ids, position_ids or None, where learned tokens stand in these, their targets, and the
    factor of the loss's backward pass.
    """
    layer = output_layer(model)
    head = choose(model, layer)
    if head.transform is not None and isinstance(layer, nn.Linear):
        root.forward = _Chunked(root.forward, layer, vocab_size, head.transform)
    else:
        root.forward = _Whole(root.forward, model, vocab_size)
    return head


def output_layer(model: PreTrainedModel) -> nn.Module | None:
    layer = model.get_output_embeddings()
    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    return layer


def choose(model: PreTrainedModel, layer: nn.Module | None) -> Head:
    if type(layer) is not nn.Linear:
        kind = type(layer).__name__ if layer is not None else "missing"
        return Head(None, f"its output layer is no plain linear layer ({kind})")
    transform = find_transform(model)
    if transform is None:
        return Head(None, f"what {type(model).__name__} does to its logits is not known")
    return Head(transform, "logits of learned tokens, a chunk at a time")


class _Chunked:
    """A forward pass that never has whole logits. It is called inside of the root's hooks, so that
    the output layer's parameters are all there.
    """

    def __init__(self, forward: Any, layer: nn.Linear, vocab_size: int, how: Transform) -> None:
        self.forward, self.layer = forward, layer
        self.vocab_size, self.transform = vocab_size, how
        self.hidden: torch.Tensor | None = None
        layer.forward = self._keep  # type: ignore[assignment, method-assign]

    def _keep(self, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden = hidden
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        learned: torch.Tensor,
        targets: torch.Tensor,
        factor: float,
    ) -> torch.Tensor:
        self.forward(input_ids=input_ids, use_cache=False, **_positions(position_ids))
        assert self.hidden is not None, "the model did not run its output layer"
        hidden, self.hidden = self.hidden, None
        hidden = hidden.flatten(0, -2).index_select(0, learned)
        weight, bias = self.layer.weight, self.layer.bias
        return head_loss_sum(hidden, weight, bias, targets, self.vocab_size, self.transform, factor)


class _Whole:
    """A forward pass through the model's own logits, of learned tokens only where it can."""

    def __init__(self, forward: Any, model: PreTrainedModel, vocab_size: int) -> None:
        self.forward, self.vocab_size = forward, vocab_size
        self.selects = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        learned: torch.Tensor,
        targets: torch.Tensor,
        factor: float,
    ) -> torch.Tensor:
        given = _positions(position_ids)
        if self.selects and len(input_ids) == 1:
            given["logits_to_keep"] = learned
        logits = self.forward(input_ids=input_ids, use_cache=False, **given).logits.flatten(0, -2)
        if len(logits) != len(targets):
            logits = logits.index_select(0, learned)
        return token_loss_sum(logits, targets, self.vocab_size)


def _positions(position_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {} if position_ids is None else {"position_ids": position_ids}


# --- what a model does to its logits --------------------------------------------------------------


def find_transform(model: PreTrainedModel) -> Transform | None:
    """What the model's forward does to its output layer's result, or None."""
    given = torch.linspace(-99.0, 99.0, 3 * 64).view(1, 3, 64)
    found = _tail(model, given)
    if found is None:
        return None
    for transform in _candidates(model.config.get_text_config()):
        if found.shape == given.shape and torch.allclose(transform(given), found, 1e-6, 1e-6):
            return transform
    return None


def _candidates(config: PretrainedConfig) -> Iterator[Transform]:
    """Nothing, or what numbers of the config that speak of logits may stand for."""
    yield Transform()
    for key, value in config.to_dict().items():
        named = "logit" in key or "lm_head" in key
        if named and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            yield Transform(cap=float(value))
            yield Transform(scale=float(value))
            yield Transform(scale=1 / value)


def _tail(model: PreTrainedModel, given: torch.Tensor) -> torch.Tensor | None:
    """The logits of a copy of the model whose output layer gives `given`, and whose other layers
    give zeros; None where its code does not take that.
    """
    stand_in = copy.copy(model)
    head = model.get_output_embeddings()
    hidden = torch.zeros(*given.shape[:2], 8)
    output = _GivesLogits(given, model)
    stand_in._modules = {
        name: output if module is head else _GivesHidden(hidden)
        for name, module in model._modules.items()
    }
    ids = torch.zeros(given.shape[:2], dtype=torch.long)
    try:
        with torch.no_grad():
            logits = type(model).forward(stand_in, input_ids=ids, use_cache=False).logits
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
    return logits if output.calls == 1 else None


class _GivesHidden(nn.Module):
    """In the place of a decoder, or of a model with one inside."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self) -> nn.Module:
        return self

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return _Hidden(last_hidden_state=self.hidden)


class _Hidden(BaseModelOutputWithPast):
    """Whatever else a family's decoder gives (a state, where tokens were routed) is absent."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivesLogits(nn.Module):
    def __init__(self, given: torch.Tensor, model: PreTrainedModel) -> None:
        super().__init__()
        self.given, self.calls = given, 0
        self.weight = nn.Parameter(torch.empty(0))

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.given.clone()
