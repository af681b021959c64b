"""Module paths, names of tensors, unused names, and the difference of two listings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fp8fx.convert import convert
from fp8fx.graph.names import module_path, name_of
from fp8fx.graph.values import unused
from fp8fx.pipeline import diff
from tests.support.capture import Capture
from tests.support.graphs import Model


@pytest.mark.parametrize(
    ("stack", "path"),
    [
        (None, ""),
        ({}, ""),
        ({"": ("", Model)}, ""),
        ({"a": ("a", Model), "a.b": ("a.b", nn.Linear)}, "a.b"),  # symbolic_trace
        ({"L__self__": ("", "Model"), "L__self___layers_0": ("layers.0", "Linear")}, "layers.0"),  # export
        ({"x": ("L['self']._modules['layers']._modules['0']._modules['fc']", nn.Linear)}, "layers.0.fc"),  # Dynamo
        ({"x": ("L['self'].layers[0].mlp.fc", nn.Linear)}, "layers.0.mlp.fc"),
        ({"x": ("L['self']", Model)}, ""),
        ({"x": ("G['model'].encoder", Model)}, "encoder"),
        ({"x": ("L['fn'].__closure__[0].cell_contents", Model)}, "__closure__.0.cell_contents"),
    ],
    ids=str,
)
def test_module_path(stack: Any, path: str) -> None:
    n = fx.Graph().placeholder("x")
    if stack is not None:
        n.meta["nn_module_stack"] = stack
    assert module_path(n) == path


@pytest.mark.parametrize("callable_name", [False, True])  # a method up to torch 2.11
def test_name_of_dynamo_s_inputs(callable_name: bool) -> None:
    n = fx.Graph().placeholder("l_self_w_")
    assert name_of(n) == "l_self_w_"
    text = "L['self']._modules['fc']._parameters['weight']"
    n._dynamo_source = SimpleNamespace(name=(lambda: text) if callable_name else text)
    assert name_of(n) == "fc.weight"


def test_names_and_paths_are_those_of_the_model_however_it_was_traced() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), Model()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model, x, capture = Outer(), torch.randn(2, 4), Capture()
    torch.compile(model, backend=capture)(x)
    expected = [
        ("layers.0.0", "layers.0.0.weight"),
        ("layers.1.inner.fc", "layers.1.inner.fc.weight"),
        ("layers.1", "layers.1.w"),
    ]
    for report in (
        capture.only.report,
        convert(model).meta["fp8fx_report"],
        convert(torch.export.export(model, (x,))).meta["fp8fx_report"],
        convert(torch.export.export(model, (x,), strict=True)).meta["fp8fx_report"],
    ):
        assert [(row.path, row.name) for row in report.rows] == expected


def test_diff() -> None:
    assert diff(["a", "b"], ["a", "b"]) == ""
    assert diff(["a", "b", "c", "d"], ["a", "b", "x", "d"]).splitlines() == [
        "--- before",
        "+++ after",
        "@@ -2,3 +2,3 @@",
        " b",
        "-c",
        "+x",
        " d",
    ]


def test_an_unused_name() -> None:
    model = nn.Module()
    model.part, model.part_1 = nn.Module(), nn.Linear(4, 4)
    model.part.fc = nn.Linear(4, 4)
    assert [unused(model, name) for name in ("other", "part", "part.fc", "part.other")] == [
        "other",
        "part_2",
        "part.fc_1",
        "part.other",
    ]
