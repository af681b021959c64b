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
    # pytest listens anew, three times a test, to each logger that does not propagate, of which torch has eighty. While
    # anybody listens to one of them, torch writes out every graph for it.
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith("torch.") and isinstance(logger, logging.Logger):
            logger.propagate = True
