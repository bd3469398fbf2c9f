"""Every family: a packed micro-batch gives the loss and gradients of its documents one by one.

Models go through `load_model` on one rank; the reference is plain transformers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.tiny import FAMILIES, SLIDING_WINDOW, VOCABULARY, joined
from vectorlm.batch import Batch, Row
from vectorlm.config.schema import TrainParameters
from vectorlm.distributed import Ranks
from vectorlm.model.causal import CausalModel
from vectorlm.model.load import Place, load_model
from vectorlm.model.shard import find_blocks

# Blocks of OPT and Phi return views, see `vectorlm.assemble`.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")

MAX_SEQ_LEN = 64
# Beyond the sliding windows, and documents of one token; two rows.
LENGTHS = ((40, 1, 7), (3, 29, 2, 1))
BLOCKS = {
    "llama": "LlamaDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "mistral": "MistralDecoderLayer",
    "gemma": "GemmaDecoderLayer",
    "gemma2": "Gemma2DecoderLayer",
    "phi": "PhiDecoderLayer",
    "gpt2": "GPT2Block",
    "opt": "OPTDecoderLayer",
    "gpt_neox": "GPTNeoXLayer",
    "falcon": "FalconDecoderLayer",
    "falcon_alibi": "FalconDecoderLayer",
}
PACKED = "use_flash_attention is false"
# (kernel, why); families that are not named here lay documents end to end.
PADDED = {
    "gemma2": ("eager", "caps its attention scores"),
    "falcon": ("sdpa", "attention cannot be replaced"),
    "falcon_alibi": ("sdpa", "attention cannot be replaced"),
}
VARIANTS = {
    "recomputed": {"use_activation_checkpointing": True},
    "padded vocabulary": {"pad_vocab_to_multiple_of": 96},
    "read whole": {"low_cpu_mem_usage": False},
    "everything": {
        "use_activation_checkpointing": True,
        "pad_vocab_to_multiple_of": 96,
        "low_cpu_mem_usage": False,
    },
}
THREE = ("llama", "gemma2", "gpt2")
Gradients = dict[str, torch.Tensor]


def rows_of_documents() -> list[list[list[int]]]:
    generator = np.random.default_rng(3)
    return [[generator.integers(3, VOCABULARY, n).tolist() for n in row] for row in LENGTHS]


ROWS = rows_of_documents()


def batch_of(rows: list[list[list[int]]]) -> Batch:
    made = [joined(documents, -100) for documents in rows]
    return Batch.from_rows([Row(r.input_ids, r.labels, r.boundaries) for r in made], -100)


def load(folder: Path, ranks: Ranks, **train: Any) -> CausalModel:
    settings = {"output_dir": "out", "max_seq_len": MAX_SEQ_LEN, "use_flash_attention": False}
    parameters = TrainParameters.model_validate(settings | train)
    return load_model(str(folder), parameters, Place(0, 1, 1, ranks.device))


def learn(model: CausalModel, batch: Batch) -> tuple[float, Gradients]:
    model.module.train()
    with model.micro_batch(batch, last=True) as loss:
        loss.backward()
    gradients = {n: whole(p.grad) for n, p in model.trainable().items() if p.grad is not None}
    return float(loss.detach()), gradients


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def one_by_one(family: str, folder: Path, documents: list[list[int]]) -> tuple[float, Gradients]:
    """Plain transformers: the sum of token losses, a document at a time."""
    from transformers import AutoModelForCausalLM

    # In transformers 5.23, Falcon's eager attention adds ALiBi twice: SDPA is its reference.
    implementation = "sdpa" if family.startswith("falcon") else "eager"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=implementation
    )
    model.train()
    total = 0.0
    for document in documents:
        ids = torch.tensor([document])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def reference(model_folder: Any) -> Any:
    """The loss and gradients of each family, computed once."""
    known: dict[str, tuple[float, Gradients]] = {}

    def of(family: str) -> tuple[float, Gradients]:
        if family not in known:
            documents = [document for row in ROWS for document in row]
            known[family] = one_by_one(family, model_folder(family), documents)
        return known[family]

    return of


def worst_difference(found: Gradients, expected: Gradients) -> float:
    """The largest relative error of a gradient; one that is all but zero is compared by size."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    errors = {}
    for name, gradient in expected.items():
        padded = found[name]
        assert not padded[gradient.shape[0] :].any(), name  # rows that pad the vocabulary
        difference = float((padded[: gradient.shape[0]] - gradient).norm())
        # A key's bias cancels out in the softmax: what is left of its gradient is rounding.
        errors[name] = difference / max(float(gradient.norm()), 1e-4 * largest)
    return max(errors.values())


def assert_same(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert worst_difference(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one(
    family: str, model_folder: Any, reference: Any, one_rank: Ranks
) -> None:
    model = load(model_folder(family), one_rank)
    assert_same(learn(model, batch_of(ROWS)), reference(family))
    assert model.evaluate(batch_of(ROWS)) == pytest.approx(reference(family)[0], rel=1e-6)
    assert_attention(model, family)
    assert_blocks(model, family)


def assert_attention(model: CausalModel, family: str) -> None:
    kernel, reason = PADDED.get(family, ("sdpa", PACKED))
    assert model.attention.kernel == kernel
    assert model.attention.padded == (family in PADDED)
    assert reason in model.attention.reason


def assert_blocks(model: CausalModel, family: str) -> None:
    blocks = find_blocks(model.module)
    # FSDP2 makes a class of its own of each unit, `FSDP<name>`.
    assert [type(block).__name__.removeprefix("FSDP") for block in blocks] == [BLOCKS[family]] * 2
    assert all(type(block).__name__.startswith("FSDP") for block in blocks)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", THREE)
def test_variants_change_nothing(
    family: str, variant: str, model_folder: Any, reference: Any, one_rank: Ranks
) -> None:
    model = load(model_folder(family), one_rank, **VARIANTS[variant])
    assert_same(learn(model, batch_of(ROWS)), reference(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_that_see_each_other_are_noticed(
    family: str, model_folder: Any, reference: Any, one_rank: Ranks
) -> None:
    """Guards the comparison: the same tokens and targets, but each row as one document."""
    batch = batch_of(ROWS)
    merged = batch_of([[[token for document in row for token in document]] for row in ROWS])
    merged = replace(merged, targets=batch.targets, learned=batch.learned)
    loss, gradients = learn(load(model_folder(family), one_rank), merged)
    expected_loss, expected = reference(family)
    assert loss != pytest.approx(expected_loss, rel=1e-6)
    assert worst_difference(gradients, expected) > 1e-2


def test_documents_reach_beyond_the_sliding_window() -> None:
    """Guards the families that have one."""
    assert max(length for row in LENGTHS for length in row) > SLIDING_WINDOW


def test_a_row_that_is_not_learned_gives_no_gradient(model_folder: Any, one_rank: Ranks) -> None:
    """A rank without rows joins every collective, and adds nothing."""
    model = load(model_folder("llama"), one_rank)
    loss, gradients = learn(model, Batch.from_rows([], -100))
    assert loss == 0.0
    assert not any(gradient.any() for gradient in gradients.values())


def test_every_block_counts_recomputed(model_folder: Any, one_rank: Ranks) -> None:
    """Recomputing runs each block's attention once more, in the backward pass."""
    runs = []
    for recompute in (False, True):
        model = load(model_folder("llama"), one_rank, use_activation_checkpointing=recompute)
        calls: list[int] = []
        for block in find_blocks(model.module):
            block.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        learn(model, batch_of(ROWS))
        runs.append(len(calls))
    assert runs == [2, 4]
