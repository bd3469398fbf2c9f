"""The picture: verdict, bar, tables; in 80 columns, without colours where there is no terminal."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vectorlm.config.schema import Config
from vectorlm.plan import picture
from vectorlm.plan.changes import compared, find_changes
from vectorlm.plan.gpus import Gpu, find_gpu
from vectorlm.plan.outlook import Outlook, counted, make_outlook
from vectorlm.plan.simulated import Simulated

MODEL = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def a100() -> Gpu:
    gpu = find_gpu("a100")
    assert gpu
    return gpu


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return Config.model_validate(
        {
            "model": str(tmp_path),
            "train_parameters": {"output_dir": "o", "max_seq_len": 4096, "use_mp": True},
            "dataset": {"train_ds": "absent", "train_bs": 4},
        }
    )


def drawn(show: Any, *given: Any, terminal: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        width=80,
        force_terminal=terminal,
        color_system="256" if terminal else None,
        highlight=False,
        markup=False,
    )
    show(*given, console)
    return out.getvalue()


def bar_of(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("["))


def test_without_a_terminal_it_is_plain_ascii(config: Config) -> None:
    text = drawn(picture.show, make_outlook(config, a100(), 4))
    assert text.isascii()
    assert "DOES NOT FIT: " in text
    assert bar_of(text).count("|") == 1  # where the memory ends
    assert len(bar_of(text)) <= 80


def test_on_a_terminal_it_has_colours(config: Config) -> None:
    text = drawn(picture.show, make_outlook(config, a100(), 4), terminal=True)
    assert "\x1b[" in text
    assert "█" in text


def test_the_bar_is_in_proportion() -> None:
    text = picture.bar({"parameters": 30, "activations": 15, "free": 15}, 60, 60, False).plain
    assert text == "[" + "P" * 30 + "A" * 15 + "." * 15 + "]"
    over = picture.bar({"parameters": 60, "activations": 60}, 120, 60, False).plain
    assert over == "[" + "P" * 30 + "|" + "A" * 30 + "]"


@pytest.mark.parametrize(
    ("fits", "words"), [(True, "FITS: "), (False, "DOES NOT FIT: "), (None, "TOO CLOSE TO CALL: ")]
)
def test_verdicts(fits: bool | None, words: str, config: Config) -> None:
    outlook = replace(make_outlook(config, a100(), 4), fits=fits)
    assert words in drawn(picture.show, outlook)


def test_without_a_gpu_it_says_what_is_needed(config: Config) -> None:
    text = drawn(picture.show, make_outlook(config, None, 4))
    assert "Needs " in text
    assert "slurm.gpu_type" in text


def test_changes_are_numbered_and_told_as_yaml(config: Config) -> None:
    now = make_outlook(config, a100(), 4)
    text = drawn(picture.show_changes, find_changes(config, now, a100(), 4))
    assert "train_parameters.use_activation_checkpointing: true" in text
    assert "{r: 16, lora_alpha: 32, target_modules: all-linear}" in text
    assert "No single change" in drawn(picture.show_changes, [])


def test_comparison(config: Config) -> None:
    rows = list(compared(config, a100(), 4))
    text = drawn(picture.show_comparison, rows)
    assert "SHARD_GRAD_OP + checkpointing" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_json_has_the_fixed_keys(config: Config) -> None:
    outlook: Outlook = make_outlook(config, a100(), 4)
    values = json.loads(picture.to_json(outlook))
    fixed = "fits peak_gib breakdown_gib host_gib disk_gib seconds_per_step hours requeues"
    assert set(fixed.split()) <= values.keys()
    assert values["host_copies_gib"] == values["checkpoint_gib"]
    assert values["fits"] is False
    assert sum(values["breakdown_gib"].values()) == pytest.approx(values["peak_gib"], abs=0.01)
    unknown = json.loads(picture.to_json(make_outlook(config)))
    assert unknown["fits"] is unknown["hours"] is unknown["seconds_per_step"] is None
    assert unknown["tokens_per_second"] is unknown["hours_per_billion_tokens"] is None
    assert values["tokens_per_second"] == pytest.approx(
        values["tokens_per_step"] / values["seconds_per_step"]
    )
    assert values["hours_per_billion_tokens"] > 1


# --- numbers that a reader can follow -------------------------------------------------------------

GIB_SHOWN = r"(\d+\.\d\d) GiB"


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7])
def test_what_is_shown_adds_up(rows: int, config: Config) -> None:
    outlook = make_outlook(config, a100(), 4, rows)
    text = drawn(picture.show, outlook)
    whole = rf"peak {GIB_SHOWN} \+ margin {GIB_SHOWN} = {GIB_SHOWN} of {GIB_SHOWN} a GPU"
    found = re.search(whole, text)
    assert found
    peak, margin, needed, room = (round(100 * float(figure)) for figure in found.groups())
    assert peak + margin == needed
    lines = re.findall(rf"^ (.)  .* {GIB_SHOWN} $", text, re.M)
    parts = {sign: round(100 * float(size)) for sign, size in lines}
    free = parts.pop(".", 0)
    assert parts["m"] == margin
    assert sum(parts.values()) == needed
    assert needed + free == (room if outlook.fits else needed)


def test_the_simulation_is_told_like_the_formulas(config: Config) -> None:
    outlook = make_outlook(config, a100(), 4)
    moment = "reducing the gradients of block 7 of 32"
    found = Simulated(outlook.peak_bytes, outlook.breakdown, moment, {})
    text = drawn(picture.show_simulated, outlook, found).replace("\n", " ")
    whole = drawn(picture.show, outlook).partition("DOES NOT FIT: ")[2].splitlines()[0]
    assert f"simulated: {whole}, in the backward of the blocks; " in text
    assert "+0.0% off" in text
    assert picture.simulated_values(found)["moment"] == "backward of the blocks"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (2e-6, "under 0.1 ms"),
        (0.0042, "4.2 ms"),
        (0.85, "0.85 s"),
        (42.4, "42 s"),
        (118, "118 s"),
        (150, "2 minutes"),
        (3500, "58 minutes"),
        (3590, "1.0 hours"),
        (4000 * 3600, "4,000.0 hours"),
    ],
)
def test_times_are_told_as_people_do(seconds: float, words: str) -> None:
    assert picture.span(seconds) == words


def test_a_short_run_is_told_in_minutes(config: Config) -> None:
    outlook = make_outlook(config, a100(), 4)
    short = replace(outlook, steps=100, hours=0.2, gpu_hours=0.8, requeues=1)
    text = drawn(picture.show, short)
    assert "12 minutes, 1 requeue, 0.8 GPU hours" in text
    assert " tokens/s, " in text
    assert "for a billion tokens" in text


def test_one_is_told_as_one(config: Config) -> None:
    assert "; 1 GPU\n" in drawn(picture.show, make_outlook(config))
    assert "; 4 GPUs\n" in drawn(picture.show, make_outlook(config, None, 4))
    assert [counted(n, "rank") for n in (0, 1, 2000)] == ["0 ranks", "1 rank", "2,000 ranks"]
