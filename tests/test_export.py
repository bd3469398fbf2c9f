"""Export: what training left behind becomes a plain Hugging Face folder, or a clear refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.conftest import ModelFolder
from vectorlm import checkpoint, export, proof, weights
from vectorlm.blueprint import Blueprint
from vectorlm.config.schema import Config, DatasetPreprocess, TrainParameters
from vectorlm.errors import ExportError
from vectorlm.merge import Adapters, Merge, quiet_peft
from vectorlm.utils import convert_to_hf

FAMILIES = (
    ("llama", True),
    ("llama", False),
    ("qwen2", None),
    ("qwen3", None),
    ("mistral", None),
    ("gemma", None),
    ("phi", None),
    ("gpt2", None),
    ("opt", None),
    ("gpt_neox", None),
    ("falcon", None),
)
PADDING = 7


def config_for(base: Path, run: Path) -> Config:
    train = TrainParameters(output_dir=str(run), max_seq_len=8)
    return Config(model=str(base), train_parameters=train)


def trained(base: Path) -> dict[str, torch.Tensor]:
    """Weights as training leaves them: others than the base's, in float32, tied ones once."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        tiny.perturb(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def padded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the vocabulary padded, as training may keep it."""
    return {
        name: torch.cat([t, t.new_zeros(PADDING, *t.shape[1:])]) if len(t) == tiny.VOCABULARY else t
        for name, t in tensors.items()
    }


def write_final(run: Path, base: Path, tensors: Any, kind: str = "full") -> Path:
    folder = run / "final-model"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "model.bin")
    (folder / "export.json").write_text(json.dumps({"base_model": str(base), "kind": kind}))
    return folder


def adapters_for(base: Path, seed: int = 3, **options: Any) -> PeftModel:
    """The base with adapters that have learned something; with seed 0, nothing."""
    arguments: dict[str, Any] = {
        "r": 4,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    } | options
    with quiet_peft():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**arguments))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad and seed:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write_adapters(run: Path, base: Path, model: PeftModel) -> Path:
    folder = run / "final-model"
    model.save_pretrained(str(folder))
    (folder / "export.json").write_text(json.dumps({"base_model": str(base), "kind": "lora"}))
    return folder


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 26).view(2, 12)
    with torch.inference_mode():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture
def base(model_folder: ModelFolder) -> Path:
    return model_folder("llama", tied=False)


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    """A finished run of the untied llama."""
    write_final(tmp_path / "run", base, trained(base))
    return tmp_path / "run"


# Whole models


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_a_trained_model_loads_anywhere_as_it_was_trained(
    family: str, tied: bool | None, model_folder: ModelFolder, tmp_path: Path
) -> None:
    base = model_folder(family, tied=tied)
    tensors = trained(base)
    write_final(tmp_path, base, padded(tensors))

    done = export.convert(config_for(base, tmp_path))

    loaded = dict(
        AutoModelForCausalLM.from_pretrained(done.folder, dtype="auto").named_parameters()
    )
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert "bit-equal to the source" in done.proof
    assert AutoConfig.from_pretrained(done.folder).vocab_size == tiny.VOCABULARY


def test_tied_weights_are_written_once(model_folder: ModelFolder, tmp_path: Path) -> None:
    base = model_folder("llama", tied=True)
    write_final(tmp_path, base, trained(base))
    export.convert(config_for(base, tmp_path))
    written = load_file(tmp_path / "hf-model/model.safetensors")
    assert "lm_head.weight" not in written
    assert "model.embed_tokens.weight" in written


def test_tied_weights_given_twice_must_agree(model_folder: ModelFolder, tmp_path: Path) -> None:
    base = model_folder("llama", tied=True)
    tensors = trained(base)
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    write_final(tmp_path, base, twice)
    assert export.convert(config_for(base, tmp_path)).n_shards == 1

    twice["lm_head.weight"][0, 0] += 1
    write_final(tmp_path, base, twice)
    with pytest.raises(
        ExportError, match=r"lm_head.weight: given twice with different values.*tied"
    ):
        export.convert(config_for(base, tmp_path))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_go_to_disk_under_their_published_names(family: str, tmp_path: Path) -> None:
    """transformers stacks experts on loading; the folder must hold them as the hub does."""
    own = {"intermediate_size": 64, "num_key_value_heads": 2, "moe_intermediate_size": 16}
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(family, **tiny.COMMON | own | experts)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    write_final(tmp_path, base, trained(base))

    done = export.convert(config_for(base, tmp_path), max_shard_size="30KB")

    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(base / "model.safetensors").keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_is_made_and_measured(dtype: str, base: Path, run: Path) -> None:
    done = export.convert(config_for(base, run), dtype=dtype)
    written = load_file(done.folder / "model.safetensors")
    wanted = trained(base)
    assert all(torch.equal(t, wanted[n].to(getattr(torch, dtype))) for n, t in written.items())
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == dtype
    assert f"the rounding to {dtype}" in done.proof


def test_the_dtype_is_the_base_models_unless_asked(tmp_path: Path, base: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    write_final(tmp_path, half, trained(base))
    assert export.convert(config_for(half, tmp_path)).dtype == "bfloat16"

    content = json.loads((half / "config.json").read_text())
    del content["dtype"]
    (half / "config.json").write_text(json.dumps(content))
    assert export.convert(config_for(half, tmp_path)).dtype == "bfloat16"


def test_shards_keep_to_their_size_and_the_index_to_the_shards(base: Path, run: Path) -> None:
    done = export.convert(config_for(base, run), max_shard_size="50KB")
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in done.folder.glob("*.safetensors"))
    assert shards == [
        f"model-{n:05d}-of-{done.n_shards:05d}.safetensors" for n in range(1, done.n_shards + 1)
    ]
    assert done.n_shards > 2
    for shard in shards:
        names = load_file(done.folder / shard).keys()
        assert names == {name for name, file in index["weight_map"].items() if file == shard}
        assert (done.folder / shard).stat().st_size < 55_000
    assert index["metadata"]["total_size"] == done.n_bytes


def test_the_tokenizer_and_its_template_come_along(base: Path, run: Path) -> None:
    done = export.convert(config_for(base, run))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (done.folder / name).read_bytes() == (base / name).read_bytes()
    assert AutoTokenizer.from_pretrained(done.folder).chat_template == tiny.CHAT_TEMPLATE
    assert (done.folder / "generation_config.json").exists()


def test_the_template_of_the_data_goes_with_the_model(
    base: Path, run: Path, tmp_path: Path
) -> None:
    """A base model has none, and the model has learned to answer to this one."""
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    config = config_for(base, run)

    def exported(**keys: Any) -> tuple[Any, str]:
        section = DatasetPreprocess.model_validate({"save_path": "rows", **keys})
        done = export.convert(config.model_copy(update={"dataset_preprocess": section}))
        return AutoTokenizer.from_pretrained(done.folder).chat_template, str(done)

    found, told = exported(load_path="a", chat_template=str(mine))
    assert (found, f"with the chat template {mine}" in told) == (mine.read_text(), True)
    found, told = exported(load_path="a", chat_template="gone.jinja")
    assert (found, "gone.jinja: No such file" in told) == (tiny.CHAT_TEMPLATE, True)
    assert exported(load_path="a")[0] == tiny.CHAT_TEMPLATE


# Adapters


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_adapters_reload_and_merge(
    family: str, tied: bool | None, model_folder: ModelFolder, tmp_path: Path
) -> None:
    base = model_folder(family, tied=tied)
    model = adapters_for(base, use_rslora=family == "qwen2", use_dora=family in ("llama", "gpt2"))
    write_adapters(tmp_path, base, model)
    wanted = logits_of(model)

    plain = export.convert(config_for(base, tmp_path))
    with quiet_peft():
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), plain.folder)
    torch.testing.assert_close(logits_of(again), wanted, rtol=0, atol=0)
    told = json.loads((plain.folder / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(base)

    merged = export.convert(config_for(base, tmp_path), merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(merged.folder)
    torch.testing.assert_close(logits_of(loaded), wanted, rtol=0, atol=1e-5)
    # Module by module, not in memory as a whole.
    assert merged.notes == ("the adapters that lay there are replaced",)
    assert (merged.folder / "tokenizer.json").exists()


def test_modules_trained_beside_adapters_are_cropped_and_merged(base: Path, tmp_path: Path) -> None:
    model = adapters_for(base, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="none")
    folder = write_adapters(tmp_path, base, model)
    save_file(
        padded(load_file(folder / "adapter_model.safetensors")),
        folder / "adapter_model.safetensors",
    )
    merged = export.convert(config_for(base, tmp_path), merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(merged.folder)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-5)


def test_a_base_that_only_transformers_can_read_is_merged_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapters_for(base)
    write_adapters(tmp_path, base, model)
    monkeypatch.setattr(Blueprint, "disk_name", lambda self, name: None)
    merged = export.convert(config_for(base, tmp_path), merge=True)
    assert "merged in memory as a whole" in str(merged)
    loaded = AutoModelForCausalLM.from_pretrained(merged.folder)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-5)


def test_a_base_in_pytorch_bin_files_is_merged_too(base: Path, tmp_path: Path) -> None:
    old = tiny.tiny_tokenizer(tmp_path / "old")
    (old / "config.json").write_text((base / "config.json").read_text())
    torch.save(load_file(base / "model.safetensors"), old / "pytorch_model.bin")
    write_adapters(tmp_path, old, adapters_for(base))
    assert export.convert(config_for(old, tmp_path), merge=True, verify=False).n_shards == 1


def test_adapters_that_learned_nothing_are_refused(base: Path, tmp_path: Path) -> None:
    write_adapters(tmp_path, base, adapters_for(base, seed=0))
    for merge in (False, True):
        with pytest.raises(ExportError, match="nothing was learned"):
            export.convert(config_for(base, tmp_path), merge=merge)
    assert not (tmp_path / "hf-model").exists()


def test_empty_and_foreign_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    folder = write_adapters(tmp_path, base, adapters_for(base))
    tensors = load_file(folder / "adapter_model.safetensors")
    one = next(iter(tensors))
    for wrong, message in (
        ({}, "adapters are empty"),
        ({n: t for n, t in tensors.items() if n != one}, "do not fit"),
        (tensors | {one: tensors[one][:, :-1].contiguous()}, "has shape"),
        (tensors | {one: tensors[one] * float("nan")}, "NaN"),
    ):
        save_file(wrong, folder / "adapter_model.safetensors")
        with pytest.raises(ExportError, match=message):
            export.convert(config_for(base, tmp_path))


def test_merge_without_adapters_is_refused(base: Path, run: Path) -> None:
    with pytest.raises(ExportError, match="no adapters to merge"):
        export.convert(config_for(base, run), merge=True)


# Checkpoints


def test_a_checkpoint_is_exported_like_the_final_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = trained(base)
    state = {"config": {"model": str(base)}, "kind": "full", "step": 5}
    checked: list[bool] = []

    def read_parameters(folder: Path, verify: bool) -> Iterator[tuple[str, torch.Tensor]]:
        checked.append(verify)
        yield from tensors.items()

    monkeypatch.setattr(checkpoint, "read_state", lambda folder: state)
    monkeypatch.setattr(checkpoint, "read_parameters", read_parameters)
    done = export.convert(config_for(base, tmp_path / "run"), checkpoint=str(tmp_path))
    assert "bit-equal" in done.proof
    assert torch.equal(
        load_file(done.folder / "model.safetensors")["lm_head.weight"], tensors["lm_head.weight"]
    )
    assert checked[0]
    assert not any(checked[1:])


def test_without_a_final_model_the_newest_checkpoint_is_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "newest", lambda output_dir: Path("C/step_00000007"))
    with pytest.raises(ExportError, match=r"not finished.*--from C/step_00000007"):
        export.convert(config_for(base, tmp_path))


# Refusals


def test_a_damaged_final_model_is_refused(base: Path, run: Path) -> None:
    file = run / "final-model/model.bin"
    sound = file.read_bytes()
    for damage, message in (
        (sound[: len(sound) // 2], "cut short"),
        (b"", "cut short"),
        (b"not a model", "cut short"),
    ):
        file.write_bytes(damage)
        with pytest.raises(ExportError, match=rf"model.bin: .*{message}.*--from"):
            export.convert(config_for(base, run))
    file.unlink()
    with pytest.raises(ExportError, match=r"model.bin: no such file"):
        export.convert(config_for(base, run))


def test_code_in_a_final_model_is_never_run(base: Path, tmp_path: Path) -> None:
    write_final(tmp_path, base, {"a": _Bomb()})
    with pytest.raises(ExportError, match="other objects"):
        export.convert(config_for(base, tmp_path))
    assert "VECTORLM_BOMB" not in os.environ


class _Bomb:
    def __reduce__(self) -> Any:
        return exec, ("import os; os.environ['VECTORLM_BOMB'] = '1'",)


def test_weights_that_do_not_fit_are_refused(base: Path, run: Path) -> None:
    tensors = trained(base)
    norm = "model.norm.weight"
    for wrong, message in (
        ({n: t for n, t in tensors.items() if n != norm}, "1 of 21 weights .* missing"),
        (tensors | {"model.extra": torch.ones(1)}, "model.extra: .* no such weight"),
        (tensors | {norm: torch.ones(33)}, r"model.norm.weight: shape \[33\]"),
        (tensors | {norm: torch.full((32,), float("nan"))}, "training diverged"),
        ({"a": 1}, "name -> tensor"),
    ):
        write_final(run, base, wrong)
        with pytest.raises(ExportError, match=message):
            export.convert(config_for(base, run))
    assert not (run / "hf-model").exists()
    assert not (run / "hf-model.partial").exists()


def test_values_too_large_for_the_dtype_are_refused(base: Path, run: Path) -> None:
    tensors = trained(base)
    tensors["model.norm.weight"][0] = 1e6
    write_final(run, base, tensors)
    with pytest.raises(ExportError, match=r"too large for torch.float16; use --dtype bfloat16"):
        export.convert(config_for(base, run), dtype="float16")


def test_another_base_than_the_trained_one_is_refused(
    base: Path, run: Path, model_folder: ModelFolder, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="was trained from"):
        export.convert(config_for(model_folder("qwen2"), run))
    write_final(run, tmp_path / "moved away since", trained(base))
    with pytest.raises(ExportError, match="neither a folder here nor"):
        export.convert(config_for(tmp_path / "nowhere", run))
    assert export.convert(config_for(base, run)).n_shards == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "allowed are float32, bfloat16, float16"),
        ({"max_shard_size": "5 apples"}, "give a size such as 5GB"),
        ({"max_shard_size": "0GB"}, "give a size such as 5GB"),
        ({"checkpoint": "nowhere"}, "--from nowhere: no such folder"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], message: str, base: Path, run: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export.convert(config_for(base, run), **options)


def test_a_quantized_base_is_refused(base: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    content = json.loads((base / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(content))
    write_final(tmp_path, quantized, trained(base))
    with pytest.raises(ExportError, match="unquantized"):
        export.convert(config_for(quantized, tmp_path))


# The proof


def test_a_tensor_that_is_written_wrong_is_found(
    base: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_changed(self: weights.ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if name == "model.embed_tokens.weight":  # a row that the sample does not ask for
            tensor = tensor.clone()
            tensor[3, 0] += 1e-3
        honest(self, name, tensor)

    honest = weights.ShardWriter.add
    monkeypatch.setattr(weights.ShardWriter, "add", add_changed)
    with pytest.raises(
        ExportError, match=r"model.embed_tokens.weight was written or read back wrong"
    ):
        export.convert(config_for(base, run))
    assert not (run / "hf-model").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_config_that_is_written_wrong_is_found(
    dtype: str, base: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are right then; only the logits tell."""

    def write_changed(path: Path, content: dict[str, Any]) -> None:
        honest(path, content | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16})

    honest = weights.write_json
    monkeypatch.setattr(export, "write_json", write_changed)
    with pytest.raises(ExportError, match="differs from the source"):
        export.convert(config_for(base, run), dtype=dtype)


def test_a_wrong_merge_is_found(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that forgets every layer gives the base back, which loads without complaint."""
    write_adapters(tmp_path, base, adapters_for(base))
    monkeypatch.setattr("peft.tuners.lora.Linear.merge", lambda self, safe_merge: None)
    with pytest.raises(ExportError, match="differs from the source"):
        export.convert(config_for(base, tmp_path), merge=True)
    assert not (tmp_path / "hf-model").exists()


def test_the_sample_reaches_the_ends_of_the_vocabulary_and_no_image(base: Path) -> None:
    config = AutoConfig.from_pretrained(base)
    config.image_token_id = tiny.VOCABULARY - 1
    ids = proof.sample(config)
    assert ids.shape == (2, 16)
    assert tiny.VOCABULARY - 1 not in ids
    config.image_token_id = None
    assert tiny.VOCABULARY - 1 in proof.sample(config)


# Publishing


def test_an_older_export_is_replaced_and_a_foreign_folder_is_not(base: Path, run: Path) -> None:
    target = run / "hf-model"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(ExportError, match="not made by this command"):
        export.convert(config_for(base, run))
    assert (target / "precious").read_text() == "mine"

    (target / "precious").unlink()
    export.convert(config_for(base, run), max_shard_size="50KB")
    export.convert(config_for(base, run))
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]
    assert sorted(path.name for path in run.iterdir()) == ["final-model", "hf-model"]


def test_what_is_being_read_is_never_replaced(base: Path, run: Path) -> None:
    first = export.convert(config_for(base, run))
    write_final(run, first.folder, trained(base))
    for out in (first.folder, run, run / "final-model"):
        with pytest.raises(ExportError, match="being read"):
            export.convert(config_for(first.folder, run), out=str(out))


def test_a_failed_export_leaves_the_older_one(
    base: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.convert(config_for(base, run))
    before = (run / "hf-model/model.safetensors").read_bytes()
    write_final(run, base, {n: t + 1 for n, t in trained(base).items()})
    monkeypatch.setattr(weights, "save_file", _full_disk)
    with pytest.raises(
        ExportError, match=r"disk is full.*needed 156.3 kB, free on the disk .*--out"
    ):
        export.convert(config_for(base, run))
    assert (run / "hf-model/model.safetensors").read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == ["final-model", "hf-model"]


def test_the_older_export_comes_back_when_the_last_step_fails(
    base: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(self: Path, target: Path) -> Path:
        if self.name == "hf-model.partial":
            raise OSError(5, "Input/output error")
        return honest(self, target)

    export.convert(config_for(base, run))
    before = (run / "hf-model/model.safetensors").read_bytes()
    honest = Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError, match="Input/output error"):
        export.convert(config_for(base, run))
    assert (run / "hf-model/model.safetensors").read_bytes() == before


def _full_disk(*_: Any, **__: Any) -> None:
    raise weights.SafetensorError(
        "Error while serializing: I/O error: Disk quota exceeded (os error 122)"
    )


def test_a_disk_too_small_is_said_before_anything_is_written(
    base: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match=r"needed 156.3 kB, free on the disk 1.0 kB"):
        export.convert(config_for(base, run))


# Memory and the door

MEASURE = """
import ctypes, gc, json, sys, threading, time
from pathlib import Path
from vectorlm import export
from vectorlm.config.schema import Config, TrainParameters

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done.is_set():
        peak.append(anonymous())
        time.sleep(0.002)

base, *runs = sys.argv[1:]
for run, options in zip(runs, ({"dtype": "bfloat16"}, {"merge": True})):
    train = TrainParameters(output_dir=run, max_seq_len=8)
    options |= {"config": Config(model=base, train_parameters=train), "verify": False}
    export.convert(**options)  # imports and caches are no part of it
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory must not hide in the baseline
    done, peak, before = threading.Event(), [0], anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    export.convert(**options, max_shard_size="16MB")
    done.set()
    thread.join()
    print(max(peak) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_a_shard_and_a_tensor(tmp_path: Path) -> None:
    """A model of 130 MB in float32, its largest tensor 8 MB; shards of 16 MB."""
    own = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7}
    own |= {"vocab_size": 4000, "num_key_value_heads": 4}
    config = AutoConfig.for_model("llama", **tiny.COMMON | own)
    base, full, lora = tmp_path / "base", tmp_path / "full", tmp_path / "lora"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(base)
    write_final(full, base, {n: p.detach() for n, p in model.named_parameters()})
    write_adapters(lora, base, adapters_for(base))
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(base), str(full), str(lora)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    in_full, in_merge = map(int, result.stdout.split())
    print(in_full, in_merge)
    shard, tensor = 16e6, 8.4e6
    assert in_full < shard + tensor
    assert in_merge < shard + 3 * tensor  # PEFT holds a weight, its change and the sum


def test_the_door_prints_one_line_and_knows_both_flags(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {base}\ntrain_parameters: {{output_dir: {run}, max_seq_len: 8}}\n")
    out = tmp_path / "elsewhere"
    for flag in ("--config", "--config_path"):
        code = convert_to_hf.main([flag, str(file), "--out", str(out), "--dtype", "bfloat16"])
        assert code == 0
        line = capsys.readouterr().out
        assert line.startswith(f"{out}: full model, 78.1 kB in 1 shard, bfloat16; reloaded:")
        assert line.count("\n") == 1
    assert convert_to_hf.main(["--config", str(file), "--out", str(run / "final-model")]) == 2
    assert "being read" in capsys.readouterr().err


def test_a_merge_can_be_read_twice_alike(base: Path, tmp_path: Path) -> None:
    """Writing reads it once, proving again."""
    model = adapters_for(base)
    write_adapters(tmp_path, base, model)
    source = export.open_final(tmp_path, config_for(base, tmp_path))
    adapters = Adapters(source.peft_config, dict(source.tensors()))
    merge = Merge(source.base, adapters, Blueprint(source.base, torch.float32))
    first, second = dict(merge), dict(merge)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
