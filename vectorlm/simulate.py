"""A training step without memory: the real model, loss and sharding, on fake tensors and in a fake
process group of the planned size; what the first rank would hold. Floor 3.

Run by `plan.simulated` as a process of its own (`python -m vectorlm.simulate`: a Job on stdin, a
line of JSON on stdout), and called by tests and benchmarks.

Fake tensors lie on the CPU, as a build without CUDA knows no other. Where CUDA would take another
way (kernels of attention and dropout), `_as_on_a_gpu` takes it.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.tensor import _sharding_prop
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import optimizer as optimizer_module
from transformers import masking_utils

from vectorlm.batch import Batch
from vectorlm.config.schema import Config
from vectorlm.errors import ModelError, VectorLMError
from vectorlm.ledger import GRADIENTS, OPTIMIZER, PARAMETERS, START, Ledger
from vectorlm.model import attention, loss, products
from vectorlm.model.causal import CausalModel
from vectorlm.model.load import (
    Place,
    allocate,
    make_outline,
    model_folder,
    read_config,
    spread,
)
from vectorlm.model.shard import find_blocks
from vectorlm.optim import build_optimizer
from vectorlm.plan.memory import BACKWARD_END, BEGINNING, FORWARD_END, LOSS, OPTIMIZER_STEP
from vectorlm.plan.simulated import Job, Simulated, job_from_json, to_json
from vectorlm.row import Row

CPU = torch.device("cpu")


def simulate(job: Job) -> Simulated:
    """The peak of one optimizer step, past the first. Needs a process without a process group."""
    assert not dist.is_initialized(), "a fake process group would take the place of a real one"
    with _fake_ranks(job.ranks):
        try:
            ledger = _watched_step(job)
        except DataDependentOutputException as error:
            raise ModelError(
                f"{job.config.model}: its code looks at the values of tensors, which a simulation "
                f"does not have ({error}); plan without --simulate"
            ) from error
        finally:
            gc.collect()
    peak = ledger.peak(after=START)
    return Simulated(peak.total_bytes, peak.by_kind, peak.moment, ledger.moments(after=START))


@contextmanager
def _fake_ranks(world: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes "fake" known

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _watched_step(job: Job) -> Ledger:
    # What neither way changes much, and fake tensors do not go through.
    without = {"compile": False, "use_liger_kernel": False}
    train = job.config.train_parameters.model_copy(update=without)
    here = Place(0, job.ranks, job.ranks_per_node, CPU)
    folder = model_folder(job.config.model)
    config = read_config(folder)
    vocabulary = config.get_text_config().vocab_size
    outline = make_outline(job.config.model, folder, config, train, job.gpu_capability)
    model = spread(outline, train, here)
    padded = config.get_text_config().vocab_size
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    ledger = Ledger(fake, (vocabulary, padded))
    with ExitStack() as stack:
        if job.gpu_capability:
            stack.enter_context(_as_on_a_gpu())
        for context in (fake, ledger, ledger.resizes(), _without_side_effects()):
            stack.enter_context(context)
        allocate(model.module, CPU)
        optimizer = _optimizer_with_state(job.config, model)
        ledger.name(model.module.buffers(), PARAMETERS)
        ledger.name(model.module.parameters(), PARAMETERS)
        ledger.name(_state(optimizer), OPTIMIZER)
        _say_where(model.module, ledger)
        _step(job.config, model, optimizer, ledger)
    return ledger


def _optimizer_with_state(config: Config, model: CausalModel) -> torch.optim.Optimizer:
    trainable = model.trainable().values()
    optimizer = build_optimizer(config.train_parameters.optimizer, trainable)
    for param in trainable:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _step(
    config: Config, model: CausalModel, optimizer: torch.optim.Optimizer, ledger: Ledger
) -> None:
    """As the trainer does it; of many micro-batches the first and the last show everything."""
    train = config.train_parameters
    batch = full_batch(config)
    model.module.train()
    ledger.values_do_not_matter = False
    micro_batches = min(train.gradient_accumulation_steps, 2)
    for i in range(micro_batches):
        ledger.moment = BEGINNING
        last = i == micro_batches - 1
        with model.micro_batch(batch, last=last) as loss:
            ledger.moment = LOSS
            (loss * 1.0).backward()
        del loss
        # Also what replicas have not added up yet.
        ledger.name_rest(GRADIENTS)
    ledger.moment = OPTIMIZER_STEP
    ledger.values_do_not_matter = True
    parameters = [p for p in model.module.parameters() if p.grad is not None]
    total = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if train.max_grad_norm is not None:
        clip_grads_with_norm_(parameters, train.max_grad_norm, total)
    optimizer.step()


def full_batch(config: Config) -> Batch:
    """Full rows, a document each."""
    length = config.train_parameters.max_seq_len
    tokens = np.zeros(length, np.int32)
    row = Row(tokens, tokens.astype(np.int64), np.zeros(1, np.int32))
    rows = config.dataset.train_bs if config.dataset else 1
    return Batch.from_rows([row] * rows, -100)


def _say_where(module: nn.Module, ledger: Ledger) -> None:
    blocks = find_blocks(module)
    count = len(blocks)

    def before(k: int) -> Callable[..., None]:
        def forward(_: Any, given: tuple[Any, ...]) -> None:
            ledger.moment = f"forward of block {k} of {count}"
            if k == 1 and given and given[0].requires_grad:
                given[0].register_hook(end)

        return forward

    def end(_: Any) -> None:
        ledger.moment = BACKWARD_END

    def after(k: int) -> Callable[..., None]:
        def backward(_: Any) -> None:
            ledger.moment = f"backward of block {k} of {count}"

        def forward(_module: Any, _given: Any, output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(backward)
            if k == count:
                ledger.moment = FORWARD_END

        return forward

    for k, block in enumerate(blocks, start=1):
        block.register_forward_pre_hook(before(k), prepend=True)
        block.register_forward_hook(after(k))


@contextmanager
def _without_side_effects() -> Iterator[None]:
    """What libraries do otherwise, or with tensors of their own, when they meet fake tensors."""
    # DTensor would lay out whole tensors in our fake mode to learn the shapes of results.
    apart = _replaced(_sharding_prop, "detect_fake_mode", lambda: None)
    # Rows that are padded hold one document; of fake positions, transformers supposes several.
    single = _replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with apart, single, warnings.catch_warnings():
        # With a bias, a linear layer of fake tensors ends in a view, where a real one does not.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        yield


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """What CUDA keeps for the backward pass where the CPU keeps something else."""

    def dropout(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        return torch.native_dropout(input, p, training)[0] if training and p else input

    fused = nn.functional.scaled_dot_product_attention
    slice_rows = loss.slice_rows

    def attend(*given: Any, dropout_p: float = 0.0, **named: Any) -> torch.Tensor:
        """Dropout inside of kernels keeps a seed; the CPU's kernel lacks it, and scores would be
        kept.
        """
        return fused(*given, **named)

    with (
        # Optimizers step through all tensors at once.
        _replaced(optimizer_module, "_get_foreach_kernels_supported_devices", lambda: ["cpu"]),
        _replaced(nn.functional, "dropout", dropout),
        _replaced(nn.functional, "scaled_dot_product_attention", attend),
        _replaced(attention, "scaled_dot_product_attention", attend),
        _replaced(products, "has_onednn", lambda: False),
        _replaced(loss, "slice_rows", lambda vocabulary, _: slice_rows(vocabulary, "cuda")),
        _replaced(attention, "_KERNELS", {**attention._KERNELS, "flash-attn": _flash_attn}),
    ):
        yield


def _flash_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, *_: Any
) -> torch.Tensor:
    """In the place of flash-attn, which has no fake kernels: torch's own copy of it, which keeps
    the same, here with grouped heads as they are.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = attention._lines(query, key, value)
    bounds = attention._bounds(batch)
    out: Any = varlen_attn(q, k, v, *bounds, enable_gqa=True)
    return out[None]


@contextmanager
def _replaced(module: Any, name: str, other: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, original)


def main() -> int:
    try:
        print(to_json(simulate(job_from_json(sys.stdin.read()))))
    except VectorLMError as error:
        print(json.dumps({"refused": str(error)}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
