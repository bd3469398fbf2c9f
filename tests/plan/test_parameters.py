"""Parameters counted from a model folder, without reading its weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vectorlm.plan.parameters import (
    Parameters,
    adapter_parameters,
    count_parameters,
    tensor_shapes,
)


def counted(folder: Path, lora: dict[str, Any] | None = None) -> Parameters:
    """As transformers and PEFT count them."""
    import torch
    from transformers import AutoModelForCausalLM

    from vectorlm.model.lora import add_adapters, lora_config

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora is not None:
        model = add_adapters(model, lora_config(lora, str(folder)))
    return Parameters(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_every_parameter(family: str, model_folder: Callable[..., Path]) -> None:
    folder = model_folder(family)
    assert count_parameters(folder, None) == counted(folder)


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"r": 2, "target_modules": r".*\.mlp\.(up|down)_proj"},
    ],
)
def test_adapters(lora: dict[str, Any], model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llama", tied=False)
    assert count_parameters(folder, lora) == counted(folder, lora)


def test_modules_that_are_trained_whole() -> None:
    shapes = {"model.embed_tokens.weight": (320, 32), "layers.0.q_proj.weight": (32, 32)}
    lora = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    assert adapter_parameters(shapes, lora) == 320 * 32 + 4 * 64


def test_sharded_files(tmp_path: Path) -> None:
    """Those that the index names, and no other."""
    for name, key in (("a", "x"), ("b", "y"), ("stray", "z")):
        write_head(tmp_path / f"{name}.safetensors", {key: [3, 4]})
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tensor_shapes(tmp_path) == {"x": (3, 4), "y": (3, 4)}


def write_head(path: Path, shapes: dict[str, list[int]]) -> None:
    entries = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    head = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)


def test_other_files_by_their_size(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\0" * 600)
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(b"\0" * 400)
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    assert count_parameters(tmp_path, None) == Parameters(500, 500)
    assert count_parameters(tmp_path, {"r": 8}) == Parameters(500, 5)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 4, struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 2) + b"[]"],
)
def test_nothing_to_count(tmp_path: Path, content: bytes) -> None:
    assert count_parameters(tmp_path, None) is None
    (tmp_path / "model.safetensors").write_bytes(content)
    assert count_parameters(tmp_path, None) is None
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert count_parameters(tmp_path, None) is None
