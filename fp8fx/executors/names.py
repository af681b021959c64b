"""The executors that a user can name."""

from __future__ import annotations

__all__ = ["EXECUTORS"]

EXECUTORS = ("auto", "scaled_mm", "simulated", "bitsandbytes")
