"""Would the job's own script run: its shell lines, its container? Floor 1, called by `everything`.

What lies on compute nodes alone cannot be seen here, so a path that is missing is a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vectorlm.check.finding import Finding, Surroundings, error, warning
from vectorlm.cluster.script import render
from vectorlm.cluster.submit import read_by_bash
from vectorlm.config.schema import Slurm
from vectorlm.errors import ClusterError

_SOURCED = re.compile(r"(?:^|[;&]\s*)(?:source|\.)\s+([^\s;&|]+)")


def look(here: Surroundings) -> Iterator[Finding]:
    section = here.config.slurm
    if section is None:
        return
    try:
        render(here.config, here.config_path)
        read_by_bash(section.setup)
    except ClusterError as problem:
        key, _, text = str(problem).partition(": ")
        yield error(
            key, text or key, "close what is open (a quote, a bracket), so that bash can read it"
        )
    yield from _sourced(section)
    yield from _container(section)


def _sourced(section: Slurm) -> Iterator[Finding]:
    for line in section.setup:
        for path in _SOURCED.findall(line):
            name = path.strip("\"'")
            if not re.search(r"[$`*~]", name) and not Path(name).exists():
                text = f"{name}, which is sourced, is not here"
                yield warning("slurm.setup", text, "mend the path")


def _container(section: Slurm) -> Iterator[Finding]:
    image = section.container_image
    if image and "://" not in image and image.startswith(("/", ".")) and not Path(image).exists():
        yield warning("slurm.container_image", f"{image} is not here", "mend the path")
    for mount in section.container_mounts:
        source = mount.split(":")[0]
        if not Path(source).exists():
            text = f"{source} is not here, and cannot be mounted"
            yield warning("slurm.container_mounts", text, "mend the path")
