"""Kernels of liger-kernel: refused where they cannot run. What they compute needs a GPU to see."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.model.test_families import load
from vectorlm.distributed import Ranks
from vectorlm.errors import ConfigError
from vectorlm.model.kernels import take_liger_kernels
from vectorlm.model.load import read_config


def test_refused_on_the_cpu(model_folder: Any, one_rank: Ranks) -> None:
    with pytest.raises(ConfigError, match="use_liger_kernel: these kernels run on NVIDIA GPUs"):
        load(model_folder("llama"), one_rank, use_liger_kernel=True)


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is not None, reason="liger-kernel is installed"
)
def test_refused_where_it_is_not_installed(model_folder: Any) -> None:
    with pytest.raises(ConfigError, match=r"cannot be imported .*pip install 'vectorlm\[kernels\]"):
        take_liger_kernels(read_config(model_folder("llama")), (9, 0))
