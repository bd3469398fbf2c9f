"""Where the file does not say how many ranks there are, does it ask for a certain number? Floor 1,
called by `everything`. With a slurm section, a number that does not go is refused with the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from vectorlm.check.finding import Finding, Surroundings, note


def look(here: Surroundings) -> Iterator[Finding]:
    train = here.config.train_parameters
    size = train.shard_group_size or 1
    if train.sharding_strategy == "HYBRID_SHARD" and size > 1 and here.ranks is None:
        yield note(
            "train_parameters.shard_group_size",
            f"the number of ranks must be a multiple of {size}, and without a slurm section the "
            "file does not say how many there are",
            f"{here.command('train')} --nproc_per_node {size}, or another multiple of {size}",
        )
