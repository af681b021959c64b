"""GraphModules that share parameters and no graph."""

from __future__ import annotations

import copy as _copy
import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from fp8fx.graph.hooks import take_over_hooks
from fp8fx.graph.values import attribute
from fp8fx.torch_internals import copy_provenance, parameter_sources, set_parameter_sources, tracer_of

__all__ = ["copy", "copy_graph", "drop", "put", "take_over"]


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Gives `new`, a GraphModule made from `old`, all that `old` holds, as it holds it, and its hooks.

    GraphModule itself takes over only what the graph uses, and every tensor as a persistent buffer.
    """
    made = new._modules
    for key in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training"):
        new.__dict__[key] = _copy.copy(old.__dict__[key])
    new.__dict__ |= {
        key: x for key, x in old.__dict__.items() if isinstance(x, Tensor)
    }  # constants, which are no buffers
    take_over_hooks(new, old)
    for name, module in made.items():
        original = old._modules[name]
        if (
            module is not None and original is not None and module is not original
        ):  # a container along the path of something used
            take_over(module, original)
            new._modules[name] = module


def copy_graph(old: fx.Graph) -> fx.Graph:
    """The same nodes once more, of no module yet."""
    graph = fx.Graph(tracer_cls=tracer_of(old))
    val_map: dict[fx.Node, fx.Node] = {}
    result: Any = graph.graph_copy(old, val_map, return_output_node=True)
    if result is not None:
        output, old_output = result
        graph.output(output, type_expr=old_output.type).meta.update(old_output.meta)
    copy_provenance(graph, old, val_map)
    return graph


def copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with a graph of its own, the same signature, and `gm`'s own parameters and submodules."""
    new = fx.GraphModule(gm, copy_graph(gm.graph), type(gm).__name__)
    new.meta.update(gm.meta)
    if (sources := parameter_sources(gm)) is not None:
        set_parameter_sources(new, sources)
    take_over(new, gm)
    return new


def own_module(gm: nn.Module, path: Iterable[str]) -> nn.Module:
    """The module at the end of this path, a copy of `gm`'s own as is every module on the way there."""
    owner = gm
    for part in path:
        child = _copy.copy(owner._modules[part])
        assert child is not None
        for key in ("_parameters", "_buffers", "_modules"):
            child.__dict__[key] = _copy.copy(child.__dict__[key])
        owner._modules[part] = owner = child
    return owner


def put(gm: nn.Module, name: str, module: nn.Module) -> None:
    """Sets a submodule by its dotted name; modules on the way there are replaced by copies, since `gm` may share them."""
    *path, last = name.split(".")
    setattr(own_module(gm, path), last, module)


def drop(gm: fx.GraphModule, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Takes these parameters and buffers out of `gm` where its graph does not read them; returns them by name.

    Modules that hold one are replaced by copies without it: `gm` may share them with the model that it was made from.
    """
    gone = {id(x) for x in tensors}
    attributes = gm.graph.find_nodes(op="get_attr")
    bodies = [n for n in attributes if isinstance(attribute(gm, str(n.target)), nn.Module)]
    read, called = (
        {str(n.target) for n in attributes},
        tuple(f"{n.target}." for n in (*gm.graph.find_nodes(op="call_module"), *bodies)),
    )
    owned = [
        (name, x)
        for name, x in itertools.chain(
            gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False)
        )
    ]
    dropped = {name: x for name, x in owned if id(x) in gone and name not in read and not name.startswith(called)}
    for name in dropped:
        *path, last = name.split(".")
        owner = own_module(gm, path)
        for held in (owner._parameters, owner._buffers):
            if last in held:
                held[last] = None  # a module's repr may look at it
        owner.__dict__.pop(last, None)
    return dropped
