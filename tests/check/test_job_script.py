"""Shell lines, containers."""

from __future__ import annotations

from tests.check.project import Project, says
from vectorlm.check.job_script import look


def test_sound(project: Project) -> None:
    assert project.find(look) == []
    (project.folder / "activate").write_text("")
    project.slurm(
        setup=[f"source {project.folder}/activate", "module load cuda", "source $HOME/x"],
        container_image="docker://site/image:1",
        container_mounts=[str(project.folder)],
    )
    assert project.find(look) == []


def test_an_open_quote(project: Project) -> None:
    project.slurm(setup=["export NAME='open"])
    assert says(project.one(look), "slurm.setup: bash cannot read", "close")


def test_what_is_not_there(project: Project) -> None:
    project.slurm(
        setup=["cd /tmp && . /away/env/bin/activate"],
        container_image="/away/image.sif",
        container_mounts=["/away/data:/data:ro"],
    )
    found = project.find(look)
    assert [finding.where for finding in found] == [
        "slurm.setup",
        "slurm.container_image",
        "slurm.container_mounts",
    ]
    assert {finding.severity for finding in found} == {"warning"}
    assert says(found[0], "/away/env/bin/activate, which is sourced, is not here", "mend")
    assert says(found[2], "/away/data is not here", "mend")
