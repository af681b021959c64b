"""Hooks of modules: whether there are any, and how a copy of a module gets them."""

from __future__ import annotations

from torch import nn

from fp8fx.graph.operators import is_known

__all__ = ["has_hooks", "is_watched", "take_over_hooks"]

_HOOKS = [key for key in nn.Module().__dict__ if "hooks" in key]
"""A module's dictionaries of hooks, or of what these are called with, by the hooks' ids."""


def take_over_hooks(new: nn.Module, old: nn.Module) -> None:
    """Gives `new` the hooks of `old`, but for torch.export's own, which check inputs by what only its module has."""
    hooks = [(key, id_, hook) for key in _HOOKS for id_, hook in old.__dict__[key].items()]
    foreign = {id_ for _, id_, hook in hooks if getattr(hook, "__module__", "").startswith("torch.export.")}
    for key, id_, hook in hooks:
        if id_ not in foreign:
            new.__dict__[key][id_] = hook
    new.__dict__["_is_full_backward_hook"] = old.__dict__["_is_full_backward_hook"]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module calls a hook of the user's, who may keep what it is given.

    torch's own hooks compute weights.
    """
    hooks = (hook for key in _HOOKS for hook in module.__dict__[key].values())
    return any(callable(hook) and not is_known(hook) for hook in hooks)
