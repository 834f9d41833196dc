"""Keep freed memory in the process instead of giving it back after every batch.

glibc returns the activations of each batch to the system and faults them in again for the next one,
which made a small CNN half as fast here. The three thresholds are those of ``MALLOC_TRIM_THRESHOLD_``,
``MALLOC_TOP_PAD_`` and ``MALLOC_MMAP_THRESHOLD_``, set at run time so that nobody needs to.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

# From malloc.h; the values were measured.
_THRESHOLDS = {-1: 1 << 30, -2: 128 << 20, -3: 32 << 20}


@cache
def keep_freed_memory() -> None:
    """Raise the thresholds of this process, once; nothing happens where there is no glibc."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in _THRESHOLDS.items():
        libc.mallopt(parameter, value)
