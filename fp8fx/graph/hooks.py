"""Hooks of modules: which there are, and their copies."""

from __future__ import annotations

from torch import nn

from fp8fx.graph.operators import is_known

__all__ = ["has_hooks", "is_watched", "take_over_hooks"]

HOOKS = [key for key in nn.Module().__dict__ if "hooks" in key]  # by id the hooks, or what they are called with


def take_over_hooks(new: nn.Module, old: nn.Module) -> None:
    """But for torch.export's own, which check inputs by what only its module holds."""
    held = [(key, i, x) for key in HOOKS for i, x in old.__dict__[key].items()]
    foreign = {i for _, i, x in held if getattr(x, "__module__", "").startswith("torch.export.")}
    for key, i, x in held:
        if i not in foreign:
            new.__dict__[key][i] = x
    new.__dict__["_is_full_backward_hook"] = old.__dict__["_is_full_backward_hook"]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module calls a hook of the user's, who may keep what it is given; torch's own compute weights."""
    return any(not is_known(hook) for key in HOOKS for hook in module.__dict__[key].values() if callable(hook))
