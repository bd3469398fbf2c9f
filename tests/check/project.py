"""A user's folder that `check` finds nothing wrong with, made without torch; tests spoil it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.tiny import SENTENCES, write_rows
from vectorlm.check.finding import Finding, Surroundings
from vectorlm.config.load import load_config
from vectorlm.tokenizer_files import tokenizer_file_sha256

VOCABULARY, HIDDEN, INNER, LAYERS = 320, 16, 32, 2
Look = Callable[[Surroundings], Iterator[Finding]]


class Project:
    """Model, data and configuration in one folder; `config` is what the YAML file will hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.data, self.output = folder / "model", folder / "rows", folder / "out"
        self.raw, self.path = folder / "raw.jsonl", folder / "config.yaml"
        self.environ = {"HOME": str(folder / "home"), "PATH": "/nowhere"}
        (folder / "home").mkdir(mode=0o700)
        write_model(self.model)
        self.raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
        self.prepare()
        self.config: dict[str, Any] = {
            "model": str(self.model),
            "train_parameters": {"output_dir": str(self.output), "max_seq_len": 8},
            "dataset": {"train_ds": str(self.data)},
        }

    @property
    def train(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["train_parameters"]
        return found

    def prepare(self, **manifest: Any) -> None:
        """Rows of the model's tokenizer, of eight tokens each."""
        made_by = {"tokenizer_file_sha256": tokenizer_file_sha256(self.model)}
        write_rows(self.data, [[list(range(3, 11))]] * 64, 8, **made_by | manifest)

    def slurm(self, **keys: Any) -> None:
        self.config["slurm"] = {"gpus_per_node": 0, **self.config.get("slurm", {}), **keys}

    def write(self) -> Path:
        self.path.write_text(yaml.safe_dump(self.config))
        self.path.chmod(0o600)
        return self.path

    def here(self, prepares: bool = False) -> Surroundings:
        return Surroundings(load_config(self.write()), str(self.path), self.environ, prepares)

    def find(self, look: Look, prepares: bool = False) -> list[Finding]:
        return list(look(self.here(prepares)))

    def one(self, look: Look, severity: str = "error") -> Finding:
        """The only finding there is."""
        found = self.find(look)
        assert [finding.severity for finding in found] == [severity], found
        return found[0]

    def cached(self, name: str, kind: str = "models") -> Path:
        """The model under its name on the hub, as a download leaves it."""
        folder = self.folder / f"home/.cache/huggingface/hub/{kind}--{name.replace('/', '--')}"
        snapshot = folder / "snapshots/abc"
        snapshot.parent.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("abc")
        self.model.rename(snapshot)
        self.config["model"] = name
        return snapshot

    def edit(self, name: str, **changes: Any) -> None:
        """Keys of a JSON file of the model; None removes one."""
        content = {**json.loads((self.model / name).read_text()), **changes}
        kept = {key: value for key, value in content.items() if value is not None}
        (self.model / name).write_text(json.dumps(kept))


def says(finding: Finding, text: str, cure: str) -> bool:
    shown = f"{finding.where}: {finding.text}"
    assert re.search(text, shown), f"{text!r} is not in {shown!r}"
    assert re.search(cure, finding.cure), f"{cure!r} is not in {finding.cure!r}"
    return True


def write_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(), folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder)


def tensors() -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}mlp.{name}.weight"] = (INNER, HIDDEN)
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (HIDDEN,)
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def write_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES * 4, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def split_weights(folder: Path) -> tuple[Path, Path]:
    """The same weights in two files and an index."""
    every = tensors()
    names = sorted(every)
    files = []
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        path = folder / f"model-{number:05d}-of-00002.safetensors"
        save_file({name: every[name] for name in part}, path, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, path.name))
        files.append(path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files[0], files[1]


def program(folder: Path, name: str, said: str, code: int = 0) -> None:
    """A command that says something, in a folder for PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit {code}\n")
    path.chmod(0o755)


def running_as_root() -> bool:
    return os.geteuid() == 0
