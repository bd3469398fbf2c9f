"""The trained model as one file on the first rank's disk, or its adapters as a PEFT folder.
Floor 3.

`export` turns either into a Hugging Face folder. Tensors are gathered one at a time: the first rank
keeps them in host memory, the others drop each at once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from vectorlm.distributed import Ranks
from vectorlm.errors import ExportError
from vectorlm.files import sync, write_synced
from vectorlm.model.causal import CausalModel

FOLDER = "final-model"


def save_final_model(model: CausalModel, base: str, output_dir: str, ranks: Ranks) -> Path:
    """Write `output_dir/final-model`, replacing an earlier one only when the new one is
    complete.
    """
    final = Path(output_dir) / FOLDER
    whole = dict(_gather(model, ranks))
    ranks.together(lambda: _write(model, whole, base, final) if ranks.first else None)
    return final


def _gather(model: CausalModel, ranks: Ranks) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.result().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if ranks.first:
            yield name, full.detach().cpu()


def _write(model: CausalModel, whole: dict[str, torch.Tensor], base: str, final: Path) -> None:
    unfinished = final.with_name(f".{final.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        if model.adapters:
            model.module.save_pretrained(unfinished, state_dict=whole, save_embedding_layers=False)
        else:
            with open(unfinished / "model.bin", "wb") as file:
                torch.save(whole, file)
                sync(file)
        kind = "lora" if model.adapters else "full"
        about = {"base_model": base, "kind": kind}
        write_synced(unfinished / "export.json", json.dumps(about))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(unfinished, final)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(final.parent).free
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ExportError(
            f"{final}: the final model could not be written: {error} (free {free / 2**30:.2f} "
            "GiB); the last checkpoint holds everything: make room and start again"
        ) from error
