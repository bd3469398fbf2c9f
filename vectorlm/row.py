"""Row: one prepared training row, as preprocessing writes it and training reads it.
Floor 2, numpy only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


class Row(NamedTuple):
    """`boundaries` are where documents, or pieces of one, start in the row."""

    input_ids: Tokens
    labels: Tokens
    boundaries: Tokens
