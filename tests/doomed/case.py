"""Sound surroundings, built once, and a copy of them for each entry to spoil.

`Surroundings` holds a tiny model, raw and prepared data and a finished run, all made by the real
commands. A `Case` is a folder of hard links to them and a configuration; what an entry changes is
written anew, so that the original stays as it is.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.doomed.asked import Site
from tests.doomed.environment import for_gpus, without
from tests.slurm.lab import Lab
from tests.tiny import SENTENCES, tiny_model, tiny_tokenizer, write_rows

ROOT = Path(__file__).resolve().parent.parent.parent
SCRATCH = Path("/srv")  # in a mount namespace of the case's own
MAX_SEQ_LEN = 64
DOCUMENTS = 40
TOOLS = ("bash", "sh", "mount", "unshare", "df", "mkdir")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


class Surroundings:
    """What every case begins as, under one folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.sound = folder / "sound"
        self.tools = folder / "bin"
        self._find_tools()
        self.models = folder / "models"
        self.models.mkdir()
        self.lab: Lab | None = None
        self.site: Site | None = None  # started by the first case that is there
        model = self.family("llama", tied=False)
        shutil.copytree(model, self.sound / "model", copy_function=os.link)
        self._write_raw()
        case = Case(self, self.sound)
        case.prepare_again()

    def _find_tools(self) -> None:
        """A PATH on which there is no Slurm, whatever this machine has."""
        self.tools.mkdir(parents=True)
        for name in TOOLS:
            found = shutil.which(name)
            if found:
                (self.tools / name).symlink_to(found)

    def _write_raw(self) -> None:
        raw = self.sound / "raw"
        raw.mkdir()
        for name, first in (("train", 0), ("test", DOCUMENTS)):
            texts = [f"{i}. {SENTENCES[i % 3]}" for i in range(first, first + DOCUMENTS)]
            lines = [json.dumps({"text": text}) for text in texts]
            (raw / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def family(self, name: str, tied: bool | None = None) -> Path:
        folder = self.models / f"{name}-{tied}"
        return folder if folder.exists() else tiny_model(name, folder, tied)

    def close(self) -> None:
        if self.site is not None:
            self.site.close()

    def gpu_python(self) -> Path:
        folder = self.root / "for-gpus"
        return folder / "bin/python" if folder.exists() else for_gpus(folder)

    def run(self) -> Path:
        """The output folder of a run of the sound configuration, begun and finished."""
        folder = self.root / "finished"
        if not folder.exists():
            case = self.case(folder)
            case.write()
            train(case)
        return folder / "output"

    def tokenizer_sha256(self) -> str:
        manifest = json.loads((self.sound / "prepared/train/manifest.json").read_text())
        return str(manifest["tokenizer_sha256"])

    def case(self, folder: Path) -> Case:
        for name in ("model", "raw", "prepared"):
            shutil.copytree(self.sound / name, folder / name, copy_function=os.link)
        return Case(self, folder)


def train(case: Case) -> int:
    """One rank, in this process."""
    from vectorlm.stop import STOP_SIGNALS
    from vectorlm.train import main

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    environ = {name: os.environ.pop(name) for name in RANK_VARIABLES if name in os.environ}
    try:
        return main(["--config", str(case.config_path)])
    finally:
        os.environ.update(environ)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Case:
    """A folder with all that a run needs, and its configuration; entries change both."""

    def __init__(self, surroundings: Surroundings, folder: Path) -> None:
        self.surroundings, self.folder = surroundings, folder
        self.config_path = folder / "config.yaml"
        self.model, self.raw, self.output = folder / "model", folder / "raw", folder / "output"
        self.data, self.eval = folder / "prepared/train", folder / "prepared/eval"
        self.text: str | None = None  # of the YAML file, instead of `config`
        self.overrides: list[str] = []
        self.mount: tuple[str, Path] | None = None  # options of a tmpfs, and where it is
        self.scratch = False  # whether SCRATCH is a large file system that all nodes share
        self.python = sys.executable
        self.hub = False  # the libraries' cache is this case's own, which they look up but once
        self.on_leave: list[Any] = []
        self.environ = self._environment()
        self.config: dict[str, Any] = {
            "model": str(self.model),
            "train_parameters": {
                "output_dir": str(self.output),
                "max_seq_len": MAX_SEQ_LEN,
                "gradient_accumulation_steps": 2,
                "logging_steps": 2,
                "save_frequency": 0.5,
                "optimizer": {"lr": 1e-3},
            },
            "dataset": {"train_ds": str(self.data), "eval_ds": str(self.eval), "train_bs": 2},
            "dataset_preprocess": {
                "load_path": str(self.raw / "train.jsonl"),
                "save_path": str(self.data),
                "eval_load_path": str(self.raw / "test.jsonl"),
                "eval_save_path": str(self.eval),
                "packing_type": "full",
            },
        }

    def _environment(self) -> dict[str, str]:
        """A private home, no Slurm, no token."""
        dropped = ("SLURM", "SBATCH", "HF_", "WANDB", "XDG_", "HUGGING")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        for name in (*RANK_VARIABLES, "VECTORLM_REQUIRE_SLURM"):
            kept.pop(name, None)
        return {
            **kept,
            "HOME": str(self.folder / "home"),
            "PATH": f"{Path(sys.executable).parent}:{self.surroundings.tools}",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }

    # ---- the configuration ----

    @property
    def train(self) -> dict[str, Any]:
        return self.config["train_parameters"]

    @property
    def dataset(self) -> dict[str, Any]:
        return self.config["dataset"]

    @property
    def prepare(self) -> dict[str, Any]:
        return self.config["dataset_preprocess"]

    @property
    def apart(self) -> bool:
        """Whether it takes a process of its own to be there."""
        return bool(self.mount) or self.scratch or self.python != sys.executable

    def slurm(self, **keys: Any) -> None:
        self.config.setdefault("slurm", {}).update(keys)

    def write(self) -> Path:
        (self.folder / "home").mkdir(mode=0o700, exist_ok=True)
        text = yaml.safe_dump(self.config, sort_keys=False) if self.text is None else self.text
        self.config_path.write_text(text)
        return self.config_path

    def without(self, package: str) -> None:
        self.python = str(without(self.folder / "environment", package))
        self.environ["PATH"] = f"{Path(self.python).parent}:{self.surroundings.tools}"

    def on_site(self) -> None:
        """Where there are GPUs: torch is built for them, and there is room for large models."""
        self.python = str(self.surroundings.gpu_python())
        self.scratch = True
        self.train["output_dir"] = f"{SCRATCH}/{secrets.token_hex(4)}/output"

    def on_cluster(self) -> None:
        """On a login node of the tests' Slurm, instead of a machine without any."""
        lab = self.surroundings.lab
        assert lab is not None
        self.environ |= {name: lab.env[name] for name in ("PATH", "SLURM_CONF")}

    # ---- files ----

    def put(self, path: Path, content: str | bytes) -> None:
        """Write a file anew: what stands there may be a hard link to the original."""
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def cut(self, path: Path, share: float) -> None:
        content = path.read_bytes()
        self.put(path, content[: int(len(content) * share)])

    def edit(self, path: Path, **changes: Any) -> None:
        """Keys of a JSON file; None removes one."""
        content = {**json.loads(path.read_text()), **changes}
        self.put(path, json.dumps({k: v for k, v in content.items() if v is not None}))

    def use_model(self, folder: Path) -> None:
        """Another family, on data of the same tokenizer."""
        shutil.rmtree(self.model)
        shutil.copytree(folder, self.model, copy_function=os.link)

    def rows(self, max_seq_len: int, rows: int = 64, **manifest: Any) -> None:
        """Prepared data of full rows, in place of that of the raw texts."""
        generator = np.random.default_rng(0)
        shutil.rmtree(self.data)
        documents = [[generator.integers(3, 300, max_seq_len).tolist()] for _ in range(rows)]
        facts = {"tokenizer_sha256": self.surroundings.tokenizer_sha256(), **manifest}
        write_rows(self.data, documents, max_seq_len, **facts)
        self.train["max_seq_len"] = max_seq_len
        self.dataset["eval_ds"] = None
        self.config.pop("dataset_preprocess", None)

    def prepare_again(self) -> None:
        """Prepare the data anew, after a change that shows in it."""
        from vectorlm.config.load import load_config
        from vectorlm.preprocess import prepare_config

        prepare_config(load_config(self.write(), self.overrides))

    def open_home(self) -> None:
        """A home that others may enter, as homes often are; the test's own folders are closed."""
        home = Path(tempfile.mkdtemp(prefix="home-", dir="/tmp"))
        home.chmod(0o755)
        self.on_leave.append(partial(shutil.rmtree, home))
        self.environ["HOME"] = str(home)

    @property
    def home(self) -> Path:
        return Path(self.environ["HOME"])

    def finished_run(self) -> None:
        """An output folder that a run of this configuration, with this model, has left."""
        finished = self.surroundings.run()
        shutil.copytree(finished, self.output, copy_function=os.link)
        self.config["model"] = str(finished.parent / "model")

    def cached(self, repository: str, source: Path) -> Path:
        """A model in the local Hugging Face cache, as a download leaves it."""
        self.hub = True
        name = "models--" + repository.replace("/", "--")
        folder = self.folder / "home/.cache/huggingface/hub" / name
        snapshot = folder / "snapshots" / ("0" * 40)
        shutil.copytree(source, snapshot, copy_function=os.link)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("0" * 40)
        return snapshot

    def other_tokenizer(self, folder: Path) -> None:
        """Another tokenizer over the one that is there, as different as can be with these sizes."""
        made = tiny_tokenizer(self.folder / "other-tokenizer")
        content = json.loads((made / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[40:42]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        self.put(folder / "tokenizer.json", json.dumps(content))
