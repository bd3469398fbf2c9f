"""Kernels of liger-kernel in the place of a family's own layers. Floor 2, called by `load`."""

from __future__ import annotations

import inspect

from transformers import PretrainedConfig

from vectorlm.errors import ConfigError

# The loss is ours: theirs would have to know of learned tokens, chunks and padded vocabularies.
_NOT_TAKEN = ("cross_entropy", "fused_linear_cross_entropy")


def take_liger_kernels(config: PretrainedConfig, gpu_capability: tuple[int, int] | None) -> None:
    """Changes the family's classes in this process, so it comes before the model is made."""
    where = "train_parameters.use_liger_kernel"
    if gpu_capability is None:
        raise ConfigError(
            f"{where}: these kernels run on NVIDIA GPUs, and this run computes on the CPU; set it "
            "to false"
        )
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ConfigError(
            f"{where}: liger-kernel cannot be imported ({error}); install it: "
            "pip install 'vectorlm[kernels]', or set it to false"
        ) from error
    family = config.get_text_config().model_type
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(
            f"{where}: liger-kernel has nothing for {family}; allowed: "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}; or set it to false"
        )
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[family]
    accepted = inspect.signature(apply).parameters
    apply(**{name: False for name in _NOT_TAKEN if name in accepted})
