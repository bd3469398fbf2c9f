"""Model folders that cannot be trained, and those that only look so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests.check.project import Project, says, split_weights, tensors, write_tokenizer
from vectorlm.check.model_folder import look

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


def test_a_sound_folder(project: Project) -> None:
    assert project.find(look) == []
    split_weights(project.model)
    assert project.find(look) == []


def cut(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


Spoil = Callable[[Project], object]
SPOILED: dict[str, tuple[Spoil, str, str]] = {
    "no folder": (
        lambda p: p.config.update(model=str(p.folder / "away/model")),
        "no folder",
        "Hugging Face",
    ),
    "another letter": (
        lambda p: p.config.update(model=str(p.folder / "modle")),
        "no folder .*modle",
        "did you mean .*/model\\?",
    ),
    "a file": (
        lambda p: p.config.update(model=str(p.model / "config.json")),
        "is a file",
        "folder",
    ),
    "never fetched": (
        lambda p: p.config.update(model="some/model-of-the-hub"),
        "neither a folder here .* cache",
        "vectorlm prefetch --config",
    ),
    "no config": (lambda p: (p.model / "config.json").unlink(), "config.json: is missing", "copy"),
    "cut config": (lambda p: cut(p.model / "config.json"), "config.json: is no JSON", "copy"),
    "pointer": (
        lambda p: (p.model / "config.json").write_text(POINTER),
        "config.json: is a git-lfs pointer",
        "copy",
    ),
    "no type": (lambda p: p.edit("config.json", model_type=None), "no model_type", "copy"),
    "new type": (
        lambda p: p.edit("config.json", model_type="lama"),
        "model_type lama is unknown to transformers .*did you mean llama",
        "update transformers",
    ),
    "own code": (
        lambda p: p.edit("config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
        "needs Python code",
        "transformers",
    ),
    "sees only": (
        lambda p: p.edit("config.json", model_type="vit"),
        "no causal language model for model_type vit",
        "language model",
    ),
    "quantised": (
        lambda p: p.edit("config.json", quantization_config={"quant_method": "awq"}),
        "quantised \\(awq\\)",
        "unquantised",
    ),
    "too long": (
        lambda p: p.train.update(max_seq_len=129),
        "max_seq_len: 129 is more than the 128 positions",
        "at most 128",
    ),
    "no weights": (
        lambda p: (p.model / "model.safetensors").unlink(),
        "holds no weights",
        "copy",
    ),
    "cut weights": (
        lambda p: cut(p.model / "model.safetensors"),
        "model.safetensors: is cut off: [\\d,]+ bytes, and its head says",
        "copy",
    ),
    "cut head": (
        lambda p: cut(p.model / "model.safetensors", 0.005),
        "model.safetensors: is cut off in its head",
        "copy",
    ),
    "weights are a pointer": (
        lambda p: (p.model / "model.safetensors").write_text(POINTER),
        "git-lfs pointer",
        "git lfs pull",
    ),
    "a shard is missing": (
        lambda p: split_weights(p.model)[1].unlink(),
        "1 of 2 weight files are missing: model-00002-of-00002.safetensors",
        "copy",
    ),
    "a shard is cut": (
        lambda p: cut(split_weights(p.model)[0]),
        "model-00001-of-00002.safetensors: is cut off",
        "copy",
    ),
    "fewer layers": (
        lambda p: p.edit("config.json", num_hidden_layers=3),
        "the weights have 2 layers, config.json says 3",
        "two models",
    ),
    "another width": (
        lambda p: p.edit("config.json", intermediate_size=64),
        "shape \\[16, 32\\], config.json says intermediate_size 64",
        "edited",
    ),
    "no tokenizer": (
        lambda p: (p.model / "tokenizer.json").unlink(),
        "holds no tokenizer",
        "copy the tokenizer",
    ),
    "cut tokenizer": (
        lambda p: cut(p.model / "tokenizer.json"),
        "tokenizer.json: cannot be read",
        "copy the tokenizer",
    ),
    "broken settings": (
        lambda p: cut(p.model / "tokenizer_config.json"),
        "tokenizer_config.json: cannot be read",
        "copy the tokenizer",
    ),
    "adapters": (
        lambda p: (
            (p.model / "config.json").unlink(),
            (p.model / "adapter_config.json").write_text("{}"),
        ),
        "holds LoRA adapters",
        "merge",
    ),
    "not converted": (
        lambda p: (
            (p.model / "config.json").unlink(),
            (p.model / "model.bin").write_text("x"),
        ),
        "before it was converted",
        "vectorlm convert",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_folder(name: str, project: Project) -> None:
    spoil, text, cure = SPOILED[name]
    spoil(project)
    assert says(project.one(look), text, cure)


def test_every_broken_file_at_once(project: Project) -> None:
    first, second = split_weights(project.model)
    cut(first)
    cut(second)
    (project.model / "tokenizer.json").write_text("{")
    assert len(project.find(look)) == 3


def test_an_index_of_another_version(project: Project) -> None:
    first, _ = split_weights(project.model)
    every = tensors()
    save_file({"model.norm.weight": every["model.norm.weight"]}, first, {"format": "pt"})
    texts = [finding.text for finding in project.find(look)]
    assert any("tensors are in no file" in text for text in texts)


def test_weights_of_more_layers_are_a_warning(project: Project) -> None:
    project.edit("config.json", num_hidden_layers=1)
    assert says(project.one(look, "warning"), "2 layers, of which config.json uses 1", "copy")
    project.edit("config.json", num_nextn_predict_layers=1)
    assert project.find(look) == []


def test_weights_of_another_vocabulary(project: Project) -> None:
    project.edit("config.json", vocab_size=400)
    texts = [finding.text for finding in project.find(look)]
    assert texts == [
        "model.embed_tokens.weight has 320 tokens, config.json says 400",
    ]


def test_only_pickled_weights(project: Project) -> None:
    (project.model / "model.safetensors").rename(project.model / "pytorch_model.bin")
    assert says(project.one(look, "note"), "no safetensors", "nothing")
    (project.model / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no end")
    found = project.find(look)
    assert [finding.severity for finding in found] == ["error", "note"]
    assert says(found[0], "pytorch_model.bin: is cut off", "copy")


def test_pickled_weights_of_which_one_is_missing(project: Project) -> None:
    (project.model / "model.safetensors").unlink()
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (project.model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (project.model / "pytorch_model-1.bin").write_bytes(b"\x80\x02")
    found = project.find(look)[0]
    assert says(found, "1 of 2 weight files are missing: pytorch_model-2.bin", "copy")


def test_a_fetched_model_is_fetched_again(project: Project) -> None:
    snapshot = project.cached("some/model")
    assert project.find(look) == []
    (snapshot / "model.safetensors").unlink()
    assert says(project.one(look), "model: some/model, fetched .* no weights", "vectorlm prefetch")


def test_a_tokenizer_of_more_tokens_than_the_model(project: Project) -> None:
    write_tokenizer(project.model, 330)
    assert says(project.one(look), "330 tokens, and the model embeddings for 320", "resize")


def test_tokens_that_were_only_added_are_a_warning(project: Project) -> None:
    content = json.loads((project.model / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 320, "content": "<image>"})
    (project.model / "tokenizer.json").write_text(json.dumps(content))
    assert says(project.one(look, "warning"), "tokens up to 320", "resize")
    project.edit("tokenizer_config.json", eos_token="<image>")
    assert says(project.one(look), "eos_token of its tokenizer is token 320", "resize")


def test_a_tokenizer_that_takes_a_library(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.model / "tokenizer.json").rename(project.model / "tokenizer.model")
    monkeypatch.setattr("vectorlm.check.libraries.package_folder", lambda name: None)
    found = [finding for finding in project.find(look) if "sentencepiece" in finding.text]
    assert says(found[0], "tokenizer.model", "pip install sentencepiece")
