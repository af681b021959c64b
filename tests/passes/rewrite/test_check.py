"""check: what FP8 cannot compute becomes a Refusal, and the graph stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.testing._internal.two_tensor import TwoTensor

from fp8fx.convert import convert
from fp8fx.errors import ExecutorError
from fp8fx.passes.rewrite import check, match
from tests.support.capture import Capture, after


class Model(nn.Module):
    """`x @ w`, for any w."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.w)


def reason(w: Tensor, x: Tensor | None = None) -> str | None:
    """Why `x @ w` is refused; None if it is not."""
    gm = fx.symbolic_trace(Model(w))
    rewrite = after([match, check], gm, None if x is None else (x,))
    assert str(rewrite.gm.graph) == str(gm.graph)
    assert rewrite.results[1].modified is False
    assert rewrite.results[1].count == len(rewrite.refusals) == 1 - len(rewrite.matches)
    return str(rewrite.refusals[0].reason) if rewrite.refusals else None


def with_values(x: Tensor, out: Tensor) -> fx.GraphModule:
    """A graph of `x @ w`, w float32 and (8, 6), that says what its input and its output are."""
    gm = fx.symbolic_trace(Model(torch.randn(8, 6)))
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "call_function"):
            node.meta["val"] = x if node.op == "placeholder" else out
    return gm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_legal(dtype: torch.dtype) -> None:
    w = torch.randn(8, 6).to(dtype)
    for x in (
        None,
        torch.randn(8).to(dtype),
        torch.randn(4, 8).to(dtype),
        torch.randn(2, 3, 4, 8).to(dtype),
        torch.randn(0, 8).to(dtype),
    ):
        assert reason(w, x) is None


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "float64"),
        (torch.int64, "int64"),
        (torch.int8, "int8"),
        (torch.complex64, "complex64"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
    ],
)
def test_dtype_of_the_weight(dtype: torch.dtype, name: str) -> None:
    assert reason(torch.ones(8, 6).to(dtype)) == f"the weight is {name}; FP8 takes float32, float16 or bfloat16"


def test_dtype_of_the_input() -> None:
    w, x = torch.randn(8, 6).double(), torch.randn(4, 8).double()
    assert reason(w, x) == "the input is float64; FP8 takes float32, float16 or bfloat16"


@pytest.mark.parametrize(
    "transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())], ids=["vmap", "grad"]
)
def test_inside_torch_func(transform: Callable[..., Any]) -> None:
    model, capture, x = Model(torch.randn(8, 6)), Capture(), torch.randn(4, 8)
    compiled = torch.compile(lambda x: (transform(model)(x), model(x)), backend=capture)
    inside, _ = compiled(x)
    torch.testing.assert_close(inside, transform(model)(x))
    assert [row.reason for row in capture.only.report.rows] == [
        "the input is inside a transform of torch.func (vmap, grad, ...)",
        None,
    ]


@pytest.mark.parametrize(("k", "n"), [(0, 6), (8, 0), (0, 0)])
def test_empty_weight(k: int, n: int) -> None:
    assert reason(torch.ones(k, n)) == f"the weight is empty: K={k}, N={n}"


def test_tensor_subclass() -> None:
    w, x = torch.randn(8, 6), torch.randn(4, 8)
    assert reason(TwoTensor(w, w)) == "the weight is a TwoTensor, not a plain tensor"
    assert reason(w, TwoTensor(x, x)) == "the input is a TwoTensor, not a plain tensor"


def test_a_module_whose_weight_is_a_tensor_subclass() -> None:
    class Custom(nn.Parameter):
        pass

    linear = nn.Linear(8, 6)
    linear.weight = Custom(linear.weight.detach())
    (refusal,) = after([match, check], nn.Sequential(linear)).refusals
    assert str(refusal.reason) == "the weight is a Custom, not a plain tensor"


@pytest.mark.parametrize(
    ("x", "shape"),
    [(torch.randn(4, 5), "(4, 5)"), (torch.randn(()), "()")],
    ids=["K differs", "0-D"],
)
def test_shapes_that_do_not_multiply(x: Tensor, shape: str) -> None:
    # Example inputs that do not run are an error before this pass; only a graph with values of its own gets here.
    rewrite = after([match, check], with_values(x, torch.empty(0)))
    assert [str(r.reason) for r in rewrite.refusals] == [f"the input's shape {shape} does not multiply with K=8"]


def test_two_dtypes_meet_under_autocast() -> None:
    rewrite = after([match, check], with_values(torch.randn(4, 8).bfloat16(), torch.empty(4, 6).bfloat16()))
    assert rewrite.refusals == []


def test_a_module_s_weight_is_checked_too() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5).double())
    rewrite = after([match, check], model)
    assert [m.path for m in rewrite.matches] == ["0"]
    assert [(r.path, r.name, r.spelling) for r in rewrite.refusals] == [("1", "1.weight", "Linear")]


def test_sizes_stay_with_the_refusal() -> None:
    (refusal,) = after([match, check], nn.Sequential(nn.Linear(8, 6).double()), (torch.randn(4, 8).double(),)).refusals
    assert (refusal.m, refusal.k, refusal.n) == (4, 8, 6)


def test_several_users_and_a_chain() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)).double()) + self.b(x.double())

    rewrite = after([match, check], Chain(), (torch.randn(4, 8),))
    assert [m.name for m in rewrite.matches] == ["a.weight"] * 2
    assert [r.name for r in rewrite.refusals] == ["b.weight"] * 2


def test_nothing_to_check() -> None:
    rewrite = after([match, check], nn.ReLU())
    assert (rewrite.matches, rewrite.refusals, rewrite.results[1].count) == ([], [], 0)


@pytest.mark.parametrize("example", [None, (torch.randn(4, 8),)], ids=["", "example inputs"])
def test_scaled_mm_on_the_cpu_is_an_error_and_nothing_changes(example: Any) -> None:
    gm = fx.symbolic_trace(Model(torch.randn(8, 6)))
    before, meta = gm.code, [dict(n.meta) for n in gm.graph.nodes]
    with pytest.raises(ExecutorError, match="executor 'scaled_mm' needs a CUDA device"):
        convert(gm, example, executor="scaled_mm")
    assert gm.code == before
    assert [dict(n.meta) for n in gm.graph.nodes] == meta


def test_the_executor_is_found_out_before_the_graph_changes() -> None:
    with pytest.raises(ExecutorError):
        after([match, check], Model(torch.randn(8, 6)), executor="scaled_mm")


def test_scaled_mm_is_no_error_where_nothing_would_run_on_it() -> None:
    assert after([match, check], Model(torch.randn(8, 6).double()), executor="scaled_mm").refusals
    assert after([match, check], nn.ReLU(), executor="scaled_mm").matches == []


def test_a_weight_on_meta_decides_no_executor() -> None:
    assert len(after([match, check], Model(torch.empty(8, 6, device="meta")), executor="scaled_mm").matches) == 1


@pytest.mark.parametrize("sparse", ["to_sparse_coo", "to_sparse_csr"])
def test_sparse_operands(sparse: str) -> None:
    w, x = torch.randn(8, 8), torch.randn(4, 8)
    kind = sparse.removeprefix("to_")
    sparse_w, sparse_x = getattr(w, sparse)(), getattr(x, sparse)()
    assert reason(sparse_w) == f"the weight is sparse: {kind}"
    assert reason(w, sparse_x) == f"the input is sparse: {kind}"
    assert torch.equal(convert(Model(sparse_w))(x), x @ sparse_w)
