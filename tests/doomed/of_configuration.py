"""Mistakes in the YAML file alone: words, values, and keys that contradict each other."""

from __future__ import annotations

from tests.doomed.case import Case
from tests.doomed.entry import doomed


@doomed(
    r"train_parameters\.optimizer\.learning_rate.*unknown|learning_rate",
    r"train_parameters\.optimizer\.lr",
    "learning_rate: unknown key",
)
def a_key_of_another_trainer(case: Case) -> None:
    case.train["optimizer"] = {"learning_rate": 1e-3}


@doomed(r"epoch\b", r"epochs", "epoch: unknown key")
def a_misspelt_key(case: Case) -> None:
    case.train["epoch"] = 3


@doomed(r"train_bs", r"dataset", "train_bs: misplaced")
def a_key_in_another_section(case: Case) -> None:
    case.train["train_bs"] = 4


@doomed(r"max_seq_len", r"missing.*whole number", "max_seq_len: missing")
def a_key_that_is_missing(case: Case) -> None:
    del case.train["max_seq_len"]


@doomed(r"epochs.*three", r"whole number", "epochs: is the text 'three'; must be a whole number")
def a_word_for_a_number(case: Case) -> None:
    case.train["epochs"] = "three"


@doomed(
    r"save_frequency.*500", r"at most 1|between 0 and 1", "is the number 500, which is out of range"
)
def steps_where_a_share_is_wanted(case: Case) -> None:
    case.train["save_frequency"] = 500


@doomed(r"eval_ds.*None", r"null", "did you mean null?")
def none_for_null(case: Case) -> None:
    case.dataset["eval_ds"] = "None"


@doomed(r"epochs.*given twice", r"keep one", "epochs: given twice")
def a_key_given_twice(case: Case) -> None:
    case.text = (
        case.write()
        .read_text()
        .replace("  max_seq_len: 64\n", "  max_seq_len: 64\n  epochs: 1\n  epochs: 3\n")
    )


@doomed(r"config\.yaml:3", r"not YAML.*tab|tab.*spaces|found character '\\t'", "is not YAML")
def a_tab(case: Case) -> None:
    case.text = "model: x\ntrain_parameters:\n\toutput_dir: y\n"


@doomed(r"precision.*bf16", r"bf16-mixed.*bf16-true", "did you mean bf16-true?")
def a_precision_of_another_trainer(case: Case) -> None:
    case.train["precision"] = "bf16"


@doomed(r"precision 16-mixed contradicts use_mp", r"remove use_mp", "contradicts use_mp")
def two_precisions(case: Case) -> None:
    case.train.update(use_mp=True, precision="16-mixed")


@doomed(r"ignore_index.*-100.*-1\b", r"must be equal", "they must be equal")
def two_labels_for_what_is_not_learned(case: Case) -> None:
    case.dataset["ignore_index"], case.prepare["ignore_index"] = -100, -1


@doomed(
    r"evaluation data would be the training data",
    r"another eval_load_path or eval_split",
    "the evaluation data would be the training data",
    verb="preprocess",
)
def evaluation_on_the_training_data(case: Case) -> None:
    del case.prepare["eval_load_path"]


@doomed(
    r"plateau.*evaluation loss",
    r"give dataset\.eval_ds or take another scheduler",
    "follows the evaluation loss",
)
def a_plateau_of_a_loss_that_is_never_measured(case: Case) -> None:
    case.train["lr_scheduler_type"] = "plateau-with-warmup"
    case.dataset["eval_ds"] = None


@doomed(
    r"output_dir.*lies in it|save_path.*replaced as a whole",
    r"separate folders",
    "is replaced as a whole when data is prepared",
    verb="preprocess",
)
def output_inside_the_prepared_data(case: Case) -> None:
    case.train["output_dir"] = str(case.data / "output")


@doomed(r"shard_group_size 4.*6 ranks", r"must divide", "must divide the 6 ranks", verb="submit")
def groups_that_do_not_divide_the_ranks(case: Case) -> None:
    case.train.update(sharding_strategy="HYBRID_SHARD", shard_group_size=4)
    case.slurm(nodes=2, gpus_per_node=3)


@doomed(
    r"shard_group_size.*multiple of 4",
    r"--nproc_per_node 4",
    "1 ranks cannot be split into groups of 4; allowed: a divisor of 1",
    severities=("note",),
)
def groups_of_more_than_are_started(case: Case) -> None:
    """The file does not say on how many ranks"""
    case.train.update(sharding_strategy="HYBRID_SHARD", shard_group_size=4)


@doomed(
    r"signal_lead_s 600.*300 s",
    r"below the time limit",
    "must be below the time limit",
    verb="submit",
)
def a_signal_before_the_job_begins(case: Case) -> None:
    case.slurm(gpus_per_node=0, time="00:05:00", signal_lead_s=600)


@doomed(r"slurm\.mem.*64 MB", r"64G", "is 64 MB to Slurm", verb="submit")
def megabytes_for_gigabytes(case: Case) -> None:
    case.slurm(gpus_per_node=0, mem="64")


@doomed(r"--gres.*key of its own", r"slurm\.gpus_per_node", "has a key of its own", verb="submit")
def a_flag_that_a_key_gives(case: Case) -> None:
    case.slurm(gpus_per_node=1, extra_flags=["--gres=gpu:2"])


@doomed(
    r"slurm\.setup.*(bash|quote)",
    r"bash cannot read|close|quote|mend the line",
    "bash cannot read these lines",
    verb="submit",
)
def an_open_quote_before_the_job(case: Case) -> None:
    case.slurm(gpus_per_node=0, setup=["export NAME='unclosed"])


@doomed(r"sweep\.grid.*train_parameters\.lr", r"optimizer\.lr", "did you mean", verb="submit")
def a_sweep_of_a_key_that_is_none(case: Case) -> None:
    case.slurm(gpus_per_node=0)
    case.config["sweep"] = {"grid": {"train_parameters.lr": [1e-5, 2e-5]}}


@doomed(r"seed.*-5", r"at least 0", "is the number -5, which is out of range", verb="submit")
def one_wrong_value_of_a_sweep(case: Case) -> None:
    case.slurm(gpus_per_node=0)
    case.config["sweep"] = {"grid": {"train_parameters.seed": [1, 2, -5]}}


@doomed(
    r"eval_loss is logged only where",
    r"give dataset\.eval_ds, or take another metric",
    "eval_loss is logged only where there is evaluation data",
    verb="submit",
)
def a_sweep_by_a_loss_that_is_never_measured(case: Case) -> None:
    case.slurm(gpus_per_node=0)
    case.dataset["eval_ds"] = None
    case.config["sweep"] = {"grid": {"train_parameters.seed": [1, 2]}}


@doomed(
    r"optimizer\.name.*AdamW8bit",
    r"AdamW\b|torch\.optim",
    "'AdamW8bit' is no optimizer of torch.optim",
)
def an_optimizer_that_torch_lacks(case: Case) -> None:
    case.train["optimizer"]["name"] = "AdamW8bit"


@doomed(
    r"optimizer.*momentum",
    r"remove|arguments|allowed|SGD",
    "got an unexpected keyword argument 'momentum'",
)
def an_argument_of_another_optimizer(case: Case) -> None:
    case.train["optimizer"]["kwargs"] = {"momentum": 0.9}


@doomed(r"optimizer\.betas.*SGD", r"remove", "SGD has no such argument; remove the line")
def a_key_that_the_optimizer_lacks(case: Case) -> None:
    case.train["optimizer"] = {"name": "SGD", "lr": 1e-3, "betas": [0.9, 0.95]}


@doomed(
    r"optimizer\.name.*Adafactor",
    r"AdamW|NO_SHARD|another",
    "'Adafactor' is no optimizer of torch.optim that can be used here",
)
def an_optimizer_that_cannot_work_on_shards(case: Case) -> None:
    case.train["optimizer"] = {"name": "Adafactor", "lr": 1e-3}


@doomed(
    r"lr_scheduler_kwargs.*min_lr",
    r"remove|cosine_with_min_lr|another",
    "got an unexpected keyword argument 'min_lr'",
)
def an_argument_of_another_schedule(case: Case) -> None:
    case.train.update(lr_scheduler_type="cosine", lr_scheduler_kwargs={"min_lr": 1e-6})


@doomed(r"lora.*\brank\b.*unknown|\brank\b", r"did you mean r\b|\br\b", "rank is unknown")
def a_lora_argument_that_peft_lacks(case: Case) -> None:
    case.train["lora_peft_config"] = {"rank": 8}


@doomed(
    r"target_modules.*(query|match|no module)",
    r"q_proj",
    "Target modules {'query'} not found in the base model",
)
def adapters_on_layers_that_are_not_there(case: Case) -> None:
    case.train["lora_peft_config"] = {"r": 4, "target_modules": ["query"]}


@doomed(
    r"init_lora_weights.*pissa",
    r"gaussian|true",
    "changes the base model's weights, which adapters alone cannot carry",
)
def adapters_that_change_the_base(case: Case) -> None:
    case.train["lora_peft_config"] = {"r": 4, "init_lora_weights": "pissa"}


@doomed(
    r"layers_to_transform.*(\b7\b|2 layers)|lora.*(\b7\b|2 layers)",
    r"0|below 2|at most 1|2 layers",
    "not found in the base model",
)
def adapters_on_blocks_that_are_not_there(case: Case) -> None:
    case.train["lora_peft_config"] = {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [7],
    }


@doomed(r"model.*no weights", r"copy|download|weights", "epoch: unknown key")
def a_misspelt_key_and_no_weights(case: Case) -> None:
    """The weights come to light when the key is right"""
    case.train["epoch"] = 3
    (case.model / "model.safetensors").unlink()


@doomed(r"dataset.*section is missing", r"train_ds", "dataset: section is missing")
def nothing_to_train_on(case: Case) -> None:
    case.slurm(gpus_per_node=0)
    del case.config["dataset"]


@doomed(
    r"target_modules.*input_layernorm",
    r"q_proj|linear",
    "is not supported. Currently, only the following modules are supported",
)
def adapters_on_layers_that_take_none(case: Case) -> None:
    case.train["lora_peft_config"] = {"r": 4, "target_modules": ["input_layernorm"]}


@doomed(
    r"target_modules.*(empty|nothing|no )",
    r"remove|q_proj|all-linear",
    "No `target_modules` passed",
)
def adapters_nowhere(case: Case) -> None:
    case.train["lora_peft_config"] = {"r": 4, "target_modules": []}


@doomed(
    r"layers_to_transform.*target_modules|target_modules.*layers_to_transform",
    r"list|remove",
    "`layers_to_transform` cannot be used when `target_modules` is a str",
)
def adapters_on_all_layers_of_some_blocks(case: Case) -> None:
    case.train["lora_peft_config"] = {
        "r": 4,
        "target_modules": "all-linear",
        "layers_to_transform": [0],
    }


@doomed(
    r"bias.*(yes|true)",
    r"none.*all.*lora_only|lora_only",
    "bias: yes is unknown",
)
def a_bias_that_peft_lacks(case: Case) -> None:
    case.train["lora_peft_config"] = {"r": 4, "bias": "yes"}


@doomed(
    r"init_lora_weights.*kaiming",
    r"true|gaussian",
    "Unknown initialization init_lora_weights='kaiming'",
)
def a_start_that_peft_lacks(case: Case) -> None:
    case.train["lora_peft_config"] = {"r": 4, "init_lora_weights": "kaiming"}


@doomed(
    r"optimizer.*nesterov",
    r"momentum",
    "Nesterov momentum requires a momentum and zero dampening",
)
def an_argument_that_needs_another(case: Case) -> None:
    case.train["optimizer"] = {"name": "SGD", "lr": 1e-3, "kwargs": {"nesterov": True}}


@doomed(r"optimizer.*foreach", r"remove", "`fused` and `foreach` cannot be `True` together")
def an_argument_against_one_of_ours(case: Case) -> None:
    case.train["optimizer"] = {"lr": 1e-3, "kwargs": {"foreach": True}}


@doomed(r"amsgrad.*'yes'", r"true or false", "amsgrad: is the text 'yes'; must be true or false")
def a_switch_in_quotes(case: Case) -> None:
    case.train["optimizer"] = {"lr": 1e-3, "kwargs": {"amsgrad": "yes"}}


@doomed(r"momentum.*-0\.9", r"number, at least 0", "momentum: is the number -0.9; must be a number")
def a_negative_momentum(case: Case) -> None:
    case.train["optimizer"] = {"name": "SGD", "lr": 1e-3, "kwargs": {"momentum": -0.9}}


@doomed(
    r"momentum.*number 9", r"below 1", "finished: .../output/final-model", severities=("warning",)
)
def a_momentum_without_its_point(case: Case) -> None:
    """Silent: the loss grows until it is no number"""
    case.train["optimizer"] = {"name": "SGD", "lr": 1.0, "kwargs": {"momentum": 9}}


@doomed(r"maximize.*grow", r"remove", "finished: .../output/final-model", severities=("warning",))
def a_loss_that_is_made_to_grow(case: Case) -> None:
    """Silent: the model gets worse with every step"""
    case.train["optimizer"] = {"name": "SGD", "lr": 1e-3, "kwargs": {"maximize": True}}


@doomed(
    r"lr_scheduler_kwargs.*lr_end",
    r"below|smaller|less|0\.001",
    "lr_end (1.0) must be smaller than initial lr",
)
def a_rate_that_rises_to_its_end(case: Case) -> None:
    case.train.update(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 1.0})


@doomed(
    r"lr_scheduler_kwargs.*wait",
    r"remove|patience|allowed",
    "got an unexpected keyword argument 'wait'",
)
def an_argument_that_the_plateau_lacks(case: Case) -> None:
    case.train.update(lr_scheduler_type="plateau-with-warmup", lr_scheduler_kwargs={"wait": 3})
