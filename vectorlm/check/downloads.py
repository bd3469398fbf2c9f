"""Would the job reach for the network, which compute nodes do not have; and where do caches lie?
Floor 1, called by `everything`.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from pathlib import Path

from vectorlm import hub_cache
from vectorlm.check.finding import Finding, Surroundings, note, warning
from vectorlm.check.places import free, gib

STATFS_S = 5.0
SMALL_BYTES = 5 << 30  # less than a model of a few billion parameters takes


def look(here: Surroundings) -> Iterator[Finding]:
    yield from _wandb(here)
    yield from _cache(here)


def _wandb(here: Surroundings) -> Iterator[Finding]:
    if not here.config.enable_wandb_logging or here.config.slurm is None:
        return
    mode = here.config.wandb_config.get("mode") or here.environ.get("WANDB_MODE") or "offline"
    if mode == "offline":
        text = "jobs log offline, into output_dir/wandb"
        yield note("enable_wandb_logging", text, "upload afterwards: wandb sync")
    elif mode == "online" and not _has_key(here):
        yield warning(
            "wandb_config.mode" if here.config.wandb_config.get("mode") else "WANDB_MODE",
            "is online, and there is no key to log in with",
            "run `wandb login`, or leave it offline and `wandb sync` afterwards",
        )


def _has_key(here: Surroundings) -> bool:
    if here.environ.get("WANDB_API_KEY"):
        return True
    home = Path(here.environ.get("HOME") or os.path.expanduser("~"))
    try:
        entries = netrc.netrc(here.environ.get("NETRC") or str(home / ".netrc")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in entries)


def _cache(here: Surroundings) -> Iterator[Finding]:
    """Only what is still to be fetched needs room."""
    if here.model_folder is not None or not hub_cache.looks_like_hub_name(here.config.model):
        return
    if Path(here.config.model).parent.is_dir() and "/" in here.config.model:
        return  # a mistyped folder
    cache = hub_cache.hub(here.environ)
    place = free(cache, STATFS_S)
    if place.free_bytes is not None and place.free_bytes < SMALL_BYTES:
        at_home = "HF_HOME" not in here.environ and "HF_HUB_CACHE" not in here.environ
        yield warning(
            "HF_HOME",
            f"{here.config.model} would be fetched into {cache}"
            f"{', in your home' if at_home else ''}, where {gib(place.free_bytes)} are free",
            "set HF_HOME to a folder on a larger file system that the nodes see, too",
        )
