"""Every form of a linear, and the same written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Neither a power of two nor a multiple of 16, in two steps of the ladder, and no two sizes equal.
M, K, N = 3, 70, 200
BSZ, BSZ2 = 128, 256

aten = torch.ops.aten
t = aten.t.default

Matmul = Callable[..., Tensor]


class Weights(nn.Module):
    """Every tensor the forms use, and one form as its forward."""

    def __init__(self, form: Callable[[Weights, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.fc = nn.Linear(K, N)
        self.bare = nn.Linear(K, N, bias=False)
        self.weight = nn.Parameter(torch.randn(N, K))
        self.bias = nn.Parameter(torch.randn(N))
        self.stored = nn.Parameter(torch.randn(K, N))
        self.qkv = nn.Parameter(torch.randn(3 * N, K))
        self.flat = nn.Parameter(torch.randn(N * K))
        self.experts = nn.Parameter(torch.randn(4, N, K))
        self.addend = nn.Parameter(torch.randn(M, N))
        self.column = nn.Parameter(torch.randn(M, 1))
        self.register_buffer("buffer", torch.randn(N, K))
        self.register_buffer("index", torch.randperm(N))
        self.register_buffer("columns", torch.randperm(K))
        self.register_buffer("number", torch.tensor(2))
        self.constant = torch.randn(N, K)

    def forward(self, x: Tensor) -> Any:
        return self.form(self, x)


@dataclass(frozen=True)
class Form:
    """One way to write a linear, and what it becomes.

    Attributes:
        name: the test's id.
        written: the form.
        expected: the same with the FP8 op, given as `mm`, block sizes included.
        dims: of the input.
        shaped: whether it is told from others by the input's shape.
    """

    name: str
    written: Callable[[Weights, Tensor], Any]
    expected: Callable[[Weights, Tensor, Matmul], Any]
    dims: tuple[int, ...] = (1, 2, 3, 4)
    shaped: bool = False


def turned(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def linear(name: str, weight: Callable[[Weights], Tensor]) -> Form:
    """F.linear with this weight (N, K)."""
    return Form(f"F.linear {name}", lambda p, x: F.linear(x, weight(p)), lambda p, x, mm: mm(x, t(weight(p))))


def right(name: str, weight: Callable[[Weights], Tensor]) -> Form:
    """`x @ ` this weight (K, N)."""
    return Form(f"@ {name}", lambda p, x: x @ weight(p), lambda p, x, mm: mm(x, weight(p)))


def add(y: Tensor, addend: Tensor, **alpha: Any) -> Tensor:
    """What an addend that the op cannot take becomes."""
    return aten.add.Tensor(y, aten.type_as.default(addend, y), **alpha)


def mul(y: Tensor, alpha: Any) -> Tensor:
    return aten.mul.Tensor(y, alpha)


def in_place(p: Weights, x: Tensor) -> Tensor:
    x @= p.stored
    return x


def by_mv(p: Weights, x: Tensor, mm: Matmul) -> Tensor:
    y: Tensor = aten.type_as.default(mm(x, p.weight.t()), x)
    return y


def by_addmv(p: Weights, x: Tensor, mm: Matmul) -> Tensor:
    bias, weight = p.bias, p.weight
    y: Tensor = aten.type_as.default(mm(x, weight.t(), bias=bias), x)
    return y


def contracted(
    name: str, written: Callable[[Weights, Tensor], Tensor], weight: Callable[[Weights], Tensor], *dims: int
) -> tuple[Form, ...]:
    """An einsum or tensordot over the input's last dimension and this weight (K, N), one form for each number of
    dimensions."""

    def form(d: int) -> Form:
        return Form(name, written, lambda p, x, mm: mm(x.expand(*[-1] * (d - 1), K), weight(p)), (d,), True)

    return tuple(map(form, dims))


def with_bias(p: Weights, x: Tensor, mm: Matmul) -> Tensor:
    bias, weight = p.bias, p.stored
    return mm(x, weight, bias=bias)


def without_bias(p: Weights, x: Tensor, mm: Matmul) -> Tensor:
    _, weight = p.bias, p.stored
    return mm(x, weight)


FORMS = (
    # A module called as a whole.
    Form("nn.Linear", lambda p, x: p.fc(x), lambda p, x, mm: mm(x, t(p.fc.weight), bias=p.fc.bias)),
    Form("nn.Linear without bias", lambda p, x: p.bare(x), lambda p, x, mm: mm(x, t(p.bare.weight))),
    Form("nn.Linear by keyword", lambda p, x: p.fc(input=x), lambda p, x, mm: mm(x, t(p.fc.weight), bias=p.fc.bias)),
    # F.linear.
    Form(
        "F.linear",
        lambda p, x: F.linear(x, p.weight, p.bias),
        lambda p, x, mm: (lambda w, b: mm(x, t(w), bias=b))(p.weight, p.bias),
    ),
    Form("F.linear without bias", lambda p, x: F.linear(x, p.weight), lambda p, x, mm: mm(x, t(p.weight))),
    Form("F.linear bias=None", lambda p, x: F.linear(x, p.weight, None), lambda p, x, mm: mm(x, t(p.weight))),
    Form(
        "F.linear by keyword",
        lambda p, x: F.linear(bias=p.bias, weight=p.weight, input=x),
        lambda p, x, mm: (lambda b, w: mm(x, t(w), bias=b))(p.bias, p.weight),
    ),
    Form("F.linear weight=", lambda p, x: F.linear(x, weight=p.weight), lambda p, x, mm: mm(x, t(p.weight))),
    Form(
        "F.linear bias of a concatenation, by keyword",
        lambda p, x: F.linear(input=x, weight=p.weight, bias=torch.cat([p.bias[:5], p.bias[5:]])),
        lambda p, x, mm: (lambda w, b: mm(x, t(w), bias=b))(p.weight, torch.cat([p.bias[:5], p.bias[5:]])),
    ),
    Form(
        "F.linear bias of a computed sum",
        lambda p, x: F.linear(x, p.weight, p.bias + p.bias),
        lambda p, x, mm: (lambda w, b: mm(x, t(w), bias=b))(p.weight, p.bias + p.bias),
    ),
    # addmm.
    Form("addmm", lambda p, x: torch.addmm(p.bias, x, p.stored), with_bias, (2,)),
    Form("addmm by keyword", lambda p, x: torch.addmm(p.bias, mat1=x, mat2=p.stored), with_bias, (2,)),
    Form(
        "addmm all by keyword",
        lambda p, x: torch.addmm(input=p.bias, mat1=x, mat2=p.stored, alpha=1, beta=1),
        with_bias,
        (2,),
    ),
    Form("Tensor.addmm", lambda p, x: p.bias.addmm(x, p.stored), with_bias, (2,)),
    Form("Tensor.addmm by keyword", lambda p, x: p.bias.addmm(mat2=p.stored, mat1=x), with_bias, (2,)),
    Form("addmm beta=0", lambda p, x: torch.addmm(p.bias, x, p.stored, beta=0), without_bias, (2,)),
    Form(
        "addmm beta=0 alpha=2",
        lambda p, x: torch.addmm(p.bias, x, p.stored, beta=0, alpha=2),
        lambda p, x, mm: mul(without_bias(p, x, mm), 2),
        (2,),
    ),
    Form(
        "addmm alpha=0.5",
        lambda p, x: torch.addmm(p.bias, x, p.stored, alpha=0.5),
        lambda p, x, mm: (lambda b, w: add(mul(mm(x, w), 0.5), b))(p.bias, p.stored),
        (2,),
    ),
    Form(
        "addmm beta=0.5",
        lambda p, x: torch.addmm(p.bias, x, p.stored, beta=0.5),
        lambda p, x, mm: (lambda b, w: add(mm(x, w), b, alpha=0.5))(p.bias, p.stored),
        (2,),
    ),
    Form(
        "Tensor.addmm alpha=3 beta=-2",
        lambda p, x: p.bias.addmm(x, p.stored, alpha=3, beta=-2),
        lambda p, x, mm: (lambda b, w: add(mul(mm(x, w), 3), b, alpha=-2))(p.bias, p.stored),
        (2,),
    ),
    Form(
        "addmm 2-D addend",
        lambda p, x: torch.addmm(p.addend, x, p.stored),
        lambda p, x, mm: (lambda c, w: add(mm(x, w), c))(p.addend, p.stored),
        (2,),
    ),
    Form(
        "addmm 2-D addend, alpha, beta",
        lambda p, x: torch.addmm(p.addend, x, p.stored, alpha=0.25, beta=2),
        lambda p, x, mm: (lambda c, w: add(mul(mm(x, w), 0.25), c, alpha=2))(p.addend, p.stored),
        (2,),
    ),
    Form(
        "addmm column addend",
        lambda p, x: torch.addmm(p.column, x, p.stored),
        lambda p, x, mm: (lambda c, w: add(mm(x, w), c))(p.column, p.stored),
        (2,),
    ),
    Form(
        "addmm transposed",
        lambda p, x: torch.addmm(p.bias, x, p.weight.t()),
        lambda p, x, mm: (lambda b, w: mm(x, w, bias=b))(p.bias, p.weight.t()),
        (2,),
    ),
    # The weight on the right.
    Form("mm", lambda p, x: torch.mm(x, p.stored), lambda p, x, mm: mm(x, p.stored), (2,)),
    Form("mm mat2=", lambda p, x: torch.mm(x, mat2=p.stored), lambda p, x, mm: mm(x, p.stored), (2,)),
    Form("Tensor.mm", lambda p, x: x.mm(p.stored), lambda p, x, mm: mm(x, p.stored), (2,)),
    Form("matmul", lambda p, x: torch.matmul(x, p.stored), lambda p, x, mm: mm(x, p.stored)),
    Form("matmul by keyword", lambda p, x: torch.matmul(input=x, other=p.stored), lambda p, x, mm: mm(x, p.stored)),
    Form("Tensor.matmul", lambda p, x: x.matmul(p.stored), lambda p, x, mm: mm(x, p.stored)),
    Form("Tensor.matmul other=", lambda p, x: x.matmul(other=p.stored), lambda p, x, mm: mm(x, p.stored)),
    Form("Tensor.__matmul__", lambda p, x: x.__matmul__(p.stored), lambda p, x, mm: mm(x, p.stored)),
    Form("Tensor.__rmatmul__", lambda p, x: p.stored.__rmatmul__(x), lambda p, x, mm: mm(x, p.stored)),
    Form("linalg.matmul", lambda p, x: torch.linalg.matmul(x, p.stored), lambda p, x, mm: mm(x, p.stored)),
    Form("@=", in_place, lambda p, x, mm: mm(x, p.stored)),
    right("stored", lambda p: p.stored),
    right(".t()", lambda p: p.weight.t()),
    right(".T", lambda p: p.weight.T),
    right(".mT", lambda p: p.weight.mT),
    right(".transpose(0, 1)", lambda p: p.weight.transpose(0, 1)),
    right(".transpose(-1, -2)", lambda p: p.weight.transpose(-1, -2)),
    right(".permute(1, 0)", lambda p: p.weight.permute(1, 0)),
    right(".swapaxes(0, 1)", lambda p: p.weight.swapaxes(0, 1)),
    right("torch.t", lambda p: torch.t(p.weight)),
    right("torch.transpose", lambda p: torch.transpose(p.weight, 0, 1)),
    right("torch.permute", lambda p: torch.permute(p.weight, (1, 0))),
    right(".t().contiguous()", lambda p: p.weight.t().contiguous()),
    right("sliced, .t()", lambda p: p.qkv[N : 2 * N].t()),
    right("[1].mT", lambda p: p.experts[1].mT),
    right("buffer.t()", lambda p: p.buffer.t()),
    right("constant.T", lambda p: p.constant.T),
    # The weight on the left.
    Form(
        "W @ x",
        lambda p, x: p.weight @ x.mT,
        lambda p, x, mm: turned(mm(turned(x.mT), p.weight.t())).contiguous(),
        (2, 3, 4),
        True,
    ),
    Form("W @ vector", lambda p, x: p.weight @ x, lambda p, x, mm: mm(x, p.weight.t()), (1,), True),
    Form(
        "mm(W, x)",
        lambda p, x: torch.mm(p.weight, x.T),
        lambda p, x, mm: turned(mm(turned(x.T), p.weight.t())).contiguous(),
        (2,),
        True,
    ),
    Form("mv", lambda p, x: torch.mv(p.weight, x), by_mv, (1,), True),
    Form("Tensor.mv", lambda p, x: p.weight.mv(vec=x), by_mv, (1,), True),
    Form("addmv", lambda p, x: torch.addmv(p.bias, p.weight, x), by_addmv, (1,), True),
    Form("Tensor.addmv by keyword", lambda p, x: p.bias.addmv(vec=x, mat=p.weight, beta=1), by_addmv, (1,), True),
    Form(
        "addmv, alpha, beta",
        lambda p, x: torch.addmv(p.bias, p.weight, x, alpha=0.25, beta=2),
        lambda p, x, mm: (lambda b: add(mul(by_mv(p, x, mm), 0.25), b, alpha=2))(p.bias),
        (1,),
        True,
    ),
    # einsum, tensordot and inner.
    *contracted("einsum", lambda p, x: torch.einsum("bsk,kn->bsn", x, p.stored), lambda p: p.stored, 3),
    *contracted("einsum ...", lambda p, x: torch.einsum("...k,kn", x, p.stored), lambda p: p.stored, 1, 2, 3, 4),
    *contracted(
        "einsum [...]", lambda p, x: torch.einsum("ij,nj->in", [x, p.weight]), lambda p: p.weight.permute(1, 0), 2
    ),
    Form(
        "einsum of a view",
        lambda p, x: torch.einsum("ij,jn->in", x, p.weight.t()),
        lambda p, x, mm: (lambda w: mm(x.expand(-1, K), w))(p.weight.t()),
        (2,),
        True,
    ),
    *contracted(
        "einsum, the weight first",
        lambda p, x: torch.einsum("nk,bsk->bsn", p.weight, x),
        lambda p: p.weight.permute(1, 0),
        3,
    ),
    Form(
        "einsum to heads",
        lambda p, x: torch.einsum("bsk,khd->bhsd", x, p.stored.view(K, 10, 20)),
        lambda p, x, mm: (lambda w: mm(x.expand(-1, -1, K), w.flatten(1)).unflatten(-1, (10, 20)).permute(0, 2, 1, 3))(
            p.stored.view(K, 10, 20)
        ),
        (3,),
        True,
    ),
    Form(
        "einsum of heads",
        lambda p, x: torch.einsum("bshd,hdn->bsn", x.unflatten(-1, (7, 10)), p.stored.view(7, 10, N)),
        lambda p, x, mm: (lambda a, w: mm(a.expand(-1, -1, 7, 10).flatten(-2), w.flatten(0, 1)))(
            x.unflatten(-1, (7, 10)), p.stored.view(7, 10, N)
        ),
        (3,),
        True,
    ),
    Form(
        "einsum of one head",
        lambda p, x: torch.einsum("bshd,hdn->bsn", x.unsqueeze(-2), p.stored.unsqueeze(0)),
        lambda p, x, mm: (lambda a, w: mm(a.sum([2], True).expand(-1, -1, 1, K).flatten(-2), w.flatten(0, 1)))(
            x.unsqueeze(-2), p.stored.unsqueeze(0)
        ),
        (3,),
        True,
    ),
    Form(
        "einsum, turned round",
        lambda p, x: torch.einsum("bsk,nk->nbs", x, p.weight),
        lambda p, x, mm: mm(x.expand(-1, -1, K), p.weight.permute(1, 0)).permute(2, 0, 1).contiguous(),
        (3,),
        True,
    ),
    *contracted("tensordot", lambda p, x: torch.tensordot(x, p.stored, 1), lambda p: p.stored, 1, 2, 3, 4),
    *contracted(
        "tensordot of given dimensions",
        lambda p, x: torch.tensordot(x, p.weight, dims=([-1], [1])),
        lambda p: p.weight.permute(1, 0),
        *(2, 3),
    ),
    *contracted("inner", lambda p, x: torch.inner(x, p.weight), lambda p: p.weight.permute(1, 0), 1, 2, 3, 4),
    *contracted("Tensor.inner", lambda p, x: x.inner(p.weight), lambda p: p.weight.permute(1, 0), 2, 3),
    Form(
        "inner, the weight first",
        lambda p, x: torch.inner(p.weight, x),
        lambda p, x, mm: mm(x.expand(-1, -1, K), p.weight.permute(1, 0)).permute(2, 0, 1).contiguous(),
        (3,),
        True,
    ),
    # Parts of a weight that an index tells, and casts to fewer bits.
    linear("gathered", lambda p: p.weight[p.index]),
    linear("gathered by index_select", lambda p: p.weight.index_select(0, p.index)),
    linear("gathered columns", lambda p: p.weight[:, p.columns]),
    linear("an expert of a computed number", lambda p: p.experts[p.number]),
    Form(
        "F.linear cast",
        lambda p, x: F.linear(x.bfloat16(), p.weight.to(torch.bfloat16), p.bias.bfloat16()),
        lambda p, x, mm: (lambda a, w, b: mm(a, t(w), bias=b))(
            x.bfloat16(), p.weight.to(torch.bfloat16), p.bias.bfloat16()
        ),
    ),
    Form("@ cast", lambda p, x: x.half() @ p.stored.half(), lambda p, x, mm: mm(x.half(), p.stored.half())),
    # Views of a weight.
    linear("sliced", lambda p: p.qkv[:N]),
    linear("sliced twice", lambda p: p.qkv[N : 2 * N, :]),
    linear("narrow", lambda p: p.qkv.narrow(0, N, N)),
    linear("chunk", lambda p: p.qkv.chunk(3)[1]),
    linear("torch.chunk", lambda p: torch.chunk(p.qkv, 3, dim=0)[2]),
    linear("split", lambda p: p.qkv.split(N)[0]),
    linear("view", lambda p: p.flat.view(N, K)),
    linear("reshape", lambda p: p.flat.reshape(N, -1)),
    linear("unflatten", lambda p: p.flat.unflatten(0, (N, K))),
    linear("[2]", lambda p: p.experts[2]),
    linear("select", lambda p: p.experts.select(0, 2)),
    linear("unbind", lambda p: p.experts.unbind(0)[3]),
    linear("squeeze", lambda p: p.experts[:1].squeeze(0)),
    linear("reshape of a transposed", lambda p: p.stored.t().reshape(K, N).t()),
    linear("detach", lambda p: p.weight.detach()),
    linear("data", lambda p: p.weight.data),
    linear("buffer", lambda p: p.buffer),
    linear("constant", lambda p: p.constant),
    linear("stored", lambda p: p.stored.t()),
)


def example(dims: int) -> Tensor:
    return torch.randn({1: (K,), 2: (M, K), 3: (2, M, K), 4: (2, 2, M, K)}[dims])


def fp8(recipe: str) -> Matmul:
    """The op of a recipe, with the block sizes that K and N call for."""
    op = getattr(torch.ops.fp8fx, f"matmul_fp8_{recipe}").default
    return lambda x, weight, **bias: op(x, weight, BSZ, BSZ2, **bias)


def by_hand(form: Form, recipe: str) -> Weights:
    """The form's module as one would write it with the op itself."""
    return Weights(lambda p, x: form.expected(p, x, fp8(recipe)))


class Tracer(fx.Tracer):
    """symbolic_trace, but a view of a buffer is a node of the graph too."""

    proxy_buffer_attributes = True


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, Tracer().trace(model))


# ATen's own forms: a 2-D matmul between views, as torch.export's decompositions and make_fx leave it.


def graph_of(function: Callable[..., Any], names: tuple[str, ...]) -> fx.Graph:
    """The graph of a function of one input and of attributes, by name."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    nodes = [graph.placeholder(names[0]), *(graph.get_attr(name) for name in names[1:])]
    graph.output(function(*(fx.Proxy(node, tracer) for node in nodes)).node)
    return graph
