"""How a process loads torch and its kin. Floor 0, used by the doors that need them.

with loading():
    from vectorlm.assemble import run
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Without garbage collection: nearly all of the 600,000 objects that they make stay, and a
    quarter of the time would go into looking them through. No later collection looks at them.
    """
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        gc.enable()
