"""What autograd keeps of a block of each family, to the byte, and of attention's kernels."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import COMMON, FAMILIES
from vectorlm.plan import families
from vectorlm.plan.blocks import BlockMemory, Kernel, Tokens, block_memory
from vectorlm.plan.lora import adapters_of
from vectorlm.plan.shapes import shape_of

TOKENS = 96
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 2}
NO_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "residual_dropout")
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
OWN: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 16},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 192, "dropout": 0.0},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 64, "head_dim": 16},
}
# Keys of others, which these families would carry along without a use.
UNKNOWN = dict.fromkeys(
    ("gpt2", "gpt_bigcode", "falcon", "opt"), ("intermediate_size", "num_key_value_heads")
) | {"gpt_neox": ("num_key_value_heads",)}


def tiny(family: str) -> Any:
    from transformers import AutoConfig

    name, own = FAMILIES.get(family, (family, {}))
    without = dict.fromkeys(NO_DROPOUT, 0.0)
    values = COMMON | own | SIZES | without | OWN.get(family, {})
    for key in UNKNOWN.get(family, ()):
        del values[key]
    if family == "mistral":
        values["sliding_window"] = None
    return AutoConfig.for_model(name, **values)


def kept_by_autograd(config: Any, dtype: Any, kernel: Kernel) -> int:
    """Bytes that the second block saves, without weights and what all blocks share."""
    import torch
    from transformers import AutoModelForCausalLM

    implementation = "eager" if kernel == "eager" else "sdpa"
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=implementation
    )
    blocks = next(m for m in model.modules() if type(m).__name__ == "ModuleList" and len(m) > 1)
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    seen: dict[int, dict[int, int]] = {0: {}, 1: {}}
    inside: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in weights:
            seen[inside[-1]][storage.data_ptr()] = storage.nbytes()
        return tensor

    for i in seen:
        blocks[i].register_forward_pre_hook(lambda *_, i=i: inside.append(i))
        blocks[i].register_forward_hook(lambda *_: inside.clear())
    ids = torch.randint(0, 300, (1, TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model.train()(input_ids=ids, use_cache=False).logits
    assert logits.requires_grad
    shared = seen[0].keys() & seen[1].keys()
    own = {pointer: size for pointer, size in seen[1].items() if pointer not in shared}
    # A block's input is the output of the one before, kept by either.
    width = TOKENS * config.hidden_size * dtype.itemsize
    given = [p for p in shared if seen[1][p] == width]
    return sum(own.values()) + sum(seen[1][p] for p in given)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_as_autograd_keeps_it(family: str, half: bool) -> None:
    import torch

    config = tiny(family)
    shape = shape_of(config.to_dict())
    kernel: Kernel = "eager" if shape.scores_capped else "plain"
    if family == "falcon":
        kernel = "math"
    real = kept_by_autograd(config, torch.bfloat16 if half else torch.float32, kernel)
    ours = block_memory(shape, Tokens(TOKENS, TOKENS), 2 if half else 4, kernel, None)
    experts = 0.025 if shape.experts else 0.0  # indices, and rounding to whole tiles
    assert ours.kept_bytes == pytest.approx(real, rel=0.008 + experts)


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **SIZES,
}


def block(kernel: Kernel, tokens: Tokens, lora: Any = None, **changes: Any) -> BlockMemory:
    shape = shape_of(LLAMA | changes)
    return block_memory(shape, tokens, 2, kernel, adapters_of(lora, shape))


def test_only_scores_grow_with_the_square_of_documents() -> None:
    long, short = Tokens(4096, 4096), Tokens(4096, 512)
    for kernel in ("flash", "varlen", "sdpa", "plain"):
        assert block(kernel, long) == block(kernel, short)
    for kernel in ("math", "eager"):
        grown = block(kernel, long).kept_bytes - block(kernel, short).kept_bytes
        scores = 4 * (long.pairs - short.pairs)  # heads
        each = 4 if kernel == "math" else 6  # 32 bits; and again in the compute type
        assert grown == scores * each


def test_a_rest_is_a_shorter_document() -> None:
    assert Tokens(10, 4).pairs == 16 + 16 + 4


def test_flash_attn_takes_grouped_heads_as_they_are() -> None:
    tokens = Tokens(TOKENS, TOKENS)
    spread = block("varlen", tokens).kept_bytes - block("flash", tokens).kept_bytes
    assert spread == 2 * TOKENS * (64 - 32) * 2


def test_adapters_keep_little_of_frozen_layers() -> None:
    """Norms stay, and so do the inputs of adapted layers only."""
    tokens = Tokens(TOKENS, TOKENS)
    full = block("flash", tokens).kept_bytes
    usual = block("flash", tokens, {"r": 8}).kept_bytes
    everywhere = block("flash", tokens, {"r": 8, "target_modules": "all-linear"}).kept_bytes
    dropped = block("flash", tokens, {"r": 8, "lora_dropout": 0.1}).kept_bytes
    assert usual < everywhere < full + 7 * TOKENS * 8 * 2
    assert dropped - usual >= 2 * TOKENS * 64  # a mask for each of q and v


def test_residual_dropout_keeps_masks() -> None:
    tokens = Tokens(TOKENS, TOKENS)
    more = block("flash", tokens, hidden_dropout=0.1).kept_bytes
    assert more - block("flash", tokens).kept_bytes == 2 * TOKENS * 64
