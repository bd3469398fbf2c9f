"""Loading: the folder's weights whatever their names and format; no rank holds them all."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed.ranks import run_ranks
from tests.tiny import COMMON, GATED
from vectorlm.config.schema import TrainParameters
from vectorlm.distributed import Ranks
from vectorlm.errors import ModelError
from vectorlm.model import load as loading
from vectorlm.model.causal import CausalModel
from vectorlm.model.load import Place, load_model

Change = Callable[[Path], None]
# 77 MB of 32-bit masters.
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 128}


def load(folder: Path, ranks: Ranks, **train: Any) -> CausalModel:
    settings = {"output_dir": "out", "max_seq_len": 64, **train}
    place = Place(ranks.rank, ranks.world, ranks.world, ranks.device)
    return load_model(str(folder), TrainParameters.model_validate(settings), place)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_weights(model: CausalModel, expected: Any) -> None:
    weights = model.weights()
    assert weights.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert torch.equal(whole(weights[name]), parameter), name


@pytest.fixture
def copied(model_folder: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model's folder that a test may change."""

    def copy(family: str, tied: bool | None = None) -> Path:
        return shutil.copytree(model_folder(family, tied), tmp_path / family)

    return copy


@pytest.fixture
def read_whole(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were read through transformers, not tensor by tensor."""
    read: list[Path] = []
    original = loading._read_whole

    def recorded(folder: Path, *rest: Any) -> dict[str, torch.Tensor]:
        read.append(folder)
        return original(folder, *rest)

    monkeypatch.setattr(loading, "_read_whole", recorded)
    return read


# --- names and formats ---------------------------------------------------------------


def in_shards(folder: Path) -> None:
    model = plain(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def in_bin(folder: Path) -> None:
    torch.save(plain(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_prefix(folder: Path) -> None:
    """As older checkpoints of GPT-2 and its kin: saved from the model without its head."""
    rename(folder, lambda name: name.removeprefix("transformer."))


def with_prefix(folder: Path) -> None:
    """As wrappers leave them: every name under the base model's."""
    rename(folder, lambda name: f"transformer.{name}")


def with_masks(folder: Path) -> None:
    """The hub's own GPT-2 carries its causal masks along."""
    rename(folder, lambda name: name, {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)})


def rename(
    folder: Path, change: Callable[[str], str], more: dict[str, torch.Tensor] | None = None
) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file({**tensors, **(more or {})}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "tied", "change", "through_transformers"),
    [
        ("llama", False, None, False),
        ("llama", True, None, False),
        ("gpt2", None, None, False),
        ("llama", False, in_shards, False),
        ("gpt2", None, without_prefix, False),
        ("gpt2", False, with_prefix, False),
        ("gpt2", None, with_masks, False),
        ("llama", False, in_bin, True),
        ("llama", True, in_bin, True),
    ],
)
def test_weights_are_those_of_the_folder(
    model_folder: Any,
    copied: Callable[..., Path],
    one_rank: Ranks,
    read_whole: list[Path],
    family: str,
    tied: bool | None,
    change: Change | None,
    through_transformers: bool,
) -> None:
    folder = copied(family, tied)
    if change:
        change(folder)
    expected = plain(model_folder(family, tied))
    assert_weights(load(folder, one_rank), expected)
    assert bool(read_whole) == through_transformers


def test_whole_loading_when_asked(
    model_folder: Any, one_rank: Ranks, read_whole: list[Path]
) -> None:
    folder = model_folder("llama")
    assert_weights(load(folder, one_rank, low_cpu_mem_usage=False), plain(folder))
    assert read_whole == [folder]


def test_half_precision_files_become_masters_in_32_bits(
    copied: Callable[..., Path], one_rank: Ranks
) -> None:
    folder = copied("llama")
    plain(folder).to(torch.bfloat16).save_pretrained(folder)
    model = load(folder, one_rank)
    assert {weight.dtype for weight in model.weights().values()} == {torch.float32}
    assert_weights(model, plain(folder))


def test_tied_embeddings_stay_one(model_folder: Any, one_rank: Ranks) -> None:
    module = load(model_folder("llama", True), one_rank).module
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_padding_of_the_vocabulary_is_zero(model_folder: Any, one_rank: Ranks) -> None:
    folder = model_folder("llama", False)
    for whole_way in (True, False):
        given = {"pad_vocab_to_multiple_of": 96, "low_cpu_mem_usage": whole_way}
        weights = load(folder, one_rank, **given).weights()
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            full = whole(weights[name])
            assert full.shape[0] == 384
            assert torch.equal(full[:320], plain(folder).state_dict()[name])
            assert not full[320:].any()


# --- what is refused -----------------------------------------------------------------


def edited(**config: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))

    return change


def cut_short(folder: Path) -> None:
    in_shards(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)


def shard_missing(folder: Path) -> None:
    in_shards(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


def headless(folder: Path) -> None:
    """Untied, and without its output layer."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def bin_cut_short(folder: Path) -> None:
    in_bin(folder)
    os.truncate(folder / "pytorch_model.bin", 5000)


def broken_index(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


REFUSED: dict[str, tuple[Change, str]] = {
    "a shard cut short": (cut_short, r"model-00002-of-\d+\.safetensors: cannot be read .*again"),
    "a shard missing": (shard_missing, r"model-00002-of-\d+\.safetensors: cannot be read .*again"),
    "a broken index": (broken_index, r"index\.json: cannot be read"),
    "no weights": (without_weights, r"its weights cannot be read: .*no file named"),
    "a bin cut short": (bin_cut_short, r"its weights cannot be read"),
    "a layer too many": (edited(num_hidden_layers=3), r"weights lack .*layers\.2"),
    "no head": (headless, r"weights lack .*lm_head\.weight"),
    "wider": (edited(intermediate_size=96), r"mlp.* asks for shape \[\d+, \d+\], its weights have"),
    "more heads": (edited(num_key_value_heads=4), r"k_proj.* asks for shape \[32, 32\], its weigh"),
    "more tokens": (edited(vocab_size=400), r"asks for shape \[400, 32\], its weights have \[320"),
    "config cut off": (lambda f: os.truncate(f / "config.json", 50), r"config\.json cannot be use"),
    "config of nothing": (
        edited(model_type="nonsense"),
        r"config\.json cannot be used \(.*nonsense",
    ),
    "config without a type": (
        lambda f: (f / "config.json").write_text("{}") and None,
        r"config\.json cannot be used",
    ),
    "config of a list": (
        lambda f: (f / "config.json").write_text("[]") and None,
        r"config\.json cannot be used",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json cannot be used"),
    "a model of another kind": (edited(model_type="vit"), r"no causal language model .*'vit'"),
    "a short model": (
        edited(max_position_embeddings=32),
        r"max_seq_len: 64 is more than the 32 positions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_broken_folders_are_refused(
    copied: Callable[..., Path], one_rank: Ranks, name: str
) -> None:
    change, message = REFUSED[name]
    folder = copied("llama", False)
    change(folder)
    with pytest.raises(ModelError, match=message) as raised:
        load(folder, one_rank)
    assert len(str(raised.value)) < 600


def test_an_absent_model_is_told_with_the_cure(one_rank: Ranks, tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "someone/model-7b", "not a name"):
        with pytest.raises(ModelError, match=r"neither a folder here nor .*hf download"):
            load(Path(name), one_rank)


# --- memory --------------------------------------------------------------------------


def large_model(folder: Path) -> int:
    """Saved in bf16; the bytes of its 32-bit masters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **COMMON | GATED | LARGE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters()) * 4


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@contextmanager
def growth() -> Iterator[list[int]]:
    """The largest growth of anonymous memory meanwhile, looked at every millisecond."""
    before, ended, found = anonymous_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.001):
            found[0] = max(found[0], anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    ended.set()
    thread.join()


def measure(ranks: Ranks, folders: dict[str, str]) -> dict[str, Any]:
    """Bytes that each rank grew by, loading by shards and whole; and sums of the weights."""
    load(Path(folders["tiny"]), ranks)  # what libraries take at their first use
    results: dict[str, Any] = {}
    models = []  # kept: freed memory would hide the next growth
    for way, by_shards in (("shards", True), ("whole", False)):
        with growth() as found:
            model = load(Path(folders["large"]), ranks, low_cpu_mem_usage=by_shards)
        models.append(model)
        sums = [float(whole(w).detach().double().sum()) for w in model.weights().values()]
        results[way] = {"grown": ranks.gather(found[0]), "sums": sums}
    return results


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_no_rank_holds_the_whole_model(model_folder: Any, tmp_path: Path) -> None:
    """Two ranks: each grows by half the model; read whole, the first by all of it (a guard)."""
    size = large_model(tmp_path)
    assert size > 75e6
    measured = run_ranks(2, measure, {"tiny": str(model_folder("llama")), "large": str(tmp_path)})
    by_shards, read_whole = measured["shards"], measured["whole"]
    assert all(0.45 * size < grown < 0.7 * size for grown in by_shards["grown"]), by_shards
    assert read_whole["grown"][0] > 0.9 * size, read_whole
    assert by_shards["sums"] == read_whole["sums"]
