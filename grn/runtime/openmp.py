"""Bounds how long waiting OpenMP threads spin.

By default they spin so long (GNU's for some milliseconds, Intel's and LLVM's for 200) that beside other busy processes,
as on laptops, login nodes and in containers, the work waits for threads that only spin. A short spin is as fast where
cores are idle, and many times faster where they are shared; results are the same.
"""

import os

# Of GNU's runtime, which PyTorch's wheels for Linux bring: rounds of a loop. Of Intel's and LLVM's (macOS, MKL builds):
# milliseconds.
SPIN = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
CHOSEN_BY_USER = ("OMP_WAIT_POLICY", *SPIN)


def bound_spinning() -> None:
    """Sets a short spin for this process and those it starts, unless the user chose a policy; before torch is imported,
    since the runtimes read their variables when they are loaded."""
    if not any(name in os.environ for name in CHOSEN_BY_USER):
        os.environ.update(SPIN)
