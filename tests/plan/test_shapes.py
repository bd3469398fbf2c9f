"""Shapes and parameter counts from config.json, against transformers and against known models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import COMMON, FAMILIES
from vectorlm.errors import ModelError
from vectorlm.plan import families
from vectorlm.plan.lora import adapters_of
from vectorlm.plan.shapes import find_folder, read_shape, shape_of

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}


def llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    return LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }


# Parameters as the models' own pages give them, counted from their weights.
KNOWN: dict[str, tuple[dict[str, Any], int]] = {
    "TinyLlama 1.1B": (llama(2048, 5632, 22, 32, 4, 32000), 1_100_048_384),
    "Llama-2-7B": (LLAMA, 6_738_415_616),
    "Llama-2-13B": (llama(5120, 13824, 40, 40, 40, 32000), 13_015_864_320),
    "Llama-2-70B": (llama(8192, 28672, 80, 64, 8, 32000), 68_976_648_192),
    "Llama-3-8B": (llama(4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "Llama-3-70B": (llama(8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "Mistral-7B": (
        llama(4096, 14336, 32, 32, 8, 32000) | {"model_type": "mistral", "sliding_window": 4096},
        7_241_732_096,
    ),
    "Qwen2.5-7B": (
        llama(3584, 18944, 28, 28, 4, 152064) | {"model_type": "qwen2"},
        7_615_616_512,
    ),
    "Qwen3-8B": (
        llama(4096, 12288, 36, 32, 8, 151936) | {"model_type": "qwen3", "head_dim": 128},
        8_190_735_360,
    ),
    "Gemma-2-9B": (
        llama(3584, 14336, 42, 16, 8, 256000)
        | {"model_type": "gemma2", "head_dim": 256, "tie_word_embeddings": True},
        9_241_705_984,
    ),
    "Mixtral-8x7B": (
        llama(4096, 14336, 32, 32, 8, 32000)
        | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
        46_702_792_704,
    ),
    "GPT-2": (
        {
            "model_type": "gpt2",
            "vocab_size": 50257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
        },
        124_439_808,
    ),
    "Phi-2": (
        llama(2560, 10240, 32, 32, 32, 51200) | {"model_type": "phi"},
        2_779_683_840,
    ),
    "Phi-3-mini": (
        llama(3072, 8192, 32, 32, 32, 32064) | {"model_type": "phi3"},
        3_821_079_552,
    ),
    "Falcon-7B": (
        {
            "model_type": "falcon",
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
        },
        6_921_720_704,
    ),
    "Pythia-6.9B": (
        llama(4096, 16384, 32, 32, 32, 50432) | {"model_type": "gpt_neox"},
        6_857_302_016,
    ),
    "OPT-1.3B": (
        {
            "model_type": "opt",
            "vocab_size": 50272,
            "hidden_size": 2048,
            "word_embed_proj_dim": 2048,
            "ffn_dim": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
        1_315_758_080,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models(name: str) -> None:
    config, parameters = KNOWN[name]
    shape = shape_of(config)
    assert shape.parameters == parameters
    assert not shape.rough


def on_meta(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family_as_transformers_builds_it(family: str) -> None:
    """Its own defaults, of three layers."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:3]
    values = config.to_dict()
    real = sum(param.numel() for param in on_meta(values).parameters())
    assert shape_of(values).parameters == real


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_the_families_that_are_trained_in_tests(family: str, tied: bool) -> None:
    name, own = FAMILIES[family]
    values = {"model_type": name, **COMMON, **own, "tie_word_embeddings": tied}
    model = on_meta(values)
    shape = shape_of(model.config.to_dict())
    assert shape.parameters == sum(param.numel() for param in model.parameters())
    blocks = next(m for m in model.modules() if type(m).__name__ == "ModuleList" and len(m) > 1)
    assert shape.layers == len(blocks)
    assert shape.block_parameters == sum(param.numel() for param in blocks[1].parameters())
    assert not shape.rough


def test_matrices_are_those_that_lora_adapts() -> None:
    names = [matrix.name for matrix in shape_of(LLAMA).matrices()]
    assert names == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi", "falcon", "opt"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_adapters_as_peft_makes_them(family: str, targets: str | None) -> None:
    from vectorlm.model.lora import add_adapters, lora_config

    name, own = FAMILIES[family]
    model = on_meta({"model_type": name, **COMMON, **own})
    lora: dict[str, Any] = {"r": 4} | ({"target_modules": targets} if targets else {})
    if family == "gpt2":
        lora["fan_in_fan_out"] = True
    model.name_or_path = "x"
    shape = shape_of(model.config.to_dict())
    real = add_adapters(model, lora_config(lora, "x"))
    trained = sum(param.numel() for param in real.parameters() if param.requires_grad)
    adapters = adapters_of(lora, shape)
    assert adapters
    assert adapters.parameters(shape) == trained


def test_a_pattern_names_layers_by_their_whole_path() -> None:
    shape = shape_of(LLAMA)
    adapters = adapters_of({"r": 2, "target_modules": r".*\.mlp\.(up|down)_proj"}, shape)
    assert adapters
    assert [matrix.name for matrix in shape.linears if adapters.adapts(matrix)] == [
        "up_proj",
        "down_proj",
    ]


def test_experts_that_rest_are_not_multiplied() -> None:
    shape = shape_of(KNOWN["Mixtral-8x7B"][0])
    assert 12.6e9 < shape.multiplied_parameters < 12.9e9


def test_padded_vocabulary() -> None:
    shape = shape_of(LLAMA).padded(96)
    assert shape.vocab_size == 32064
    assert shape.parameters == 6_738_415_616 + 2 * 64 * 4096


def test_a_model_that_sees_is_planned_by_its_text_half() -> None:
    shape = shape_of({"model_type": "llava", "text_config": LLAMA})
    assert shape.rough
    assert shape.hidden == 4096


def write(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content, encoding="utf-8")
    return folder


def test_an_unknown_family_is_a_rough_llama_counted_from_its_weights(
    tmp_path: Path, model_folder: Any
) -> None:
    source = model_folder("llama")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "newcomer"}
    folder = write(tmp_path / "m", json.dumps(config))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    shape = read_shape(str(folder))
    assert shape.rough
    assert shape.parameters == read_shape(str(source)).parameters


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "it holds no JSON object"),
        ("{}", "lacks 'model_type'"),
        (json.dumps({"model_type": "llama", "vocab_size": 5}), "lacks 'hidden_size'"),
        (json.dumps(LLAMA | {"hidden_size": "wide"}), "hidden_size is 'wide', which is no size"),
        (json.dumps(LLAMA | {"num_attention_heads": -1}), "is -1, which is no size"),
    ],
)
def test_a_config_that_cannot_be_used(content: str, said: str, tmp_path: Path) -> None:
    folder = write(tmp_path, content)
    with pytest.raises(ModelError, match=said):
        read_shape(str(folder))


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_shape(str(tmp_path))


def test_a_hub_name_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    repository = tmp_path / "hub/models--meta-llama--Llama-2-7b-hf"
    write(repository / "snapshots/abc", json.dumps(LLAMA))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    assert read_shape("meta-llama/Llama-2-7b-hf").parameters == 6_738_415_616
    with pytest.raises(ModelError, match="hf download meta-llama/Other"):
        find_folder("meta-llama/Other")
