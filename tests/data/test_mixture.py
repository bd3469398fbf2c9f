"""Several sources as one: how often rows come, and that any place is found again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.data.conftest import options_of
from vectorlm import readers
from vectorlm.data.mixture import HeldOut, MixedEncoder, Mixture, Part, find_part, lot, passes
from vectorlm.data.sources import START
from vectorlm.data.text_encoder import TextEncoder
from vectorlm.data.tokenize import TextTokenizer
from vectorlm.row_batch import RowBatch


def part(path: Path, name: str, rows: int, weight: float, files: int = 1) -> Part:
    """Rows `name0`, `name1`, ... in some files."""
    folder = path / name
    folder.mkdir()
    for file in range(files):
        lines = [json.dumps({"text": f"{name}{n}"}) for n in range(file, rows, files)]
        (folder / f"{file}.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    return find_part(options_of(folder), str(folder), None, weight)


@pytest.fixture
def encoder(tokenizer: TextTokenizer) -> TextEncoder:
    return TextEncoder(
        tokenizer, add_bos_eos_tokens=True, pre_pend=None, separator=None, ignore_index=-100
    )


@pytest.fixture
def mixed(tmp_path: Path, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> MixedEncoder:
    monkeypatch.setattr(readers, "BATCH_BYTES", 256)  # so that there are many batches
    parts = [
        part(tmp_path, "a", 200, 0.5, files=2),
        part(tmp_path, "b", 100, 2.25),
        part(tmp_path, "c", 100, 1, files=3),
    ]
    return MixedEncoder(Mixture(parts), [encoder] * 3, seed=3)


def rows(mixed: MixedEncoder) -> list[RowBatch]:
    return list(mixed.rows(mixed.mixture, START))


def texts(batches: list[RowBatch]) -> list[str]:
    return [text for batch in batches for text in batch.values]


def test_weights(mixed: MixedEncoder) -> None:
    counts = Counter(texts(rows(mixed)))
    times = {name: [counts[f"{name}{n}"] for n in range(100)] for name in "abc"}
    assert set(counts[f"a{n}"] for n in range(200)) == {0, 1}
    assert 70 < sum(counts[f"a{n}"] for n in range(200)) < 130
    assert set(times["b"]) == {2, 3}
    assert 10 < times["b"].count(3) < 40
    assert set(times["c"]) == {1}


def test_bad_rows_are_told_once(mixed: MixedEncoder) -> None:
    bad = [one.where for batch in rows(mixed) for one in batch.bad]
    assert len(bad) == len(set(bad)) == 2 + 1 + 3


def test_another_seed_chooses_others(mixed: MixedEncoder) -> None:
    first = texts(rows(mixed))
    assert first == texts(rows(mixed))
    mixed.seed = 4
    assert first != texts(rows(mixed))


def test_it_goes_on_behind_any_batch(mixed: MixedEncoder) -> None:
    batches = rows(mixed)
    assert len(batches) > 20
    whole = texts(batches)
    for at in range(0, len(batches), 3):
        rest = list(mixed.rows(mixed.mixture, batches[at].after))
        assert texts(rest) == whole[len(texts(batches[: at + 1])) :]
        assert [one for batch in rest for one in batch.bad] == [
            one for batch in batches[at + 1 :] for one in batch.bad
        ]


def test_how_far_it_is(mixed: MixedEncoder) -> None:
    seen = [mixed.mixture.fraction() for _ in mixed.rows(mixed.mixture, START)]
    assert seen == sorted(seen)
    assert seen[0] < 0.2
    assert seen[-1] == pytest.approx(1)


def test_every_row_is_encoded_by_its_parts_encoder(
    mixed: MixedEncoder, tokenizer: TextTokenizer
) -> None:
    bare = TextEncoder(
        tokenizer, add_bos_eos_tokens=False, pre_pend=None, separator=None, ignore_index=-100
    )
    mixed.encoders = (bare, mixed.encoders[1], bare)
    for batch in rows(mixed):
        documents, bad = mixed.encode(batch)
        assert not bad
        ends = documents.ids[documents.offsets[1:] - 1].tolist()
        with_ends = all(text.startswith("b") for text in batch.values)
        assert all((one == tokenizer.eos_id) == with_ends for one in ends)


def test_the_hash_is_of_all_contents(mixed: MixedEncoder) -> None:
    before = mixed.mixture.sha256()
    assert before == mixed.mixture.sha256()
    path = mixed.mixture.parts[2].source.files[0]
    path.write_text(path.read_text() + '{"text": "more"}\n')
    assert mixed.mixture.sha256() != before


def test_passes() -> None:
    def of(weight: float) -> list[tuple[float, bool]]:
        one = Part(None, None, None, None, weight)  # type: ignore[arg-type]
        return [(found.share, found.first) for found in passes(0, one)]

    assert of(1) == [(1.0, True)]
    assert of(0.25) == [(0.25, True)]
    assert of(2.5) == [(1.0, True), (1.0, False), (0.5, False)]


def test_both_sides_are_all_rows(tmp_path: Path, encoder: TextEncoder) -> None:
    source = part(tmp_path, "a", 1000, 1).source
    sides = [
        texts(list(HeldOut(encoder, 0.2, 5, held).rows(source, START))) for held in (False, True)
    ]
    assert sorted(sides[0] + sides[1]) == sorted(f"a{n}" for n in range(1000))
    assert 150 < len(sides[1]) < 250
    bad = [
        [one for batch in HeldOut(encoder, 0.2, 5, held).rows(source, START) for one in batch.bad]
        for held in (False, True)
    ]
    assert [len(one) for one in bad] == [1, 0]


def test_lots_are_even_and_never_change() -> None:
    found = [lot(1, str(n)) for n in range(4000)]
    assert all(0 <= one < 1 for one in found)
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.02)
    assert lot(1, "a") == 0.24029678015953898
    assert lot(1, "a") != lot(2, "a")
    assert lot(0, "\ud800") >= 0
