"""Known truths, the verdict and its doubt, what follows from data and from Slurm, disk and host."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_rows
from vectorlm.config.schema import Config
from vectorlm.plan.calibration import record
from vectorlm.plan.disk import CUDA_HOST_BYTES, FREE_SHARE
from vectorlm.plan.gpus import GIB, Gpu, find_gpu
from vectorlm.plan.outlook import make_outlook

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def sizes(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


UNMEASURED = "step time and margin are formulas, not yet measured on A100-80GB"
TINY_1B = sizes(2048, 5632, 22, 32, 4)
SEVEN_B = sizes(4096, 11008, 32, 32, 32)
THIRTEEN_B = sizes(5120, 13824, 40, 40, 40)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def gpu(name: str = "a100-80") -> Gpu:
    found = find_gpu(name)
    assert found
    return found


def config(folder: Path, model: dict[str, Any], rows: int = 1, **keys: Any) -> Config:
    sections = {name: keys.pop(name) for name in ("slurm", "dataset") if name in keys}
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    train = {"output_dir": "o", "max_seq_len": 2048} | keys
    dataset = {"train_ds": str(folder / "absent"), "train_bs": rows}
    return Config.model_validate(
        {"model": str(folder), "train_parameters": train, "dataset": dataset} | sections
    )


def test_tinyllama_in_32_bits(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"max_seq_len": 512, "precision": "32-true"}
    assert make_outlook(config(tmp_path, TINY_1B, 40, **keys), gpu()).fits is False
    close = make_outlook(config(tmp_path, TINY_1B, 32, **keys), gpu())
    assert close.fits is None  # simulated: 75.3 GiB, of 79.2
    assert close.peak_bytes == pytest.approx(75.3 * GIB, rel=0.01)
    assert make_outlook(config(tmp_path, TINY_1B, 8, **keys), gpu()).fits is True
    recomputed = config(tmp_path, TINY_1B, 32, use_activation_checkpointing=True, **keys)
    assert make_outlook(recomputed, gpu()).fits is True


@pytest.mark.parametrize("length", [512, 2048, 4096])
def test_13b_in_pure_bf16(length: int, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"max_seq_len": length, "precision": "bf16-true"}
    assert make_outlook(config(tmp_path, THIRTEEN_B, **keys), gpu()).fits is False
    sgd = config(tmp_path, THIRTEEN_B, optimizer={"name": "SGD"}, **keys)
    assert make_outlook(sgd, gpu()).fits is True


def test_momentum_is_a_state(tmp_path: Path) -> None:
    plain = {"name": "SGD"}
    heavy = {"name": "SGD", "kwargs": {"momentum": 0.9}}
    held = [
        make_outlook(
            config(tmp_path, THIRTEEN_B, precision="bf16-true", optimizer=optimizer), gpu()
        )
        for optimizer in (plain, heavy)
    ]
    assert held[1].breakdown["optimizer"] == held[1].breakdown["parameters"]
    assert held[0].breakdown["optimizer"] == 0


def test_7b_on_four_gpus_and_on_one(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "max_seq_len": 4096,
        "precision": "bf16-mixed",
        "use_activation_checkpointing": True,
    }
    planned = config(tmp_path, SEVEN_B, **keys)
    assert make_outlook(planned, gpu(), 4).fits is True
    assert make_outlook(planned, gpu(), 1).fits is False


@pytest.mark.parametrize(
    ("name", "fits"), [("t4", False), ("rtx4090", True), ("a100-40", True), ("h200", True)]
)
def test_7b_adapters_on_one_gpu(name: str, fits: bool, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "precision": "16-mixed" if name == "t4" else "bf16-mixed",
        "use_activation_checkpointing": True,
        "lora_peft_config": {"r": 16},
    }
    assert make_outlook(config(tmp_path, SEVEN_B, **keys), gpu(name)).fits is fits


# --- the verdict ----------------------------------------------------------------------------------


def test_an_unknown_gpu_leaves_it_open(tmp_path: Path) -> None:
    outlook = make_outlook(config(tmp_path, TINY_1B))
    assert outlook.fits is None
    assert "--gpu" in outlook.why_open
    assert outlook.capacity_bytes is outlook.seconds_per_step is outlook.hours is None
    assert outlook.peak_bytes > 16 * outlook.parameters


def of_size(capacity: int) -> Gpu:
    known = gpu()
    return Gpu("A100-80GB", capacity, 312, 19.5, known.bandwidth_bytes, known.link_bytes)


def test_too_close_to_call_is_a_band_around_what_is_needed(tmp_path: Path) -> None:
    planned = config(tmp_path, TINY_1B)
    outlook = make_outlook(planned, gpu())
    edge = outlook.needed_bytes
    near, far = outlook.doubt_bytes // 2, outlook.doubt_bytes + 1
    assert 0.01 * edge < outlook.doubt_bytes < 0.06 * edge
    verdicts = [make_outlook(planned, of_size(edge + by)).fits for by in (-far, -near, near, far)]
    assert verdicts == [False, None, None, True]
    assert "too close to call" in make_outlook(planned, of_size(edge + near)).why_open


def test_a_family_that_is_not_known_leaves_more_doubt(tmp_path: Path) -> None:
    known = make_outlook(config(tmp_path, TINY_1B), gpu())
    rough = make_outlook(config(tmp_path, TINY_1B | {"model_type": "newcomer"}), gpu())
    assert rough.doubt_bytes > 2 * known.doubt_bytes
    assert any("newcomer" in note for note in rough.notes)


# --- ranks ----------------------------------------------------------------------------------------


def test_ranks_and_gpu_as_slurm_is_asked(tmp_path: Path) -> None:
    slurm = {"nodes": 2, "gpus_per_node": 4, "gpu_type": "a100_40gb"}
    planned = config(tmp_path, TINY_1B, slurm=slurm)
    hardware = make_outlook(planned).hardware
    assert (hardware.ranks, hardware.ranks_per_node) == (8, 4)
    assert hardware.gpu
    assert hardware.gpu.name == "A100-40GB"
    other = make_outlook(planned, gpu("h100"), 8).hardware
    assert (other.ranks, other.ranks_per_node) == (16, 8)
    alone = make_outlook(config(tmp_path, TINY_1B), gpu(), 4).hardware
    assert (alone.ranks, alone.ranks_per_node) == (4, 4)


# --- steps, hours, disk, host ---------------------------------------------------------------------


def prepared(folder: Path) -> dict[str, Any]:
    rows = [[[5] * 100], [[5] * 60, [6] * 40], [[7] * 100]] * 20
    return {"train_ds": str(write_rows(folder / "data", rows, 128)), "train_bs": 2}


def test_steps_and_hours_follow_the_data(tmp_path: Path) -> None:
    planned = config(
        tmp_path,
        TINY_1B,
        max_seq_len=128,
        epochs=3,
        gradient_accumulation_steps=2,
        dataset=prepared(tmp_path),
        slurm={"gpus_per_node": 2, "gpu_type": "a100_80gb", "time": "08:00:00"},
    )
    outlook = make_outlook(planned)
    assert outlook.steps == 3 * 8  # 60 rows, 8 a step
    assert outlook.tokens_per_step == 800
    assert outlook.supervised_tokens == 60 * 100 - 80  # a document's first token is not learned
    assert outlook.seconds_per_step
    assert outlook.hours == pytest.approx(24 * outlook.seconds_per_step / 3600)
    assert outlook.gpu_hours == pytest.approx(2 * outlook.hours)
    assert outlook.requeues == 0
    assert outlook.notes == (UNMEASURED,)
    shorter = make_outlook(config(tmp_path, TINY_1B, max_seq_len=100, dataset=prepared(tmp_path)))
    assert (
        shorter.peak_bytes
        == make_outlook(
            config(tmp_path, TINY_1B, max_seq_len=128, dataset=prepared(tmp_path))
        ).peak_bytes
    )  # the longest row is what counts


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"requeue": False}, "slurm.requeue is false"), ({"max_requeues": 1}, "max_requeues is 1")],
)
def test_a_run_that_its_job_will_not_finish(
    keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    slurm = {"gpu_type": "a100", "time": "00:08:00", "signal_lead_s": 30} | keys
    data = prepared(tmp_path)
    planned = config(tmp_path, TINY_1B, max_seq_len=128, epochs=500, dataset=data, slurm=slurm)
    outlook = make_outlook(planned)
    assert outlook.requeues
    assert any(said in note for note in outlook.notes)
    assert not any("1 requeues" in note for note in outlook.notes)


def test_without_prepared_data(tmp_path: Path) -> None:
    outlook = make_outlook(config(tmp_path, TINY_1B, 2), gpu(), 4)
    assert outlook.steps is outlook.hours is outlook.requeues is None
    assert outlook.tokens_per_step == 2 * 2048 * 4
    assert any("is not prepared yet" in note for note in outlook.notes)
    assert outlook.seconds_per_step
    rate = outlook.tokens_per_second
    assert rate == pytest.approx(outlook.tokens_per_step / outlook.seconds_per_step)
    assert outlook.hours_per_billion_tokens == pytest.approx(1e9 / rate / 3600)
    nowhere = make_outlook(config(tmp_path, TINY_1B, 2))
    assert nowhere.tokens_per_second is nowhere.hours_per_billion_tokens is None


# --- links between nodes --------------------------------------------------------------------------


def test_links_between_nodes_are_as_fast_as_the_file_says(tmp_path: Path) -> None:
    two: dict[str, Any] = {"nodes": 2, "gpus_per_node": 4, "gpu_type": "a100_80gb"}
    usual = make_outlook(config(tmp_path, SEVEN_B, slurm=two))
    said = make_outlook(config(tmp_path, SEVEN_B, slurm=two | {"node_gbit_per_s": 100}))
    slow = make_outlook(config(tmp_path, SEVEN_B, slurm=two | {"node_gbit_per_s": 10}))
    assert usual.time
    assert slow.time
    assert usual.time == said.time
    assert slow.time.links_s == pytest.approx(10 * usual.time.links_s)
    assert any("100 Gbit/s" in n and "slurm.node_gbit_per_s" in n for n in usual.notes)
    assert not any("node_gbit_per_s" in note for note in (*said.notes, *slow.notes))
    assert any("of a step waits for links" in note for note in slow.notes)


def test_one_node_has_no_links_to_others(tmp_path: Path) -> None:
    one: dict[str, Any] = {"gpus_per_node": 4, "gpu_type": "a100_80gb"}
    outlooks = [
        make_outlook(config(tmp_path, SEVEN_B, slurm=one | {"node_gbit_per_s": rate}))
        for rate in (1, 400)
    ]
    assert outlooks[0] == outlooks[1]
    alone = make_outlook(config(tmp_path, SEVEN_B), gpu(), 4)
    assert alone.time == outlooks[0].time


# --- what was never measured ----------------------------------------------------------------------


def test_what_was_not_measured_is_said_until_it_is(tmp_path: Path) -> None:
    planned = config(tmp_path, TINY_1B)
    before = make_outlook(planned, gpu())
    assert UNMEASURED in before.notes
    record(gpu(), "a run", 100, 105)
    after = make_outlook(planned, gpu())
    assert UNMEASURED not in after.notes
    corrected = "memory is corrected by +5.0%, as measured on A100-80GB; step time is a formula"
    assert corrected in after.notes
    other = make_outlook(planned, gpu("h100"))
    assert "step time and margin are formulas, not yet measured on H100" in other.notes


@pytest.mark.parametrize(("name", "told"), [("mi250", 1), ("mi300", 1), ("h100", 0)])
def test_of_amd_it_says_whose_kernels_are_planned(name: str, told: int, tmp_path: Path) -> None:
    notes = make_outlook(config(tmp_path, TINY_1B), gpu(name)).notes
    assert sum("NVIDIA" in note for note in notes) == told


def test_disk(tmp_path: Path) -> None:
    """Checkpoints: parameters and states; one more than are kept while the newest is written."""
    outlook = make_outlook(config(tmp_path, TINY_1B, use_mp=True, keep_checkpoints=3), gpu())
    assert outlook.checkpoint_bytes == 12 * outlook.parameters
    assert outlook.final_bytes == 8 * outlook.parameters
    assert outlook.disk_bytes == 4 * outlook.checkpoint_bytes + outlook.final_bytes
    without = make_outlook(config(tmp_path, TINY_1B, checkpointing_enabled=False), gpu())
    assert without.disk_bytes == without.final_bytes
    adapters = make_outlook(config(tmp_path, TINY_1B, lora_peft_config={"r": 8}), gpu())
    assert adapters.disk_bytes < GIB // 10


def test_host_memory(tmp_path: Path) -> None:
    """The final model is gathered on the first rank; without low_cpu_mem_usage it reads it all."""
    usual = make_outlook(config(tmp_path, TINY_1B, precision="bf16-true"), gpu(), 4)
    whole = make_outlook(
        config(tmp_path, TINY_1B, precision="bf16-true", low_cpu_mem_usage=False), gpu(), 4
    )
    assert whole.host_bytes - usual.host_bytes == 2 * usual.parameters
    fewer = make_outlook(config(tmp_path, TINY_1B, precision="bf16-true"), gpu(), 2)
    assert fewer.host_bytes < usual.host_bytes


def test_copies_that_checkpoints_are_written_from(tmp_path: Path) -> None:
    """Of what the ranks of a node have: all of it among four that share a copy."""
    keys: dict[str, Any] = {"precision": "bf16-mixed"}
    plain = make_outlook(config(tmp_path, TINY_1B, **keys), gpu(), 4)
    assert plain.copies_bytes == plain.checkpoint_bytes
    copies = make_outlook(config(tmp_path, TINY_1B, sharding_strategy="NO_SHARD", **keys), gpu(), 4)
    assert copies.copies_bytes == 4 * copies.checkpoint_bytes
    assert copies.host_bytes == plain.host_bytes
    for switch in ("async_checkpointing", "checkpointing_enabled"):
        none = make_outlook(config(tmp_path, TINY_1B, **keys | {switch: False}), gpu(), 4)
        assert none.copies_bytes == 0


@pytest.mark.parametrize(("mem", "waits"), [("12G", True), ("20G", False), ("0", False)])
def test_copies_without_room_are_said(mem: str, waits: bool, tmp_path: Path) -> None:
    """12.3 GiB of 80 % of what two ranks leave."""
    slurm = {"gpus_per_node": 2, "gpu_type": "a100_80gb", "mem": mem}
    outlook = make_outlook(config(tmp_path, TINY_1B, use_mp=True, slurm=slurm))
    said = [note for note in outlook.notes if "waits for each checkpoint" in note]
    assert len(said) == waits


def test_room_for_copies_is_as_the_trainer_sees_it() -> None:
    from vectorlm import saver

    assert saver.FREE_SHARE == FREE_SHARE


@pytest.mark.parametrize("switch", ["compile", "use_liger_kernel"])
def test_what_is_not_modelled_is_said(switch: str, tmp_path: Path) -> None:
    notes = make_outlook(config(tmp_path, TINY_1B, **{switch: True}), gpu()).notes
    assert any(f"planned as without {switch}" in note for note in notes)


def test_few_learned_tokens_take_less_time_and_as_much_memory(tmp_path: Path) -> None:
    planned = config(tmp_path, TINY_1B, max_seq_len=128, dataset=prepared(tmp_path))
    usual = make_outlook(planned, gpu())
    path = tmp_path / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"supervised_tokens": 60}))
    few = make_outlook(planned, gpu())
    assert usual.time
    assert few.time
    assert few.time.compute_s < 0.97 * usual.time.compute_s
    assert few.peak_bytes == usual.peak_bytes


def test_a_run_without_gpus_trains_in_host_memory(tmp_path: Path) -> None:
    on_gpus, without = (
        make_outlook(config(tmp_path, TINY_1B, slurm={"gpus_per_node": n, "processes_per_node": 2}))
        for n in (2, 0)
    )
    assert without.host_bytes == on_gpus.host_bytes + 2 * (without.peak_bytes - CUDA_HOST_BYTES)


def test_evaluation_counts(tmp_path: Path) -> None:
    data = {"train_ds": "d", "train_bs": 1, "eval_ds": "e", "eval_bs": 128}
    outlook = make_outlook(
        config(tmp_path, TINY_1B, use_activation_checkpointing=True, dataset=data), gpu()
    )
    assert outlook.moment == "evaluation"
    assert any("eval_bs" in note for note in outlook.notes)


@pytest.mark.parametrize(
    ("gpu", "train", "said"),
    [
        ("v100-32", {"use_mp": True}, "V100-32GB has no bf16; set .*16-mixed"),
        ("a100-80", {"optimizer": {"name": "Adafactor"}}, "Adafactor cannot be used"),
        ("a100-80", {"max_seq_len": 8192}, "8192 is more than the model's 4096 positions"),
        ("a100-80", {"lora_peft_config": {"target_modules": ["zzz"]}}, "matches no layer"),
    ],
)
def test_what_would_be_refused_does_not_fit(
    gpu: str, train: dict[str, Any], said: str, tmp_path: Path
) -> None:
    outlook = make_outlook(
        config(tmp_path, TINY_1B, **{"max_seq_len": 512, **train}), find_gpu(gpu)
    )
    assert outlook.fits is False
    assert re.search(said, outlook.obstacle)
    assert outlook.why_open == outlook.obstacle


def test_a_run_that_never_ends_is_said(tmp_path: Path) -> None:
    slurm = {"gpu_type": "a100-80", "time": "00:06:00", "gpus_per_node": 2}
    data = prepared(tmp_path)
    planned = config(tmp_path, TINY_1B, max_seq_len=128, epochs=9000, dataset=data, slurm=slurm)
    outlook = make_outlook(planned)
    assert outlook.requeues is None
    assert "the run never ends" in str(outlook.notes)
