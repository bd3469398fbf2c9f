"""The proof that a written folder is the model that was trained. Floor 3, called by `export`.

The folder is loaded the way any user will load it, without VectorLM. Every tensor is compared with
what was meant to be written, and the logits of a fixed sample with those of the source: the first
finds a wrong weight, the second a wrong config, a wrong tying, a wrong merge.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from vectorlm.blueprint import Base, Blueprint, Named, crop
from vectorlm.errors import ExportError
from vectorlm.merge import ADAPTER, Adapters, attach, load_base, quiet_peft, set_tensor

_ROWS, _LENGTH = 2, 16
# How far a cast may move the largest logit, in units of the dtype's precision: rounding grows with
# the square root of the number of layers; a wrong weight moves logits by about their own size.
_ROUNDINGS = 32


def sample(config: PretrainedConfig) -> torch.Tensor:
    """Token ids spread over the vocabulary, its first and last among them; none that stands for "
    "an image."""
    text = config.get_text_config()
    length = min(_LENGTH, getattr(text, "max_position_embeddings", None) or _LENGTH)
    ids = torch.linspace(0, text.vocab_size - 1, _ROWS * length, dtype=torch.float64).long()
    special = [v for k, v in config.to_dict().items() if "token_i" in k and isinstance(v, int)]
    ids[torch.isin(ids, torch.tensor(special, dtype=torch.long))] = text.vocab_size // 2
    # Interleaved, so that small ids do not all stand in one row.
    return ids.view(length, _ROWS).t().contiguous()


def logits(model: Any, config: PretrainedConfig) -> torch.Tensor:
    ids = sample(config)
    with torch.inference_mode():
        output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    found = output.logits.float()
    if not bool(torch.isfinite(found).all()):
        raise ExportError(
            "the model answers with NaN or infinity on a sample; try --dtype float32, or an "
            "earlier checkpoint"
        )
    return found


def prove_model(
    folder: Path, blueprint: Blueprint, intended: Named, source_logits: torch.Tensor, exact: bool
) -> str:
    """`intended`: what should be in the folder. `exact`: source and folder have the same dtype, "
    "so logits must be equal."""
    model = _load(folder, blueprint.dtype)
    _compare_tensors(folder, model, intended)
    found = logits(model, blueprint.base.config)
    return _compare_logits(folder, found, source_logits, blueprint.dtype, exact)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as problem:  # whatever it is, users of the folder would meet it too
        raise ExportError(
            f"{folder}: transformers cannot load what was written: {problem}"
        ) from problem
    model, told = loaded
    wrong = {kind: sorted(map(str, keys))[:3] for kind, keys in told.items() if keys}
    if wrong:
        raise ExportError(f"{folder}: what was written does not load as it should: {wrong}")
    return model


def _compare_tensors(folder: Path, model: Any, intended: Named) -> None:
    loaded = model.state_dict()
    for name, tensor in intended:
        if not torch.equal(loaded[name], tensor.to(loaded[name].dtype)):
            raise ExportError(
                f"{folder}: {name} was written or read back wrong; check the disk and export again"
            )


def _compare_logits(
    folder: Path, found: torch.Tensor, source: torch.Tensor, dtype: torch.dtype, exact: bool
) -> str:
    if torch.equal(found, source):
        return "reloaded: weights and logits bit-equal to the source"
    difference = (found - source).abs().max().item()
    precision = torch.finfo(dtype).eps
    allowed = _ROUNDINGS * precision * source.abs().max().item()
    if exact or difference > allowed:
        raise ExportError(
            f"{folder}: the reloaded model differs from the source: largest difference of a logit "
            f"{difference:.3g}, explained by rounding: {0 if exact else allowed:.3g}. It was not "
            "published; report it, with the model's name."
        )
    return (
        f"reloaded: weights bit-equal, logits within {difference:.2g} of the source's, "
        f"the rounding to {_name(dtype)}"
    )


def logits_from_tensors(blueprint: Blueprint, tensors: Named, dtype: torch.dtype) -> torch.Tensor:
    """Logits of the source itself: its tensors put into the plain model as they are."""
    config = copy.deepcopy(blueprint.base.config)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for given, tensor in tensors:
        name = blueprint.aliases.get(given, given)
        fitted = crop(tensor, blueprint.expected[name].shape, blueprint.vocab_size)
        assert fitted is not None  # writing has fitted it before
        set_tensor(model, name, fitted)
    model.tie_weights()
    return logits(model, config)


def logits_with_adapters(base: Base, adapters: Adapters, dtype: torch.dtype) -> torch.Tensor:
    """Logits of the base with the source's adapters, not merged."""
    return logits(attach(load_base(base, dtype), adapters), base.config)


def prove_adapters(folder: Path, base: Base, intended: Adapters, dtype: torch.dtype) -> str:
    source_logits = logits_with_adapters(base, intended, dtype)
    try:
        with quiet_peft():
            model = PeftModel.from_pretrained(load_base(base, dtype), folder)
    except Exception as problem:  # whatever it is, users of the folder would meet it too
        raise ExportError(f"{folder}: PEFT cannot load what was written: {problem}") from problem
    _compare_adapters(folder, model, intended.tensors)
    return _compare_logits(folder, logits(model, base.config), source_logits, dtype, exact=True)


def _compare_adapters(folder: Path, model: PeftModel, intended: dict[str, torch.Tensor]) -> None:
    loaded = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    wrong = [
        n
        for n, t in intended.items()
        if n not in loaded or not torch.equal(loaded[n], t.to(loaded[n].dtype))
    ]
    if wrong or len(loaded) != len(intended):
        odd = wrong or sorted(set(loaded) - set(intended))
        raise ExportError(
            f"{folder}: adapters were written or read back wrong, such as {odd[0]}; export again"
        )


def source_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The widest dtype among the source's numbers."""
    found = {t.dtype for t in tensors if t.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
