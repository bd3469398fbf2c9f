"""The table of wrong files, for `test_load`: what is wrong, and how its one line must begin."""

from __future__ import annotations

import dataclasses

BASE = """\
model: path/to/model
train_parameters:
  output_dir: out
  max_seq_len: 128
"""  # 4 lines, to which cases append
DATASET = "dataset:\n  train_ds: prepared\n"
PREPARE = "dataset_preprocess:\n  load_path: raw\n  save_path: prepared\n"


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    text: str | bytes
    start: str
    parts: tuple[str, ...] = ()


CASES = [
    # keys
    Case(
        "misspelt",
        BASE + "  epoch: 3\n",
        "c.yaml:5: train_parameters.epoch: unknown key",
        ("did you mean train_parameters.epochs?",),
    ),
    Case(
        "other case",
        BASE + "  Seed: 3\n",
        "c.yaml:5: train_parameters.Seed: unknown key",
        ("did you mean train_parameters.seed?",),
    ),
    Case(
        "misspelt at the top",
        BASE + "enable_wandb: true\n",
        "c.yaml:5: enable_wandb: unknown key",
        ("allowed: model,", "did you mean enable_wandb_logging?"),
    ),
    Case("unlike anything", BASE + "zzz: 3\n", "c.yaml:5: zzz: unknown key; allowed: model,"),
    Case(
        "misplaced",
        BASE + DATASET + "  epochs: 3\n",
        "c.yaml:7: dataset.epochs: misplaced; belongs under train_parameters",
    ),
    Case(
        "misplaced, two homes",
        BASE + "ignore_index: -100\n",
        "c.yaml:5: ignore_index: misplaced",
        ("under dataset or under dataset_preprocess",),
    ),
    Case(
        "misplaced section",
        BASE + "  dataset:\n    train_ds: x\n",
        "c.yaml:5: train_parameters.dataset: misplaced; belongs at the top level",
    ),
    Case(
        "adapters at the top",
        BASE + "lora_peft_config:\n  r: 8\n",
        "c.yaml:5: lora_peft_config: misplaced; belongs under train_parameters",
    ),
    Case(
        "misspelt in another section",
        BASE + DATASET + "  warmup_ratios: 0\n",
        "c.yaml:7: dataset.warmup_ratios: unknown key",
        ("mean train_parameters.warmup_ratio?",),
    ),
    Case(
        "another trainer's word",
        BASE + "  learning_rate: 1\n",
        "c.yaml:5: train_parameters.learning_rate:",
        ("mean train_parameters.optimizer.lr?",),
    ),
    Case(
        "doubled",
        BASE + "  seed: 1\n  seed: 1\n",
        "c.yaml:6: train_parameters.seed: given twice",
        ("line 5",),
    ),
    Case(
        "doubled section",
        BASE + "train_parameters:\n  seed: 1\n",
        "c.yaml:5: train_parameters: given twice; the other is on line 2",
    ),
    Case(
        "doubled inside a free mapping",
        BASE + "wandb_config: {name: a, name: b}\n",
        "c.yaml:5: wandb_config.name: given twice",
    ),
    Case(
        "two spellings",
        BASE + PREPARE + "  separator: a\n  seperator: b\n",
        "c.yaml:9: dataset_preprocess.seperator: is another spelling of separator",
        ("line 8",),
    ),
    Case("number as a key", BASE + "1: x\n", "c.yaml:5: key '1' is not a text", ("quotes",)),
    Case("list as a key", BASE + "? [a]\n: x\n", "c.yaml:5: a key is not a text"),
    Case(
        "missing",
        "model: m\ntrain_parameters:\n  output_dir: o\n",
        "c.yaml:2: train_parameters.max_seq_len: missing; must be a whole number, at least 2",
    ),
    Case("missing section", "# x\nmodel: m\n", "c.yaml:2: train_parameters: missing"),
    # types
    Case(
        "text for a number",
        BASE + "  epochs: three\n",
        "c.yaml:5: train_parameters.epochs: is the text 'three'; must be a whole number",
    ),
    Case(
        "quoted number",
        BASE + '  epochs: "3"\n',
        "c.yaml:5: train_parameters.epochs:",
        ("the text '3'", "remove the quotes"),
    ),
    Case(
        "quoted rate",
        BASE + '  optimizer: {lr: "2e-5"}\n',
        "c.yaml:5: train_parameters.optimizer.lr:",
        ("remove the quotes",),
    ),
    Case(
        "quoted switch",
        BASE + "  use_mp: 'true'\n",
        "c.yaml:5: train_parameters.use_mp:",
        ("must be true or false", "remove the quotes"),
    ),
    Case(
        "number for a switch",
        BASE + "  use_mp: 1\n",
        "c.yaml:5: train_parameters.use_mp: is the number 1",
    ),
    Case(
        "switch for a number",
        BASE + "  epochs: true\n",
        "c.yaml:5: train_parameters.epochs: is the boolean true; must be a whole number",
    ),
    Case(
        "fraction", BASE + "  epochs: 1.5\n", "c.yaml:5: train_parameters.epochs: is the number 1.5"
    ),
    Case(
        "whole number with a point",
        BASE + "  epochs: 1e3\n",
        "c.yaml:5: train_parameters.epochs:",
        ("write 1000",),
    ),
    Case(
        "leading zero",
        BASE + "  epochs: 010\n",
        "c.yaml:5: train_parameters.epochs: is the text '010'",
    ),
    Case(
        "time of day",
        BASE + "  epochs: 1:30\n",
        "c.yaml:5: train_parameters.epochs: is the text '1:30'",
    ),
    Case(
        "list for a number",
        BASE + "  seed: [1]\n",
        "c.yaml:5: train_parameters.seed: is a list of 1",
    ),
    Case(
        "mapping for a number",
        BASE + "  seed: {a: 1}\n",
        "c.yaml:5: train_parameters.seed: is a mapping",
    ),
    Case(
        "number for a text",
        BASE + DATASET + "  eval_ds: 7\n",
        "c.yaml:7: dataset.eval_ds: is the number 7",
        ("quotes",),
    ),
    Case("null for a number", BASE + "  epochs:\n", "c.yaml:5: train_parameters.epochs: is null"),
    Case(
        "None",
        BASE + DATASET + "  eval_ds: None\n",
        "c.yaml:7: dataset.eval_ds: is the text 'None'",
        ("did you mean null?",),
    ),
    Case(
        "empty text",
        BASE + DATASET + "  eval_ds: ''\n",
        "c.yaml:7: dataset.eval_ds: is an empty text",
    ),
    Case(
        "one beta",
        BASE + "  optimizer: {betas: [0.9]}\n",
        "c.yaml:5: train_parameters.optimizer.betas: is a list of 1; must be a list of 2 numbers",
    ),
    Case(
        "three betas",
        BASE + "  optimizer: {betas: [0.9, 0.9, 0.9]}\n",
        "c.yaml:5: train_parameters.optimizer.betas: is a list of 3",
    ),
    Case(
        "a text among betas",
        BASE + "  optimizer: {betas: [0.9, '0.9']}\n",
        "c.yaml:5: train_parameters.optimizer.betas: item 2 is the text '0.9'",
    ),
    Case(
        "a switch among betas",
        BASE + "  optimizer: {betas: [0.9, true]}\n",
        "c.yaml:5: train_parameters.optimizer.betas: item 2 is the boolean true",
    ),
    Case("empty section", BASE + "dataset:\n", "c.yaml:5: dataset: is empty; must be a section"),
    Case(
        "text for a section",
        BASE + "dataset: here\n",
        "c.yaml:5: dataset: is the text 'here'; must be",
    ),
    Case(
        "list for a section",
        "model: m\ntrain_parameters:\n  - epochs: 1\n",
        "c.yaml:2: train_parameters: is a list of 1",
    ),
    Case(
        "list for a free mapping",
        BASE + "wandb_config: [a]\n",
        "c.yaml:5: wandb_config: is a list of 1",
    ),
    # ranges and choices
    Case(
        "zero",
        BASE + "  epochs: 0\n",
        "c.yaml:5: train_parameters.epochs: is the number 0, which is out of"
        " range; must be a whole number, at least 1",
    ),
    Case(
        "above one",
        BASE + "  warmup_ratio: 1.5\n",
        "c.yaml:5: train_parameters.warmup_ratio:",
        ("out of range", "at least 0 and at most 1"),
    ),
    Case(
        "too large for the seed",
        BASE + "  seed: 2147483648\n",
        "c.yaml:5: train_parameters.seed:",
        ("below 2^31",),
    ),
    Case(
        "too small to be a row",
        "model: m\ntrain_parameters:\n  output_dir: o\n  max_seq_len: 1\n",
        "c.yaml:4: train_parameters.max_seq_len: is the number 1, which is out of range",
    ),
    Case(
        "infinite",
        BASE + "  max_grad_norm: .inf\n",
        "c.yaml:5: train_parameters.max_grad_norm: is .inf",
        ("finite",),
    ),
    Case(
        "overflow",
        BASE + "wandb_config: {x: 1e999}\n",
        "c.yaml:5: wandb_config.x: is 1e999",
        ("finite",),
    ),
    Case(
        "a huge number",
        BASE + "  optimizer: {lr: 1" + "0" * 400 + "}\n",
        "c.yaml:5: train_parameters.optimizer.lr: is the number of more than 40 digits",
    ),
    Case(
        "too many digits",
        BASE + "  seed: 1" + "0" * 5000 + "\n",
        "c.yaml:5: train_parameters.seed: ",
    ),
    Case(
        "lower case",
        BASE + "  sharding_strategy: full_shard\n",
        "c.yaml:5: train_parameters.sharding_strategy: is the text 'full_shard'",
        ("one of FULL_SHARD, SHARD_GRAD_OP", "did you mean FULL_SHARD?"),
    ),
    Case(
        "misspelt scheduler",
        BASE + "  lr_scheduler_type: plataeu_with_warmup\n",
        "c.yaml:5: train_parameters.lr_scheduler_type:",
        ("did you mean plateau-with-warmup?",),
    ),
    Case(
        "misspelt packing",
        BASE + PREPARE + "  packing_type: Full\n",
        "c.yaml:8: dataset_preprocess.packing_type:",
        ("did you mean full?",),
    ),
    # YAML
    Case("tab", "model: m\n\tx: 1\n", "c.yaml:2: is not YAML", ("not tabs",)),
    Case("open bracket", BASE + "wandb_config: {a: [1\n", "c.yaml:6: is not YAML"),
    Case("bad indentation", BASE + " seed: 1\n", "c.yaml:5: is not YAML"),
    Case("two documents", BASE + "---\nmodel: m\n", "c.yaml:5: is not YAML", ("another document",)),
    Case("unknown alias", "model: *m\n", "c.yaml:1: is not YAML", ("undefined alias",)),
    Case("control character", "model: m\nx: \x00\n", "c.yaml:2: holds a character", ("U+0000",)),
    Case("not UTF-8", b"model: m\nx: \xff\n", "c.yaml:2: is not UTF-8"),
    Case(
        "code",
        "model: !!python/object/apply:os.system [exit]\n" + BASE[BASE.index("train") :],
        "c.yaml:1: model: has the tag !!python/object/apply:os.system, which is refused",
    ),
    Case(
        "private tag",
        BASE + "  epochs: !mine 3\n",
        "c.yaml:5: train_parameters.epochs: has the tag !mine",
    ),
    Case("tagged section", BASE + "dataset: !!set {a}\n", "c.yaml:5: dataset: has the tag !!set"),
    Case(
        "tag that does not fit",
        BASE + "  epochs: !!int x\n",
        "c.yaml:5: train_parameters.epochs: is 'x'",
    ),
    Case(
        "switch tag that does not fit",
        BASE + "  use_mp: !!bool x\n",
        "c.yaml:5: train_parameters.use_mp: has the tag !!bool",
    ),
    Case(
        "contains itself",
        BASE + "wandb_config: &a\n  b: *a\n",
        "c.yaml:6: wandb_config.b: contains itself through an alias",
    ),
    Case(
        "list that contains itself",
        BASE + "wandb_config:\n  b: &a [*a]\n",
        "c.yaml:6: wandb_config.b: contains",
    ),
    Case(
        "merges itself",
        BASE + "wandb_config: &a\n  <<: *a\n",
        "c.yaml:6: wandb_config: << must name",
    ),
    Case(
        "merges a number", BASE + "wandb_config: {<<: 1}\n", "c.yaml:5: wandb_config: << must name"
    ),
    Case("empty", "", "c.yaml: is empty"),
    Case("only comments", "# model: m\n", "c.yaml: is empty"),
    Case("a bare text", "model\n", "c.yaml:1: holds the text 'model'"),
    Case("a list", "- model: m\n", "c.yaml:1: holds a list of 1"),
    Case("template left unfilled", "{{ x }}\n", "c.yaml:1: a key is not a text"),
    Case("too deep", "model: " + "[" * 600, "c.yaml:1: is nested too deeply"),
    Case("too large", "#" * (1 << 20) + "\n" + BASE, "c.yaml: is larger than 1 MiB"),
]
