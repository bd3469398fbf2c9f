"""`vectorlm prefetch` against a hub on this machine that speaks enough of its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.check.project import Project
from vectorlm.hub_cache import find_model

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = "some/gated"


class Hub(BaseHTTPRequestHandler):
    """`some/model` is a folder of this machine; `some/gated` asks for access."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        type(self).asked.append(path)
        if path.startswith(f"/api/models/{GATED}"):
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/some/model/tree/"):
            self.answer(200, json.dumps(self.tree()).encode())
        elif path.startswith("/api/models/some/model"):
            self.answer(200, json.dumps(self.facts()).encode())
        elif path.startswith(f"/some/model/resolve/{COMMIT}/"):
            content = (self.folder / path.rpartition("/")[2]).read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": etag})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
            for path in sorted(self.folder.iterdir())
        ]

    def facts(self) -> dict[str, object]:
        siblings = [{"rfilename": one["path"], "size": one["size"]} for one in self.tree()]
        return {"id": "some/model", "modelId": "some/model", "sha": COMMIT, "siblings": siblings}

    def answer(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    made.config["model"] = "some/model"
    (made.model / "README.md").write_text("not wanted")
    (made.model / "model.gguf").write_text("not wanted")
    (made.model / "pytorch_model.bin").write_text("not wanted")
    return made


@pytest.fixture
def address(project: Project) -> Iterator[str]:
    """Where the hub is."""
    kind = type("OwnHub", (Hub,), {"folder": project.model, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def prefetch(project: Project, address: str, **environ: str) -> subprocess.CompletedProcess[str]:
    dropped = ("HF_", "TRANSFORMERS_", "HUGGING", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return subprocess.run(
        [sys.executable, "-m", "vectorlm.cli", "prefetch", "--config", str(project.write())],
        env={
            **kept,
            "PYTHONPATH": str(ROOT),
            "HOME": str(project.folder / "home"),
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_model_is_fetched_and_found(project: Project, address: str) -> None:
    done = prefetch(project, address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model: some/model, 4 files, ")
    folder = find_model("some/model", project.environ)
    assert folder
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (folder / "config.json").read_bytes() == (project.model / "config.json").read_bytes()
    from vectorlm.check.model_folder import look

    assert project.find(look) == []


def test_where_there_is_no_safetensors_the_other_weights_are_fetched(
    project: Project, address: str
) -> None:
    (project.model / "model.safetensors").unlink()
    assert prefetch(project, address).returncode == 0
    folder = find_model("some/model", project.environ)
    assert folder
    assert (folder / "pytorch_model.bin").exists()


def test_a_folder_needs_no_network(project: Project) -> None:
    project.config["model"] = str(project.model)
    done = prefetch(project, "http://127.0.0.1:9")
    assert (done.returncode, done.stdout.count("nothing to fetch")) == (0, 1), done.stderr


REFUSALS = {
    GATED: "is gated: ask for access on https://huggingface.co/some/gated",
    "some/nothing": "the hub has no some/nothing, or it is private",
    "/away/model": "is neither a folder here nor a name of the hub",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, project: Project, address: str) -> None:
    project.config["model"] = name
    done = prefetch(project, address)
    assert done.returncode == 2
    assert REFUSALS[name] in done.stderr
    assert "Traceback" not in done.stderr


def test_no_network(project: Project) -> None:
    done = prefetch(project, "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "model: some/model could not be fetched (" in done.stderr
    assert "Traceback" not in done.stderr


def test_offline_mode(project: Project, address: str) -> None:
    done = prefetch(project, address, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr


def test_no_model(project: Project, address: str) -> None:
    (project.model / "config.json").unlink()
    done = prefetch(project, address)
    assert done.returncode == 2
    assert "has no config.json" in done.stderr


def test_data_that_is_here(project: Project, address: str) -> None:
    paths = {"load_path": str(project.raw), "save_path": str(project.folder / "new")}
    project.config["dataset_preprocess"] = paths
    done = prefetch(project, address)
    assert done.returncode == 0, done.stderr
    assert f"data: {project.raw} is here: nothing to fetch" in done.stdout
