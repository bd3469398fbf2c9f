"""A model folder -> a sharded model of which no rank ever holds the whole.
Floor 2, called by `assemble`.

Built with parameters on the meta device, adapters added, sharded, then filled: each rank reads its
own slices of the safetensors files. Where names or formats do not allow that, the first rank reads
the model through transformers and sends it out tensor by tensor.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from vectorlm.config.schema import TrainParameters
from vectorlm.errors import ModelError
from vectorlm.model import attention, lora
from vectorlm.model.causal import CausalModel
from vectorlm.model.head import install
from vectorlm.model.kernels import take_liger_kernels
from vectorlm.model.products import keep_few_kernels, take_onednn
from vectorlm.model.shard import (
    COMPUTE_DTYPE,
    MASTER_DTYPE,
    compile_blocks,
    make_mesh,
    recompute_blocks,
    shard,
)
from vectorlm.model.weights import Weights, place
from vectorlm.steps import pad_to_multiple


@dataclass(frozen=True)
class Place:
    """Where this rank's part goes."""

    rank: int
    world: int
    local_world: int
    device: torch.device


def model_folder(name: str) -> Path:
    """The folder of a model given by path, or by hub name when it is already in the local cache."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ModelError(
            f"model: {name} is neither a folder here nor a model in the local Hugging Face cache; "
            f"give a folder, or fetch it where there is a network: hf download {name}"
        ) from error


def read_config(folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder}: its config.json cannot be used ({first_line})") from error


def load_model(name: str, train: TrainParameters, here: Place) -> CausalModel:
    folder = model_folder(name)
    precision = train.effective_precision
    _check_precision(precision, here.device)
    config = read_config(folder)
    vocab_size = config.get_text_config().vocab_size
    outline = make_outline(name, folder, config, train, attention.gpu_capability(here.device))
    padding = (vocab_size, config.get_text_config().vocab_size)
    adapters = outline.adapters
    initial: dict[str, torch.Tensor] = {}
    if adapters and not lora.needs_base_weights(adapters):
        initial = lora.first_values(outline.module, train.seed)
    if here.device.type == "cpu":
        keep_few_kernels()
    model = spread(outline, train, here)
    allocate(model.module, here.device)
    if not train.compile:  # the compiler's own products are chosen by itself
        take_onednn(model.module)
    _fill(model.module, folder, train, adapters, initial, here, padding)
    return model


@dataclass(frozen=True)
class Outline:
    """A model whose parameters are on the meta device, and what was chosen for it."""

    module: Any  # a PreTrainedModel, or a PeftModel around one
    attention: attention.Attention
    adapters: LoraConfig | None
    vocab_size: int  # without padding


def make_outline(
    name: str,
    folder: Path,
    config: PretrainedConfig,
    train: TrainParameters,
    gpu_capability: tuple[int, int] | None,
) -> Outline:
    """The model with its adapters, for a GPU of this capability or for none."""
    vocab_size = config.get_text_config().vocab_size
    _check_length(config, train.max_seq_len)
    _pad_vocabulary(config, train.pad_vocab_to_multiple_of)
    precision = train.effective_precision
    arguments = train.lora_peft_config
    adapters = lora.lora_config(arguments, name) if arguments else None
    kind = _model_class(config, folder)
    if train.use_liger_kernel:
        take_liger_kernels(config, gpu_capability)
    choice = attention.choose(
        kind, config, train.use_flash_attention, gpu_capability, COMPUTE_DTYPE[precision]
    )
    attention.register(choice)
    dtype = COMPUTE_DTYPE[precision] if adapters else MASTER_DTYPE[precision]
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=choice.implementation
        )
    model.config.use_cache = False
    model.tie_weights()  # before it is cut: what is tied is gathered and reduced once
    if adapters:
        with init_empty_weights(include_buffers=False):
            model = lora.add_adapters(model, adapters)
    return Outline(model, choice, adapters, vocab_size)


def spread(outline: Outline, train: TrainParameters, here: Place) -> CausalModel:
    """The outline, cut into this rank's part; `allocate` gives it memory."""
    model, precision = outline.module, train.effective_precision
    if outline.adapters:
        for param in model.parameters():
            if param.requires_grad:
                param.data = param.data.to(MASTER_DTYPE[precision])
    if train.compile:
        compile_blocks(model)
    if train.use_activation_checkpointing:
        recompute_blocks(model)
    mesh = make_mesh(
        train.sharding_strategy,
        here.world,
        train.shard_group_size or here.local_world,
        here.device.type,
    )
    head = install(model, _base(model), outline.vocab_size)
    shard(model, mesh, train)
    return CausalModel(
        model, outline.attention, head, outline.vocab_size, here.device, outline.adapters, mesh
    )


def _check_length(config: PretrainedConfig, max_seq_len: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and max_seq_len > limit:
        raise ModelError(
            f"train_parameters.max_seq_len: {max_seq_len} is more than the {limit} positions this "
            f"model has; set at most {limit} and prepare the data again"
        )


def _pad_vocabulary(config: PretrainedConfig, multiple: int | None) -> None:
    text = config.get_text_config()
    text.vocab_size = pad_to_multiple(text.vocab_size, multiple)


def _check_precision(precision: str, device: torch.device) -> None:
    if device.type != "cuda" or not precision.startswith("bf16"):
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError(
            f"train_parameters.precision: {torch.cuda.get_device_name(device)} has no bf16; use "
            "`precision: 16-mixed`"
        )


def _model_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    try:
        found: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ModelError(
            f"{folder}: transformers has no causal language model for model_type "
            f"{config.model_type!r}"
        ) from None
    return found


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give the shards memory. Buffers were computed at construction and are put back as they
    were.
    """
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    model.to_empty(device=device)
    _base(model).tie_weights()  # allocating gave each name a tensor of its own
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            buffer.copy_(buffers[key])


def _targets(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that weights fill, tied ones once."""
    yield from model.named_parameters()
    persistent = set(model.state_dict(keep_vars=True))
    yield from ((key, buffer) for key, buffer in model.named_buffers() if key in persistent)


def _fill(
    model: nn.Module,
    folder: Path,
    train: TrainParameters,
    adapters: LoraConfig | None,
    initial: dict[str, torch.Tensor],
    here: Place,
    padding: tuple[int, int],
) -> None:
    weights = Weights(folder)
    names = {key: lora.base_name(key) for key, _ in _targets(model) if key not in initial}
    stored = _stored_names(
        set(names.values()), set(weights.files), _base(model).base_model_prefix + "."
    )
    whole = not train.low_cpu_mem_usage or stored is None
    if whole or (adapters and lora.needs_base_weights(adapters)):
        _send_whole(model, folder, adapters, here, train.seed, padding)
        return
    assert stored is not None
    with torch.no_grad():
        for key, target in _targets(model):
            if key in initial:
                place(target, initial[key].__getitem__, list(initial[key].shape), key)
            else:
                source = stored[names[key]]
                place(target, weights.reader(source), weights.shape(source), source, padding)


def _base(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def _stored_names(wanted: set[str], files: set[str], prefix: str) -> dict[str, str] | None:
    """How the files call each wanted tensor, or None where only transformers can tell."""
    for rename in (lambda n: n, lambda n: n.removeprefix(prefix), lambda n: prefix + n):
        if all(rename(name) in files for name in wanted):
            return {name: rename(name) for name in wanted}
    return None


def _send_whole(
    model: nn.Module,
    folder: Path,
    adapters: LoraConfig | None,
    here: Place,
    seed: int,
    padding: tuple[int, int],
) -> None:
    """The first rank reads the model through transformers; every tensor is sent out and cut by
    each rank.
    """
    source: dict[str, torch.Tensor] = {}
    news: list[Any] = [None]  # shapes, or why there are none
    if here.rank == 0:
        try:
            source = _read_whole(folder, adapters, seed)
            news = [{key: list(value.shape) for key, value in source.items()}]
        except ModelError as error:
            news = [str(error)]
    dist.broadcast_object_list(news, src=0)
    if isinstance(news[0], str):
        raise ModelError(news[0])
    with torch.no_grad():
        for key, target in _targets(model):
            if key not in news[0]:
                raise ModelError(f"{folder}: its weights lack {key}, which its config asks for")
            full = torch.empty(news[0][key], dtype=target.dtype, device=here.device)
            if here.rank == 0:
                full.copy_(source.pop(key))
            dist.broadcast(full, src=0)
            place(target, full.__getitem__, list(full.shape), key, padding)


def _read_whole(folder: Path, adapters: LoraConfig | None, seed: int) -> dict[str, torch.Tensor]:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"{folder}: its weights cannot be read: {error}") from error
    model, info = loaded
    if info["missing_keys"]:  # transformers would begin them at random
        names = sorted(info["missing_keys"])
        lacking = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        raise ModelError(
            f"{folder}: its weights lack {lacking}, which its config asks for; copy the model "
            "folder again, or mend its config.json"
        )
    if adapters is not None:
        torch.manual_seed(seed)
        model = lora.add_adapters(model, adapters)
    return dict(_targets(model))
