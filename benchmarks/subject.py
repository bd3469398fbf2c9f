"""What benchmarks train: a random Llama of 35 million parameters unless said, full rows; and a real
trainer of it in one process, for those that watch the loop from inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 512
VOCABULARY = 32_000
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}


def make_model(folder: Path, **shape: int) -> Path:
    """A model's folder; `shape` instead of what SHAPE says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer

    sizes: dict[str, Any] = SHAPE | shape
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return tiny_tokenizer(folder)


def whole_vocabulary(model: Path, words: int) -> None:
    """A word for each of the model's ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))


def make_rows(folder: Path, model: Path, rows: int, length: int, vocabulary: int) -> Path:
    """Prepared data of random tokens; each row is full and one document."""
    from tests.tiny import write_rows
    from vectorlm.data.tokenize import load_tokenizer

    tokens = np.random.default_rng(0).integers(3, vocabulary, (rows, length)).tolist()
    fingerprint = load_tokenizer(str(model)).sha256
    return write_rows(folder, [[row] for row in tokens], length, tokenizer_sha256=fingerprint)


@contextmanager
def trainer(folder: Path, rows: int, **train: Any) -> Iterator[Any]:
    """A Trainer as a run has it, with one row a step."""
    from vectorlm.assemble import assemble
    from vectorlm.attempt import Attempt
    from vectorlm.config.schema import Config
    from vectorlm.distributed import connect, disconnect
    from vectorlm.stop import StopFlag
    from vectorlm.train import _quiet_libraries

    _quiet_libraries()
    model = make_model(folder / "model")
    data = make_rows(folder / "data", model, rows, LENGTH, VOCABULARY)
    output = folder / "output"
    config = Config.model_validate(
        {
            "model": str(model),
            "train_parameters": {"output_dir": str(output), "max_seq_len": LENGTH, **train},
            "dataset": {"train_ds": str(data)},
        }
    )
    assert config.dataset is not None
    ranks = connect(timeout_minutes=5)
    try:
        with Attempt(ranks, str(output), "config.yaml") as attempt:
            yield assemble(config, config.dataset, attempt, StopFlag())
    finally:
        disconnect()
