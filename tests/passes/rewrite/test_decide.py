"""decide: what the user leaves out or FP8 would make slower becomes a Refusal, and the graph stays as it is."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from fp8fx.config import Config
from fp8fx.executors import hardware
from fp8fx.executors.scaled_mm import ScaledMM
from fp8fx.graph.copies import copy
from fp8fx.passes.rewrite import decide, match, replace
from fp8fx.profit import measure, weighing
from fp8fx.profit.cost_model import MODEL, Times
from fp8fx.profit.times import times_on
from fp8fx.report import Report
from tests.support.capture import after
from tests.support.choices import remark_of


class Block(nn.Module):
    """A linear called as a module and one written out."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Parameter(torch.randn(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) @ self.down


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 100)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


ALL = ["layers.0.up.weight", "layers.0.down", "layers.1.up.weight", "layers.1.down", "head.weight"]


def kept(**options: Any) -> list[str]:
    """The weights of what is left to rewrite."""
    gm = fx.symbolic_trace(Model())
    rewrite = after([match, decide], gm, **options)
    assert str(rewrite.gm.graph) == str(gm.graph)
    assert rewrite.results[1].modified is False
    assert rewrite.results[1].count == len(rewrite.refusals) == 5 - len(rewrite.matches)
    return [m.name for m in rewrite.matches]


def reasons(**options: Any) -> dict[str, str]:
    """The reason for each weight that is left out."""
    return {r.name: str(r.reason) for r in after([match, decide], Model(), **options).refusals}


def test_the_default_keeps_all() -> None:
    assert kept() == ALL


@pytest.mark.parametrize(
    ("pattern", "left_out"),
    [
        ("head", ["head.weight"]),  # the module's path
        ("head.weight", ["head.weight"]),  # the weight's name
        ("layers.0", ["layers.0.down"]),  # the path of the module that a written-out linear stands in
        ("layers.0.*", ["layers.0.up.weight", "layers.0.down"]),
        ("*.down", ["layers.0.down", "layers.1.down"]),
        ("*.up", ["layers.0.up.weight", "layers.1.up.weight"]),
        ("layers.[1-9].*", ["layers.1.up.weight", "layers.1.down"]),
        ("*", ALL),
        ("HEAD", []),
        ("ead", []),
    ],
)
def test_exclude_and_include(pattern: str, left_out: list[str]) -> None:
    assert kept(exclude=pattern) == [name for name in ALL if name not in left_out]
    assert kept(include=pattern) == left_out
    assert reasons(exclude=pattern) == dict.fromkeys(left_out, f"excluded by {pattern!r}")
    assert reasons(include=pattern) == {name: f"not among include={pattern!r}" for name in ALL if name not in left_out}


def test_exclude_wins_over_include() -> None:
    assert kept(include="layers.*", exclude="layers.1*") == ["layers.0.up.weight", "layers.0.down"]


def test_several_patterns() -> None:
    assert kept(include=("head", "layers.0.up")) == ["layers.0.up.weight", "head.weight"]
    assert reasons(include=("a", "b"))["head.weight"] == "not among include='a', 'b'"
    assert reasons(exclude=("a", "head", "h*"))["head.weight"] == "excluded by 'head'"  # the first that fits


@pytest.mark.parametrize(
    ("least", "left"),
    [(0, ALL), (8, ALL), (9, [])],
)
def test_min_features(least: int, left: list[str]) -> None:
    assert kept(min_features=least) == left


def test_min_features_counts_the_smaller_of_k_and_n() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    rewrite = after([match, decide], model, min_features=32)
    assert [m.path for m in rewrite.matches] == ["1"]
    assert [str(r.reason) for r in rewrite.refusals] == [
        "K=8, N=32: below min_features=32",
        "K=32, N=8: below min_features=32",
    ]


def test_a_shared_module_is_left_out_every_time_it_is_called() -> None:
    linear = nn.Linear(8, 8)
    rewrite = after([match, decide], nn.Sequential(linear, nn.ReLU(), linear), exclude="0")
    assert (rewrite.matches, [r.path for r in rewrite.refusals]) == ([], ["0", "0"])


ROUTER = "a router: topk chooses by it; routers=True rewrites it too"
ROUTES: dict[str, Any] = {
    "softmax": lambda y: torch.topk(torch.softmax(y, -1), 2)[1],
    "its own values": lambda y: y.topk(2, dim=-1).values,
    "sigmoid, a bias, groups": lambda y: (y.sigmoid() + 1).view(4, 2, 4).topk(2, dim=-1)[0].sum(-1),
    "in float32": lambda y: torch.topk(F.softmax(y.float(), dim=-1, dtype=torch.float32), k=2, dim=-1)[0],
}


class Routed(nn.Module):
    """Linears of which one may be a router."""

    def __init__(self, route: Any, experts: int = 8) -> None:
        super().__init__()
        self.route, self.up, self.router = route, nn.Linear(32, 32), nn.Linear(32, experts)

    def forward(self, x: Tensor) -> Any:
        return self.route(self.router(self.up(x)))


@pytest.mark.parametrize("name", ROUTES)
def test_a_router_stays_unless_asked_for(name: str) -> None:
    model, x = Routed(ROUTES[name]), (torch.randn(4, 32),)
    rewrite = after([match, decide], model, x, profit="always")
    assert ([m.path for m in rewrite.matches], [(r.path, str(r.reason)) for r in rewrite.refusals]) == (
        ["up"],
        [("router", ROUTER)],
    )
    assert [m.path for m in after([match, decide], model, x, routers=True).matches] == ["up", "router"]


def test_a_router_of_a_weight_in_float32_is_one() -> None:
    class Cast(Routed):
        def forward(self, x: Tensor) -> Any:
            return (
                self.route(F.linear(x.float(), self.router.weight.float())) + F.linear(x, self.up.weight.float()).sum()
            )

    computed = "the weight is computed, not a parameter, a buffer, a constant or a view of one"
    for routers, reason in (
        (False, "a router: topk chooses by it; and its weight is computed, as by a cast to float32"),
        (True, computed),
    ):
        rewrite = after(
            [match, decide], Cast(ROUTES["sigmoid, a bias, groups"]), (torch.randn(4, 32),), routers=routers
        )
        assert (rewrite.matches, [str(r.reason) for r in rewrite.refusals]) == ([], [reason, computed])


@pytest.mark.parametrize(
    ("route", "experts"),
    [
        (lambda y: torch.softmax(y, -1), 8),  # attention over a few, say
        (lambda y: torch.topk(y, 2)[0], 32),  # as wide as its input: words, to sample from
        (lambda y: torch.topk(y @ y.T, 2)[0], 8),  # of something else
    ],
)
def test_what_is_no_router(route: Any, experts: int) -> None:
    rewrite = after([match, decide], Routed(route, experts), (torch.randn(4, 32),))
    assert [m.path for m in rewrite.matches] == ["up", "router"]


def test_a_router_without_shapes_is_not_known() -> None:
    assert [m.path for m in after([match, decide], Routed(ROUTES["softmax"])).matches] == ["up", "router"]


def test_nothing_to_decide() -> None:
    rewrite = after([match, decide], nn.ReLU(), exclude="*")
    assert (rewrite.matches, rewrite.refusals, rewrite.results[1].count) == ([], [], 0)


def test_never_refuses_every_match() -> None:
    assert kept(profit="never") == []
    assert reasons(profit="never") == reasons(profit="never", exclude="head") == dict.fromkeys(ALL, "profit='never'")


def test_why_unwanted_itself() -> None:
    found = after([match], Model()).matches[-1]
    assert decide.why_unwanted(found, Config()) is None
    assert str(decide.why_unwanted(found, Config(min_features=9))) == "K=8, N=100: below min_features=9"


# Worth it? Weighed only where there are tensor cores; here the test says that there are.


class Attention(nn.Module):
    """Linears whose operands come from every kind of place."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out, self.up, self.tiny = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:])
        q, k, v = (f(h).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.tiny(F.gelu(self.up(y + x)))


@pytest.fixture
def _tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_fp8_tensor_cores", lambda device: True)


class _CapturedError(Exception):
    """Raised once the graph is there: these models are too large to run on a CPU."""


def captured(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """Dynamo's graph."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(copy(gm))  # Dynamo empties the graph of a compilation that failed
        raise _CapturedError

    with pytest.raises(BackendCompilerFailed):
        torch.compile(model, backend=keep)(*inputs)
    (graph,) = graphs
    return graph


def matmuls(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that are FP8 matmul ops."""
    return [n for n in gm.graph.nodes if "matmul_fp8" in str(n.target)]


def large(rows: int, trained: bool = True, width: int = 1024) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        model = Attention(width).to(torch.bfloat16).requires_grad_(trained)
    x = torch.zeros(4, rows, width, dtype=torch.bfloat16).requires_grad_(trained)
    return model.to_empty(device="cpu"), x


@pytest.mark.usefixtures("_tensor_cores")
@pytest.mark.parametrize("recipe", ["mixed", "global"])
def test_each_gemm_is_weighed_by_its_own_sizes(recipe: str) -> None:
    rewrite = after([match, decide], captured(*large(4096)), recipe=recipe)
    (up,) = [rewrite.choices[m.node] for m in rewrite.matches if m.path.endswith("up")]
    assert up.fp8 == (("forward",) if recipe == "mixed" else ("forward", "dgrad", "wgrad"))
    assert ("dgrad 1.0" in remark_of(up)) == (recipe == "mixed")
    (refused,) = [r for r in rewrite.refusals if r.path.endswith("tiny")]
    assert str(refused.reason).startswith("FP8 is not worth it, predicted: forward 0.")
    assert str(refused.reason).endswith("x at M=16384")


@pytest.mark.usefixtures("_tensor_cores")
def test_few_rows_leave_everything_alone_and_always_takes_everything() -> None:
    graph = captured(*large(2))
    rewrite = after([match, decide], graph)
    assert rewrite.matches == []
    assert all("at M=8" in str(r.reason) for r in rewrite.refusals if "not worth it" in str(r.reason))
    rewrite = after([match, decide], graph, profit="always")
    assert len(rewrite.matches) == 6
    assert {rewrite.choices[m.node].fp8 for m in rewrite.matches} == {("forward", "dgrad")}


def test_without_tensor_cores_nothing_is_weighed() -> None:
    rewrite = after([match, decide], captured(*large(2)))
    assert len(rewrite.matches) == 6
    assert {remark_of(rewrite.choices[m.node]) for m in rewrite.matches} == {""}


@pytest.mark.usefixtures("_tensor_cores")
def test_without_gradients_only_forward_is_weighed() -> None:
    assert {c.fp8 for c in after([match, decide], captured(*large(4096, trained=False))).choices.values()} == {
        ("forward",)
    }
    with torch.no_grad():
        assert {c.fp8 for c in after([match, decide], captured(*large(4096)), recipe="global").choices.values()} == {
            ("forward",)
        }


@pytest.mark.usefixtures("_tensor_cores")
def test_an_unknown_m_is_not_weighed() -> None:
    assert len(after([match, decide], nn.Sequential(nn.Linear(8, 8))).matches) == 1


@pytest.mark.usefixtures("_tensor_cores")
def test_siblings_share_the_cost_of_their_input_and_a_fused_cast_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = []

    def spy(linear: Any, *others: Any) -> Any:
        weighed.append((linear.siblings, linear.input_fused, linear.grad_fused))
        return choose(linear, *others)

    choose = weighing.choose
    monkeypatch.setattr(weighing, "choose", spy)
    after([match, decide], captured(*large(64)))
    norm_to_attention, attention_to_add = (3, True, False), (1, False, True)
    assert weighed == [norm_to_attention] * 3 + [attention_to_add, (1, True, True), (1, True, False)]


@pytest.mark.usefixtures("_tensor_cores")
def test_what_is_not_worth_it_becomes_an_argument_of_the_op() -> None:
    rewrite = after([match, decide, replace], captured(*large(256, width=4096)), recipe="global")
    kwargs = {m.path.rpartition(".")[2]: n.kwargs for m, n in zip(rewrite.matches, matmuls(rewrite.gm), strict=True)}
    assert {name: {k: v for k, v in given.items() if k != "bias"} for name, given in kwargs.items()} == {
        "up": {"dgrad": False, "forward": False}
    }


# By measured times: a stand-in measures, in place of the device.


class Device:
    """Measured times of made-up ratios, and what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, int, int, int, torch.dtype, bool]] = []
        self.seconds = {"high": 20e-6, "tensor": 5e-6, "row": 5e-6, "weight_only": 4e-6}
        monkeypatch.setattr(measure, "seconds", self._seconds)
        monkeypatch.setattr(measure, "bandwidth", lambda device: 3e12)
        self._monkeypatch = monkeypatch

    def times(self, device: torch.device) -> Times:
        with self._monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return times_on(torch.device("cuda", 0))  # the weights are on the CPU, since there is no other place

    def _seconds(
        self, device: torch.device, kind: str, m: int, k: int, n: int, dtype: torch.dtype, *, exact: bool
    ) -> float:
        self.asked.append((kind, m, k, n, dtype, exact))
        return self.seconds[kind]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, _tensor_cores: None) -> Device:
    return Device(monkeypatch)


def test_each_direction_is_measured_at_its_own_sizes(device: Device) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1024, 3072, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    x = torch.zeros(2, 256, 1024, dtype=torch.bfloat16, requires_grad=True)
    after([match, decide], captured(Wide(), x), times=device.times, recipe="global")
    forward, dgrad, wgrad = (512, 1024, 3072), (512, 3072, 1024), (3072, 512, 1024)
    assert {asked[:4]: asked[4:] for asked in device.asked} == {
        (kind, *sizes): (torch.bfloat16, sizes == wgrad)
        for kind in ("high", "tensor")
        for sizes in (forward, dgrad, wgrad)
    }


def test_the_remark_of_a_rewritten_linear_is_the_ratio_it_was_decided_on(device: Device) -> None:
    device.seconds |= {"high": 2e-3, "row": 1e-3}
    rewrite = after([match, decide], captured(*large(4096, trained=False)), times=device.times)
    assert len(rewrite.matches) == 6
    for choice in rewrite.choices.values():
        assert remark_of(choice) == f"measured: forward {choice.speed['forward']:.2f}x"
        assert 1.1 < choice.speed["forward"] < 2


def test_the_report_shows_the_ratio(device: Device) -> None:
    device.seconds |= {"high": 2e-3, "row": 1e-3}
    rewrite = after([match, decide, replace], captured(*large(4096, trained=False)), times=device.times)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fp8fx.report.resolve", lambda executor, device, groups: ScaledMM())
        report = Report.of(rewrite)
    assert all(row.remark.startswith("measured: forward 1.") for row in report.rewritten)
    assert "measured: forward 1." in str(report)


def test_a_refusal_says_that_it_was_measured(device: Device) -> None:
    device.seconds["row"] = 19.9e-6
    rewrite = after([match, decide], captured(*large(4096, trained=False)), times=device.times)
    assert rewrite.matches == []
    reasons = [str(r.reason) for r in rewrite.refusals if "not worth it" in str(r.reason)]
    assert len(reasons) == 6
    assert all(
        r.startswith("FP8 is not worth it, measured: forward 0.") and r.endswith("x at M=16384") for r in reasons
    )


def test_what_cannot_be_measured_is_predicted(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "seconds", lambda *args, **kwargs: None)
    monkeypatch.setattr(measure, "bandwidth", lambda device: None)
    unmeasured = after([match, decide], captured(*large(4096)), times=device.times)
    assert {c.measured for c in unmeasured.choices.values()} == {False}
    assert all("predicted: " in remark_of(c) for c in unmeasured.choices.values())


@pytest.mark.parametrize("place", [torch.device("cpu"), torch.device("cuda")], ids=str)
def test_without_a_cuda_device_the_model_decides(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: place.type == "cpu")
    assert times_on(place) is MODEL


@pytest.mark.parametrize("profit", ["always", "never"])
def test_nothing_is_measured_where_nothing_is_weighed(profit: str, device: Device) -> None:
    after([match, decide], captured(*large(4096)), times=device.times, profit=profit)
    after([match, decide], captured(*large(4096)), times=device.times, executor="simulated")
    assert device.asked == []


def frozen(rows: int, dynamic: bool = False, **options: Any) -> Any:
    """Where a linear in inference stands after decide, its weight's value known."""
    linear = (
        nn.Linear(4096, 4096, bias=False, device="meta", dtype=torch.bfloat16)
        .to_empty(device="cpu")
        .requires_grad_(False)
    )
    x = torch.zeros(rows, 4096, dtype=torch.bfloat16)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    exported = torch.export.export(linear, (x,), dynamic_shapes=shapes)
    (choice,) = after([match, decide], exported.module(), freeze=True, **options).choices.values()
    return choice


def test_a_single_row_of_a_frozen_weight_is_left_as_it_is_where_that_is_fastest(device: Device) -> None:
    measured = functools.partial(frozen, times=device.times)
    assert measured(1).weight_only
    assert remark_of(measured(1)) == "measured: forward 5.00x"
    assert measured(1, profit="always").weight_only
    assert not measured(2).weight_only
    assert measured(8, dynamic=True).weight_only
    assert measured(8, dynamic=True, profit="always").weight_only
    device.seconds["weight_only"] = 20e-6
    assert not any(
        choice.weight_only for choice in (measured(1), measured(8, dynamic=True), measured(1, profit="always"))
    )


def test_an_m_that_is_not_known_may_be_one(device: Device) -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(64, 64)))
    (choice,) = after([match, decide], gm, times=device.times, freeze=True).choices.values()
    assert (choice.fp8, choice.weight_only, remark_of(choice)) == (("forward", "dgrad"), True, "")
    assert {asked[1] for asked in device.asked} == {1}
    assert not next(iter(after([match, decide], gm, times=device.times).choices.values())).weight_only


def test_a_weight_whose_value_is_not_known_will_not_be_frozen(device: Device) -> None:
    graph, x = captured(nn.Linear(64, 64).requires_grad_(False), torch.zeros(1, 64)), torch.zeros(1, 64)
    values = {"weight": torch.zeros(64, 64), "bias": torch.zeros(64)}
    placeholders = graph.graph.find_nodes(op="placeholder")
    inputs = [next((nn.Parameter(v, False) for name, v in values.items() if name in n.name), x) for n in placeholders]
    known = after([match, decide], graph, inputs, times=device.times, freeze=True, profit="always")
    unknown = after([match, decide], graph, times=device.times, freeze=True, profit="always")
    assert [c.weight_only for c in known.choices.values()] == [True]
    assert [c.weight_only for c in unknown.choices.values()] == [False]


@pytest.mark.usefixtures("_tensor_cores")
def test_a_frozen_weight_is_worth_it_at_a_few_rows() -> None:
    assert frozen(16).fp8 == ("forward",)
    assert remark_of(frozen(16)).startswith("predicted: forward 1.")


def test_without_tensor_cores_a_frozen_weight_is_quantized_at_any_number_of_rows() -> None:
    assert not frozen(1).weight_only
