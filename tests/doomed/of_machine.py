"""Packages that are missing, secrets in view, and caches that fill a small home."""

from __future__ import annotations

from tests.doomed.case import Case
from tests.doomed.entry import doomed

EITHER = ("error", "warning")


@doomed(r"enable_wandb_logging.*wandb", r"pip install.*wandb", "wandb")
def no_wandb(case: Case) -> None:
    case.config["enable_wandb_logging"] = True
    case.without("wandb")


@doomed(r"enable_tensorboard_logging.*tensorboard", r"pip install.*tensorboard", "tensorboard")
def no_tensorboard(case: Case) -> None:
    case.config["enable_tensorboard_logging"] = True
    case.without("tensorboard")


@doomed(r"lora_peft_config.*peft|peft", r"pip install.*peft", "No module named 'peft'")
def no_peft(case: Case) -> None:
    case.train["lora_peft_config"] = {"r": 4}
    case.without("peft")


@doomed(r"slurm\.launcher.*submitit|submitit", r"pip install.*submitit", "submitit", verb="submit")
def no_submitit(case: Case) -> None:
    case.slurm(gpus_per_node=0, launcher="submitit")
    case.without("submitit")


@doomed(
    r"gpus_per_node.*(CUDA|GPU)",
    r"install|pytorch\.org|gpus_per_node: 0",
    "1 ranks on CPU",
    severities=EITHER,
)
def a_torch_that_knows_no_gpus(case: Case) -> None:
    """Silent: the GPUs idle while the run crawls. As the tests' own torch is."""
    case.slurm(gpus_per_node=1)


@doomed(r"wandb_config\.api_key.*secret", r"wandb login|WANDB_API_KEY", "is a secret")
def a_key_in_the_configuration(case: Case) -> None:
    case.config["wandb_config"] = {"api_key": "0123456789abcdef0123456789abcdef01234567"}


@doomed(r"slurm\.setup.*secret", r"file", "holds a secret", verb="submit")
def a_token_in_the_shell_lines(case: Case) -> None:
    case.slurm(gpus_per_node=0, setup=["export HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz01234567"])


@doomed(
    r"(wandb_config|tags|notes).*(token|secret|key)",
    r"remove|hf auth login|HF_TOKEN|revoke",
    "finished: .../output/final-model",
    severities=EITHER,
)
def a_token_where_nobody_looks(case: Case) -> None:
    """Silent: it is written into every checkpoint, and sent to Weights & Biases."""
    case.config["wandb_config"] = {"notes": "with hf_abcdefghijklmnopqrstuvwxyz01234567"}


@doomed(
    r"huggingface/token.*(read|others|world|everybody)",
    r"chmod (600|go-)",
    "finished: .../output/final-model",
    severities=EITHER,
)
def a_token_that_everybody_can_read(case: Case) -> None:
    """Silent: until somebody uses it."""
    case.open_home()
    token = case.home / ".cache/huggingface/token"
    case.put(token, "hf_abcdefghijklmnopqrstuvwxyz01234567")
    token.chmod(0o644)


@doomed(
    r"\.netrc.*(read|others|world|everybody)",
    r"chmod (600|go-)",
    "finished: .../output/final-model",
    severities=EITHER,
)
def keys_that_everybody_can_read(case: Case) -> None:
    """Silent: where `wandb login` leaves its key."""
    case.open_home()
    netrc = case.home / ".netrc"
    case.put(netrc, "machine api.wandb.ai\n  login user\n  password 0123456789abcdef0123456789\n")
    netrc.chmod(0o644)
    case.config["enable_wandb_logging"] = True


@doomed(
    r"config\.yaml.*(changed|written|write).*(everybody|others)",
    r"chmod",
    "finished: .../output/final-model",
    severities=EITHER,
)
def a_configuration_that_everybody_can_change(case: Case) -> None:
    """Silent: `slurm.setup` holds lines that run as you."""
    case.open_home()
    case.config_path = case.home / "config.yaml"
    case.write()
    case.config_path.chmod(0o666)


@doomed(
    r"(HF_HOME|home|cache).*(free|room|full|quota)",
    r"HF_HOME",
    "No space left on device",
    seen=False,
    severities=EITHER,
    as_root=True,
)
def a_cache_on_a_home_that_is_full(case: Case) -> None:
    """The model has to be fetched yet, and would go to a home of 1 MB."""
    case.config["model"] = "someone/tiny-llama"
    case.mount = ("size=1m", case.folder / "home")
