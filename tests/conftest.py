"""Shared fixtures: tiny tokenizers and models, each built once a session. See tests/tiny.py."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile

# Before anything imports torch or a Hugging Face library: tests never reach for the network, and
# ranks that share a few cores must not fight over threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What is kept for later runs is not the user's.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="vectorlm-tests-")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import tiny

if TYPE_CHECKING:
    from vectorlm.distributed import Ranks

ModelFolder = Callable[..., Path]


def pytest_configure() -> None:
    # A shell that runs the tests in the background has them, and all that they start, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports all libraries: a third of it would be garbage collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


LONGEST_FIRST = (
    "tests/slurm/test_survival.py",
    "tests/slurm/",
    "tests/distributed/",
    "tests/model/test_shard.py",
    "",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """So that the processes among which the files are shared end together."""
    items.sort(key=lambda item: [item.nodeid.startswith(s) for s in LONGEST_FIRST].index(True))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny tokenizer; do not write into it."""
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """`model_folder("llama", tied=True)`: the folder of a tiny model; do not write into it."""
    made: dict[tuple[str, bool | None], Path] = {}

    def folder(family: str, tied: bool | None = None) -> Path:
        key = (family, tied)
        if key not in made:
            made[key] = tiny.tiny_model(family, tmp_path_factory.mktemp(family), tied)
        return made[key]

    return folder


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """This process as the only rank of a run."""
    from vectorlm.distributed import connect, disconnect

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    ranks = connect(timeout_minutes=1)
    yield ranks
    disconnect()
