"""Where downloads are found without the library that made them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vectorlm.hub_cache import find_dataset, find_model, home, hub, looks_like_hub_name


def test_places(tmp_path: Path) -> None:
    own = {"HOME": "/home/me"}
    assert home(own) == Path("/home/me/.cache/huggingface")
    assert hub({**own, "XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub({**own, "HF_HOME": "~/hf"}) == Path("/home/me/hf/hub")
    assert hub({**own, "HF_HOME": "/x", "HF_HUB_CACHE": "/y"}) == Path("/y")


def test_a_model(tmp_path: Path) -> None:
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    assert find_model("some/model", environ) is None
    snapshot = tmp_path / "models--some--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    assert find_model("some/model", environ) is None
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text("abc\n")
    assert find_model("some/model", environ) == snapshot
    assert find_model("/some/model", environ) is None


def test_a_dataset(tmp_path: Path) -> None:
    environ = {"HF_HOME": str(tmp_path)}
    assert find_dataset("some/texts", environ) is None
    folder = tmp_path / "datasets/some___texts"
    folder.mkdir(parents=True)
    assert find_dataset("some/texts", environ) == folder
    assert find_dataset("some/texts", {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}) == folder


@pytest.mark.parametrize(
    ("name", "answer"),
    [("gpt2", True), ("some/model-7b.v2", True), ("./x", False), ("/x/y", False), ("a/b/c", False)],
)
def test_names(name: str, answer: bool) -> None:
    assert looks_like_hub_name(name) is answer


def test_it_is_where_the_library_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    snapshot = tmp_path / "models--some--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text("abc")
    real = snapshot_download("some/model", cache_dir=tmp_path, local_files_only=True)
    assert find_model("some/model", {"HF_HUB_CACHE": str(tmp_path)}) == Path(real)
