"""Groups that share a copy, where nothing says how many ranks there are."""

from __future__ import annotations

from tests.check.project import Project, says
from vectorlm.check.ranks import look


def test_groups_without_a_slurm_section(project: Project) -> None:
    assert project.find(look) == []
    project.train.update(sharding_strategy="HYBRID_SHARD", shard_group_size=4)
    text = "shard_group_size: the number of ranks must be a multiple of 4"
    assert says(project.one(look, "note"), text, "vectorlm train .* --nproc_per_node 4")
    project.slurm(processes_per_node=8)
    assert project.find(look) == []


def test_groups_of_any_number(project: Project) -> None:
    project.train.update(sharding_strategy="HYBRID_SHARD")
    assert project.find(look) == []
    project.train.update(shard_group_size=1)
    assert project.find(look) == []
