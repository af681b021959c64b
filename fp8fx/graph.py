"""FX helpers: what a node's value looks like, where it stands in the model, which nodes hold weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree

from fp8fx.errors import GraphError

__all__ = ["UNKNOWN", "attribute", "constants", "copy", "diff", "fake", "module_path", "name_of", "propagate", "value"]


class _Unknown:
    """The value of a node that cannot be told without example inputs."""

    def __repr__(self) -> str:
        return "?"


UNKNOWN: Final = _Unknown()


def value(node: fx.Node) -> Any:
    """What the node computes, tensors as fake ones: `val` (export, `propagate`) or `example_value` (Dynamo); else UNKNOWN."""
    return node.meta.get("val", node.meta.get("example_value", UNKNOWN))


def fake(node: fx.Node) -> Tensor | None:
    """The node's value where it is known to be a tensor."""
    found = value(node)
    return found if isinstance(found, Tensor) else None


def attribute(gm: fx.GraphModule, target: str) -> Any:
    """What a get_attr or call_module node's dotted target names."""
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part)
    return found


def copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with a graph of its own, the same signature, and `gm`'s own parameters and submodules."""
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    outputs = graph.graph_copy(gm.graph, val_map := {}, return_output_node=True)
    if outputs is not None:
        result, old = outputs
        graph.output(result).meta.update(old.meta)
    for old_node, node in val_map.items():
        if hasattr(old_node, "_dynamo_source"):  # Dynamo's provenance of an input; node_copy drops it
            node._dynamo_source = old_node._dynamo_source
    graph._codegen = gm.graph._codegen
    new = fx.GraphModule(gm, graph, type(gm).__name__)
    new.meta.update(gm.meta)
    originals = dict(gm.named_modules())
    for path, module in new.named_modules():  # GraphModule registers every tensor it takes over as a persistent buffer
        if module is not (original := originals[path]):
            module._non_persistent_buffers_set |= original._non_persistent_buffers_set & module._buffers.keys()
    new.training = gm.training
    return new


class _Propagator(fx.Interpreter):
    """Fills in `meta["val"]` wherever it follows from what is known, and leaves it out elsewhere."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        known = value(n)
        if known is not UNKNOWN or n.op == "output":
            return known
        if n.op == "placeholder":
            given = super().run_node(n)
        elif not n.users or any(self.env[i] is UNKNOWN for i in n.all_input_nodes):
            return UNKNOWN
        else:
            try:
                with self.mode:
                    given = super().run_node(n)
            except (
                DataDependentOutputException,
                DynamicOutputShapeException,
                UnsupportedFakeTensorException,
                UnsupportedOperatorException,
            ):
                return UNKNOWN  # depends on data, or an op without a fake implementation
        result = pytree.tree_map_only(Tensor, self._fake, given)
        if result is not UNKNOWN and not isinstance(result, nn.Module):
            n.meta["val"] = result
        return result

    def _fake(self, x: Tensor) -> Tensor:
        return x if isinstance(x, torch._subclasses.FakeTensor) else self.mode.from_tensor(x)


def propagate(gm: fx.GraphModule, example_inputs: Sequence[Any] | None) -> None:
    """Sets `meta["val"]` on `gm`'s nodes, in place. Without example inputs, only what follows from the weights alone.

    Raises:
        GraphError: the example inputs do not fit the graph.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    given = list(example_inputs or ())
    required = [n for n in placeholders if not n.args and n.target.startswith("*") is False]
    if example_inputs is not None and not len(required) <= len(given) <= len(placeholders):
        raise GraphError(
            f"got {len(given)} example inputs for a graph of {len(placeholders)} inputs "
            f"({', '.join(n.name for n in placeholders)}); pass one for each, in order"
        )
    if all(value(n) is not UNKNOWN for n in gm.graph.nodes if n.op != "output"):
        return
    mode = detect_fake_mode([value(n) for n in gm.graph.nodes] + given)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    # A default is as good as an input: an omitted one is not known to be the default.
    inputs = given + [UNKNOWN] * (len(placeholders) - len(given))
    try:
        _Propagator(gm, mode).run(*inputs, enable_io_processing=False)
    except Exception as error:
        if example_inputs is None:
            raise
        shapes = pytree.tree_map_only(Tensor, lambda x: f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}", given)
        raise GraphError(f"the graph does not run on the example inputs {shapes}: {error}") from error


def _from_outside(node: fx.Node) -> bool:
    """Whether Dynamo read the input from a module, a global or a closure, rather than from the call's arguments."""
    if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}):
        return True
    source = getattr(node, "_dynamo_source", None)
    while hasattr(source, "base"):
        source = source.base
    return type(source).__name__ == "GlobalSource" or bool(getattr(source, "is_derefed_cell_contents", False))


def constants(gm: fx.GraphModule, example_inputs: Sequence[Any] | None) -> set[fx.Node]:
    """The nodes that hold a parameter, a buffer or a constant tensor, whether as an attribute or lifted to an input."""
    found = {n for n in gm.graph.find_nodes(op="get_attr") if isinstance(attribute(gm, n.target), Tensor)}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, example in zip(placeholders, [*(example_inputs or ()), *[None] * len(placeholders)], strict=False):
        tensors = (example, value(node))
        if any(isinstance(x, nn.Parameter) for x in tensors) or _from_outside(node):
            found.add(node)
    return found


_ROOT = re.compile(r"^[LG]\['[^']*'\]")
_PART = re.compile(r"\['?([^'\]]+)'?\]|\.?([^.\[\]]+)")
_CONTAINERS = {"_modules", "_parameters", "_buffers"}


def _dotted(expression: str) -> str:
    """`L['self']._modules['fc']._parameters['weight']` -> `fc.weight`."""
    parts = (a or b for a, b in _PART.findall(_ROOT.sub("", expression)))
    return ".".join(p for p in parts if p not in _CONTAINERS)


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward the node stands in, as `layers.0.mlp`; empty for the root."""
    stack = node.meta.get("nn_module_stack")
    return _dotted(list(stack.values())[-1][0]) if stack else ""


def name_of(node: fx.Node) -> str:
    """The name of a parameter, buffer or constant, as the model's own state dict has it where that can be told."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return str(node.target)
    name = source.name
    return _dotted(name() if callable(name) else name)  # a method up to torch 2.11


def diff(before: Iterable[str], after: Iterable[str]) -> str:
    """A unified diff of two listings of nodes."""
    return "\n".join(difflib.unified_diff(list(before), list(after), "before", "after", lineterm="", n=1))
