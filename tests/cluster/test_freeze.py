"""What is written down is read back as the same configuration, whatever it holds."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import pytest

from vectorlm.cluster.freeze import freeze, write_private
from vectorlm.config.load import load_config

TEXTS = [
    "plain",
    "with space",
    " lead",
    "trail ",
    "1e3",
    "1e-3",
    "010",
    "0x1f",
    "1_000",
    "1:30",
    "12:30:45",
    ".5",
    "+1",
    ".inf",
    "true",
    "Yes",
    "off",
    "y",
    "null",
    "~",
    "None",
    "",
    "2021-01-01",
    "<<",
    "=",
    "### Answer:",
    "a: b",
    "a # b",
    "- a",
    "? a",
    "[a",
    "{a",
    "&a",
    "*a",
    "!a",
    "%a",
    "@a",
    "`a",
    "|",
    ">",
    "'",
    '"',
    "back\\slash",
    "two\nlines\n",
    "\n\n",
    "tab\there",
    "return\rhere",
    "bell\a",
    "delete\x7f",
    "next\x85line",
    "separator\u2028here",
    "\ufeffmark",
    "naïve 你好 🙂",
    "---",
    "...",
    "word " * 15,
]
BASE = "model: m\ntrain_parameters: {output_dir: o, max_seq_len: 8}\n"


def frozen_again(folder: Path, overrides: list[str]) -> str:
    (folder / "c.yaml").write_text(BASE)
    config = load_config(folder / "c.yaml", overrides)
    freeze(config, folder / "frozen.yaml", "# origin\n")
    assert load_config(folder / "frozen.yaml") == config
    return (folder / "frozen.yaml").read_text()


@pytest.mark.parametrize("text", TEXTS)
def test_texts(text: str, tmp_path: Path) -> None:
    shown = "".join(f"\\U{ord(character):08x}" for character in text)
    overrides = [f'wandb_config.a="{shown}"', f'wandb_config.b=["{shown}", {{"{shown}": 1}}]']
    if text.strip() and text not in ("null", "~"):
        overrides.append(f'model="{shown}"')
    frozen_again(tmp_path, overrides)


def test_long_texts(tmp_path: Path) -> None:
    overrides = [f"wandb_config.{name}={'word ' * 500}." for name in "ab"]
    assert len(frozen_again(tmp_path, overrides).splitlines()) < 20


def test_texts_at_random(tmp_path: Path) -> None:
    chance = random.Random(7)
    alphabet = "ab 01:-#'\"\\[]{}&*!|>%@`,?~.=e_\n\t\x85\u2028é🙂"
    for _ in range(100):
        text = "".join(chance.choices(alphabet, k=chance.randint(1, 12)))
        shown = "".join(f"\\U{ord(character):08x}" for character in text)
        frozen_again(tmp_path, [f'wandb_config.a="{shown}"'])


def test_values(tmp_path: Path) -> None:
    text = frozen_again(
        tmp_path,
        [
            "train_parameters.optimizer.lr=2e-5",
            "train_parameters.optimizer.betas=[0.9, 0.95]",
            "train_parameters.max_grad_norm=null",
            "train_parameters.lora_peft_config={r: 8, target_modules: [q_proj]}",
            "wandb_config={a: 1.0e+30, b: -0.0, c: [1, true, null, []], d: {}}",
            "slurm={time: 90, mem: 0, setup: ['module load x # y']}",
        ],
    )
    assert text.startswith("# origin\nmodel: m\n")
    assert "epochs" not in text  # only what was given: the file stays as short as its source


def test_a_sweep_is_kept_whole(tmp_path: Path) -> None:
    given = "sweep={metric: loss, grid: {train_parameters.seed: [1, 2]}}"
    assert "sweep:" in frozen_again(tmp_path, [given])


def test_files_are_private_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_private(path, "first, and longer\n")
    write_private(path, "second \udcff\n")
    assert path.read_bytes() == b"second \xff\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
