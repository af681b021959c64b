"""However a linear is written, the rewritten graph is the one written by hand, and so is every bit of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.recipes.recipe import RECIPES
from tests.support.capture import Capture, assert_same_graph, ops

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
    """An einsum or tensordot over the input's last dimension and this weight (K, N), one form for each number of dimensions."""

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
    Form("addmm all by keyword", lambda p, x: torch.addmm(input=p.bias, mat1=x, mat2=p.stored, alpha=1, beta=1), with_bias, (2,)),
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
    Form("W @ x", lambda p, x: p.weight @ x.mT, lambda p, x, mm: turned(mm(turned(x.mT), p.weight.t())).contiguous(), (2, 3, 4), True),
    Form("W @ vector", lambda p, x: p.weight @ x, lambda p, x, mm: mm(x, p.weight.t()), (1,), True),
    Form("mm(W, x)", lambda p, x: torch.mm(p.weight, x.T), lambda p, x, mm: turned(mm(turned(x.T), p.weight.t())).contiguous(), (2,), True),
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
    *contracted("einsum [...]", lambda p, x: torch.einsum("ij,nj->in", [x, p.weight]), lambda p: p.weight.permute(1, 0), 2),
    Form(
        "einsum of a view",
        lambda p, x: torch.einsum("ij,jn->in", x, p.weight.t()),
        lambda p, x, mm: (lambda w: mm(x.expand(-1, K), w))(p.weight.t()),
        (2,),
        True,
    ),
    *contracted("einsum, the weight first", lambda p, x: torch.einsum("nk,bsk->bsn", p.weight, x), lambda p: p.weight.permute(1, 0), 3),
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
        lambda p, x, mm: (lambda a, w, b: mm(a, t(w), bias=b))(x.bfloat16(), p.weight.to(torch.bfloat16), p.bias.bfloat16()),
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


def each(forms: Iterable[Form]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", list(forms), ids=lambda form: form.name)


# No tracer sees `t(constant)` in what is expected, and which expert it is has no value without Dynamo.
@each(form for form in FORMS if "constant" not in form.name and "number" not in form.name)
@pytest.mark.parametrize("recipe", RECIPES)
def test_symbolic_trace(form: Form, recipe: str) -> None:
    gm, expected = traced(Weights(form.written)), by_hand(form, recipe)
    for dims in form.dims:
        x = example(dims)
        new = convert(gm, (x,), recipe=recipe)
        assert_same_graph(new.graph, traced(expected).graph)
        assert torch.equal(new(x), expected(x)), f"{dims}-D input"
        assert new(x).stride() == gm(x).stride()
    if not form.shaped:  # example inputs change nothing
        assert_same_graph(convert(gm, recipe=recipe).graph, new.graph)


def test_symbolic_trace_of_a_constant() -> None:
    model = Weights(lambda p, x: F.linear(x, p.constant))
    new = convert(fx.symbolic_trace(model))
    assert_same_graph(new.graph, graph_of(lambda x, constant: fp8("mixed")(x, t(constant)), ("x", "constant")))
    x = example(3)
    assert torch.equal(new(x), fp8("mixed")(x, model.constant.t()))


def test_an_einsum_lies_in_memory_as_torch_s_own() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bsk,nk->nbs", x, self.w).view(-1, 64)  # its columns come first

    model, x = Model(), torch.randn(3, 64, 2)
    new = convert(model, (x,))
    assert new.meta["fp8fx_report"].rewritten
    assert torch.equal(new(x), torch.ops.fp8fx.matmul_fp8_mixed(x, model.w.t()).permute(2, 0, 1).reshape(-1, 64))


def check_dynamo(model: nn.Module, expected: nn.Module, x: Tensor, recipe: str) -> None:
    capture, plain = Capture(Config(recipe=recipe)), Capture()
    out = torch.compile(model, backend=capture)(x)
    torch.compile(expected, backend=plain)(x)
    assert_same_graph(capture.only.after.graph, plain.only.before.graph)
    torch.testing.assert_close(out, expected(x), rtol=0, atol=0)


@each(FORMS)
def test_dynamo(form: Form) -> None:
    check_dynamo(Weights(form.written), by_hand(form, "mixed"), example(form.dims[-1]), "mixed")


def test_dynamo_all_forms_in_one_graph() -> None:
    forms = [form for form in FORMS if 2 in form.dims]
    model = Weights(lambda p, x: [form.written(p, x) for form in forms])
    expected = Weights(lambda p, x: [form.expected(p, x, fp8("global")) for form in forms])
    check_dynamo(model, expected, example(2), "global")


EXPORTED = (
    "nn.Linear",
    "F.linear without bias",
    "F.linear sliced",
    "addmm",
    "addmm 2-D addend, alpha, beta",
    "mm",
    "@ .T",
    "F.linear constant",
)


@each(form for form in FORMS if form.name in EXPORTED)
def test_export(form: Form) -> None:
    model, expected = Weights(form.written), by_hand(form, "mixed")
    x = example(form.dims[-1])
    new = convert(torch.export.export(model, (x,)))
    assert_same_graph(new.graph, torch.export.export(expected, (x,)).module().graph)
    assert torch.equal(new(x), expected(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda w, x: torch.mv(w, x),
        lambda w, x: w @ x,
        lambda w, x: x @ w.t(),
        lambda w, x: torch.einsum("bhk,nhk->bn", x[None, None], w[:, None]),
    ],
    ids=["mv", "@", "@ t", "einsum of one head"],
)
def test_autocast_gives_each_form_the_dtype_that_torch_gives_it(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, K))

        def forward(self, x: Tensor) -> Tensor:
            return call(self.weight, x)

    model, x = Vector(), torch.randn(K)
    new = convert(model, (x,))
    assert len(new.meta["fp8fx_report"].rewritten) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert new(x).dtype == model(x).dtype


@pytest.mark.parametrize("tracer", ["torch.export", "make_fx"])
def test_all_forms_in_one_aten_graph(tracer: str) -> None:
    forms = [form for form in FORMS if form.name != "F.linear data" and 2 in form.dims]  # export itself does not take `.data`
    model, x = Weights(lambda p, x: [form.written(p, x) for form in forms]), example(2)
    new = convert(make_fx(model)(x) if tracer == "make_fx" else torch.export.export(model, (x,)))
    counts = ops(new.graph)
    assert counts[torch.ops.fp8fx.matmul_fp8_mixed.default] == len(forms)
    assert not counts.keys() & {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default}
    torch.testing.assert_close(list(new(x)), [form.expected(model, x, fp8("mixed")) for form in forms], rtol=0, atol=0)


# ATen's own forms: a 2-D matmul between views, as torch.export's decompositions and make_fx leave it.


@dataclass(frozen=True)
class Traced:
    """What one tracer makes of a linear.

    Attributes:
        trace: the tracer.
        turn: how it transposes a weight.
        names: what it calls the input and the weights.
    """

    trace: Callable[[Callable[..., Any], Tensor, tuple[Tensor, ...]], fx.GraphModule]
    turn: Callable[[Tensor], Tensor]
    names: tuple[str, ...]


class Parameters(nn.Module):
    """A function of an input and some parameters, as a module."""

    def __init__(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList(tensors)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.tensors)


def decomposed(function: Callable[..., Any], x: Tensor, tensors: tuple[Tensor, ...]) -> fx.GraphModule:
    exported = torch.export.export(Parameters(function, tensors), (x,)).run_decompositions()
    return exported.module(check_guards=False)  # type: ignore[return-value]


TRACED = {
    "make_fx": Traced(
        lambda function, x, tensors: make_fx(Parameters(function, tensors))(x),
        aten.t.default,
        ("arg0_1", "_param_constant0", "_param_constant1"),
    ),
    "decomposed": Traced(
        decomposed,
        lambda w: aten.permute.default(w, [1, 0]),
        ("x", "tensors.0", "tensors.1"),
    ),
}

# The form; what is expected, given how to flatten x, transpose w, and unflatten y; the shapes of its weights.
ATEN: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, lambda a, mm, x, w, b: a.view(mm(a.flat(x), a.turn(w), bias=b)), ((N, K), (N,))),
    "linear without bias": (F.linear, lambda a, mm, x, w: (lambda r: a.view(mm(a.flat(x), r)))(a.turn(w)), ((N, K),)),
    "x @ w.t()": (lambda x, w: x @ w.t(), lambda a, mm, x, w: (lambda r: a.view(mm(a.flat(x), r)))(a.turn(w)), ((N, K),)),
    "x @ w": (torch.matmul, lambda a, mm, x, w: a.view(mm(a.flat(x), w)), ((K, N),)),
}


@dataclass(frozen=True)
class Views:
    """The views around a 2-D matmul; none for an input that is 2-D already."""

    traced: Traced
    shape: tuple[int, ...]

    def flat(self, x: Tensor) -> Tensor:
        return x if len(self.shape) == 2 else aten.view.default(x, [torch.Size(self.shape[:-1]).numel(), K])

    def turn(self, w: Tensor) -> Tensor:
        return self.traced.turn(w)

    def view(self, y: Tensor) -> Tensor:
        return y if len(self.shape) == 2 else aten.view.default(y, [*self.shape[:-1], N])


def graph_of(function: Callable[..., Any], names: tuple[str, ...]) -> fx.Graph:
    """The graph of a function of one input and of attributes, by name."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    nodes = [graph.placeholder(names[0]), *(graph.get_attr(name) for name in names[1:])]
    graph.output(function(*(fx.Proxy(node, tracer) for node in nodes)).node)
    return graph


@pytest.mark.parametrize("tracer", TRACED)
@pytest.mark.parametrize("form", ATEN)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_aten(tracer: str, form: str, dims: int) -> None:
    function, expected, shapes = ATEN[form]
    tensors = tuple(torch.randn(shape) for shape in shapes)
    x, how = example(dims), TRACED[tracer]
    gm = how.trace(function, x, tensors)
    new = convert(gm)
    views = Views(how, tuple(x.shape))

    def hand(*operands: Tensor) -> Tensor:
        return expected(views, fp8("mixed"), *operands)

    graph = graph_of(hand, how.names[: len(tensors) + 1])
    if tracer == "decomposed":  # returns a tuple
        (output,) = graph.find_nodes(op="output")
        output.args = (output.args,)
    for node in new.graph.find_nodes(op="call_function", target=aten._unsafe_view.default):
        node.target = aten.view.default  # which of the two a tracer writes around a matmul is torch's
    assert_same_graph(new.graph, graph)
    assert torch.equal(new(x), hand(x, *tensors))


def test_operators_called_without_their_overload() -> None:
    class Packets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 16).requires_grad_(False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            w = self.fc.weight
            return aten.linear(x, w, self.fc.bias), aten.mm(x, w.t()), aten.mm.out(x, w.t(), out=x.new_empty(4, 16))

    rows = convert(Packets(), (torch.randn(4, 32),)).meta["fp8fx_report"].rows
    assert [(row.form, row.reason) for row in rows] == [
        ("aten.linear", None),
        ("aten.mm", None),
        ("aten.mm", "called with other arguments than input, mat2"),
    ]
