"""Named ranges on a profiler's time line (NVTX): passes of a step, exchanges, optimizer, data.

Without a profiler a range costs a fifth of a microsecond, and passes get none at all: nvtx knows
from the start of the process whether anybody listens.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import nvtx

DOMAIN = "fastalex"


@functools.cache
def nvtx_range(name: str) -> AbstractContextManager[Any]:
    """Show the ``with`` block as ``name`` on a profiler's time line.

    One object per name is enough: it keeps nothing between entering and leaving, so that it can be
    entered again while it is open.
    """
    context: AbstractContextManager[Any] = nvtx.annotate(name, domain=DOMAIN)
    return context


def listening() -> bool:
    """Whether a profiler takes the ranges; releases of nvtx that can't tell are taken to listen."""
    get_domain = getattr(nvtx, "get_domain", None)
    return get_domain is None or hasattr(get_domain(DOMAIN), "handle")
