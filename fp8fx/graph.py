"""FX helpers: what a node's value looks like, where it stands in the model, which nodes hold weights."""

from __future__ import annotations

import copy as _copy
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fp8fx.errors import GraphError
from fp8fx.operators import is_known, tags
from fp8fx.torch_internals import (
    SET_GRAD_ENABLED,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    GuardBuilder,
    HigherOrderOperator,
    LocalSource,
    TracingContext,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    copy_provenance,
    forward_mode_level,
    install_guard,
    is_module_source,
    parameter_sources,
    pytree,
    set_parameter_sources,
    source_name,
    source_of,
    storage_of,
    tracer_of,
)

__all__ = [
    "FORWARD_MODE",
    "OWN",
    "UNKNOWN",
    "Body",
    "attribute",
    "bodies",
    "call_instead",
    "computed",
    "constants",
    "copy",
    "copy_graph",
    "diff",
    "drop",
    "expression",
    "fake",
    "has_hooks",
    "hint",
    "in_forward_mode",
    "module_path",
    "name_of",
    "pin",
    "propagate",
    "put",
    "real",
    "repeats",
    "storage",
    "take_over",
    "unused",
    "value",
]


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


def hint(size: int | torch.SymInt | None) -> int | None:
    """A size as a number: that of the traced call where it is symbolic, without a guard on it; None where it is not known."""
    if isinstance(size, torch.SymInt):
        traced = size.node.hint
        return traced if isinstance(traced, int) else None  # of rows of various lengths, as a nested tensor has, it is no number
    return size


def attribute(gm: nn.Module, target: str) -> Any:
    """What a get_attr or call_module node's dotted target names."""
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part)
    return found


def unused(gm: nn.Module, base: str) -> str:
    """The dotted name `base`, with a number behind it where `gm` has something of that name."""
    for name in itertools.chain((base,), (f"{base}_{i}" for i in itertools.count(1))):
        try:
            attribute(gm, name)
        except AttributeError:
            break
    return name


def storage(x: Tensor | None) -> int | None:
    """Equal for tensors that share memory; None where the tensor does not tell."""
    try:
        return None if x is None else storage_of(x)
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, inside a transform of torch.func, or not initialized
        return None


_HOOKS = [key for key in nn.Module().__dict__ if "hooks" in key]  # by id the hooks, or what they are called with


def _take_over_hooks(new: nn.Module, old: nn.Module) -> None:
    """But for torch.export's own, which check inputs by what only its module holds."""
    held = [(key, i, x) for key in _HOOKS for i, x in old.__dict__[key].items()]
    foreign = {i for _, i, x in held if getattr(x, "__module__", "").startswith("torch.export.")}
    for key, i, x in held:
        if i not in foreign:
            new.__dict__[key][i] = x
    new.__dict__["_is_full_backward_hook"] = old.__dict__["_is_full_backward_hook"]


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Gives `new`, a GraphModule made from `old`, all that `old` holds, as it holds it, and its hooks.

    GraphModule itself takes over only what the graph uses, and every tensor as a persistent buffer.
    """
    made = new._modules
    for key in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training"):
        new.__dict__[key] = _copy.copy(old.__dict__[key])
    new.__dict__ |= {key: x for key, x in old.__dict__.items() if isinstance(x, Tensor)}  # constants, which are no buffers
    _take_over_hooks(new, old)
    for name, module in made.items():
        original = old._modules[name]
        if module is not None and original is not None and module is not original:  # a container along the path of something used
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


# The higher-order operators whose bodies run as if they stood in the graph itself.
_INLINE = {"tag_activation_checkpoint", "cond", "wrap_with_set_grad_enabled", "wrap_with_autocast"}
_INLINE |= {"invoke_subgraph", "while_loop", "scan", "map_impl"}

_STEPS = {"while_loop", "scan"}
"""Those whose gradient keeps what each step has saved in one tensor, written step by step, for which torch has no FP8 kernel."""

_HELD = "fp8fx_held"
"""In the meta of a body's input that is a weight, or a view of one, in the graph around the body: its name there."""


OWN: Final = "fp8fx_own"
"""In the meta of a body's input that no input of the call reaches in the graph around the body."""


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _is_watched(module: nn.Module) -> bool:
    """Whether a call of the module calls a hook of the user's, who may keep what it is given; torch's own compute weights."""
    return any(not is_known(hook) for key in _HOOKS for hook in module.__dict__[key].values() if callable(hook))


FORWARD_MODE = "inside forward-mode differentiation (torch.autograd.forward_ad)"


def in_forward_mode(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that run where forward-mode differentiation is on, around the graph or in it."""
    level, found = forward_mode_level() + 1, set()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        level += (name == "_enter_dual_level") - (name == "_exit_dual_level")
        if level > 0:
            found.add(node)
    return found


@dataclass(frozen=True)
class Body:
    """A graph inside a higher-order operator of another graph.

    Attributes:
        call: the operator's node.
        name: the attribute of the other graph's module that holds it.
        gm: a copy, whose inputs know which weight is behind them.
        barred: why nothing in it can be FP8; None if there is no reason.
    """

    call: fx.Node
    name: str
    gm: fx.GraphModule
    barred: str | None


def _needs_gradients(gm: fx.GraphModule, operand: fx.Node) -> bool:
    known = attribute(gm, str(operand.target)) if operand.op == "get_attr" else value(operand)
    return known is UNKNOWN or (isinstance(known, Tensor) and known.requires_grad)


def bodies(gm: fx.GraphModule, weight_behind: Callable[[fx.Node], fx.Node | None], own: Set[fx.Node] = frozenset()) -> Iterator[Body]:
    """The graphs inside `gm`'s higher-order operators, as often as they are called.

    `own` are the nodes that no input of the call reaches.
    """
    differentiated, grad = in_forward_mode(gm.graph), torch.is_grad_enabled()
    for node in gm.graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            grad = bool(node.args[0])
        if not isinstance(node.target, HigherOrderOperator) or node.target.name() not in _INLINE:
            continue
        arguments = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
        kind, barred = node.target.name(), FORWARD_MODE if node in differentiated else None
        if kind in _STEPS and grad and any(_needs_gradients(gm, a) for a in arguments):
            barred = f"inside a {kind} that needs gradients: torch cannot store the FP8 tensors of each step"
        for name in [str(a.target) for a in arguments if a.op == "get_attr"]:
            body = attribute(gm, name)
            if not isinstance(body, fx.GraphModule):
                continue
            body = copy(body)
            placeholders = body.graph.find_nodes(op="placeholder")
            for placeholder, operand in zip(reversed(placeholders), reversed(arguments), strict=False):  # they come last
                if (weight := weight_behind(operand)) is not None:
                    placeholder.meta[_HELD] = name_of(weight)
                if operand in own:
                    placeholder.meta[OWN] = True
            yield Body(node, name, body, barred)


def call_instead(body: Body, name: str) -> None:
    """Has the body's own call run what `name` holds."""
    graph, (old,) = body.call.graph, {a for a in body.call.all_input_nodes if a.op == "get_attr" and a.target == body.name}
    with graph.inserting_before(body.call):
        body.call.replace_input_with(old, graph.get_attr(name))
    if body.call.target is torch.ops.higher_order.invoke_subgraph:  # AOTAutograd takes bodies of one identifier for the same
        body.call.update_arg(1, name)
    if not old.users:
        graph.erase_node(old)


def _reshapes(node: fx.Node) -> bool:
    """Whether the node changes its first argument's shape or strides in place, as `x.t_()` does."""
    return node.op in ("call_function", "call_method") and torch.Tag.inplace_view in tags(node.target)


def _read_reshaped(gm: fx.GraphModule) -> bool:
    """Lets what reads a tensor after its shape changed in place read the change's result: the same tensor, under its new shape.

    Dynamo's value of it is of the last shape: gone, for `propagate` to find the first. Returns whether there is any.
    """
    nodes = list(gm.graph.nodes)
    found = [i for i, node in enumerate(nodes) if _reshapes(node)]
    for i in found:
        changed = nodes[i].all_input_nodes[0]
        changed.replace_all_uses_with(nodes[i], delete_user_cb=set(nodes[i + 1 :]).__contains__)
        changed.meta.pop("example_value", None)
    return bool(found)


class _Propagator(fx.Interpreter):
    """Fills in `meta["val"]` wherever it follows from what is known, and leaves it out elsewhere."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode, strict: bool) -> None:
        super().__init__(gm)
        self.mode, self.strict = mode, strict

    def run_node(self, n: fx.Node) -> Any:
        known = value(n)
        if known is not UNKNOWN or n.op == "output":
            return pytree.tree_map_only(FakeTensor, self._fake, known)
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
                # As custom_op says it, in a plain RuntimeError. What autograd forbids to change in place, no_grad may allow later.
                told = "no fake impl" not in str(error) and (n.op != "call_function" or is_known(n.target))
                if self.strict and not _reshapes(n) and told:
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
                node.meta["val"] = changing.detach().requires_grad_(changing.requires_grad)  # a view would be made anew where it is used

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        lazy = any(is_lazy(x) for x in itertools.chain(module.parameters(), module.buffers()))
        if lazy or any(isinstance(one, torch.jit.ScriptModule) or _is_watched(one) for one in module.modules()):
            return UNKNOWN
        return self._shadow(module, {})(*args, **kwargs)

    def _shadow(self, module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
        """A copy with fake tensors: whatever a call sets or appends, as what BatchNorm counts and weight_norm computes, is set there."""
        if module not in made:
            made[module] = shadow = object.__new__(type(module))
            shadow.__dict__ |= {key: _copy.copy(x) if isinstance(x, (list, dict, set)) else x for key, x in module.__dict__.items()}
            for key in ("_parameters", "_buffers"):
                shadow.__dict__[key] = {name: None if x is None else self._fake(x) for name, x in module.__dict__[key].items()}
            children = {name: None if child is None else self._shadow(child, made) for name, child in module._modules.items()}
            shadow.__dict__["_modules"] = children
        return made[module]

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

    A node has one value: of a tensor that changes its shape in place, the shape before; what reads it later reads the change's result.

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
        if (known := fake(node)) is not None and not _fits(x, known):
            if reshaped and node.meta.pop("example_value", None) is not None:
                continue  # by another name
            raise GraphError(f"the graph was traced with {node.name} as {_text(known)}; got {_text(x)}")
    if all(value(n) is not UNKNOWN for n in gm.graph.nodes if n.op != "output"):
        return
    fakes = (x for x in pytree.tree_leaves([*map(value, gm.graph.nodes), *given]) if isinstance(x, FakeTensor))
    mode = next((x.fake_mode for x in fakes), None) or FakeTensorMode(allow_non_fake_inputs=True)
    # A default is as good as an input: an omitted one is not known to be the default.
    inputs = given + [UNKNOWN] * (len(placeholders) - len(given))
    try:
        _Propagator(gm, mode, strict=example_inputs is not None).run(*inputs, enable_io_processing=False)
    except Exception as error:
        raise GraphError(f"the graph does not run on the example inputs {', '.join(map(_text, given))}: {error}") from error


def _from_outside(node: fx.Node) -> bool:
    """Whether the input comes from a module, a global or a closure, rather than from the call's arguments."""
    source: Any = source_of(node)
    if _HELD in node.meta:
        return True
    if source is None:  # of a part of Dynamo's graph, as DDPOptimizer splits it
        return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    if is_module_source(source):
        return True
    while hasattr(source, "base"):
        source = source.base
    if type(source).__name__ == "GlobalSource":
        return True
    # An argument that an inner function reads, as a generator expression, is in a cell, too.
    return bool(getattr(source, "is_derefed_cell_contents", False)) and not getattr(source, "is_input", False)


def constants(gm: fx.GraphModule, example_inputs: Sequence[Any] | None) -> set[fx.Node]:
    """The nodes that hold a parameter, a buffer or a constant tensor, whether as an attribute or lifted to an input."""
    found = {n for n in gm.graph.find_nodes(op="get_attr") if isinstance(attribute(gm, n.target), Tensor)}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, example in zip(placeholders, [*(example_inputs or ()), *[None] * len(placeholders)], strict=False):
        tensors = (example, value(node))
        if any(isinstance(x, nn.Parameter) for x in tensors) or _from_outside(node):
            found.add(node)
    return found


def real(gm: fx.GraphModule, example_inputs: Sequence[Any] | None, node: fx.Node) -> Tensor | None:
    """The tensor itself behind a node that holds a constant; None where only a fake one is known."""
    found: Any = None
    if node.op == "get_attr":
        found = attribute(gm, str(node.target))
    elif example_inputs is not None:
        found = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)).get(node)
    return found if isinstance(found, Tensor) and not isinstance(found, FakeTensor) else None


def pin(node: fx.Node) -> bool:
    """Has Dynamo compile anew when this constant is another tensor than now; False where the node is an input that Dynamo does not guard.

    A graph's parameters are inputs to Dynamo, which would call it with those of another model of the same class.
    """
    if node.op != "placeholder":
        return True
    context, source = TracingContext.try_get(), source_of(node)
    if context is None or source is None:
        return False
    install_guard(source.make_guard(GuardBuilder.ID_MATCH))
    held = _MODULE.match(source_name(source))
    while hasattr(source, "base"):
        source = source.base
    # Of modules that it guards Dynamo counts the compilations apart, as of a model's blocks that are compiled one by one.
    if isinstance(source, LocalSource) and held:
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))
    return True


def _own(gm: nn.Module, path: Iterable[str]) -> nn.Module:
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
    setattr(_own(gm, path), last, module)


def drop(gm: fx.GraphModule, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Takes these parameters and buffers out of `gm` where its graph does not read them; returns them by name.

    Modules that hold one are replaced by copies without it: `gm` may share them with the model that it was made from.
    """
    gone = {id(x) for x in tensors}
    attributes = gm.graph.find_nodes(op="get_attr")
    bodies = [n for n in attributes if isinstance(attribute(gm, str(n.target)), nn.Module)]
    read, called = {str(n.target) for n in attributes}, tuple(f"{n.target}." for n in (*gm.graph.find_nodes(op="call_module"), *bodies))
    owned = [
        (name, x) for name, x in itertools.chain(gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False))
    ]
    dropped = {name: x for name, x in owned if id(x) in gone and name not in read and not name.startswith(called)}
    for name in dropped:
        *path, last = name.split(".")
        owner = _own(gm, path)
        for held in (owner._parameters, owner._buffers):
            if last in held:
                held[last] = None  # a module's repr may look at it
        owner.__dict__.pop(last, None)
    return dropped


def computed(gm: fx.GraphModule, constants: set[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on `constants` alone: weights made of weights."""
    found = set(constants)
    for node in gm.graph.nodes:
        if node.op.startswith("call_") and node.all_input_nodes and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found - constants


def repeats(node: fx.Node) -> bool:
    """Whether a call computes the same of the same: it draws no random numbers, and is torch's."""
    if node.op == "call_module" or (node.op == "call_function" and not is_known(node.target)):
        return False
    return torch.Tag.nondeterministic_seeded not in tags(node.target)


def expression(node: fx.Node, constants: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """What `node` is computed of: the constants, and the nodes from there to `node`, both in the graph's order; None if of more, or not
    to the same in every call."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current in constants:
            continue
        if not current.op.startswith("call_") or not current.all_input_nodes or not repeats(current):
            return None
        pending += [source for source in current.all_input_nodes if source not in seen]
        seen.update(current.all_input_nodes)
    ordered = sorted(seen)
    return [n for n in ordered if n in constants], [n for n in ordered if n not in constants]


_ROOT = re.compile(r"^[LG]\['[^']*'\]")
_MODULE = re.compile(_ROOT.pattern + r"\._(modules|parameters|buffers)\b")
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
    source = source_of(node)
    if source is None or _HELD in node.meta:
        return str(node.meta.get(_HELD, node.target))
    return _dotted(source_name(source))


def diff(before: Iterable[str], after: Iterable[str]) -> str:
    """A unified diff of two listings of nodes."""
    return "\n".join(difflib.unified_diff(list(before), list(after), "before", "after", lineterm="", n=1))
