"""A real trainer for benchmarks that watch the loop from inside: one process, a random Llama of
35 million parameters, full rows of 512 tokens.
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


def make_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer

    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    return tiny_tokenizer(folder)


@contextmanager
def trainer(folder: Path, rows: int, **train: Any) -> Iterator[Any]:
    """A Trainer as a run has it, with one row a step."""
    from tests.tiny import write_rows
    from vectorlm.assemble import assemble
    from vectorlm.attempt import Attempt
    from vectorlm.config.schema import Config
    from vectorlm.data.tokenize import load_tokenizer
    from vectorlm.distributed import connect, disconnect
    from vectorlm.stop import StopFlag
    from vectorlm.train import _quiet_libraries

    _quiet_libraries()
    model = make_model(folder / "model")
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (rows, LENGTH))
    documents = [[row.tolist()] for row in tokens]
    own = load_tokenizer(str(model)).sha256
    data = write_rows(folder / "data", documents, LENGTH, tokenizer_sha256=own)
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
