"""What the demo makes for itself, and how it ends; the real doors are not run here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vectorlm import demo
from vectorlm.config.load import load_config


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert demo.prepare_assets(folder)
    return folder


def texts(folder: Path, name: str) -> list[str]:
    lines = (folder / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_same_bytes_every_time(assets: Path, tmp_path: Path) -> None:
    demo.prepare_assets(tmp_path)
    assert contents(tmp_path) == contents(assets)


def test_made_once_and_again_when_the_recipe_changed(assets: Path, tmp_path: Path) -> None:
    assert not demo.prepare_assets(assets)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "leftover").touch()
    (tmp_path / "assets.sha256").write_text("of an older recipe")
    assert demo.prepare_assets(tmp_path)
    assert not (tmp_path / "model" / "leftover").exists()


def test_no_document_twice(assets: Path) -> None:
    train, test = texts(assets, "train"), texts(assets, "test")
    assert (len(train), len(test)) == (demo.TRAIN_DOCUMENTS, demo.TEST_DOCUMENTS)
    assert len({*train, *test}) == len(train) + len(test)


def test_tokenizer(assets: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    text = "Mara the baker, 你好 🙂\n\ttwo  spaces"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mara."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<s>Question: Who?\nAnswer: Mara.</s>"
    )
    encoded = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, learned in pairs if learned]) == " Mara.</s>"


def test_untrained_model_knows_nothing(assets: Path) -> None:
    config = json.loads((assets / "model" / "config.json").read_text())
    assert config["vocab_size"] <= demo.VOCABULARY
    verdict = demo.judge(assets / "model", texts(assets, "test")[:5])
    assert verdict.eval_loss == pytest.approx(math.log(config["vocab_size"]), abs=0.3)
    assert all(map(str.startswith, verdict.samples, demo.PROMPTS))


def test_config_for_another_folder_points_there(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    path = demo.config_for(folder)
    assert demo.DEFAULT_DIR.as_posix() not in path.read_text(encoding="utf-8")
    config = load_config(path)
    assert config.model == str(folder / "model")
    assert config.train_parameters.output_dir == str(folder / "output")
    assert demo.config_for(demo.DEFAULT_DIR) == demo.CONFIG


def run_with(
    monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, losses: tuple[float, float]
) -> int:
    """The demo with one door, that runs `code`, and a judge that has made up its mind."""
    verdicts = iter([demo.Verdict(loss, ("text",) * len(demo.PROMPTS)) for loss in losses])
    monkeypatch.setattr(demo, "doors", lambda config: [("train", ["-c", code])])
    monkeypatch.setattr(demo, "judge", lambda folder, texts: next(verdicts))
    return demo.main(["--dir", str(folder)])


def test_starts_anew_and_reports(
    assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("output", "prepared"):
        (assets / name).mkdir()
    assert run_with(monkeypatch, assets, "pass", (6.5, 3.2)) == 0
    assert not (assets / "output").exists()
    assert (assets / "prepared").exists()
    out = capsys.readouterr().out
    assert "$ python -c pass" in out
    assert "eval loss" in out
    assert "6.500     3.200" in out


def test_fails_where_nothing_was_learned(
    assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, assets, "pass", (6.5, 3.3)) == 1
    assert "went from 6.500 to 3.300" in capsys.readouterr().err


def test_fails_where_a_door_fails(
    assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, assets, "raise SystemExit(2)", (6.5, 3.3)) == 1
    assert "ended with exit code 2" in capsys.readouterr().err
