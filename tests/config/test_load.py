"""Wrong files and what is said about them: each mistake with its line, all of them at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.config.mistakes import BASE, CASES, DATASET, PREPARE, Case
from vectorlm.config.load import config_to_dict, load_config, required_section
from vectorlm.config.schema import Config
from vectorlm.errors import ConfigError

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a text as the file `c.yaml`."""
    monkeypatch.chdir(tmp_path)

    def from_text(text: str | bytes, *overrides: str) -> Config:
        data = text.encode() if isinstance(text, str) else text
        Path("c.yaml").write_bytes(data)
        return load_config("c.yaml", overrides)

    return from_text


def problems(load: Load, text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def name_of(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_mistake(load: Load, case: Case) -> None:
    line = problems(load, case.text)[0]
    assert line.startswith(case.start)
    for part in case.parts:
        assert part in line


ALONE = {"template left unfilled"}  # misses the required keys, too


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in ALONE], ids=name_of)
def test_one_mistake_is_one_line(load: Load, case: Case) -> None:
    """No key is called missing because it was misspelt, misplaced or unreadable."""
    assert len(problems(load, case.text)) == 1


def test_base_is_sound(load: Load) -> None:
    config = load(BASE + DATASET + PREPARE)
    assert config.train_parameters.max_seq_len == 128
    assert config.dataset is not None
    assert config.dataset_preprocess is not None


def test_all_at_once_in_file_order(load: Load) -> None:
    text = """\
model: 3
train_parameter:
  output_dir: o
  max_seq_len: 128
  seed: 1
  seed: 2
  use_mp: true
  precision: 32-true
  optimizer:
    lr: "1"
    betas: [1, 0.9]
dataset:
  ignore_index: -1
  train_ds: prepared
  epochs: 3
  train_bs: 0
dataset_preprocess:
  load_path: !!python/name:x y
  overlap: 5
"""
    found = problems(load, text, "train_parameters.epoch=1", "nonsense")
    assert [line.split(": ")[0] for line in found[:-2]] == [
        f"c.yaml:{n}" for n in (1, 2, 6, 8, 10, 11, 13, 15, 16, 17, 18, 19)
    ]
    assert found[-2].startswith("--set train_parameters.epoch: unknown key")
    assert found[-1].startswith("--set nonsense: must be KEY=VALUE")


def test_a_section_in_two_places_is_read_in_both(load: Load) -> None:
    found = problems(load, BASE + "  epoch: 1\ntrain_parameters:\n  epochs: 0\n")
    assert [line.split(":")[1] for line in found] == ["5", "6", "7"]


def test_contradictions_wait_for_the_keys_they_concern(load: Load) -> None:
    """`eval_d` was meant to be eval_ds, so that it is missing is no second mistake."""
    plateau = BASE + "  lr_scheduler_type: greedy\n" + DATASET
    assert "dataset.eval_ds" in problems(load, plateau)[0]
    for wrong in ("eval_d: x", "eval_ds: 3", "eval_ds: !!x y"):
        assert len(problems(load, f"{plateau}  {wrong}\n")) == 1


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(BASE)
    with pytest.raises(
        ConfigError, match=r"confg\.yaml: no such file; did you mean .*config\.yaml\?"
    ):
        load_config(tmp_path / "confg.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("a\0b")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "config.yaml" / "x")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root, who runs tests in containers, may read all
    with pytest.raises(ConfigError, match=r"c\.yaml: cannot be read: Permission denied"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("2e-5", 2e-5),
        ("2E-5", 2e-5),
        ("1E3", 1000.0),
        ("1.e-3", 1e-3),
        (".5", 0.5),
        ("5.", 5.0),
        ("+1", 1.0),
        ("1_000.5", 1000.5),
        ("2.0e-5", 2e-5),
        ("0x10", 16.0),
        ("1", 1.0),
        ("!!float 3", 3.0),
    ],
)
def test_numbers(load: Load, written: str, number: float) -> None:
    config = load(BASE + f"  optimizer:\n    lr: {written}\n")
    assert config.train_parameters.optimizer.lr == number
    assert isinstance(config.train_parameters.optimizer.lr, float)


def test_texts_that_look_like_something_else(load: Load) -> None:
    text = "wandb_config: {date: 2024-01-01, time: 1:30, id: 007, eq: =, quoted: '1', n: 1e5}\n"
    assert load(BASE + text).wandb_config == {
        "date": "2024-01-01",
        "time": "1:30",
        "id": "007",
        "eq": "=",
        "quoted": "1",
        "n": 1e5,
    }


@pytest.mark.parametrize(
    ("written", "time"),
    [
        ("90", "90"),
        ("1:30", "1:30"),
        ("1:30:00", "1:30:00"),
        ("08:00:00", "08:00:00"),
        ("1-0", "1-0"),
        ("1-12:00:00", "1-12:00:00"),
        ("'90'", "90"),
        ("007", "007"),
    ],
)
def test_times_need_no_quotes(load: Load, written: str, time: str) -> None:
    """Other readers of YAML take 1:30:00 for 5400."""
    text = f"slurm:\n  time: {written}\n  signal_lead_s: 30\n  preprocess: {{time: {written}}}\n"
    overrides = (f"slurm.time={written}", "slurm.signal_lead_s=30")
    for config in (load(BASE + text), load(BASE, *overrides)):
        assert config.slurm is not None
        assert config.slurm.time == time
    assert load(BASE + text).slurm.preprocess.time == time  # type: ignore[union-attr]


@pytest.mark.parametrize(("written", "mem"), [("0", "0"), ("120G", "120G"), ("64000", "64000")])
def test_sizes_need_no_quotes(load: Load, written: str, mem: str) -> None:
    for config in (load(BASE + f"slurm: {{mem: {written}}}"), load(BASE, f"slurm.mem={written}")):
        assert config.slurm is not None
        assert config.slurm.mem == mem


def test_anchors_and_merge_keys(load: Load) -> None:
    text = """\
wandb_config:
  first: &first {a: 1, b: 1}
  second: &second {b: 2, c: 2}
  one: {<<: *first, b: 9}
  both: {<<: [*first, *second]}
  nested: &nested {<<: *second, d: 3}
  deep: {<<: *nested}
  same: *first
"""
    config = load(BASE + text).wandb_config
    assert config["one"] == {"a": 1, "b": 9}
    assert config["both"] == {"a": 1, "b": 1, "c": 2}
    assert config["deep"] == {"b": 2, "c": 2, "d": 3}
    assert config["same"] == {"a": 1, "b": 1}


@pytest.mark.parametrize("step", ["[{0}, {0}, {0}, {0}, {0}]", "{{<<: [{0}, {0}, {0}, {0}, {0}]}}"])
def test_aliases_that_explode_are_refused(load: Load, step: str) -> None:
    lines = ["  a0: &a0 {x: 1}\n"]
    lines += [f"  a{n}: &a{n} {step.format(f'*a{n - 1}')}\n" for n in range(1, 25)]
    found = problems(load, BASE + "wandb_config:\n" + "".join(lines))
    assert "grows to more than" in found[0]


def test_byte_order_mark_and_windows_lines(load: Load) -> None:
    data = b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode()
    assert load(data).model == "path/to/model"


def test_aliases_of_the_original(load: Load) -> None:
    old = load(BASE + PREPARE + "  seperator: '###'\n")
    new = load(BASE + PREPARE + "  separator: '###'\n")
    assert old == new
    assert load(BASE + "  lr_scheduler_type: plataeu-with-warmup\n").train_parameters


def test_original_file_loads_with_its_values() -> None:
    config = load_config(Path(__file__).parent / "original.yaml")
    train, prepare = config.train_parameters, config.dataset_preprocess
    assert train.optimizer.betas == (0.9, 0.95)
    assert (train.max_grad_norm, train.effective_precision) == (1.0, "bf16-mixed")
    assert train.lora_peft_config is not None
    assert train.lora_peft_config["r"] == 8
    assert prepare is not None
    assert (prepare.separator, prepare.pre_pend) == ("### Response:", "### Text: ")
    assert (prepare.effective_packing, prepare.overlap, prepare.from_disk) == ("partial", 8, True)


def test_garbage_is_refused_politely(load: Load) -> None:
    """Whatever is done to a sound file, the answer is a Config or a ConfigError."""
    text = (Path(__file__).parent / "original.yaml").read_text()
    lines, random = text.splitlines(), Random(1)
    pieces = [
        "- ",
        ": ",
        "{",
        "]",
        "&a ",
        "*a",
        "<<: ",
        "!!map ",
        "? ",
        "'",
        "|\n",
        "null",
        "1e9",
        "  ",
    ]
    told: list[str] = []
    for _ in range(150):
        changed = list(lines)
        for _ in range(random.randint(1, 3)):
            row = random.randrange(len(changed))
            at = random.randint(0, len(changed[row]))
            changed[row] = changed[row][:at] + random.choice(pieces) + changed[row][at:]
        try:
            load("\n".join(changed))
        except ConfigError as error:
            told.append(str(error))
    assert len(told) > 100
    assert all(line.startswith("c.yaml:") for text in told for line in text.splitlines())


# --- overrides ------------------------------------------------------------------------------------


def test_override_values(load: Load) -> None:
    config = load(
        BASE + "  epochs: 2\n",
        "train_parameters.epochs=3",
        "train_parameters.optimizer.lr=1e-4",
        "train_parameters.optimizer.betas=[0.9, 0.95]",
        "train_parameters.lora_peft_config.r=8",
        "train_parameters.max_grad_norm=null",
        "wandb_config.name=x",
        "dataset.train_ds=a=b",
    )
    train = config.train_parameters
    assert (train.epochs, train.max_grad_norm) == (3, None)
    assert (train.optimizer.lr, train.optimizer.betas) == (1e-4, (0.9, 0.95))
    assert train.lora_peft_config == {"r": 8}
    assert config.wandb_config == {"name": "x"}
    assert config.dataset is not None
    assert config.dataset.train_ds == "a=b"


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("### Answer: x", "### Answer: x"),
        ("007", "007"),
        ("a # b", "a # b"),
        ("'a '", "a "),
        ("null", None),
        ("", None),
    ],
)
def test_texts_are_taken_as_they_stand(load: Load, written: str, text: str | None) -> None:
    prepare = load(BASE + PREPARE, f"dataset_preprocess.separator={written}").dataset_preprocess
    assert prepare is not None
    assert prepare.separator == text


def test_override_replaces_the_other_spelling_and_wrong_values(load: Load) -> None:
    text = BASE + "  epochs: many\n" + PREPARE + "  seperator: a\n"
    overrides = ("dataset_preprocess.separator=b", "train_parameters.epochs=1")
    prepare = load(text, *overrides).dataset_preprocess
    assert prepare is not None
    assert prepare.separator == "b"


def test_override_makes_sections(load: Load) -> None:
    config = load(BASE + "dataset:\n", "dataset.train_ds=x", "dataset.train_bs=2")
    assert config.dataset is not None
    assert config.dataset.train_bs == 2


def test_override_of_the_job(load: Load) -> None:
    """Brackets are a text where they can be one, else a list."""
    config = load(
        BASE + "slurm: {partition: gpu, time: 5-0}\n",
        "slurm.partition=null",
        "slurm.constraint=[a100*2|h100]",
        "slurm.exclude=gpu[03,07]",
        "slurm.extra_flags=[--exclusive, --nice=3]",
        'slurm.setup=["module load a", "echo \'b: c\'"]',
        "slurm.preprocess.mem=0",
    )
    slurm = config.slurm
    assert slurm is not None
    assert (slurm.partition, slurm.time) == (None, "5-0")
    assert (slurm.constraint, slurm.exclude) == ("[a100*2|h100]", "gpu[03,07]")
    assert slurm.extra_flags == ["--exclusive", "--nice=3"]
    assert slurm.setup == ["module load a", "echo 'b: c'"]
    assert slurm.preprocess.mem == "0"


def test_override_takes_a_section_out(load: Load) -> None:
    text = BASE + DATASET + "slurm: {nodes: 2}\nsweep: {grid: {train_parameters.seed: [1]}}\n"
    config = load(text, "sweep=null", "slurm=", "dataset=~")
    assert (config.sweep, config.slurm, config.dataset) == (None, None, None)
    config = load(text, "slurm=null", "slurm.nodes=3", "sweep.metric=loss")
    assert config.slurm is not None
    assert config.slurm.nodes == 3


@pytest.mark.parametrize(
    ("override", "start", "part"),
    [
        ("train_parameters.epoch=1", "train_parameters.epoch: unknown key", "parameters.epochs?"),
        ("train_parameters.epochs=a", "train_parameters.epochs: is the text 'a'", "whole number"),
        ("train_parameters.epochs=0", "train_parameters.epochs: is the number 0", "at least 1"),
        ("train_parameters.epochs=", "train_parameters.epochs: is null", "whole number"),
        ("epochs=1", "epochs: misplaced", "under train_parameters"),
        ("epochs", "epochs: must be KEY=VALUE", "such as"),
        ("=1", "=1: must be KEY=VALUE", "such as"),
        ("a..b=1", "a..b=1: must be KEY=VALUE", "such as"),
        ("model.x=1", "model.x: cannot be set", "model is the text"),
        ("wandb_config.x=[1", "wandb_config.x: the value is not YAML", "','"),
        ("wandb_config.x=!!python/x y", "wandb_config.x: has the tag", "refused"),
        ("wandb_config={a: 1, a: 2}", "wandb_config.a: given twice", "keep one"),
        ("train_parameters=1", "train_parameters: is the number 1", "a section"),
        ("train_parameters=null", "train_parameters: is empty", "a section"),
        ("slurm.preprocess=null", "slurm.preprocess: is empty", "a section"),
        ("slurm.job_name=a b", "slurm.job_name: is the text 'a b'", "a name of letters"),
        ("slurm.setup=true", "slurm.setup: is the boolean true", "a list of shell lines"),
        ("slurm.time=0", "slurm.time: time 0 is no limit", "give one"),
        ("dataset.train_bs=1", "dataset.train_ds: missing", "non-empty text"),
        ("train_parameters.lora_peft_config.r=0", "train_parameters.lora_peft_config.r: ", "1"),
    ],
)
def test_wrong_override(load: Load, override: str, start: str, part: str) -> None:
    (line,) = problems(load, BASE, override)
    assert line.startswith(f"--set {start}")
    assert part in line


def test_contradiction_between_file_and_override(load: Load) -> None:
    text = BASE + DATASET + "  ignore_index: -1\n" + PREPARE
    (line,) = problems(load, text, "dataset_preprocess.ignore_index=-2")
    assert line.startswith("--set dataset_preprocess.ignore_index: ")
    assert line.endswith("dataset.ignore_index is on line 7")


# --- what doors use -------------------------------------------------------------------------------


def test_secrets_do_not_leave_the_config(load: Load) -> None:
    text = """\
  optimizer: {kwargs: {list: [{password: p}], capturable: true}}
  lr_scheduler_kwargs: {Auth_Token: {a: b}, api_key: null}
"""
    dumped = config_to_dict(load(BASE + text + PREPARE))
    train = dumped["train_parameters"]
    assert train["optimizer"]["kwargs"] == {
        "list": [{"password": "<redacted>"}],
        "capturable": True,
    }
    assert train["lr_scheduler_kwargs"] == {"Auth_Token": "<redacted>", "api_key": None}
    assert dumped["dataset_preprocess"]["add_bos_eos_tokens"] is True


def test_dict_is_plain_json_and_loads_again(load: Load) -> None:
    config = load_config(Path(__file__).parent / "original.yaml")
    text = json.dumps(config_to_dict(config))
    assert load(text) == config


def test_job_and_sweep_in_the_dict(load: Load) -> None:
    """Whole, and absent where there is none, so that what is stored loads again."""
    text = """\
slurm: {time: 90, setup: [export TOKEN=$(cat x)], mail_user: a@b, account: secret}
sweep: {grid: {train_parameters.seed: [1, 2]}, metric: loss}
"""
    config = load(BASE + text)
    dumped = config_to_dict(config)
    assert dumped["slurm"]["setup"] == ["export TOKEN=$(cat x)"]
    assert dumped["slurm"]["account"] == "secret"
    assert dumped["sweep"]["grid"] == {"train_parameters.seed": [1, 2]}
    assert not {"dataset", "dataset_preprocess"} & dumped.keys()
    assert load(json.dumps(dumped)) == config
    assert not {"slurm", "sweep"} & config_to_dict(load(BASE)).keys()


def test_required_section(load: Load) -> None:
    config = load(BASE + DATASET)
    assert required_section(config, "dataset", "c.yaml") is config.dataset
    with pytest.raises(ConfigError) as caught:
        required_section(config, "dataset_preprocess", "c.yaml")
    assert str(caught.value) == (
        "c.yaml: dataset_preprocess: section is missing; preprocessing needs it, with at least: "
        "save_path"
    )
