"""GraphModules that share their parameters and not their graph."""

from __future__ import annotations

import copy as copying
import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from fp8fx.graph.hooks import own_hooks, take_over_hooks
from fp8fx.graph.values import attribute
from fp8fx.torch_internals import copy_provenance, parameter_sources, set_parameter_sources, tracer_of

__all__ = ["copy", "copy_graph", "drop", "put", "set_parameter", "take_over"]

_STATE = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training")


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Gives `new`, a GraphModule made from `old`, all that `old` has, in the way that it has it, and its hooks.

    GraphModule itself takes over only what the graph uses, and every tensor as a persistent buffer.
    """
    containers = new._modules
    for key in _STATE:
        new.__dict__[key] = copying.copy(old.__dict__[key])
    # Constants are attributes, and no buffers.
    new.__dict__ |= {key: x for key, x in old.__dict__.items() if isinstance(x, Tensor)}
    take_over_hooks(new, old)
    for name, module in containers.items():
        original = old._modules[name]
        if module is None or original is None or module is original:
            continue
        # GraphModule made it, as a container on the path to something that the graph uses.
        take_over(module, original)
        new._modules[name] = module


def copy_graph(old: fx.Graph) -> fx.Graph:
    """The same nodes once more, of no module yet."""
    graph = fx.Graph(tracer_cls=tracer_of(old))
    copies: dict[fx.Node, fx.Node] = {}
    result: Any = graph.graph_copy(old, copies, return_output_node=True)
    if result is not None:
        output, old_output = result
        graph.output(output, type_expr=old_output.type).meta.update(old_output.meta)
    copy_provenance(graph, old, copies)
    return graph


def copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with a graph of its own, the same signature, and `gm`'s own parameters and submodules."""
    new = fx.GraphModule(gm, copy_graph(gm.graph), type(gm).__name__)
    new.meta.update(gm.meta)
    if (sources := parameter_sources(gm)) is not None:
        set_parameter_sources(new, sources)
    take_over(new, gm)
    return new


def _own_module(gm: nn.Module, path: Iterable[str]) -> nn.Module:
    """The module at the end of this path.

    It and every module on the way become copies, since `gm` may share them with the model that it was made from.
    """
    tensors = "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"
    owner = gm
    for part in path:
        child = copying.copy(owner._modules[part])
        assert child is not None
        for key in tensors:
            child.__dict__[key] = copying.copy(child.__dict__[key])
        own_hooks(child)
        owner._modules[part] = child
        owner = child
    return owner


def put(gm: nn.Module, name: str, module: nn.Module) -> None:
    """Sets a submodule of `gm` alone by its dotted name."""
    *path, last = name.split(".")
    setattr(_own_module(gm, path), last, module)


def set_parameter(gm: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Sets a parameter of `gm` alone by a dotted name that is free, or that a dropped tensor had."""
    *path, last = name.split(".")
    owner = _own_module(gm, path)
    owner._buffers.pop(last, None)
    owner._non_persistent_buffers_set.discard(last)
    owner.register_parameter(last, parameter)


def _read_by(graph: fx.Graph, gm: fx.GraphModule) -> tuple[set[str], tuple[str, ...]]:
    """The names of the attributes that the graph reads, and the prefixes of the modules and bodies that it calls."""
    attributes = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    bodies = [name for name in attributes if isinstance(attribute(gm, name), nn.Module)]
    modules = [str(node.target) for node in graph.find_nodes(op="call_module")]
    return attributes, tuple(f"{name}." for name in (*modules, *bodies))


def drop(gm: fx.GraphModule, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Takes these parameters and buffers out of `gm` unless its graph reads them; returns them by name."""
    gone = {id(x) for x in tensors}
    attributes, called = _read_by(gm.graph, gm)
    parameters = gm.named_parameters(remove_duplicate=False)
    buffers = gm.named_buffers(remove_duplicate=False)
    dropped = {
        name: x
        for name, x in itertools.chain(parameters, buffers)
        if id(x) in gone and name not in attributes and not name.startswith(called)
    }
    for name in dropped:
        *path, last = name.split(".")
        owner = _own_module(gm, path)
        for tensors_by_name in (owner._parameters, owner._buffers):
            if last in tensors_by_name:
                tensors_by_name[last] = None  # a module's repr may look at it
        owner.__dict__.pop(last, None)
    return dropped
