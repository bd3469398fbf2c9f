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
    # the job
    Case(
        "Slurm's word",
        BASE + "slurm:\n  ntasks_per_node: 4\n",
        "c.yaml:6: slurm.ntasks_per_node: unknown key; did you mean slurm.processes_per_node?",
    ),
    Case(
        "a word like another key",
        BASE + "slurm:\n  queue: gpu\n",
        "c.yaml:6: slurm.queue: unknown key; did you mean slurm.partition?",
    ),
    Case(
        "a word of another section",
        BASE + "slurm:\n  cpus: 4\n",
        "c.yaml:6: slurm.cpus: unknown key; did you mean slurm.cpus_per_gpu?",
    ),
    Case(
        "the same word in the section below",
        BASE + "slurm:\n  preprocess: {walltime: 4}\n",
        "c.yaml:6: slurm.preprocess.walltime: unknown key",
        ("did you mean slurm.preprocess.time?",),
    ),
    Case(
        "preprocess at the top",
        BASE + "preprocess:\n  load_path: raw\n  save_path: prepared\n",
        "c.yaml:5: preprocess: unknown key",
        ("did you mean dataset_preprocess?",),
    ),
    Case(
        "job key at the top",
        BASE + "time: 08:00:00\n",
        "c.yaml:5: time: misplaced; belongs under slurm or under slurm.preprocess",
    ),
    Case(
        "another name of the section",
        BASE + "cluster:\n  nodes: 2\n",
        "c.yaml:5: cluster: unknown key",
        ("did you mean slurm?",),
    ),
    Case("empty job", BASE + "slurm:\n", "c.yaml:5: slurm: is empty; must be a section"),
    Case(
        "a section below, empty",
        BASE + "slurm:\n  preprocess:\n",
        "c.yaml:6: slurm.preprocess: is empty",
    ),
    Case(
        "no time limit",
        BASE + "slurm: {time: UNLIMITED}\n",
        "c.yaml:5: slurm.time: is the text 'UNLIMITED'; must be a duration such as 90 (minutes), "
        "08:00:00 or 1-12:00:00",
    ),
    Case(
        "time with too many seconds",
        BASE + "slurm: {time: 1:90}\n",
        "c.yaml:5: slurm.time: is the text '1:90'",
    ),
    Case(
        "negative time",
        BASE + "slurm: {time: -1}\n",
        "c.yaml:5: slurm.time: is the number -1; must be a duration",
    ),
    Case("a half hour", BASE + "slurm: {time: 1.5}\n", "c.yaml:5: slurm.time: is the number 1.5;"),
    Case(
        "a size with B",
        BASE + "slurm: {mem: 120GB}\n",
        "c.yaml:5: slurm.mem: is the text '120GB'; must be a size such as 120G, or 0; "
        "did you mean 120G?",
    ),
    Case(
        "blanks between partitions",
        BASE + "slurm:\n  partition: gpu, gpu-long\n",
        "c.yaml:6: slurm.partition: is the text 'gpu, gpu-long'; must be a name such as gpu",
        ("did you mean gpu,gpu-long?",),
    ),
    Case(
        "a list of partitions",
        BASE + "slurm: {partition: [gpu, long]}\n",
        "c.yaml:5: slurm.partition: is a list of 2",
        ("write gpu,long",),
    ),
    Case(
        "features in brackets",
        BASE + "slurm: {constraint: [a100|h100]}\n",
        "c.yaml:5: slurm.constraint: is a list of 1",
        ("put it in quotes",),
    ),
    Case(
        "an account of digits",
        BASE + "slurm: {account: 123}\n",
        "c.yaml:5: slurm.account: is the number 123",
        ("put it in quotes if a text is meant",),
    ),
    Case(
        "a line break in a name",
        BASE + 'slurm: {job_name: "a\\n#SBATCH --wrap=x"}\n',
        "c.yaml:5: slurm.job_name: is the text 'a\\n#SBATCH --wrap=x'; must be a name of letters",
    ),
    Case(
        "mails in small letters",
        BASE + "slurm: {mail_type: end}\n",
        "c.yaml:5: slurm.mail_type: is the text 'end'; must be NONE, ALL, or some of BEGIN",
        ("did you mean END?",),
    ),
    Case(
        "None for a partition",
        BASE + "slurm: {partition: None}\n",
        "c.yaml:5: slurm.partition: is the text 'None'",
        ("did you mean null?",),
    ),
    Case(
        "a home folder",
        BASE + "slurm: {container_image: ~/x.sif}\n",
        "c.yaml:5: slurm.container_image: is the text '~/x.sif'; must be an image",
        ("write the path in full",),
    ),
    Case(
        "a variable among mounts",
        BASE + "slurm: {container_image: /x.sif, container_mounts: [/a, $SCRATCH]}\n",
        "c.yaml:5: slurm.container_mounts: item 2 is the text '$SCRATCH'; must be a list of",
        ("write the path in full",),
    ),
    Case(
        "a mount that is read-only nowhere",
        BASE + "slurm: {container_image: /x.sif, container_mounts: [/a:ro]}\n",
        "c.yaml:5: slurm.container_mounts: item 1 is the text '/a:ro'",
    ),
    Case(
        "one setup line",
        BASE + "slurm: {setup: module load cuda}\n",
        "c.yaml:5: slurm.setup: is the text 'module load cuda'; must be a list of shell lines",
    ),
    Case(
        "a setup line with a colon",
        BASE + "slurm:\n  setup:\n    - 'true'\n    - echo a: b\n",
        "c.yaml:6: slurm.setup: item 2 is a mapping; must be a list of shell lines",
        ("put it in quotes",),
    ),
    Case(
        "two lines in one",
        BASE + "slurm:\n  setup:\n    - |\n      true\n      false\n",
        "c.yaml:6: slurm.setup: item 1 is the text 'true\\nfalse\\n'",
    ),
    Case(
        "a setup line that takes the next one",
        BASE + "slurm: {setup: [module load a \\]}\n",
        "c.yaml:5: slurm.setup: item 1 is the text 'module load a \\\\'",
        ("none may end in a backslash",),
    ),
    Case(
        "a short flag",
        BASE + "slurm: {extra_flags: [-t 5]}\n",
        "c.yaml:5: slurm.extra_flags: item 1 is the text '-t 5'; must be a list of long flags",
    ),
    Case(
        "a flag that has a key",
        BASE + "slurm: {extra_flags: [--exclusive, --time=5]}\n",
        "c.yaml:5: slurm.extra_flags: --time has a key of its own; give it as slurm.time",
    ),
    # sweeps
    Case("empty sweep", BASE + "sweep: {}\n", "c.yaml:5: sweep: has neither grid nor runs"),
    Case("a list for a sweep", BASE + "sweep: [1]\n", "c.yaml:5: sweep: is a list of 1; must be"),
    Case(
        "one value for a list",
        BASE + "sweep:\n  grid:\n    train_parameters.seed: 3\n",
        "c.yaml:7: sweep.grid.train_parameters.seed: is the number 3; sweep.grid must be a "
        "mapping from keys such as train_parameters.seed to lists such as [1, 2]",
    ),
    Case(
        "sections in a grid",
        BASE + "sweep:\n  grid:\n    train_parameters:\n      seed: [1, 2]\n",
        "c.yaml:7: sweep.grid.train_parameters: is a mapping; sweep.grid must be",
    ),
    Case(
        "a mapping for runs",
        BASE + "sweep:\n  runs: {train_parameters.seed: 3}\n",
        "c.yaml:6: sweep.runs: is a mapping; must be a list of mappings",
    ),
    Case(
        "a number for a run",
        BASE + "sweep:\n  runs: [{}, 3]\n",
        "c.yaml:6: sweep.runs: item 2 is the number 3; must be a list of mappings",
    ),
    Case(
        "no key",
        BASE + "sweep:\n  grid:\n    lr: [1, 2]\n",
        "c.yaml:7: sweep.grid.lr: is no key; did you mean train_parameters.optimizer.lr?",
    ),
    Case(
        "a wrong value in a grid",
        BASE + "sweep:\n  grid:\n    train_parameters.seed: [1]\n"
        "    train_parameters.optimizer.lr: [1, -1]\n",
        "c.yaml:8: sweep.grid.train_parameters.optimizer.lr: is the number -1, which is out of "
        "range; must be a number, above 0",
    ),
    Case(
        "a wrong value in a run",
        BASE + "sweep:\n  runs:\n    - train_parameters.seed: 1\n    - train_parameters.seed: x\n",
        "c.yaml:6: sweep.runs: run 2: train_parameters.seed: is the text 'x'; must be a whole",
    ),
    Case(
        "a contradiction in one run",
        BASE + "  use_mp: true\nsweep:\n  grid:\n    train_parameters.precision: [null, 32-true]\n",
        "c.yaml:8: sweep.grid.train_parameters.precision: precision 32-true contradicts use_mp",
        ("train_parameters.use_mp is on line 5",),
    ),
    Case(
        "a value that leads nowhere",
        BASE + "wandb_config: {a: 1}\nsweep:\n  grid:\n    wandb_config.a.b: [1]\n",
        "c.yaml:8: sweep.grid.wandb_config.a.b: cannot be set, because wandb_config.a is",
    ),
    Case(
        "the same run twice",
        BASE + "sweep:\n  grid:\n    train_parameters.optimizer.lr: [1, 2, 1.0]\n",
        "c.yaml:5: sweep: two of its runs are the same, ",
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
