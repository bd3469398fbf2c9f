"""Units that are gathered and reduced once, and blocks that are compiled once."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from tests.model.test_families import (
    ROWS,
    Gradients,
    batch_of,
    learn,
    load,
    worst_difference,
)
from tests.tiny import VOCABULARY
from vectorlm.batch import Batch
from vectorlm.distributed import Ranks
from vectorlm.model.causal import CausalModel

LORA = {"lora_peft_config": {"r": 4, "target_modules": ["q_proj"]}}


def root_parameters(model: CausalModel) -> list[Any]:
    return list(model.module._get_fsdp_state()._fsdp_param_group.fsdp_params)


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_tied_embeddings_are_gathered_once(
    model_folder: Any, one_rank: Ranks, more: dict[str, Any]
) -> None:
    """Beside them, the root has its last norm; untied, a head, too."""
    tied = load(model_folder("llama", True), one_rank, **more)
    learn(tied, batch_of(ROWS))
    assert len(root_parameters(tied)) == 2
    assert len(root_parameters(load(model_folder("llama", False), one_rank, **more))) == 3


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_parameters_are_shards_after_an_evaluation(
    model_folder: Any, one_rank: Ranks, strategy: str, more: dict[str, Any]
) -> None:
    """An evaluation leaves units gathered; what is saved or stepped must be this rank's part."""
    model = load(model_folder("llama"), one_rank, sharding_strategy=strategy, **more)
    before = model.trainable()
    model.evaluate(batch_of(ROWS))
    assert not all(isinstance(p, DTensor) for p in model.module.parameters())
    after = model.trainable()
    assert all(after[name] is parameter for name, parameter in before.items())
    model.evaluate(batch_of(ROWS))
    assert all(isinstance(weight, DTensor) for weight in model.weights().values())


def test_gradients_are_reduced_in_the_type_asked_for(model_folder: Any, one_rank: Ranks) -> None:
    as_they_come = None
    for reduce_dtype, expected in (("float32", torch.float32), ("compute", as_they_come)):
        model = load(
            model_folder("llama"), one_rank, precision="bf16-mixed", reduce_dtype=reduce_dtype
        )
        learn(model, batch_of(ROWS))
        assert model.module._get_fsdp_state()._fsdp_param_group._reduce_dtype == expected
        assert {p.grad.dtype for p in model.trainable().values()} == {torch.float32}


# --- compiled blocks ----------------------------------------------------------------------------

# The compiler looks at tensors in ways that warn, and hides that by itself outside of tests.
quietly = pytest.mark.filterwarnings("ignore")


def batches(count: int) -> list[Batch]:
    """Of one or two rows, each of other documents."""
    generator = np.random.default_rng(1)
    made = []
    for _ in range(count):
        lengths = [generator.integers(1, 20, generator.integers(1, 5)) for _ in range(2)]
        rows = [[generator.integers(3, VOCABULARY, n).tolist() for n in row] for row in lengths]
        made.append(batch_of(rows[: generator.integers(1, 3)]))
    return made


def assert_compiled_once(folder: Any, ranks: Ranks, **more: Any) -> None:
    """To learn and to evaluate, for one token and for one document; then never again, whatever the
    lengths.
    """
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = load(folder, ranks, **more), load(folder, ranks, compile=True, **more)
    first, *others = batches(8)
    one_document = batch_of([[list(range(3, 12))]])
    for batch in (first, Batch.from_rows([], -100), one_document, others.pop()):
        assert_same(plain, compiled, batch)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    for batch in others:
        assert_same(plain, compiled, batch)
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def assert_same(plain: CausalModel, compiled: CausalModel, batch: Batch) -> None:
    """Fused operations round otherwise: 1e-6 in the loss, 1e-5 in gradients, in 32 bits."""
    expected, found = fresh(plain, batch), fresh(compiled, batch)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    if expected[0]:
        assert worst_difference(found[1], expected[1]) < 1e-5
    assert compiled.evaluate(batch) == pytest.approx(plain.evaluate(batch), rel=1e-6)


def fresh(model: CausalModel, batch: Batch) -> tuple[float, Gradients]:
    result = learn(model, batch)
    for parameter in model.trainable().values():
        parameter.grad = None
    return result


@quietly
def test_blocks_are_compiled_once(
    model_folder: Any, one_rank: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the compiler's front alone."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert_compiled_once(model_folder("llama"), one_rank, use_activation_checkpointing=True)


@quietly
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"), [("llama", LORA), ("gemma2", {}), ("gpt2", {}), ("qwen3", {})]
)
def test_blocks_of_others_are_compiled_once(
    family: str,
    more: dict[str, Any],
    model_folder: Any,
    one_rank: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its front and its autograd, which has conditions of its own."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert_compiled_once(model_folder(family), one_rank, **more)


@quietly
@pytest.mark.slow
def test_compiled_code_gives_the_same(model_folder: Any, one_rank: Ranks) -> None:
    assert_compiled_once(model_folder("llama"), one_rank)


@quietly
@pytest.mark.slow
def test_compiled_code_does_not_depend_on_its_first_batch(
    model_folder: Any, one_rank: Ranks
) -> None:
    """A run that goes on has another first batch than the one that was interrupted."""
    short, long = batch_of([[[3, 4, 5, 6]]]), batch_of([[list(range(3, 40)), list(range(3, 30))]])
    losses, gradients = [], []
    for before in ([], [short]):
        torch._dynamo.reset()
        model = load(model_folder("llama"), one_rank, compile=True)
        for batch in before:
            fresh(model, batch)
        loss, found = fresh(model, long)
        losses.append(loss)
        gradients.append(found)
    assert losses[0] == losses[1]
    assert worst_difference(*gradients) == 0
    torch._dynamo.reset()
