"""How the blocks of each family of models are built. Floor 1, read by `shapes` and `blocks`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

# What a rule may be: fixed, or the key of config.json that decides (`!`: true where it is absent).
Rule = bool | str
LLAMA_NAMES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


@dataclass(frozen=True)
class Family:
    """The traits of a family; the defaults are a Llama's.

    `norm`: rms (in 32 bits but for its weight), gemma (the weight in 32 bits, too), layer
    (torch's LayerNorm), bare (that without weights), scale (Cohere's: no bias, in 32 bits).
    `turns_part`: only a part of each head is rotated. `packs`: its attention can be replaced by
    ours. `adapts`: what PEFT adapts when no `target_modules` are given.
    """

    name: str
    norm: Literal["rms", "gemma", "layer", "bare", "scale"] = "rms"
    block_norms: int = 2
    norm_after: bool = False
    qk_norm: Literal["", "head", "all"] = ""
    qkv_bias: Rule = False
    out_bias: Rule = False
    mlp_bias: Rule = False
    head_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    parallel: Rule = False
    tied: bool = False
    rotary: bool = True
    turns_part: bool = False
    position_offset: int | None = None
    caps: bool = False
    packs: bool = True
    expert_keys: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    adapts: tuple[str, ...] = ("q_proj", "v_proj")


LLAMA = Family("llama", qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
QWEN2 = Family("qwen2", qkv_bias=True)
QWEN3 = replace(LLAMA, name="qwen3", qk_norm="head", mlp_bias=False)
GEMMA = replace(
    LLAMA,
    name="gemma",
    norm="gemma",
    activation="gelu_pytorch_tanh",
    tied=True,
    mlp_bias=False,
)
GEMMA2 = replace(GEMMA, name="gemma2", block_norms=4, caps=True)
GPT2 = Family(
    "gpt2",
    norm="layer",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=False,
    activation="gelu_new",
    tied=True,
    rotary=False,
    position_offset=0,
    names={"qkv": "c_attn", "o": "attn.c_proj", "up": "c_fc", "down": "mlp.c_proj"},
    adapts=("c_attn",),
)
NEOX = Family(
    "gpt_neox",
    norm="layer",
    qkv_bias="attention_bias!",
    out_bias="attention_bias!",
    mlp_bias=True,
    gated=False,
    activation="gelu",
    parallel="use_parallel_residual!",
    names={
        "qkv": "query_key_value",
        "o": "attention.dense",
        "up": "dense_h_to_4h",
        "down": "dense_4h_to_h",
    },
    adapts=("query_key_value",),
    turns_part=True,
)
OPT = Family(
    "opt",
    norm="layer",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=False,
    activation="relu",
    tied=True,
    rotary=False,
    position_offset=2,
    names={
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "o": "out_proj",
        "up": "fc1",
        "down": "fc2",
    },
)
PHI = Family(
    "phi",
    norm="layer",
    block_norms=1,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    head_bias=True,
    gated=False,
    activation="gelu_new",
    parallel=True,
    names={"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "dense", "up": "fc1", "down": "fc2"},
    adapts=("q_proj", "v_proj", "fc1", "fc2"),
    turns_part=True,
)
PHI3 = Family(
    "phi3",
    turns_part=True,
    names={"qkv": "qkv_proj", "o": "o_proj", "gate_up": "gate_up_proj", "down": "down_proj"},
    adapts=("qkv_proj",),
)
FALCON = Family(
    "falcon",
    norm="layer",
    qkv_bias="bias",
    out_bias="bias",
    mlp_bias="bias",
    gated=False,
    activation="gelu",
    parallel="parallel_attn!",
    tied=True,
    packs=False,
    names={
        "qkv": "query_key_value",
        "o": "self_attention.dense",
        "up": "dense_h_to_4h",
        "down": "dense_4h_to_h",
    },
    adapts=("query_key_value",),
)
STABLELM = Family(
    "stablelm",
    norm="layer",
    qkv_bias="use_qkv_bias",
    parallel="use_parallel_residual",
    packs=False,
    turns_part=True,
)
STARCODER2 = Family(
    "starcoder2",
    norm="layer",
    qkv_bias="use_bias!",
    out_bias="use_bias!",
    mlp_bias="use_bias!",
    gated=False,
    activation="gelu_pytorch_tanh",
    tied=True,
    names={
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "o": "o_proj",
        "up": "c_fc",
        "down": "c_proj",
    },
)
OLMO2 = replace(LLAMA, name="olmo2", norm="gemma", qk_norm="all", norm_after=True, mlp_bias=False)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": Family("mistral"),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA, name="gemma3_text", block_norms=4, qk_norm="head"),
    "phi": PHI,
    "phi3": PHI3,
    "falcon": FALCON,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "gpt_bigcode": replace(GPT2, name="gpt_bigcode", activation="gelu_pytorch_tanh"),
    "opt": OPT,
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
    "olmo": replace(LLAMA, name="olmo", norm="bare", mlp_bias=False),
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, name="olmo3"),
    "granite": replace(LLAMA, name="granite"),
    "smollm3": replace(LLAMA, name="smollm3", tied=True),
    "cohere": replace(LLAMA, name="cohere", norm="scale", block_norms=1, parallel=True, tied=True),
    "mixtral": Family("mixtral", expert_keys=("num_local_experts", "num_experts")),
    "qwen2_moe": replace(QWEN2, name="qwen2_moe", expert_keys=("num_experts",)),
    "qwen3_moe": replace(QWEN3, name="qwen3_moe", expert_keys=("num_experts", "num_local_experts")),
}
