"""Tiny tokenizers, models and prepared folders for tests: built here, nothing is downloaded.

The fixtures in conftest.py build each once a session; ranks of a distributed test are given the
folder that a fixture made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vectorlm.row import Row

SEED = 11
VOCABULARY = 320
MAX_POSITIONS = 128
SLIDING_WINDOW = 16
BOS, EOS = 0, 1
# Qwen's tokenizer class adds this token where it is missing, past the end of the embedding.
PAD = "<|endoftext|>"

SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river.",
    "A baker bakes bread, a potter shapes bowls, and a smith forges lanterns.",
    "Question: how much is 12 plus 30?\nAnswer: 12 and 30 make 42.",
    "Grüße aus Köln; 你好, 世界; emoji 🙂 and  two  spaces\tand a tab.",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 320 tokens: <s> is 0, </s> is 1; a chat template, no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    return folder


# What most families share, and what each has of its own; hidden 32, 4 heads, 2 layers.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "attention_dropout": 0.0,
}
GATED = {"intermediate_size": 64, "num_key_value_heads": 2}
FALCON = {"hidden_dropout": 0.0, "num_kv_heads": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GATED),
    "qwen2": ("qwen2", GATED),
    "qwen3": ("qwen3", GATED | {"head_dim": 8}),
    "mistral": ("mistral", GATED | {"sliding_window": SLIDING_WINDOW}),
    "gemma": ("gemma", GATED | {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        GATED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": SLIDING_WINDOW},
    ),
    "phi": ("phi", GATED | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": ("opt", {"ffn_dim": 64, "dropout": 0.0, "word_embed_proj_dim": 32}),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 64, "hidden_dropout": 0.0}),
    "falcon": ("falcon", FALCON | {"alibi": False}),
    "falcon_alibi": ("falcon", FALCON | {"alibi": True}),
}


def tiny_model(family: str, folder: Path, tied: bool | None = None) -> Path:
    """A folder of that family: seeded random fp32 weights in safetensors, and the tiny tokenizer.

    `tied`: whether input and output embeddings are one; None leaves what the family does.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, own = FAMILIES[family]
    ties = {} if tied is None else {"tie_word_embeddings": tied}
    config = AutoConfig.for_model(name, **COMMON | own | ties)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        perturb(model)
    model.save_pretrained(folder)
    return tiny_tokenizer(folder)


def perturb(model: Any) -> None:
    """Move fresh biases from 0 and norms from 1: a part that drops them must be noticed."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def write_rows(
    folder: Path,
    rows: Sequence[Sequence[Sequence[int]]],
    max_seq_len: int,
    ignore_index: int = -100,
    **manifest: Any,
) -> Path:
    """A prepared folder (docs/decisions.md, section 2); a row is a list of documents of token ids.

    `manifest` replaces what the manifest says, such as `tokenizer_sha256="..."`.
    """
    from vectorlm.data.store import RowWriter

    facts: dict[str, Any] = {
        "documents": sum(len(documents) for documents in rows),
        "skipped": {},
        "tokenizer_sha256": "0" * 64,
        "source_sha256": "0" * 64,
        "options": {},
    }
    with RowWriter(folder, max_seq_len=max_seq_len, ignore_index=ignore_index) as writer:
        for documents in rows:
            writer.add_row(joined(documents, ignore_index))
        writer.publish(**facts | manifest)
    return folder


def joined(documents: Sequence[Sequence[int]], ignore_index: int) -> Row:
    """Documents end to end; the first token of each is not learned, as nothing stands before it."""
    import numpy as np

    from vectorlm.row import Row

    ids = np.concatenate([np.asarray(ids, np.int32) for ids in documents])
    starts = np.cumsum([0, *(len(ids) for ids in documents[:-1])], dtype=np.int32)
    labels = ids.copy()
    labels[starts] = ignore_index
    return Row(ids, labels, starts)
