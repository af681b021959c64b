"""The graphs of a training step.

Each model goes through the backend and Inductor's own partitioner as on a GPU with FP8 tensor cores. Only the last
step, from graphs to kernels, is left out where there is none: the graphs are kept, and run with `_scaled_mm` emulated.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx_inner

import fp8fx

aten, prims = torch.ops.aten, torch.ops.prims
MM, SCALED_MM = aten.mm.default, aten._scaled_mm.default
E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
FP8 = (E4M3, E5M2)

Gemm = tuple[Any, torch.dtype, torch.dtype]
"""Operator, dtype of the left operand, dtype of the right one."""

FORWARD, DGRAD, WGRAD = (
    (SCALED_MM, E4M3, E4M3),
    (SCALED_MM, E5M2, E4M3),
    {"mixed": (MM, BF16, BF16), "global": (SCALED_MM, E5M2, E4M3)},
)

recipes = pytest.mark.parametrize("recipe", ["mixed", "global"])


class _Emulated(fx.Interpreter):
    """Runs a graph with `_scaled_mm` in float64: the CPU's own takes no scale per row before torch 2.13."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not SCALED_MM:
            return super().call_function(target, args, kwargs)
        a, b, scale_a, scale_b, bias, _, dtype, *_ = args
        out = (a.double() * scale_a) @ (b.double() * scale_b)
        return (out if bias is None else out + bias).to(dtype)


# What changes no value, or only its format.
_SAME = (
    *(aten.permute.default, aten.t.default, aten.view.default, aten.view.dtype, aten.expand.default, aten.slice.Tensor),
    *(aten.abs.default, aten.clone.default, aten.constant_pad_nd.default, prims.convert_element_type.default),
)


def first(node: fx.Node) -> fx.Node:
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found


def is_reciprocal(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.target is prims.convert_element_type.default
        and first(node).target is aten.reciprocal.default
    )


def origin(node: fx.Node) -> fx.Node:
    """What `node` holds the values of, behind views, padding, casts and the multiplication by a scale's reciprocal."""
    while node.target in _SAME or (node.target is aten.mul.Tensor and is_reciprocal(node.args[1])):
        node = first(node)
    return node


def value(node: fx.Node) -> Tensor:
    found = node.meta["val"]
    assert isinstance(found, Tensor)
    return found


def calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in targets]


def results(graph: fx.Graph) -> list[fx.Node | None]:
    (output,) = graph.find_nodes(op="output")
    return list(output.args[0])


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    a, b = node.args[:2]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    return a, b


def gemm(node: fx.Node) -> Gemm:
    a, b = operands(node)
    return node.target, value(a).dtype, value(b).dtype


@dataclass(frozen=True)
class Step:
    """The graphs of one step, as Inductor's code generation gets them; the backward graph is empty where there is none.

    A tensor goes by one name in both: what is saved is a placeholder of the backward graph, what is recomputed a node
    again.

    Attributes:
        parameters: the name of a parameter's placeholder, by the parameter's own.
    """

    forward: fx.Graph
    backward: fx.Graph
    parameters: dict[str, str]

    @property
    def saved(self) -> list[fx.Node]:
        """The tensors that the forward graph computes and keeps for the backward graph, behind the model's one
        output."""
        return [
            n
            for n in results(self.forward)[1:]
            if n is not None and n.op != "placeholder" and isinstance(n.meta["val"], Tensor)
        ]

    def name(self, node: fx.Node) -> str:
        """The name of what `node` holds the values of, whichever graph computes it."""
        found = origin(node)
        return next((origin(n).name for n in self.saved if n.name == found.name), found.name)

    def weight(self, linear: str) -> str:
        """The name of a linear's weight; `linear` may be a parameter itself."""
        return self.parameters.get(linear) or self.parameters[f"{linear}.weight"]

    def reading(self, graph: fx.Graph, name: str) -> list[fx.Node]:
        """The GEMMs that have `name` as an operand."""
        return [n for n in calls(graph, SCALED_MM, MM, aten.addmm.default) if name in map(self.name, operands(n))]

    def wgrad(self, linear: str) -> fx.Node | None:
        """What computes the gradient of a linear's weight.

        The backward graph returns a gradient for each input of the forward graph.
        """
        inputs = [node.name for node in self.forward.find_nodes(op="placeholder")]
        gradient = results(self.backward)[inputs.index(self.weight(linear))]
        return None if gradient is None else origin(gradient)

    def gemms(self, linear: str) -> tuple[list[Gemm], list[Gemm], list[Gemm]]:
        """Of forward and of backward, those that read the linear's weight; and the one that computes the weight's
        gradient."""
        forward, dgrad = (self.reading(graph, self.weight(linear)) for graph in (self.forward, self.backward))
        wgrad = self.wgrad(linear)
        return list(map(gemm, forward)), list(map(gemm, dgrad)), [] if wgrad is None else [gemm(wgrad)]

    def input(self, linear: str) -> str:
        """The name of what a linear multiplies with its weight in forward."""
        (node,) = self.reading(self.forward, self.weight(linear))
        return self.name(operands(node)[0])

    def amaxes(self, *graphs: fx.Graph) -> Counter[str]:
        """How often the amax of each tensor is taken."""
        return Counter(
            self.name(first(n))
            for graph in graphs or (self.forward, self.backward)
            for n in calls(graph, aten.amax.default)
        )

    def casts(self, *graphs: fx.Graph) -> Counter[str]:
        """How often each tensor is cast to FP8."""
        made = [
            n
            for graph in graphs or (self.forward, self.backward)
            for n in calls(graph, prims.convert_element_type.default)
        ]
        return Counter(self.name(n) for n in made if value(n).dtype in FP8)

    def read_by_gemms_alone(self) -> list[fx.Node]:
        """What is saved for nothing but GEMMs of backward, which read it as it is or quantized."""
        nodes = {node.name: node for node in self.backward.find_nodes(op="placeholder")}

        def alone(node: fx.Node) -> bool:
            return all(
                user.target in (SCALED_MM, MM)
                or (
                    (user.target in _SAME or user.target is aten.mul.Tensor)
                    and origin(user) is origin(node)
                    and alone(user)
                )
                for user in node.users
            )

        return [node for node in self.saved if value(node).dim() == 2 and alone(nodes[node.name])]


class Capture:
    """`torch.compile(model, backend=Capture(model, ...))`: the backend, but its graphs are kept, and on a CPU emulated.

    Attributes:
        graphs: each graph, and whether it is a backward graph.
        static: which inputs of each graph the compiler takes to stay where they are, by position.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.backend = fp8fx.Backend(fp8fx.Config(**{"profit": "always"} | options))
        self.model = model
        self.graphs: list[tuple[bool, fx.Graph]] = []
        self.static: list[list[int]] = []
        self.parameters: dict[str, str] = {}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with pytest.MonkeyPatch.context() as patch, functorch_config.patch(enable_autograd_cache=False):
            patch.setattr("fp8fx.executors.hardware.has_fp8_tensor_cores", lambda device: True)
            patch.setattr("fp8fx.lowering.compile_fx_inner", self._keep)
            return self.backend(gm, example_inputs)

    def _keep(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, is_backward: bool = False, **kwargs: Any
    ) -> Callable[..., Any]:
        graph = copy.deepcopy(gm.graph)  # Inductor goes on rewriting its own
        self.graphs.append((is_backward, graph))
        self.static.append(list(kwargs["static_input_idxs"]))
        kernels: Any = None
        if any(isinstance(x, Tensor) and x.is_cuda for x in example_inputs):
            kernels = compile_fx_inner(gm, example_inputs, is_backward=is_backward, **kwargs)

        def call(*args: Any) -> Any:
            if not is_backward:
                names = {parameter.data_ptr(): name for name, parameter in self.model.named_parameters()}
                for node, x in zip(graph.find_nodes(op="placeholder"), args, strict=True):
                    if isinstance(x, Tensor) and x.data_ptr() in names:
                        self.parameters[names[x.data_ptr()]] = node.name
            return _Emulated(gm).run(*args) if kernels is None else kernels(list(args))

        return make_boxed_func(call)

    @property
    def step(self) -> Step:
        forward, backward = (
            [graph for is_backward, graph in self.graphs if is_backward is wanted] for wanted in (False, True)
        )
        assert len(forward) == 1 and len(backward) <= 1
        if not backward:
            backward.append(fx.Graph())
            backward[0].output([None] * len(forward[0].find_nodes(op="placeholder")))
        return Step(forward[0], backward[0], self.parameters)


def training_step(model: nn.Module, *args: Any, **options: Any) -> Step:
    """The step's graphs; without a backward one where nothing needs a gradient."""
    torch._dynamo.reset()
    capture = Capture(model, **options)
    out = torch.compile(model, backend=capture, fullgraph=True, dynamic=False)(*args)
    if out.requires_grad:
        out.sum().backward()
    return capture.step


def linear(k: int, n: int) -> nn.Linear:
    return nn.Linear(k, n, bias=False, dtype=BF16)


def rows(m: int = 32, dtype: torch.dtype = BF16, requires_grad: bool = True, device: str = "cpu") -> Tensor:
    return torch.randn(m, 48, dtype=dtype, requires_grad=requires_grad, device=device)


class Block(nn.Module):
    """Two halves of a transformer's block: three siblings and an output, then SwiGLU, each behind a norm."""

    LINEARS = ("q", "k", "v", "o", "gate", "up", "down")

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(48, dtype=BF16), nn.LayerNorm(48, dtype=BF16)
        self.q, self.k, self.v, self.o = (linear(48, 48) for _ in range(4))
        self.gate, self.up, self.down = linear(48, 96), linear(48, 96), linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.o(self.q(y) * self.k(y) + self.v(y))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def steps_of_a_block(device: str) -> dict[str, Step]:
    """A training step of Block under each recipe."""
    model, x = Block().to(device), rows(80, device=device)  # more rows than few
    return {recipe: training_step(model, x, recipe=recipe) for recipe in ("mixed", "global")}


def gradients(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(call(x).square().sum(), (x, *model.parameters())))


class Chosen(nn.Module):
    """Linears that each leave one GEMM in high precision, and one that does not."""

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.op = getattr(torch.ops.fp8fx, f"matmul_fp8_{recipe}")
        self.a, self.b, self.c = (
            nn.Parameter(torch.randn(n, k, dtype=BF16)) for n, k in ((64, 48), (80, 64), (96, 80))
        )
        self.head = linear(96, 112)

    def forward(self, x: Tensor) -> Tensor:
        x = self.op(x, self.a.t(), forward=False)
        x = self.op(x, self.b.t(), dgrad=False)
        x = self.op(x, self.c.t(), wgrad=False)
        return self.head(x)


def assert_chosen_gemms_stay_in_high_precision(recipe: str, device: str) -> None:
    step, exact = training_step(Chosen(recipe).to(device), rows(device=device), recipe=recipe), (MM, BF16, BF16)
    assert step.gemms("a") == ([exact], [DGRAD], [WGRAD[recipe]])
    assert step.gemms("b") == ([FORWARD], [exact], [WGRAD[recipe]])
    assert step.gemms("c") == ([FORWARD], [DGRAD], [exact])
    assert step.gemms("head") == ([FORWARD], [DGRAD], [WGRAD[recipe]])
    # Every weight; every input and gradient but a's and b's, which under mixed are not quantized for wgrad.
    assert list(step.amaxes().values()) == [1] * (4 + (4 + 4 if recipe == "global" else 3 + 3))
    for name, layouts in (("a", 1), ("b", 1), ("c", 2), ("head", 2)):
        assert step.casts()[step.weight(name)] == layouts
    (dgrad,) = step.reading(step.backward, step.weight("c"))
    assert step.casts()[step.name(operands(dgrad)[0])] == 1
