"""merge: frozen linears that read the same input become one GEMM, and nothing else about the graph changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.executors import hardware
from fp8fx.graph.values import value
from fp8fx.passes.rewrite import check, decide, freeze, match, merge, replace
from tests.support.capture import Capture, after, ops

aten = torch.ops.aten
PASSES = (match, check, decide, replace, merge, freeze)
K = 16
RECIPES = ("mixed", "global", "rowwise")
recipes = pytest.mark.parametrize("recipe", RECIPES)


def op(recipe: str) -> Any:
    return getattr(torch.ops.fp8fx, f"matmul_fp8_{recipe}").default


class Siblings(nn.Module):
    """Some linears and a function of them as its forward."""

    def __init__(
        self, function: Callable[[Siblings, Tensor], Any], widths: Sequence[int] = (16, 16, 16), biases: Sequence[bool] = (False,) * 3
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        for name, n, bias in zip("qkv", widths, biases, strict=False):
            self.add_module(name, nn.Linear(K, n, bias=bias))
        self.other = nn.Linear(K, K)
        self.kn = nn.Parameter(torch.randn(K, 24) / 4)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def example(*leading: int) -> Tensor:
    return torch.randn(*(leading or (4,)), K)


def products(gm: fx.GraphModule, recipe: str = "rowwise") -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=op(recipe)))


def widths(gm: fx.GraphModule, recipe: str = "rowwise") -> list[int]:
    """N of each op, as its frozen weight has it."""
    return [gm.get_parameter(node.args[1].args[0].target).shape[0] for node in products(gm, recipe)]


def splits(gm: fx.GraphModule) -> list[list[int]]:
    """The widths of each merged op's parts."""
    found: dict[Any, list[int]] = {}
    for node in gm.graph.find_nodes(op="call_method", target="narrow"):
        found.setdefault(node.args[0], []).append(node.args[3])
    return list(found.values())


def copies(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_method", target="clone"))


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same_results(new: Any, old: Any, x: Tensor) -> None:
    """Per row, merging changes no FP8 value; a wider GEMM may sum in another order."""
    for actual, expected in zip(flat(new(x)), flat(old(x)), strict=True):
        assert (actual.dtype, actual.shape, actual.is_contiguous()) == (expected.dtype, expected.shape, expected.is_contiguous())
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def qkv(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
    return p.q(x), p.k(x), p.v(x)


# What becomes one GEMM.


@recipes
@pytest.mark.parametrize("biases", [(False,) * 3, (True,) * 3, (False, True, False), (True, False, True)], ids=str)
@pytest.mark.parametrize("n", [(16, 16, 16), (32, 8, 5)], ids=str)
def test_siblings_become_one_op_and_views_of_its_result(n: tuple[int, ...], biases: tuple[bool, ...], recipe: str) -> None:
    model, x = Siblings(qkv, n, biases), example()
    rewrite = after(PASSES, model, (x,), recipe=recipe, freeze=True)
    merged = rewrite.results[4]
    assert (merged.name, merged.count, merged.modified) == ("merge", 3, True)
    (product,) = products(rewrite.gm, recipe)
    assert widths(rewrite.gm, recipe) == [sum(n)]
    assert splits(rewrite.gm) == [list(n)]
    assert ("bias" in product.kwargs) is any(biases)
    assert tuple(value(product).shape) == (4, sum(n))
    assert ops(rewrite.gm.graph)[aten.cat.default] == 0  # frozen, not computed at each call
    assert set(rewrite.ops.values()) == {product}
    # The values of the ops by themselves, their scale the largest of the three where there is one scale a tensor.
    weights, amax = [model.get_submodule(name) for name in "qkv"], None
    if recipe != "rowwise":
        amax = torch.stack([layer.weight.abs().amax() for layer in weights]).amax()
    for layer, out in zip(weights, rewrite.gm(x), strict=True):
        weight = layer.weight if amax is None else torch.cat([layer.weight, amax.expand(1, K)])
        bias = layer.bias if amax is None or layer.bias is None else F.pad(layer.bias, (0, 1))
        expected = op(recipe)(x, weight.t(), bias=bias)[:, : layer.out_features]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_whole_numbers_come_out_bit_for_bit() -> None:
    # Scales of 1 and sums below 2**24: exact in any order, so that only another FP8 value could make a difference.
    model, x = Siblings(qkv, (32, 8, 5), (True, False, True)), torch.randint(-8, 9, (6, K)).float()
    x[:, 0] = 448
    for layer in (model.q, model.k, model.v):
        layer.weight.copy_(torch.randint(-8, 9, layer.weight.shape))
        layer.weight[:, 1] = 448
    merged, old = convert(model, (x,), recipe="rowwise", freeze=True), convert(model, recipe="rowwise")
    assert len(products(merged)) == 1
    assert all(torch.equal(a, b) for a, b in zip(merged(x), old(x), strict=True))


FORMS: dict[str, Callable[[Siblings, Tensor], Any]] = {
    "modules": lambda p, x: (p.q(x), p.k(x)),
    "F.linear": lambda p, x: (F.linear(x, p.q.weight, p.q.bias), F.linear(x, p.k.weight)),
    "addmm": lambda p, x: (torch.addmm(p.q.bias, x, p.kn[:, :16]), x @ p.kn),
    "x @ w.t()": lambda p, x: (x @ p.q.weight.t(), x @ p.k.weight.T),
    "a mixture": lambda p, x: (p.q(x), x @ p.kn, torch.addmm(p.other.bias, x, p.other.weight.t())),
    "scaled afterwards": lambda p, x: (torch.addmm(p.q.bias, x, p.q.weight.t(), alpha=2, beta=3), p.k(x)),
    "einsum": lambda p, x: (torch.einsum("...k,nk", x, p.q.weight), torch.tensordot(x, p.kn, 1), torch.einsum("mk,nk", x, p.k.weight)),
    "halves of one weight": lambda p, x: (F.linear(x, p.q.weight.chunk(2)[0]), F.linear(x, p.q.weight.chunk(2)[1])),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("known", [False, True], ids=["", "example inputs"])
def test_however_they_are_written(known: bool, form: str) -> None:
    model, x = Siblings(FORMS[form], biases=(True, True, True)), example()
    given = (x,) if known or form in ("addmm", "einsum") else None
    new = convert(model, given, recipe="rowwise", freeze=True)
    assert len(products(new)) == 1
    assert_same_results(new, convert(model, given, recipe="rowwise"), x)


@pytest.mark.parametrize("leading", [(4,), (2, 3), (1,), (1, 1), ()], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    model, x = Siblings(qkv, (8, 24, 16)), torch.randn(*leading, K)
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert len(products(new)) == 1
    assert_same_results(new, convert(model, recipe="rowwise"), x)


def test_gate_and_up_of_dynamos_graph() -> None:
    model, x = Siblings(lambda p, x: F.silu(p.q(x)) * p.k(x), (24, 24)), example()
    capture = Capture(Config(recipe="rowwise", freeze=True))
    with torch.no_grad():
        out = torch.compile(model, backend=capture, fullgraph=True)(x)
    assert widths(capture.only.after) == [48]
    torch.testing.assert_close(out, convert(model, recipe="rowwise")(x), rtol=1e-5, atol=1e-6)


def test_exported_siblings_merge_too() -> None:
    model, x = Siblings(lambda p, x: p.q(x) * p.k(x), biases=(True, False)), example()
    for ep in (torch.export.export(model, (x,)), torch.export.export(model, (x,)).run_decompositions()):
        new = convert(ep, recipe="rowwise", freeze=True)
        assert len(products(new)) == 1
        assert_same_results(new, convert(ep, recipe="rowwise"), x)


def test_another_reader_of_the_input_makes_no_difference() -> None:
    model, x = Siblings(lambda p, x: torch.relu(x) + p.q(x) + x.sum() + p.k(x) * x), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert len(products(new)) == 1
    assert_same_results(new, convert(model, recipe="rowwise"), x)


def test_a_reader_between_two_siblings_makes_no_difference() -> None:
    # k's weight and bias are read after what q's result goes into.
    def between(p: Siblings, x: Tensor) -> Tensor:
        h = torch.relu(p.q(x))
        h = p.other(h)
        return h * F.linear(x, p.k.weight, p.k.bias)

    model, x = Siblings(between, biases=(True, True)), example()
    for gm in (fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        new = convert(gm, recipe="rowwise", freeze=True)
        assert sorted(widths(new)) == [16, 32]
        assert_same_results(new, convert(gm, recipe="rowwise"), x)


def test_each_group_of_siblings_is_its_own() -> None:
    model, x = Siblings(lambda p, x: (h := p.q(x) * p.k(x), p.v(h) + p.other(h))[1]), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert widths(new) == [32, 32]
    assert_same_results(new, convert(model, recipe="rowwise"), x)


def test_an_excluded_sibling_stays_as_it_is() -> None:
    model, x = Siblings(qkv), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True, exclude="k")
    assert widths(new) == [32]
    assert ops(new.graph)["k"] == 1
    assert_same_results(new, convert(model, recipe="rowwise", exclude="k"), x)


def test_one_weight_read_twice_is_kept_once() -> None:
    model, x = Siblings(lambda p, x: p.q(x) + torch.relu(p.q(x))), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert_same_results(new, convert(model, recipe="rowwise"), x)
    assert sum(p.numel() for p in new.parameters() if p.dtype == torch.float8_e4m3fn) == K * K


# What must stay apart.


def test_nothing_is_merged_without_freeze() -> None:
    model, x = Siblings(qkv), example()
    rewrite = after(PASSES, model, (x,))
    assert [(r.name, r.count, r.modified) for r in rewrite.results[4:]] == [("merge", 0, False), ("freeze", 0, False)]
    assert len(products(rewrite.gm, "mixed")) == 3
    assert str(rewrite.gm.graph) == str(after(PASSES[:4], model, (x,)).gm.graph)


def test_one_linear_is_no_group() -> None:
    rewrite = after(PASSES, Siblings(lambda p, x: p.q(x) + p.k(torch.relu(x))), (example(),), freeze=True)
    assert (rewrite.results[4].count, rewrite.results[4].modified) == (0, False)
    assert len(products(rewrite.gm, "mixed")) == 2
    assert splits(rewrite.gm) == []


def test_weights_of_two_dtypes_stay_apart() -> None:
    model = Siblings(lambda p, x: p.q(x).float() + p.k(x.bfloat16()).float())
    model.k.bfloat16()
    capture = Capture(Config(freeze=True))
    x = example()

    def autocast(x: Tensor) -> Tensor:  # which takes weights of any dtype
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, model.q.weight) + F.linear(x, model.k.weight)

    with torch.no_grad():
        out = torch.compile(autocast, backend=capture, fullgraph=True)(x)
    assert len(products(capture.only.after, "mixed")) == 2
    torch.testing.assert_close(out, autocast(x), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("mutate", ["method", "in-place activation", "out=", "through a view"])
def test_an_input_changed_between_two_siblings_is_read_twice(mutate: str) -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1
        q = p.q(h)
        if mutate == "method":
            h.add_(1)
        elif mutate == "in-place activation":
            F.relu(h, inplace=True)
        elif mutate == "out=":
            torch.add(x, 1, out=h)
        else:
            h.t().mul_(2)
        return q, p.k(h)

    model, x = Siblings(forward), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    for actual, expected in zip(new(x), convert(model, recipe="rowwise")(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda h: h,
    "a transpose": lambda h: h.t(),
    "the diagonal": lambda h: h.diagonal(),
    "windows": lambda h: h.unfold(0, 2, 2),
    "view_as": lambda h: h.view_as(torch.empty(4, K)),
    "as_strided": lambda h: torch.as_strided(h, (2, 3), (K, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("reads", ["what is viewed", "the view"])
def test_a_change_through_any_view_whose_result_is_used_counts(reads: str, view: str) -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
        base = x * 1
        other = VIEWS[view](base)
        if reads == "what is viewed":
            read, changed = base, other
        else:  # a view with K columns again
            read, changed = torch.as_strided(other, (2, K), (K, 1)), base
        q = p.q(read)
        return q, p.k(read), changed.mul_(3).sum(), p.v(read)

    model, x = Siblings(forward), example()
    new, old = convert(model, (x,), recipe="rowwise", freeze=True), convert(model, recipe="rowwise")
    for actual, expected in zip(new(x), old(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("written", ["k.weight", "k.bias", "k.weight by a view"])
@pytest.mark.parametrize("first", [False, True], ids=["after the siblings", "before them"])
def test_a_sibling_whose_weight_or_bias_the_graph_writes_stays_apart(first: bool, written: str) -> None:
    def write(p: Siblings) -> None:
        if written == "k.weight by a view":
            p.k.weight.t()[:3].mul_(1.5)
        else:
            (p.k.bias if written == "k.bias" else p.k.weight).mul_(1.5)

    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
        if first:
            write(p)
        y = p.q(x), p.k(x), p.v(x)
        if not first:
            write(p)
        return y

    models, x = [Siblings(forward, biases=(True,) * 3) for _ in range(2)], example()
    new, old = convert(models[0], (x,), recipe="rowwise", freeze=True), convert(models[1], recipe="rowwise")
    assert [row.remark for row in new.meta["fp8fx_report"].rows] == [
        "one GEMM with v.weight",
        "" if written == "k.bias" else "not frozen: the graph writes it",
        "one GEMM with q.weight",
    ]
    before = old(x)
    assert all(torch.allclose(actual, expected, 1e-5, 1e-6) for actual, expected in zip(new(x), before, strict=True))
    assert_same_results(new, old, x)
    assert not torch.allclose(old(x)[1], before[1], 1e-3)


def test_what_else_the_graph_writes_keeps_no_siblings_apart() -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
        h = x * 1
        q = p.q(h)
        q = q + torch.sum(q, 0, True) + p.kn.add_(1).sum()
        return q, p.k(h)

    model, x = Siblings(forward), example()
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert widths(new) == [32]


def test_siblings_inside_and_outside_autocast_keep_their_dtypes() -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            q = p.q(x)
        return q, p.k(x)

    model, x = Siblings(forward), example()
    with torch.no_grad():
        out = torch.compile(model, backend=Capture(Config(freeze=True)), fullgraph=True)(x)
    assert [y.dtype for y in out] == [torch.bfloat16, torch.float32]


def test_siblings_inside_and_outside_no_grad_keep_their_history() -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            q = p.q(x)
        return q, p.k(x)

    model, x = Siblings(forward), example().requires_grad_()
    out = torch.compile(model, backend=Capture(Config(freeze=True)), fullgraph=True)(x)
    assert [y.requires_grad for y in out] == [False, True]


# Per-tensor scales.


def spread(ratio: float, **options: Any) -> tuple[Siblings, list[str], int]:
    """Three siblings, the middle one's weight `ratio` times larger; their remarks, and how many ops there are."""
    model = Siblings(qkv)
    for layer, amax in zip((model.q, model.k, model.v), (1.0, ratio, 1.0), strict=True):
        layer.weight.mul_(amax / layer.weight.abs().amax())
        layer.weight[0, 0] = amax
    new = convert(model, (example(),), freeze=True, **options)
    return model, [row.remark for row in new.meta["fp8fx_report"].rows], len(products(new, options["recipe"]))


@pytest.mark.parametrize("recipe", ["mixed", "global"])
@pytest.mark.parametrize("ratio", [100.0, 0.01], ids=str)
def test_amaxes_far_apart_stay_apart_where_a_tensor_has_one_scale(ratio: float, recipe: str) -> None:
    _, remarks, count = spread(ratio, recipe=recipe)
    assert count == 3
    for remark in remarks:
        assert "not merged with its siblings: their weights' amaxes differ by more than 64x" in remark
        assert "one GEMM with" not in remark


@pytest.mark.parametrize("recipe", ["mixed", "global"])
def test_the_limit_is_a_factor_of_64(recipe: str) -> None:
    assert [spread(ratio, recipe=recipe)[2] for ratio in (64.0, 65.0)] == [1, 3]


@pytest.mark.parametrize("recipe", ["mixed", "global"])
def test_the_amaxes_of_parts_are_their_own(recipe: str) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.v = nn.Parameter(torch.randn(128, 64)), nn.Parameter(torch.randn(64, 64))
            with torch.no_grad():
                self.qk[64:].mul_(1e-3)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [F.linear(x, w) for w in (self.qk.narrow(0, 64, 64), self.v)]

    new = convert(Parts().requires_grad_(False), (torch.randn(3, 64),), freeze=True, recipe=recipe)
    assert len(products(new, recipe)) == 2
    assert all("differ by more than 64x" in row.remark for row in new.meta["fp8fx_report"].rows)


def test_amaxes_far_apart_are_merged_where_each_row_has_its_scale() -> None:
    _, remarks, count = spread(100.0, recipe="rowwise")
    assert count == 1
    assert remarks == ["one GEMM with k.weight, v.weight", "one GEMM with q.weight, v.weight", "one GEMM with q.weight, k.weight"]


def test_zeros_have_no_amax_to_compare() -> None:
    model, x = Siblings(qkv), example()
    model.k.weight.zero_()
    new = convert(model, (x,), freeze=True)  # merged or not
    q, k, v = new(x)
    assert not k.any()
    for y, layer in ((q, model.q), (v, model.v)):
        assert (y - layer(x)).norm() / layer(x).norm() < 0.06


def test_the_amaxes_are_those_of_now() -> None:
    model = Siblings(qkv)
    assert len(products(convert(model, freeze=True), "mixed")) == 1
    model.k.weight.mul_(1e4)
    assert len(products(convert(model, freeze=True), "mixed")) == 3


def error(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm())


@recipes
@pytest.mark.parametrize("ratio", [1.0, 8.0, 60.0], ids=str)
def test_merging_costs_no_accuracy(ratio: float, recipe: str) -> None:
    model, x = nn.Module(), torch.randn(64, 256)
    model.q, model.k, model.v = nn.Linear(256, 200, bias=False), nn.Linear(256, 100), nn.Linear(256, 50, bias=False)
    model.requires_grad_(False)
    for layer, amax in zip((model.q, model.k, model.v), (1.0, ratio, ratio**0.5), strict=True):
        layer.weight.copy_(torch.randn(layer.weight.shape))
        layer.weight.mul_(amax / layer.weight.abs().amax())
    graph = fx.Graph()
    given = graph.placeholder("x")
    graph.output(tuple(graph.call_module(name, (given,)) for name in "qkv"))
    gm = fx.GraphModule(model, graph)
    merged, apart = convert(gm, (x,), recipe=recipe, freeze=True), convert(gm, recipe=recipe)
    assert len(products(merged, recipe)) == 1
    for layer, new, old in zip((model.q, model.k, model.v), merged(x), apart(x), strict=True):
        exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
        assert error(new, exact) <= 1.05 * error(old, exact)


# What reads the views.

READERS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "pointwise": (lambda y: torch.relu(y), False),
    "heads": (lambda y: y.view(2, 3, 4, 4).transpose(1, 2) * 2, False),
    "reshape": (lambda y: y.reshape(6, 16) * 2, False),
    "a view across the sliced dimension": (lambda y: y.view(-1) * 2, True),
    "rows joined": (lambda y: y.view(2, 48) * 2, True),
    "a view of a view": (lambda y: y.view(2, 3, 4, 4).transpose(1, 2).transpose(1, 2).view(2, 48) * 2, True),
    "a view after a pointwise op": (lambda y: torch.relu(y).view(-1), False),
    "another dtype's view": (lambda y: y.view(torch.int32).view(torch.float32) * 2, False),
    "flatten": (lambda y: y.flatten() * 2, False),
    "chunks": (lambda y: y.chunk(2, -1)[0] * y.chunk(2, -1)[1], False),
    "as_strided": (lambda y: torch.as_strided(y, (6, 16), (16, 1)) * 2, True),
    "its own strides": (lambda y: torch.as_strided(y, (2, 3, 4), y.stride()) * 2, False),
    "complex": (lambda y: torch.view_as_real(torch.view_as_complex(y.view(2, 3, 8, 2)) * 1j), False),
    "view_as": (lambda y: y.view_as(torch.empty(96)) * 2, True),
    "in place": (lambda y: y.add_(1).mul_(2), False),
    "reshaped in place": (lambda y: y.view(2, 3, 4, 4).mul_(2).sum((1, 2)), False),
}


@pytest.mark.parametrize("reader", [name for name in READERS if name != "its own strides"])
@pytest.mark.parametrize("n", [(16, 16, 16), (5, 16, 8)], ids=str)
def test_what_reads_a_slice_gets_what_it_got(n: tuple[int, ...], reader: str) -> None:
    function, needs_copy = READERS[reader]
    model = Siblings(lambda p, x: torch.relu(p.q(x)).sum() + function(p.k(x)).sum(-1) + torch.relu(p.v(x)).sum(), n)
    x, old = example(2, 3), convert(model, recipe="rowwise")
    known, unknown = convert(model, (x,), recipe="rowwise", freeze=True), convert(model, recipe="rowwise", freeze=True)
    for new in (known, unknown):
        assert len(products(new)) == 1
        torch.testing.assert_close(new(x), old(x), rtol=1e-5, atol=1e-4)
    if reader not in ("as_strided", "complex", "view_as"):
        assert len(copies(known)) == needs_copy  # only there
    assert len(copies(unknown)) == 3  # whatever may follow


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "reshaped": lambda y: [y.reshape(-1).mul_(3), y][1],
    "contiguous": lambda y: [y.contiguous().mul_(3), y][1],
    "flattened, and read as it was": lambda y: [r := y.flatten(), y.mul_(3), r.view(y.shape)][2],
    "rows taken and raveled": lambda y: [y.chunk(2, 0)[0].ravel().mul_(3), y][1],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("n", [(16, 16, 16), (5, 16, 8)], ids=str)
def test_what_is_changed_through_a_view_of_contiguous_memory_alone_is_copied(n: tuple[int, ...], change: str) -> None:
    def function(p: Siblings, x: Tensor) -> Tensor:
        q, k, v = p.q(x), p.k(x), p.v(x)
        return torch.relu(q).sum() + (CHANGES[change](k) * 2).sum(-1) + torch.relu(v).sum()

    model, x = Siblings(function, n), example(2, 3)
    old, new = convert(model, recipe="rowwise"), convert(model, (x,), recipe="rowwise", freeze=True)
    assert (len(products(new)), len(copies(new))) == (1, 1)
    torch.testing.assert_close(new(x), old(x), rtol=1e-5, atol=1e-4)


def test_a_graph_that_reads_strides_gets_those_it_was_traced_with() -> None:
    function = READERS["its own strides"][0]
    model, x = Siblings(lambda p, x: function(p.q(x)).sum() + function(p.k(x)).sum()), example(2, 3)
    capture = Capture(Config(recipe="rowwise", freeze=True))
    out = torch.compile(model, backend=capture, fullgraph=True)(x)
    torch.testing.assert_close(out, convert(model, recipe="rowwise")(x), rtol=1e-5, atol=1e-4)


def test_an_output_of_the_graph_is_a_tensor_of_its_own() -> None:
    def forward(p: Siblings, x: Tensor) -> tuple[Tensor, ...]:
        return p.q(x), p.k(x).view(2, 3, 4, 4).transpose(1, 2), torch.relu(p.v(x))

    model, x = Siblings(forward), example(2, 3)
    new = convert(model, (x,), recipe="rowwise", freeze=True)
    assert len(copies(new)) == 2
    assert_same_results(new, convert(model, recipe="rowwise"), x)
    outs = new(x)
    assert len({out.untyped_storage().data_ptr() for out in outs}) == 3
    assert all(out.untyped_storage().nbytes() == out.nbytes for out in outs)


@pytest.mark.parametrize("first", [True, False])
def test_a_result_may_be_changed_in_place_where_the_input_has_a_gradient(first: bool) -> None:
    def forward(p: Siblings, x: Tensor) -> Tensor:
        q, k = p.q(x), p.k(x)
        changed, other = (q, k) if first else (k, q)
        return F.relu(changed, inplace=True) * other

    model, x = Siblings(forward), example().requires_grad_()
    results = []
    for new in (
        torch.compile(model, backend=Capture(Config(recipe="rowwise", freeze=True))),
        convert(model, (x,), recipe="rowwise", freeze=True),
        convert(model, recipe="rowwise"),
    ):
        out = new(x)
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    for result in results[:2]:
        torch.testing.assert_close(result[0], results[2][0], rtol=1e-5, atol=1e-6)
        assert (result[1] - results[2][1]).norm() / results[2][1].norm() < 0.06  # the gradient is one GEMM too


@recipes
def test_the_inputs_gradient_is_the_siblings_sum(recipe: str) -> None:
    model, x = Siblings(lambda p, x: torch.cat(qkv(p, x), -1), (8, 24, 16), (True, False, True)), example().requires_grad_()
    new, grad = convert(model, (x,), recipe=recipe, freeze=True), torch.randn(4, 48)
    assert len(products(new, recipe)) == 1
    (value,), (exact,) = torch.autograd.grad(new(x), x, grad), torch.autograd.grad(model(x), x, grad)
    assert 0 < error(value, exact.double()) < 0.08


# Report, dynamic shapes, decisions.


def test_the_report_has_a_row_for_each_by_its_own_name() -> None:
    model = Siblings(lambda p, x: p.q(x) + p.k(x) + p.other(torch.relu(x)), (16, 16), (True, False))
    rows = convert(model, (example(),), freeze=True).meta["fp8fx_report"].rows
    assert [(row.path, row.name, row.m, row.k, row.n, row.reason) for row in rows] == [
        (name, f"{name}.weight", "4", "16", "16", None) for name in ("q", "k", "other")
    ]
    assert [row.remark for row in rows] == ["one GEMM with k.weight", "one GEMM with q.weight", ""]


def test_names_in_dynamos_report_are_the_models_own() -> None:
    model = nn.Sequential(Siblings(lambda p, x: p.q(x) + p.k(x)))
    capture = Capture(Config(freeze=True))
    torch.compile(model, backend=capture)(example())
    assert [(row.name, row.remark) for row in capture.only.report.rows] == [
        ("0.q.weight", "one GEMM with 0.k.weight"),
        ("0.k.weight", "one GEMM with 0.q.weight"),
    ]


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_a_varying_batch_is_compiled_no_more_often_than_unfrozen(dynamic: bool | None) -> None:
    def heads(y: Tensor) -> Tensor:
        return y.view(y.shape[0], y.shape[1], 4, 4).transpose(1, 2)

    model = Siblings(lambda p, x: (heads(p.q(x)) * heads(p.k(x)), p.v(x).view(-1)), biases=(True, False, True))
    counts, old = [], convert(model, recipe="rowwise")
    for frozen in (True, False):
        torch._dynamo.reset()
        capture = Capture(Config(recipe="rowwise", freeze=frozen))
        counter = CompileCounterWithBackend(capture)
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
        for batch, length in ((2, 3), (2, 5), (3, 5), (7, 2), (4, 1), (1, 6), (2, 0)):
            x = example(batch, length)
            for actual, expected in zip(compiled(x), old(x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert {len(products(graph.after)) for graph in capture.graphs} == {1 if frozen else 3}
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("rows", [1, 8])
def test_merged_siblings_keep_what_was_decided_for_each(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)
    with torch.no_grad():
        new = convert(Siblings(qkv), (example(rows),), recipe="rowwise", freeze=True, profit="always")
    (product,) = products(new)
    assert product.kwargs.get("weight_only", False) is (rows == 1)
    assert widths(new) == [48]


@pytest.mark.parametrize("rows", [1, 4])
def test_siblings_that_the_graph_returns_share_no_memory(rows: int) -> None:
    gm = convert(Siblings(lambda p, x: (p.q(x), p.k(x))), (example(rows),), freeze=True, profit="always")
    q, k = gm(example(rows))
    assert len(products(gm, "mixed")) == 1
    assert q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
    assert q.stride() == k.stride() == (16, 1)
