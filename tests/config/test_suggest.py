"""Words that other programs use lead to keys that there are."""

from __future__ import annotations

import pytest

from vectorlm.config.keys import SECTIONS, KeyPath, all_keys, find
from vectorlm.config.suggest import ELSEWHERE, HERE, unknown


@pytest.mark.parametrize("word", ELSEWHERE)
def test_words_of_others(word: str) -> None:
    """The word is no key itself, and is understood at the top and inside any section."""
    assert find(ELSEWHERE[word])
    assert not [path for path in all_keys() if path[-1] == word]
    for section in SECTIONS:
        candidates = unknown((*section, word)).candidates
        assert [path[-1] for path in candidates] == [ELSEWHERE[word][-1]] or (
            (*section, word) in HERE
        )


@pytest.mark.parametrize("path", HERE)
def test_words_with_another_meaning_here(path: KeyPath) -> None:
    assert find(HERE[path])
    assert find(path) is None
    finding = unknown(path)
    assert finding.candidates == [HERE[path]]
    assert finding.message.startswith("unknown key")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        (("slurm", "partitions"), ("slurm", "partition")),
        (("slurm", "NCCL_SOCKET_IFNAME"), ("slurm", "network_interface")),
        (("slurm", "max-requeues"), ("slurm", "max_requeues")),
        (("slurm", "preprocess", "memory"), ("slurm", "preprocess", "mem")),
        (("slurm", "preprocess", "queue"), ("slurm", "preprocess", "partition")),
        (("sweep", "grids"), ("sweep", "grid")),
        (("train_parameters", "gpus"), ("slurm", "gpus_per_node")),
        (("slrum",), ("slurm",)),
    ],
)
def test_nearly(path: KeyPath, meant: KeyPath) -> None:
    assert unknown(path).candidates == [meant]
