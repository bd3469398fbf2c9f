"""Trained weights -> a Hugging Face folder that is proven to load. Floor 3, for `convert_to_hf`.

    final-model/ or a checkpoint -> Source -> fitted to the base's Blueprint -> shards -> proof ->
    rename

Tensors stream: memory holds a shard and a tensor, whatever the model's size (the proof, which loads
the model, holds the model). Everything is written beside the target, which appears only when it is
right.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vectorlm import __version__
from vectorlm.blueprint import Base, Blueprint, Named
from vectorlm.config.schema import Config
from vectorlm.errors import ExportError, ModelError
from vectorlm.merge import CONFIG_FILE, WEIGHTS_FILE, Adapters, Merge, check_adapters, read_adapters
from vectorlm.model.load import model_folder, read_config
from vectorlm.proof import (
    logits_from_tensors,
    logits_with_adapters,
    prove_adapters,
    prove_model,
    source_dtype,
)
from vectorlm.weights import (
    DTYPES,
    ShardWriter,
    WeightFiles,
    human_size,
    parse_size,
    read_bin,
    read_json,
    require_space,
    return_freed_memory,
    write_errors,
    write_json,
    write_safetensors,
)

MARKER = "vectorlm_export.json"
# What belongs to the tokenizer or processor, byte for byte as the base model has it.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates",
    "*processor_config.json",
)


@dataclass(frozen=True)
class Source:
    """What is exported, wherever it lies."""

    kind: str
    origin: Path
    base: Base
    tensors: Callable[[], Named]
    peft_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    what: str
    n_bytes: int
    n_shards: int
    dtype: str
    proof: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shards = "1 shard" if self.n_shards == 1 else f"{self.n_shards} shards"
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"{self.folder}: {self.what}, {human_size(self.n_bytes)} in {shards}, {self.dtype}; "
            f"{self.proof}{notes}"
        )


def convert(
    config: Config,
    *,
    checkpoint: str | None = None,
    merge: bool = False,
    dtype: str | None = None,
    out: str | None = None,
    verify: bool = True,
    max_shard_size: str = "5GB",
) -> Exported:
    """Write the final model, or a checkpoint, as a Hugging Face folder; publish it only once it "
    "is proven."""
    return_freed_memory()
    max_shard_bytes = parse_size(max_shard_size)
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"--dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    output_dir = Path(config.train_parameters.output_dir)
    source = (
        open_checkpoint(Path(checkpoint), config) if checkpoint else open_final(output_dir, config)
    )
    if merge and source.kind != "lora":
        raise ExportError(
            f"--merge: {source.origin} holds a whole model, there are no adapters to merge; leave "
            "it out"
        )
    target = Path(out) if out else output_dir / "hf-model"
    _refuse_target(target, source)
    had_adapters, adapters = (target / CONFIG_FILE).exists(), source.kind == "lora" and not merge
    with _publish(target) as folder:
        if adapters:
            exported = _write_adapters(source, folder, dtype, verify)
        else:
            exported = _write_model(source, folder, dtype, verify, max_shard_bytes)
        template = _write_template(config, folder)
        _mark(folder, source, exported)
    notes = exported.notes + template
    if had_adapters and not adapters:
        notes += ("the adapters that lay there are replaced",)
    return replace(exported, folder=target, notes=notes)


# Sources


def open_final(output_dir: Path, config: Config) -> Source:
    """What training left in final-model/."""
    folder = output_dir / "final-model"
    if not folder.is_dir():
        raise ExportError(
            f"{folder}: no such folder, so training has not finished. "
            f"{_hint_checkpoint(output_dir)}"
        )
    told = read_json(folder / "export.json")
    kind = told.get("kind")
    base = _base(str(told.get("base_model") or config.model), config, folder)
    if kind == "lora":
        adapters = read_adapters(folder)
        return Source("lora", folder, base, adapters.tensors.items, adapters.config)
    if kind != "full":
        raise ExportError(f"{folder / 'export.json'}: kind is {kind!r}; allowed: 'full', 'lora'")
    return Source("full", folder, base, read_bin(folder / "model.bin").items)


def open_checkpoint(folder: Path, config: Config) -> Source:
    """What a checkpoint holds, found sound before it is read."""
    from vectorlm import checkpoint

    if not folder.is_dir():
        raise ExportError(
            f"--from {folder}: no such folder. {_hint_checkpoint(folder.parent.parent)}"
        )
    state = checkpoint.read_state(folder)
    base = _base(state["config"]["model"], config, folder)
    # Hashes are checked by the first reading only.
    verified: list[bool] = []

    def tensors() -> Named:
        yield from checkpoint.read_parameters(folder, not verified)
        verified.append(True)

    return Source(state["kind"], folder, base, tensors, state.get("peft_config") or {})


def _hint_checkpoint(output_dir: Path) -> str:
    from vectorlm import checkpoint

    newest = checkpoint.newest(output_dir)
    if newest is None:
        return "There is no checkpoint either; check train_parameters.output_dir, or train first."
    return f"The newest checkpoint can be exported: --from {newest}"


def _base(recorded: str, config: Config, origin: Path) -> Base:
    name = config.model
    if recorded != name and _folder(recorded) not in (None, _folder(name)):
        raise ExportError(
            f"{origin} was trained from {recorded}, but the config says model: {name}. Use the "
            f"config it was trained with, or --set model={recorded}"
        )
    try:
        folder = model_folder(name)
        base = Base(name, folder, read_config(folder))
    except ModelError as problem:
        raise ExportError(str(problem)) from problem
    if getattr(base.config, "quantization_config", None):
        raise ExportError(
            f"{folder}: this base model is quantized; exports are written in full precision. Set "
            "`model` to its unquantized original."
        )
    return base


def _folder(name: str) -> Path | None:
    try:
        return model_folder(name).resolve()
    except ModelError:
        return None


# Writing


def _write_model(
    source: Source, folder: Path, dtype: str | None, verify: bool, max_shard_bytes: int
) -> Exported:
    blueprint = Blueprint(source.base, _dtype(dtype, source.base))
    tensors, notes = source.tensors, _copy_tokenizer(source.base, folder)
    adapters = None
    if source.kind == "lora":
        adapters = check_adapters(
            Adapters(source.peft_config, dict(tensors())), source.base, source.origin
        )
        merge = Merge(source.base, adapters, blueprint)
        tensors = merge.__iter__
        if merge.whole_reason:
            notes.append(f"merged in memory as a whole, for {merge.whole_reason}")
    writer = ShardWriter(folder, max_shard_bytes)
    require_space(folder, blueprint.n_bytes)
    with write_errors(folder, blueprint.n_bytes):
        for name, tensor in blueprint.to_disk(blueprint.fit(tensors())):
            writer.add(name, tensor)
            del tensor
        n_shards = writer.close()
    _write_config(blueprint, folder)
    proof = _prove(folder, blueprint, tensors, adapters) if verify else "not verified"
    what = "LoRA merged into its base" if adapters else "full model"
    return Exported(
        folder, what, writer.n_bytes, n_shards, _dtype_name(blueprint.dtype), proof, tuple(notes)
    )


def _prove(
    folder: Path, blueprint: Blueprint, tensors: Callable[[], Named], adapters: Adapters | None
) -> str:
    if adapters:
        source_logits, exact = (
            logits_with_adapters(blueprint.base, adapters, blueprint.dtype),
            False,
        )
    else:
        dtype = source_dtype(tensor for _, tensor in tensors())
        source_logits, exact = (
            logits_from_tensors(blueprint, tensors(), dtype),
            dtype == blueprint.dtype,
        )
    return prove_model(folder, blueprint, blueprint.fit(tensors()), source_logits, exact)


def _write_adapters(source: Source, folder: Path, dtype: str | None, verify: bool) -> Exported:
    base = source.base
    adapters = check_adapters(
        Adapters(source.peft_config, dict(source.tensors())), base, source.origin
    )
    if dtype:
        cast = {n: t.to(DTYPES[dtype]) for n, t in adapters.tensors.items()}
        adapters = check_adapters(Adapters(adapters.config, cast), base, source.origin)
    n_bytes = sum(t.nbytes for t in adapters.tensors.values())
    name = str(base.folder.resolve()) if Path(base.name).is_dir() else base.name
    require_space(folder, n_bytes)
    with write_errors(folder, n_bytes):
        write_safetensors(folder / WEIGHTS_FILE, adapters.tensors)
        config = {**adapters.config, "base_model_name_or_path": name, "inference_mode": True}
        write_json(folder / CONFIG_FILE, config)
        notes = _copy_tokenizer(base, folder)
    proof = prove_adapters(folder, base, adapters, _dtype(None, base)) if verify else "not verified"
    kept = _dtype_name(source_dtype(adapters.tensors.values()))
    return Exported(folder, f"LoRA adapters for {base.name}", n_bytes, 1, kept, proof, tuple(notes))


def _dtype(asked: str | None, base: Base) -> torch.dtype:
    found = (
        base.config.dtype or base.config.get_text_config().dtype or WeightFiles(base.folder).dtype()
    )
    name = asked or _dtype_name(found or torch.float32)
    if name not in DTYPES:
        raise ExportError(
            f"{base.folder}: its dtype is {name}; choose with --dtype one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _write_config(blueprint: Blueprint, folder: Path) -> None:
    """The base's own config.json, with nothing changed but the dtype and the class that was "
    "trained."""
    base_folder = blueprint.base.folder
    content = read_json(base_folder / "config.json")
    _set_dtype(content, _dtype_name(blueprint.dtype))
    content["architectures"] = [type(blueprint.model).__name__]
    write_json(folder / "config.json", content)
    if (base_folder / "generation_config.json").exists():
        shutil.copyfile(base_folder / "generation_config.json", folder / "generation_config.json")


def _set_dtype(content: dict[str, Any], dtype: str, top: bool = True) -> None:
    old_key = "torch_dtype" in content
    if top or old_key or "dtype" in content:
        content["torch_dtype" if old_key else "dtype"] = dtype
    for part in content.values():
        if isinstance(part, dict):
            _set_dtype(part, dtype, top=False)


def _copy_tokenizer(base: Base, folder: Path) -> list[str]:
    found = {path for pattern in _TOKENIZER_FILES for path in base.folder.glob(pattern)}
    for path in sorted(found):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    return (
        []
        if any("token" in path.name or "vocab" in path.name for path in found)
        else ["the base has no tokenizer"]
    )


def _write_template(config: Config, folder: Path) -> tuple[str, ...]:
    """Where one was given by path, it is what the model has learned to answer to."""
    prepare = config.dataset_preprocess
    if prepare is None or prepare.chat_template is None:
        return ()
    path = Path(prepare.chat_template).expanduser()
    try:
        text = path.read_bytes()
    except OSError as problem:
        return (f"the base's chat template is kept: {path}: {problem.strerror}",)
    with write_errors(folder, len(text)):
        (folder / "chat_template.jinja").write_bytes(text)
    return (f"with the chat template {path}",)


# Publishing


def _refuse_target(target: Path, source: Source) -> None:
    for taken in (source.base.folder, source.origin):
        if target.resolve() in (taken.resolve(), *taken.resolve().parents):
            raise ExportError(
                f"--out {target}: {taken} is being read and lies there; choose another folder"
            )
    if target.is_symlink() or (target.exists() and not _is_ours(target)):
        raise ExportError(
            f"{target}: exists and was not made by this command, so it is not replaced; move it "
            "away or choose another folder with --out"
        )


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and ((folder / MARKER).exists() or not any(folder.iterdir()))


@contextmanager
def _publish(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when all went well, and vanishes when not."""
    draft = target.with_name(f"{target.name}.partial")
    old = target.with_name(f"{target.name}.old")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # left by an export that was killed
        draft.mkdir(parents=True)
    except OSError as problem:
        raise ExportError(
            f"{draft}: cannot be made: {problem.strerror}; choose another folder with --out"
        ) from problem
    try:
        with write_errors(draft, 0):
            yield draft
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            try:
                draft.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _mark(folder: Path, source: Source, exported: Exported) -> None:
    """Says that this folder is ours to replace, and where it comes from."""
    content = {
        "made_by": f"vectorlm {__version__}",
        "base_model": source.base.name,
        "from": str(source.origin),
        "kind": source.kind,
        "what": exported.what,
        "dtype": exported.dtype,
        "proof": exported.proof,
    }
    write_json(folder / MARKER, content)
