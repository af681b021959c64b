"""Shapes and dtypes of all nodes, from what is known."""

from __future__ import annotations

import copy as _copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fp8fx.errors import GraphError
from fp8fx.graph.hooks import is_watched
from fp8fx.graph.operators import is_known, tags
from fp8fx.graph.values import UNKNOWN, fake, value
from fp8fx.torch_internals import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    pytree,
)

__all__ = ["propagate"]


def _reshapes(node: fx.Node) -> bool:
    """Whether the node changes its first argument's shape or strides in place, as `x.t_()` does."""
    return node.op in ("call_function", "call_method") and torch.Tag.inplace_view in tags(node.target)


def _read_reshaped(gm: fx.GraphModule) -> bool:
    """Lets what reads a tensor after its shape changed in place read the change's result, which has the new shape.

    Dynamo's value of the tensor has the last shape. It is removed, so that `propagate` finds the first. Returns whether
    there is any.
    """
    nodes = list(gm.graph.nodes)
    places = [i for i, node in enumerate(nodes) if _reshapes(node)]
    for i in places:
        changed = nodes[i].all_input_nodes[0]
        changed.replace_all_uses_with(nodes[i], delete_user_cb=set(nodes[i + 1 :]).__contains__)
        changed.meta.pop("example_value", None)
    return bool(places)


class _Propagator(fx.Interpreter):
    """Fills in `meta["val"]` wherever it follows from what is known, and leaves it out elsewhere."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode, strict: bool) -> None:
        super().__init__(gm)
        self.mode = mode
        self.strict = strict

    def run_node(self, n: fx.Node) -> Any:
        before = value(n)
        if n.op == "placeholder" and before is not UNKNOWN:
            super().run_node(n)  # takes its input, so that the next one gets its own
        if before is not UNKNOWN or n.op == "output":
            return pytree.tree_map_only(FakeTensor, self._fake, before)
        if n.op == "placeholder":
            given = UNKNOWN if str(n.target).startswith("*") else super().run_node(n)
        elif n.op != "get_attr" and not (n.users and n.all_input_nodes) and not _reshapes(n):
            return UNKNOWN  # it may act on the outside, as _enter_autocast and _enter_inference_mode do
        elif any(self.env[i] is UNKNOWN for i in n.all_input_nodes):
            return UNKNOWN
        else:
            if _reshapes(n):
                self._keep(self.env[n.all_input_nodes[0]])
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
            except Exception as error:
                # custom_op says "no fake impl" in a plain RuntimeError. What autograd forbids to change in place,
                # no_grad may allow later.
                is_meant = "no fake impl" not in str(error) and (n.op != "call_function" or is_known(n.target))
                if self.strict and not _reshapes(n) and is_meant:
                    raise
                return UNKNOWN
        result = pytree.tree_map_only(Tensor, self._fake, given)
        if result is not UNKNOWN and not isinstance(result, nn.Module):
            n.meta["val"] = result
        return result

    def _keep(self, changing: Any) -> None:
        """Of a tensor about to change its shape, the nodes before keep the one that they had."""
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            if node.meta.get("val") is changing:
                # A view would be made anew where it is used.
                node.meta["val"] = changing.detach().requires_grad_(changing.requires_grad)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        lazy = any(is_lazy(x) for x in itertools.chain(module.parameters(), module.buffers()))
        if lazy or any(isinstance(m, torch.jit.ScriptModule) or is_watched(m) for m in module.modules()):
            return UNKNOWN
        return self._shadow(module, {})(*args, **kwargs)

    def _shadow(self, module: nn.Module, shadows: dict[nn.Module, nn.Module]) -> nn.Module:
        """A copy with fake tensors, on which a call sets what it sets: BatchNorm counts, weight_norm computes."""
        if module not in shadows:
            shadows[module] = shadow = object.__new__(type(module))
            shadow.__dict__ |= {
                key: _copy.copy(x) if isinstance(x, (list, dict, set)) else x for key, x in module.__dict__.items()
            }
            for key in ("_parameters", "_buffers"):
                shadow.__dict__[key] = {
                    name: None if x is None else self._fake(x) for name, x in module.__dict__[key].items()
                }
            children = {
                name: None if child is None else self._shadow(child, shadows) for name, child in module._modules.items()
            }
            shadow.__dict__["_modules"] = children
        return shadows[module]

    def _fake(self, x: Tensor) -> Tensor:
        # make_fx gives every value a mode of its own, and modes do not mix.
        return x if isinstance(x, FakeTensor) and x.fake_mode is self.mode else self.mode.from_tensor(x)


def _text(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _fits(x: Any, known: Tensor) -> bool:
    """Whether `x` can stand for an input traced as `known`; symbolic sizes take any."""
    if not isinstance(x, Tensor) or x.dtype != known.dtype or x.dim() != known.dim():
        return False
    return all(a == b for a, b in zip(x.shape, known.shape, strict=True) if isinstance(a, int) and isinstance(b, int))


def propagate(gm: fx.GraphModule, example_inputs: Sequence[Any] | None) -> None:
    """Sets `meta["val"]` on `gm`'s nodes, in place. Without example inputs, only what follows from the weights alone.

    A node has one value. If a tensor changes its shape in place, its node has the shape before. What reads it later
    reads the change's result.

    Raises:
        GraphError: the example inputs do not fit the graph.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    given = list(example_inputs or ())
    required = [n for n in placeholders if not n.args and not n.target.startswith("*")]
    if example_inputs is not None and not len(required) <= len(given) <= len(placeholders):
        raise GraphError(
            f"got {len(given)} example inputs for a graph of {len(placeholders)} inputs "
            f"({', '.join(n.name for n in placeholders)}); pass one for each, in order"
        )
    reshaped = _read_reshaped(gm)
    for node, x in zip(placeholders, given, strict=False):
        traced = fake(node)
        if traced is not None and not _fits(x, traced):
            if reshaped and node.meta.pop("example_value", None) is not None:
                continue  # by another name
            raise GraphError(f"the graph was traced with {node.name} as {_text(traced)}; got {_text(x)}")
    if all(value(n) is not UNKNOWN for n in gm.graph.nodes if n.op != "output"):
        return
    fakes = (x for x in pytree.tree_leaves([*map(value, gm.graph.nodes), *given]) if isinstance(x, FakeTensor))
    mode = next((x.fake_mode for x in fakes), None) or FakeTensorMode(allow_non_fake_inputs=True)
    # A default is as good as an input: an omitted one is not known to be the default.
    inputs = given + [UNKNOWN] * (len(placeholders) - len(given))
    try:
        _Propagator(gm, mode, strict=example_inputs is not None).run(*inputs, enable_io_processing=False)
    except Exception as error:
        raise GraphError(
            f"the graph does not run on the example inputs {', '.join(map(_text, given))}: {error}"
        ) from error
