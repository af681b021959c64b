"""Leaves out of compilations what takes long and no test reads: what Dynamo measures and traces, vectors of the CPU."""

from __future__ import annotations

import logging


def spare() -> None:
    """For this process. The graphs that are compiled stay the same."""
    from torch._dynamo import guards
    from torch._inductor import config

    # Without a second loop over vectors the C++ compiler takes a third less. tests/inductor has them.
    config.cpp.simdlen = 1

    # It flushes the CPU's caches to measure how long the guards take, for a line in the log.
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *args: 0.0
    # pytest listens anew, three times a test, to each logger that does not propagate, of which torch has eighty. While
    # anybody listens to one of them, torch writes out every graph for it.
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith("torch.") and isinstance(logger, logging.Logger):
            logger.propagate = True
