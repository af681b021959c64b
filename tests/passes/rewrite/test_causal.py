"""causal: attention loses a mask that it can do without, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint

import fp8fx
from fp8fx import Config
from fp8fx.errors import ConfigError
from fp8fx.graph import masks
from fp8fx.passes.rewrite import causal
from fp8fx.reasons import MaskReason
from tests.support.capture import Capture, after, assert_same_graph, ops

LENGTH = 8


def triangle(length: int = LENGTH) -> Tensor:
    positions = torch.arange(length)
    return positions[:, None] >= positions


class Attention(nn.Module):
    """Heads of 16 that attend by a mask of the user's own making."""

    def __init__(self, mask: Callable[[Attention, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.mask = mask
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.register_buffer("kept", triangle())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, self.mask(self, x))
        return x + self.out(y.transpose(1, 2).flatten(2))


def captured(model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any) -> tuple[Any, Tensor]:
    """The graph before and after, and what the rewritten one computes."""
    capture = Capture(Config(**{"profit": "never", **options}))
    y = torch.compile(model, backend=capture, dynamic=dynamic, fullgraph=True)(*args)
    return capture.only, y


def attentions(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if "scaled_dot_product_attention" in str(node.target)]


CAUSAL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "comparison": lambda self, x: triangle(x.shape[1]),
    "tril": lambda self, x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "triu": lambda self, x: ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1),
    "-inf": lambda self, x: torch.full((LENGTH, LENGTH), -torch.inf).triu(1),
    "least": lambda self, x: torch.full((LENGTH, LENGTH), torch.finfo(x.dtype).min).triu(1)[None, None],
    "torch's own": lambda self, x: nn.Transformer.generate_square_subsequent_mask(LENGTH),
    "for each of the batch": lambda self, x: triangle()[None, None].expand(x.shape[0], 2, -1, -1),
    "a window as long as the input": lambda self, x: triangle() & ~torch.ones(LENGTH, LENGTH).tril(-LENGTH).bool(),
    "where": lambda self, x: torch.where(triangle(), 0.0, -torch.inf),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_becomes_an_argument(name: str) -> None:
    model, x = Attention(CAUSAL[name]), torch.randn(2, LENGTH, 32)
    graphs, y = captured(model, x)
    (attention,) = attentions(graphs.after)
    assert attention.kwargs["is_causal"] is True and attention.kwargs["attn_mask"] is None
    without, _ = captured(Attention(lambda self, x: None), x)
    assert ops(graphs.after.graph) == ops(without.after.graph), "the nodes that made the mask are gone"
    torch.testing.assert_close(y, model(x))


def test_a_mask_that_hides_nothing_is_left_out() -> None:
    model, x = Attention(lambda self, x: torch.ones(LENGTH, LENGTH, dtype=torch.bool)), torch.randn(2, LENGTH, 32)
    graphs, y = captured(model, x)
    (attention,) = attentions(graphs.after)
    assert (attention.kwargs["attn_mask"], attention.kwargs["is_causal"]) == (None, False)
    torch.testing.assert_close(y, model(x))


def test_the_other_arguments_stay() -> None:
    def model(q: Tensor) -> Tensor:
        mask = triangle()
        return F.scaled_dot_product_attention(q, q[:, :1], q[:, 1:2], mask, 0.0, False, scale=0.3, enable_gqa=True)

    q = torch.randn(2, 2, LENGTH, 16)
    graphs, y = captured(model, q)
    (attention,) = attentions(graphs.after)
    others = {"dropout_p": 0.0, "scale": 0.3, "enable_gqa": True}
    assert {name: attention.kwargs[name] for name in others} == others
    torch.testing.assert_close(y, model(q))


def test_a_mask_that_others_read_stays_for_them() -> None:
    def model(q: Tensor) -> Tensor:
        mask = triangle()
        a = F.scaled_dot_product_attention(q, q, q, mask)
        b = F.scaled_dot_product_attention(a, q, q, attn_mask=mask)
        return b + mask.sum()

    q = torch.randn(2, LENGTH, 16)
    graphs, y = captured(model, q)
    assert [node.kwargs["is_causal"] for node in attentions(graphs.after)] == [True, True]
    torch.testing.assert_close(y, model(q))


@pytest.mark.parametrize("option", [{"attention": "leave"}, {}], ids=["leave", "no mask"])
def test_without_a_match_the_graph_stays(option: dict[str, str]) -> None:
    mask = CAUSAL["tril"] if option else lambda self, x: None
    graphs, _ = captured(Attention(mask), torch.randn(2, LENGTH, 32), **option)
    assert_same_graph(graphs.after.graph, graphs.before.graph)
    assert [row.kind for row in graphs.report.attention] == [MaskReason.OPTION] * len(option)


@torch.library.custom_op("test_causal::triangle", mutates_args=())
def own_triangle(length: int) -> Tensor:
    return triangle(length)


own_triangle.register_fake(lambda length: torch.empty(length, length, dtype=torch.bool))


def set_in_place(self: Attention, x: Tensor) -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[3] = True
    return mask


LEFT: dict[str, tuple[Callable[[Any, Tensor], Tensor], MaskReason]] = {
    "a window": (lambda self, x: triangle() & ~triangle().tril(-3), MaskReason.OTHER),
    "of the input": (lambda self, x: triangle() & (x[0, :, 0] < torch.inf), MaskReason.INPUT),
    "a buffer": (lambda self, x: self.kept, MaskReason.MODELS_TENSOR),
    "chance": (lambda self, x: triangle() & (torch.rand(LENGTH) >= 0), MaskReason.CODE),
    "an operator of the user's": (lambda self, x: torch.ops.test_causal.triangle(LENGTH), MaskReason.CODE),
    "chance, by a function": (lambda self, x: F.dropout1d(torch.ones(LENGTH, LENGTH), 0.0) > 0, MaskReason.CODE),
    "set in place": (set_in_place, MaskReason.WRITTEN),
    "set in place, chained": (lambda self, x: torch.full((LENGTH, LENGTH), -torch.inf).triu_(1), MaskReason.WRITTEN),
}


@pytest.mark.parametrize("name", LEFT)
def test_any_other_mask_stays_with_its_reason(name: str) -> None:
    mask, reason = LEFT[name]
    model, x = Attention(mask), torch.randn(2, LENGTH, 32)
    graphs, y = captured(model, x)
    assert [row.kind for row in graphs.report.attention] == [reason]
    assert_same_graph(graphs.after.graph, graphs.before.graph)
    torch.testing.assert_close(y, model(x))


FOR_ANY_LENGTH: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "comparison": CAUSAL["comparison"],
    "tril": CAUSAL["tril"],
    "triu": CAUSAL["triu"],
    "less than": lambda self, x: torch.arange(x.shape[1]) < torch.arange(x.shape[1])[:, None] + 1,
    "for each of the batch": lambda self, x: triangle(x.shape[1])[None, None].expand(x.shape[0], 2, -1, -1),
    "with what is always true": lambda self, x: triangle(x.shape[1]) & (torch.arange(x.shape[1]) + 1 > 0),
}


@pytest.mark.parametrize("name", FOR_ANY_LENGTH)
def test_a_mask_of_symbolic_sizes_is_proved_by_its_coordinates(name: str) -> None:
    model, x = Attention(FOR_ANY_LENGTH[name]), torch.randn(2, LENGTH, 32)
    graphs, y = captured(model, x, dynamic=True)
    assert [row.became for row in graphs.report.attention] == ["is_causal=True"]
    torch.testing.assert_close(y, model(x))


NOT_FOR_ANY_LENGTH: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a window, longer than this input": lambda self, x: triangle(x.shape[1]) & triangle(x.shape[1]).triu(-99),
    "without the diagonal": lambda self, x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(-1),
    "the keys before": lambda self, x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(),
    "one row": lambda self, x: triangle(x.shape[1])[:1],
    "from the end": lambda self, x: triangle(x.shape[1])[:, -1:],
    "a remainder": lambda self, x: triangle(x.shape[1]) & (torch.arange(x.shape[1]) % 2 == 0),
    "added": lambda self, x: torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1),
    "either": lambda self, x: triangle(x.shape[1]) | (torch.arange(x.shape[1]) == 3),
    "not all": lambda self, x: ~(triangle(x.shape[1]) & (torch.arange(x.shape[1]) > 1)),
}


@pytest.mark.parametrize("name", NOT_FOR_ANY_LENGTH)
def test_what_is_not_proved_for_every_length_stays(name: str) -> None:
    model, x = Attention(NOT_FOR_ANY_LENGTH[name]), torch.randn(2, LENGTH, 32)
    graphs, y = captured(model, x, dynamic=True)
    assert [row.kind for row in graphs.report.attention] == [MaskReason.SYMBOLIC_SIZE]
    torch.testing.assert_close(y, model(x), equal_nan=True)


def test_a_mask_too_large_to_evaluate_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_MOST_ELEMENTS", LENGTH**2 - 1)
    graphs, _ = captured(Attention(CAUSAL["-inf"]), torch.randn(2, LENGTH, 32))
    (row,) = graphs.report.attention
    assert row.kind is MaskReason.TOO_LARGE and "64 elements; at most 63" in str(row.reason)
    graphs, _ = captured(Attention(CAUSAL["tril"]), torch.randn(2, LENGTH, 32))
    assert graphs.report.attention[0].became == "is_causal=True", "proved by its coordinates"


def test_autocast_may_round_what_the_mask_is_made_of() -> None:
    def model(q: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows = torch.arange(300).float()[:, None] @ torch.ones(1, 300)
        return F.scaled_dot_product_attention(q, q, q, rows >= torch.arange(300))

    q = torch.randn(2, 300, 16)
    graphs, y = captured(model, q)
    (row,) = graphs.report.attention
    assert row.kind is MaskReason.NOT_EVALUATED
    assert "torch.float32 here and torch.bfloat16 in the graph" in str(row.reason)
    torch.testing.assert_close(y, model(q))


def test_what_gives_a_symbolic_size_is_not_erased() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.add_(1).shape[1])
            return F.scaled_dot_product_attention(x, x, x, positions[:, None] >= positions)

    x = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False).from_tensor(torch.randn(2, LENGTH, 16))
    rewrite = after([causal], Model(), [x])
    assert [attention.became for attention in rewrite.attention] == ["is_causal=True"]
    assert rewrite.gm.graph.find_nodes(op="call_method", target="add_")


@pytest.mark.parametrize(("attends", "option"), [(False, "auto"), (True, "leave")])
def test_nothing_is_evaluated_for_a_body_that_does_not_need_it(
    attends: bool, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "_evaluate", lambda nodes: pytest.fail("evaluated"))

    def model(x: Tensor) -> Tensor:
        mask = triangle()

        def call(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, mask) if attends else x * mask.sum()

        return checkpoint(call, x, use_reentrant=False)

    captured(model, torch.randn(2, LENGTH, 16), attention=option)


def test_an_error_while_the_mask_is_made_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(nodes: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(masks, "_evaluate", fail)
    graphs, _ = captured(Attention(CAUSAL["tril"]), torch.randn(2, LENGTH, 32))
    (row,) = graphs.report.attention
    assert row.reason == "the mask could not be evaluated: RuntimeError: out of memory"


def test_each_mask_is_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[Tensor]()

    def hidden_by(mask: Tensor) -> masks.Hidden:
        found.append(mask)
        return masks.Hidden.LATER_KEYS

    monkeypatch.setattr(masks, "hidden_by", hidden_by)

    def model(q: Tensor) -> Tensor:
        mask = triangle()
        for _ in range(5):
            q = F.scaled_dot_product_attention(q, q, q, mask)
        return q

    captured(model, torch.randn(2, LENGTH, 16))
    assert len(found) == 1 and type(found[0]) is Tensor


class Recomputed(nn.Module):
    """Two calls that are recomputed in backward, by one mask that is made around them."""

    def __init__(self, mask: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(self, x)

        def call(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.fc(x), x, x, mask)

        return checkpoint(call, checkpoint(call, x, use_reentrant=False), use_reentrant=False)


@pytest.mark.parametrize("name", ["tril", "a window"])
def test_inside_checkpointed_bodies(name: str) -> None:
    is_causal = name in CAUSAL
    model, x = Recomputed(CAUSAL[name] if is_causal else LEFT[name][0]), torch.randn(2, LENGTH, 16)
    graphs, y = captured(model, x)
    assert [row.became for row in graphs.report.attention] == ["is_causal=True" if is_causal else None] * 2
    bodies = [body for body in graphs.after.modules() if isinstance(body, fx.GraphModule)]
    calls = [node for body in bodies for node in attentions(body)]
    assert calls and all(node.kwargs.get("is_causal", False) is is_causal for node in calls)
    torch.testing.assert_close(y, model(x))
    y.sum().backward()
    assert model.fc.weight.grad is not None


def test_a_body_that_is_called_with_different_masks() -> None:
    def model(x: Tensor) -> Tensor:
        for mask in (triangle(), triangle().tril(-1) | (torch.arange(LENGTH) == 0)):
            x = checkpoint(lambda x, mask: F.scaled_dot_product_attention(x, x, x, mask), x, mask, use_reentrant=False)
        return x

    x = torch.randn(2, LENGTH, 16)
    graphs, y = captured(model, x)
    assert [row.became for row in graphs.report.attention] == ["is_causal=True", None]
    torch.testing.assert_close(y, model(x))


def test_what_a_body_is_told_of_an_input() -> None:
    model, x = Recomputed(LEFT["of the input"][0]), torch.randn(2, LENGTH, 16)
    graphs, _ = captured(model, x)
    assert [row.reason for row in graphs.report.attention] == ["the mask depends on 'x', an input of the call"] * 2


def test_through_the_whole_rewrite_and_by_each_door() -> None:
    model, x = Attention(CAUSAL["comparison"]).eval(), torch.randn(2, LENGTH, 32)
    plain = Attention(lambda self, x: None)
    plain.load_state_dict(model.state_dict())
    exported = torch.export.export(model, (x,))
    gm = fp8fx.convert(exported)
    report = gm.meta["fp8fx_report"]
    assert [row.became for row in report.attention] == ["is_causal=True"] and len(report.rewritten) == 2
    graphs, y = captured(model, x, profit="always")
    with torch.no_grad():
        torch.testing.assert_close(gm(x), y)
        assert str(report).splitlines()[-1] == "attention: 1 call with a mask 8 x 8 -> is_causal=True"
        assert fp8fx.explain(model, x).attention == report.attention == graphs.report.attention


@pytest.mark.compiles
def test_compiled_with_gradients() -> None:
    model, x = Attention(CAUSAL["-inf"]), torch.randn(2, LENGTH, 32)
    found = []
    for attention in ("auto", "leave"):
        torch._dynamo.reset()
        model.zero_grad()
        y = torch.compile(model, backend=fp8fx.Backend(Config(attention=attention)))(x)
        y.sum().backward()
        found.append([y, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


def test_the_pass_alone() -> None:
    gm = fx.symbolic_trace(lambda q, mask: F.scaled_dot_product_attention(q, q, q, mask))
    rewrite = after([causal], gm, [torch.randn(2, LENGTH, 16), triangle()])
    assert [attention.hidden for attention in rewrite.attention] == [MaskReason.INPUT(name="mask")]
    assert [(result.count, result.modified) for result in rewrite.results] == [(0, False)]


def test_an_unknown_option() -> None:
    with pytest.raises(ConfigError, match="fast"):
        Config(attention="fast")


def test_rows_by_hand() -> None:
    model = nn.Sequential(Attention(CAUSAL["tril"]), Attention(LEFT["a window"][0]))
    report = fp8fx.explain(model, torch.randn(2, LENGTH, 32))
    assert report.attention == (
        masks.MaskedAttention("0", "8 x 8", masks.Hidden.LATER_KEYS),
        masks.MaskedAttention("1", "8 x 8", MaskReason.OTHER()),
    )
