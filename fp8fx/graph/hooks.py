"""Hooks of modules: whether there are any, and how a copy of a module gets them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fp8fx.graph.operators import is_known
from fp8fx.torch_internals import WrappedHook

__all__ = ["has_hooks", "is_watched", "own_hooks", "take_over_hooks"]

_HOOKS = [key for key in nn.Module().__dict__ if "hooks" in key]
"""A module's dictionaries of hooks, or of what these are called with, by the hooks' ids."""


def _bound_to(module: nn.Module, hook: Any) -> Any:
    """A hook of another module as this one's: one that is given its module remembers which."""
    return WrappedHook(hook.hook, module) if isinstance(hook, WrappedHook) and hook.with_module else hook


def own_hooks(new: nn.Module) -> None:
    """Makes the hooks of state dicts that a shallow copy shares with the module it was made of its own."""
    for key in ("_state_dict_hooks", "_load_state_dict_pre_hooks"):
        shared = new.__dict__[key]
        new.__dict__[key] = type(shared)((id_, _bound_to(new, hook)) for id_, hook in shared.items())


def take_over_hooks(new: nn.Module, old: nn.Module) -> None:
    """Gives `new` the hooks of `old`, but for torch.export's own, which check inputs by what only its module has."""
    hooks = [(key, id_, hook) for key in _HOOKS for id_, hook in old.__dict__[key].items()]
    foreign = {id_ for _, id_, hook in hooks if getattr(hook, "__module__", "").startswith("torch.export.")}
    for key, id_, hook in hooks:
        if id_ not in foreign:
            new.__dict__[key][id_] = _bound_to(new, hook)
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
