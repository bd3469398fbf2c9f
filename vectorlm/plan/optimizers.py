"""What optimizers keep for each trained number, and what their step needs besides. Floor 1, read by
`memory`, `disk` and `duration`.

In the multiples of the trained parameters' own bytes; torch steps through many tensors at once
(`foreach`) on GPUs, which makes temporaries as large as all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vectorlm.config.schema import Optimizer

# Of torch.optim: those that need more than gradients, and what is none.
NOT_USABLE = ("LBFGS", "SparseAdam", "Optimizer")
# torch (up to 2.13) cannot run their steps on tensors that are spread over ranks.
NOT_ON_SHARDS = ("Adafactor", "Rprop")
# Whose fused kernels torch can run on such tensors; used unless `kwargs` says otherwise.
FUSED = ("Adam", "AdamW")


@dataclass(frozen=True)
class Keeps:
    states: float
    temporaries: float


_KEEPS = {
    "Adam": Keeps(2, 0),  # fused, see `vectorlm.optim`
    "AdamW": Keeps(2, 0),
    "SGD": Keeps(0, 0),
    "Adadelta": Keeps(2, 2),
    "Adagrad": Keeps(1, 2),
    "Adamax": Keeps(2, 1),
    "ASGD": Keeps(1, 1),
    "NAdam": Keeps(2, 2),
    "RAdam": Keeps(2, 2),
    "RMSprop": Keeps(1, 1),
    "Muon": Keeps(1, 1),
}
_UNKNOWN = Keeps(2, 2)
# Arguments that add a state.
_ADDS = {
    "SGD": ("momentum",),
    "RMSprop": ("momentum", "centered"),
    "Adam": ("amsgrad",),
    "AdamW": ("amsgrad",),
}
_DECAYS_APART = ("Adam", "AdamW", "Muon")  # weight decay without a copy of gradients


def keeps(optimizer: Optimizer) -> Keeps:
    known = _KEEPS.get(optimizer.name, _UNKNOWN)
    added = sum(bool(optimizer.kwargs.get(name)) for name in _ADDS.get(optimizer.name, ()))
    temporaries = known.temporaries
    if optimizer.name in FUSED and optimizer.kwargs.get("fused") is False:
        temporaries += 1
    if optimizer.weight_decay and optimizer.name not in _DECAYS_APART:
        temporaries += 1
    if optimizer.kwargs.get("foreach") is False:
        temporaries = 0  # one tensor at a time
    return Keeps(known.states + added, temporaries)
