"""`vectorlm check`: what a login node can know before the queue; `submit` asks, too. Floor 4."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from vectorlm.check.everything import findings, findings_beside
from vectorlm.check.finding import Finding
from vectorlm.check.said import as_object, as_text, counted, has_errors
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.errors import EXIT_OK, EXIT_USER, ClusterError, ConfigError


def check(config_path: str, overrides: Sequence[str], as_json: bool = False) -> int:
    try:
        config = load_config(config_path, overrides)
    except ConfigError as problem:
        beside = findings_beside(config_path, overrides=overrides)
        if not as_json:
            if beside:
                print(as_text(beside), end="\n\n", flush=True)
            raise
        print(_json([*_of_the_file(config_path, problem), *beside]))
        return EXIT_USER
    found = findings(config, config_path, overrides=overrides)
    if as_json:
        print(_json(found))
    else:
        _show(config_path, config, found)
    return EXIT_USER if has_errors(found) else EXIT_OK


def _of_the_file(config_path: str, problem: ConfigError) -> list[Finding]:
    lines = str(problem).splitlines()
    return [Finding("error", config_path, line, "mend the file") for line in lines]


def _json(found: Sequence[Finding]) -> str:
    return json.dumps(as_object(found), indent=2)


def _show(config_path: str, config: Config, found: Sequence[Finding]) -> None:
    if found:
        print(as_text(found), end="\n\n")
    counts = counted(found)
    if has_errors(found):
        print(f"{config_path}: a job with it would fail: {counts}")
    else:
        sound = f"sound, with {counts}" if counts else "sound"
        print(f"{config_path}: {sound} ({_summary(config)})")


def _summary(config: Config) -> str:
    train = config.train_parameters
    facts = [
        f"model {config.model}",
        "LoRA" if train.lora_peft_config is not None else "full fine-tuning",
        f"{train.max_seq_len} tokens a row",
        train.effective_precision,
        train.sharding_strategy,
        f"{train.epochs} epoch{'s' if train.epochs > 1 else ''}",
    ]
    absent = [
        f"no {name}: only for {purpose}"
        for name, purpose, section in (
            ("dataset", "preprocessing", config.dataset),
            ("dataset_preprocess", "training", config.dataset_preprocess),
        )
        if section is None
    ]
    return ", ".join(facts + absent)


def before_submitting(
    config: Config, config_path: str, overrides: Sequence[str], prepares: bool, stops: bool
) -> None:
    """Say on standard error what was found; ClusterError when it is to stop the submission."""
    found = findings(config, config_path, overrides=overrides, prepares=prepares)
    told = [finding for finding in found if finding.severity != "note"]
    if told:
        print(as_text(told), file=sys.stderr, flush=True)
    if stops and has_errors(found):
        raise ClusterError(
            f"{config_path}: not submitted, for the job would fail: {counted(found)}, see above; "
            "to submit it all the same, add --force"
        )
