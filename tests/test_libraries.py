"""Libraries are loaded without the garbage collector, by every door that loads torch."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from vectorlm.libraries import loading

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = 200_000

# The first import of torch says whether it is collected meanwhile, and goes no further.
WATCH = """
import gc, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print("collected" if gc.isenabled() else "not collected", flush=True)
            raise ImportError
sys.meta_path.insert(0, Watch())
"""


@pytest.fixture
def collections() -> Iterator[list[str]]:
    """Grows with every collection."""
    seen: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        seen.append(phase)

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_nothing_is_collected_meanwhile_and_what_stays_is_left_alone(
    collections: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = gc.get_freeze_count()
    with loading():
        monkeypatch.setitem(sys.modules, "a_new_module", gc)
        made = [[] for _ in range(OBJECTS)]
        assert not collections
    assert gc.isenabled()
    assert gc.get_freeze_count() - before >= len(made)


def test_nothing_is_left_alone_where_all_was_loaded_before() -> None:
    """What a run in the same process has left behind can still be collected."""
    before = gc.get_freeze_count()
    with loading():
        import gc as loaded  # noqa: F401
    assert gc.get_freeze_count() == before


def test_a_library_that_fails_to_load() -> None:
    with pytest.raises(ImportError), loading():
        importlib.import_module("no_such_library")
    assert gc.isenabled()


@pytest.mark.parametrize("door", ["train", "preflight_door", "utils.convert_to_hf"])
def test_doors_load_torch_like_that(door: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    train = {"output_dir": str(tmp_path / "out"), "max_seq_len": 8}
    content = {"model": "m", "train_parameters": train, "dataset": {"train_ds": "rows"}}
    config.write_text(yaml.safe_dump(content))
    code = f"{WATCH}from vectorlm.{door} import main\nmain(['--config', {str(config)!r}])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "not collected\n", done.stdout + done.stderr
