"""What memory and time depend on in a model, from its config.json alone. Floor 1, read by all of
`plan`.

A family says how its blocks are built; the config says how large they are. A family that is not
known here is taken for a Llama, and its parameters are counted from the weights where there are
any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vectorlm import hub_cache
from vectorlm.errors import ModelError
from vectorlm.plan.families import FAMILIES, LLAMA, Family
from vectorlm.plan.parameters import count_parameters

LARGEST_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a block. `adapts`: LoRA can be put on it (not on experts stored as one)."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1
    adapts: bool = True

    @property
    def parameters(self) -> int:
        return self.copies * (self.inputs + self.bias) * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """A decoder of equal blocks. `drops`: dropout behind attention and feed-forward;
    `drops_scores`: inside of attention. `rough`: the family is not known, so this is a guess."""

    model_type: str
    family: Family
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    activation: str
    tied: bool
    max_positions: int | None
    linears: tuple[Matrix, ...]
    block_vectors: int
    root_vectors: int
    learned_positions: int = 0
    embedding_size: int = 0
    experts: int = 0
    experts_per_token: int = 0
    shared_intermediate: int = 0
    parallel: bool = False
    block_norms: int = 2
    window: int | None = None
    scores_capped: bool = False
    logits_capped: bool = False
    alibi: bool = False
    drops: bool = False
    drops_scores: bool = False
    counted: int | None = None
    rough: bool = False

    @property
    def block_parameters(self) -> int:
        return sum(matrix.parameters for matrix in self.linears) + self.block_vectors

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * (self.embedding_size or self.hidden)

    @property
    def root_parameters(self) -> int:
        """What is outside of blocks: embeddings, the head unless it is tied, norms."""
        return self.embedding_parameters * (1 if self.tied else 2) + self.root_vectors

    @property
    def parameters(self) -> int:
        return self.counted or self.layers * self.block_parameters + self.root_parameters

    @property
    def multiplied_parameters(self) -> int:
        """Parameters that a token is multiplied with: of experts only those that are asked."""
        resting = sum(
            matrix.parameters * (matrix.copies - self.experts_per_token) // matrix.copies
            for matrix in self.linears
            if matrix.copies > 1
        )
        looked_up = 0 if self.tied else self.embedding_parameters
        return self.parameters - self.layers * resting - looked_up

    @property
    def packs(self) -> bool:
        """Documents can be laid end to end, with our own attention (`model.attention`)."""
        return self.family.packs and not self.scores_capped and not self.alibi

    def matrices(self) -> tuple[Matrix, ...]:
        """The linear layers of one block."""
        return self.linears

    def padded(self, multiple: int | None) -> ModelShape:
        """With the vocabulary padded as `pad_vocab_to_multiple_of` asks."""
        size = self.vocab_size if not multiple else -(-self.vocab_size // multiple) * multiple
        added = (size - self.vocab_size) * (self.embedding_size or self.hidden)
        added *= 1 if self.tied else 2
        counted = self.counted + added if self.counted else None
        return replace(self, vocab_size=size, counted=counted)


# --- finding and reading --------------------------------------------------------------------------


def read_shape(model: str) -> ModelShape:
    """The shape of a model given as a folder, or as a hub name that is in the local cache."""
    folder = find_folder(model)
    path = folder / "config.json"
    try:
        if path.stat().st_size > LARGEST_CONFIG_BYTES:
            raise ValueError("it is larger than 16 MiB")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        raise ModelError(
            f"model: {folder} has no config.json, so it is no model in the Hugging Face format; "
            "give the folder that holds it"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read ({error}); copy the model folder again"
        ) from error
    try:
        return _counted(shape_of(values), folder)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(
            f"{path}: cannot be planned with: {what}; only causal language models with a usual "
            "config.json can"
        ) from error


def find_folder(model: str) -> Path:
    """The folder of a model given by path, or by hub name when it is in the local cache."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    cached = hub_cache.find_model(model)
    if cached is None:
        raise ModelError(
            f"model: {model} is neither a folder here nor a model in the local Hugging Face cache; "
            f"give a folder, or fetch it where there is a network: hf download {model}"
        )
    return cached


def _counted(shape: ModelShape, folder: Path) -> ModelShape:
    if not shape.rough:
        return shape
    found = count_parameters(folder, None)
    return replace(shape, counted=found.every if found else None)


# --- from the config to the shape -----------------------------------------------------------------


def shape_of(values: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes; KeyError or ValueError where it lacks what counts."""
    text = values.get("text_config")
    if isinstance(text, dict):  # a model that sees: only the half that reads is planned
        inner = {"model_type": values.get("model_type"), **text}
        return replace(shape_of(inner), rough=True)
    model_type = str(values["model_type"])
    family = FAMILIES.get(model_type, LLAMA)
    sizes = _Sizes(values, family)
    shape = ModelShape(
        model_type=model_type,
        family=family,
        vocab_size=sizes.whole("vocab_size"),
        hidden=sizes.hidden,
        layers=sizes.whole("num_hidden_layers", "n_layer", "n_layers"),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate=sizes.intermediate,
        activation=sizes.activation,
        tied=bool(sizes.get("tie_word_embeddings", family.tied)),
        max_positions=sizes.get("max_position_embeddings", sizes.get("n_positions")),
        linears=tuple(_attention(sizes) + _feed_forward(sizes)),
        block_vectors=_block_vectors(sizes),
        root_vectors=_root_vectors(sizes),
        learned_positions=sizes.positions,
        embedding_size=sizes.embedding,
        experts=sizes.experts,
        experts_per_token=sizes.get("num_experts_per_tok", 2) if sizes.experts else 0,
        shared_intermediate=sizes.shared if sizes.experts else 0,
        parallel=sizes.parallel,
        block_norms=sizes.block_norms,
        window=sizes.window,
        scores_capped=family.caps and sizes.get("attn_logit_softcapping", 50.0) is not None,
        logits_capped=family.caps and sizes.get("final_logit_softcapping", 30.0) is not None,
        alibi=bool(sizes.get("alibi", False)),
        drops=sizes.any_of("resid_pdrop", "dropout", "hidden_dropout", "residual_dropout"),
        drops_scores=sizes.any_of("attn_pdrop", "attention_dropout"),
        rough=model_type not in FAMILIES or sizes.irregular,
    )
    if min(shape.vocab_size, shape.hidden, shape.layers, shape.heads) < 1:
        raise ValueError("a size in it is not positive")
    return shape


class _Sizes:
    """The numbers of a config.json, under whatever names a family has for them."""

    def __init__(self, values: Mapping[str, Any], family: Family) -> None:
        self.values, self.family = values, family
        self.hidden = self.whole("hidden_size", "n_embd", "d_model")
        self.heads = self.whole("num_attention_heads", "n_head")
        self.head_dim: int = self.get("head_dim") or self.hidden // self.heads
        self.kv_heads = self._kv_heads()
        self.q_size = self.heads * self.head_dim
        self.kv_size = self.kv_heads * self.head_dim
        self.experts: int = self._first(*family.expert_keys) or 0
        inner = self._first("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
        self.intermediate: int = inner or 4 * self.hidden
        if self.experts:
            self.expert_inner: int = self.get("moe_intermediate_size") or self.intermediate
        self.shared: int = self.get("shared_expert_intermediate_size") or 0
        chosen = self._first("hidden_activation", "hidden_act", "activation_function", "activation")
        self.activation = str(chosen or family.activation)
        wide = self.get("word_embed_proj_dim", self.hidden)
        self.embedding: int = 0 if wide == self.hidden else wide
        offset = family.position_offset
        places = self.get("max_position_embeddings", self.get("n_positions", 0))
        self.positions: int = places + offset if offset is not None else 0

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def _first(self, *names: str) -> Any:
        return next((self.values[name] for name in names if self.values.get(name)), None)

    def any_of(self, *names: str) -> bool:
        return self._first(*names) is not None

    def whole(self, *names: str) -> int:
        value = self._first(*names)
        if value is None:
            raise KeyError(names[0])
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{names[0]} is {value!r}, which is no size")
        return value

    def _kv_heads(self) -> int:
        if self.family.name == "falcon":
            grouped = self.get("new_decoder_architecture", False)
            given: int = self.get("num_kv_heads") or self.heads
            return given if grouped else (1 if self.get("multi_query", True) else self.heads)
        if self.family.name == "gpt_bigcode":
            return 1 if self.get("multi_query", True) else self.heads
        return self._first("num_key_value_heads") or self.heads

    def has(self, rule: bool | str) -> bool:
        """A trait of the family, or the config's key that decides it (with `!` for its default)."""
        if isinstance(rule, bool):
            return rule
        return bool(self.get(rule.removesuffix("!"), rule.endswith("!")))

    @property
    def parallel(self) -> bool:
        return self.has(self.family.parallel)

    @property
    def block_norms(self) -> int:
        if self.family.name == "falcon":
            grouped = bool(self.get("new_decoder_architecture", False))
            both = self.get("num_ln_in_parallel_attn") or (2 if grouped else 1)
            return both if self.parallel else 2
        if self.family.name == "stablelm":
            return 1 if self.parallel else 2
        return self.family.block_norms

    @property
    def window(self) -> int | None:
        if self.get("use_sliding_window", True) is False:
            return None
        return self.get("sliding_window") or None

    @property
    def irregular(self) -> bool:
        """Blocks that differ in size from one another, or parts that are not known here."""
        sparse = self.get("decoder_sparse_step", 1) != 1 or bool(self.get("mlp_only_layers"))
        own_norm = self.get("qk_layernorm", False) or not self.get("do_layer_norm_before", True)
        odd_opt = not self.get("enable_bias", True) or self.embedding
        return bool((self.experts and sparse) or own_norm or odd_opt)


def _attention(sizes: _Sizes) -> list[Matrix]:
    names, family = sizes.family.names, sizes.family
    qkv, out = sizes.has(family.qkv_bias), sizes.has(family.out_bias)
    dense = Matrix(names["o"], sizes.q_size, sizes.hidden, out)
    if "qkv" in names:
        width = sizes.q_size + 2 * sizes.kv_size
        return [Matrix(names["qkv"], sizes.hidden, width, qkv), dense]
    return [
        Matrix(names["q"], sizes.hidden, sizes.q_size, qkv),
        Matrix(names["k"], sizes.hidden, sizes.kv_size, qkv),
        Matrix(names["v"], sizes.hidden, sizes.kv_size, qkv),
        dense,
    ]


def _feed_forward(sizes: _Sizes) -> list[Matrix]:
    names, hidden, inner = sizes.family.names, sizes.hidden, sizes.intermediate
    bias = sizes.has(sizes.family.mlp_bias)
    if sizes.experts:
        return _experts(sizes)
    if "gate_up" in names:
        first = [Matrix(names["gate_up"], hidden, 2 * inner, bias)]
    elif sizes.family.gated:
        first = [Matrix(names[part], hidden, inner, bias) for part in ("gate", "up")]
    else:
        first = [Matrix(names["up"], hidden, inner, bias)]
    return [*first, Matrix(names["down"], inner, hidden, bias)]


def _experts(sizes: _Sizes) -> list[Matrix]:
    hidden, inner, shared = sizes.hidden, sizes.expert_inner, sizes.shared
    found = [
        Matrix("experts.gate_up_proj", hidden, 2 * inner, copies=sizes.experts, adapts=False),
        Matrix("experts.down_proj", inner, hidden, copies=sizes.experts, adapts=False),
        Matrix("gate", hidden, sizes.experts, adapts=False),
    ]
    if shared:
        found += [Matrix(f"shared_expert.{n}_proj", hidden, shared) for n in ("gate", "up")]
        found.append(Matrix("shared_expert.down_proj", shared, hidden))
        found.append(Matrix("shared_expert_gate", hidden, 1))
    return found


def _norm_size(sizes: _Sizes) -> int:
    each: dict[Literal["rms", "gemma", "layer", "bare", "scale"], int]
    each = {"rms": 1, "gemma": 1, "layer": 2, "bare": 0, "scale": 1}
    return each[sizes.family.norm]


def _block_vectors(sizes: _Sizes) -> int:
    total = sizes.block_norms * _norm_size(sizes) * sizes.hidden
    if sizes.family.qk_norm == "head":
        total += 2 * sizes.head_dim
    elif sizes.family.qk_norm == "all":
        total += sizes.q_size + sizes.kv_size
    return total


def _root_vectors(sizes: _Sizes) -> int:
    positions = sizes.positions * sizes.hidden
    head_bias = sizes.whole("vocab_size") if sizes.family.head_bias else 0
    return positions + head_bias + _norm_size(sizes) * sizes.hidden
