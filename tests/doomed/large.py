"""Model folders of real sizes that take no room: weights are sparse files with a true header."""

from __future__ import annotations

import json
import os
import struct

from tests.doomed.case import Case

SHAPES = {
    "1b": {  # TinyLlama 1.1 B
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "128k": {  # Llama 3.2 1 B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
COMMON = {"max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16"}
BYTES = 2


def large_model(case: Case, size: str) -> None:
    """A Llama of that size in place of the tiny one; the tokenizer stays."""
    case.edit(case.model / "config.json", **SHAPES[size], **COMMON, head_dim=None)
    (case.model / "model.safetensors").unlink()
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors(SHAPES[size]).items():
        begin, end = end, end + BYTES * _product(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(case.model / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        os.truncate(file.fileno(), 8 + len(text) + end)


def tensors(shape: dict[str, int]) -> dict[str, list[int]]:
    """Names and shapes of a Llama."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head = hidden // shape["num_attention_heads"]
    keys = head * shape["num_key_value_heads"]
    block = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    found = {"model.embed_tokens.weight": [shape["vocab_size"], hidden]}
    for number in range(shape["num_hidden_layers"]):
        found |= {f"model.layers.{number}.{name}.weight": size for name, size in block.items()}
    return found | {"model.norm.weight": [hidden], "lm_head.weight": [shape["vocab_size"], hidden]}


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
