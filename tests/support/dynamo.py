"""Has Dynamo leave out what it measures and traces of each compilation.

No test reads that, and it takes longer than the compilation.
"""

from __future__ import annotations

import logging


def spare() -> None:
    """For this process. What is compiled stays the same."""
    from torch._dynamo import guards

    # It flushes the CPU's caches to measure how long the guards take, for a line in the log.
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *args: 0.0
    # pytest listens to each logger that does not propagate. While anybody listens to this one, torch writes out every
    # graph for it.
    logging.getLogger("torch.__trace").propagate = True
