"""What every form of the table promises. A new form is tested as soon as it is in the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fp8fx.convert import convert
from fp8fx.linears.form import Family, Form
from fp8fx.linears.forms import FORMS, form_of, form_of_module
from fp8fx.linears.matches import LinearMatch, MatmulMatch, ModuleMatch, Refusal
from fp8fx.linears.recognise import match_node
from fp8fx.linears.site import NodeKinds
from fp8fx.passes.rewrite.expand import CALLS
from fp8fx.reasons import CallReason, WeightReason
from tests.support.numbers import error
from tests.support.one_linear import of_form

EXAMPLES = [form for form in FORMS.values() if form.why_left_alone is None]
MATMULS = [form for form in FORMS.values() if form.family is Family.MATMUL]
LEFT_ALONE = [form for form in FORMS.values() if form.family is Family.LEFT_ALONE]
MODULES = [form for form in FORMS.values() if form.module is not None]

each_example = pytest.mark.parametrize("form", EXAMPLES, ids=lambda form: form.operator)
each_matmul = pytest.mark.parametrize("form", MATMULS, ids=lambda form: form.operator)


@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.operator)
def test_a_form_is_whole(form: Form) -> None:
    """It is left alone for a reason, or has what its matcher and these tests read."""
    assert (form.why_left_alone is None) == (form.family is not Family.LEFT_ALONE)
    assert (form.why_left_alone is None) == bool(form.example)
    assert (form.read_contraction is not None) == (form.family is Family.CONTRACTION)
    if form.family in (Family.MATMUL, Family.CONVOLUTION, Family.GROUPED):
        assert {form.left, form.right, form.addend or form.right} <= set(form.arguments)


@each_example
def test_the_example_calls_the_form(form: Form) -> None:
    gm = fx.symbolic_trace(of_form(form).model())
    assert form in map(form_of, gm.graph.nodes)


@each_example
def test_an_example_is_rewritten_and_agrees_with_high_precision_or_is_left_alone(form: Form) -> None:
    program = of_form(form)
    model = program.model()
    x = program.arguments(grad=False)
    exact = model(*x)[0]
    new = convert(model, x, convolutions=True)
    out = new(*x)[0]
    (row,) = [row for row in new.meta["fp8fx_report"].rows if "+" not in row.form]
    assert (out.shape, out.dtype, out.stride()) == (exact.shape, exact.dtype, exact.stride())
    if form.is_rewritten:
        assert (row.op is not None, row.reason) == (True, None)
        assert 0 < error(out, exact) < 0.05
    else:
        assert (row.op, bool(row.reason)) == (None, True)
        assert torch.equal(out, exact)


@each_example
def test_a_rewritten_example_gives_the_dtype_that_autocast_gives_it(form: Form) -> None:
    program = of_form(form)
    model = program.model()
    x = program.arguments(grad=False)
    new = convert(model, x, convolutions=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert new(*x)[0].dtype == model(*x)[0].dtype


def call(form: Form, left: str, right: str) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """A call of the form: of an input `x` (8, 8), a constant `w` (8, 8) and an addend `c` if the form has one."""
    gm = fx.GraphModule({"w": torch.randn(8, 8)}, fx.Graph())
    nodes = {name: gm.graph.placeholder(name) for name in "xc"} | {"w": gm.graph.get_attr("w")}
    for node in nodes.values():
        node.meta["val"] = torch.empty(8, 8)
    roles = {form.left: left, form.right: right} | ({} if form.addend is None else {form.addend: "c"})
    kwargs = {name: nodes[roles[name]] for name in form.arguments if name in roles}
    nodes["call"] = gm.graph.call_method(form.operator, (), kwargs)
    return gm, nodes


def matched(form: Form, left: str, right: str, **kinds: Any) -> tuple[Any, dict[str, fx.Node]]:
    """What such a call is; of the node kinds, `states` and `own` are given by their nodes' names."""
    gm, nodes = call(form, left, right)
    named = {kind: {nodes[name] for name in names} for kind, names in kinds.items()}
    return match_node(nodes["call"], gm, NodeKinds(constants={nodes["w"]}, **named)), nodes


def expected_refusal(form: Form) -> Any:
    return CallReason.IN_PLACE() if form.in_place else CallReason.BATCH_SUMMED() if form.sums_batch else None


@each_matmul
def test_a_weight_on_the_right_is_matched_by_its_role(form: Form) -> None:
    match, nodes = matched(form, "x", "w")
    if form.is_rewritten:
        assert isinstance(match, MatmulMatch)
        assert (match.form, match.input, match.weight) == (form, nodes["x"], nodes["w"])
        assert (match.bias, match.transposed) == (None if form.addend is None else nodes["c"], form.is_transposed)
    else:
        assert isinstance(match, Refusal)
        assert match.reason == expected_refusal(form)


@each_matmul
def test_a_weight_on_the_left_is_a_linear_if_the_form_says_so(form: Form) -> None:
    match, nodes = matched(form, "w", "x")
    if not form.may_have_weight_on_the_left:
        assert isinstance(match, Refusal)
        assert match.reason == CallReason.ON_THE_LEFT()
    elif form.is_rewritten:
        assert isinstance(match, MatmulMatch)
        assert (match.input, match.weight, match.transposed) == (nodes["x"], nodes["w"], False)
    else:
        assert match.reason == expected_refusal(form)


@each_matmul
def test_a_state_is_a_weight_only_of_a_form_that_names_it(form: Form) -> None:
    match, _ = matched(form, "x", "w", states="w")
    if form.names_its_weight:
        assert isinstance(match, LinearMatch) == form.is_rewritten
    else:
        assert match.reason == WeightReason.ACTIVATIONS()


@each_matmul
def test_a_product_of_the_model_s_own_is_a_linear_only_of_a_form_that_names_its_weight(form: Form) -> None:
    match, _ = matched(form, "x", "w", own="xw")
    if form.names_its_weight:
        assert isinstance(match, LinearMatch) == form.is_rewritten
    else:
        assert match.reason == WeightReason.OWN_OPERANDS()


@each_matmul
def test_without_a_weight_a_layer_s_is_computed_or_given_and_others_are_activations(form: Form) -> None:
    match, _ = matched(form, "x", "c")
    assert match.reason == (WeightReason.GIVEN() if form.is_layer else WeightReason.ACTIVATIONS())
    match, _ = matched(form, "x", "c", computed="c")
    assert match.reason == (WeightReason.GIVEN() if form.is_layer else WeightReason.COMPUTED())


@pytest.mark.parametrize("form", LEFT_ALONE, ids=lambda form: form.operator)
def test_a_call_that_is_left_alone_says_why(form: Form) -> None:
    gm = fx.GraphModule({}, fx.Graph())
    node = gm.graph.call_method(form.operator, (gm.graph.placeholder("x"),))
    refusal = match_node(node, gm, NodeKinds(constants=set()))
    assert isinstance(refusal, Refusal)
    assert form.why_left_alone is not None
    assert refusal.reason == form.why_left_alone()


def test_expand_opens_the_calls_that_the_table_says() -> None:
    assert CALLS.keys() == {form.operator for form in FORMS.values() if form.opened_by_expand}


@pytest.mark.parametrize("form", MODULES, ids=lambda form: form.operator)
def test_a_module_is_matched_as_its_form(form: Form) -> None:
    assert form.module is not None
    module = form.module(8, 6) if form.family is Family.MATMUL else form.module(8, 6, 1)
    assert form_of_module(module) is form
    gm = fx.GraphModule({}, fx.Graph())
    gm.add_submodule("module", module)
    x = gm.graph.placeholder("x")
    node = gm.graph.call_module("module", (x,))
    x.meta["val"] = torch.empty(2, *([8] * max(1, module.weight.dim() - 1)))
    node.meta["val"] = module(x.meta["val"])
    match = match_node(node, gm, NodeKinds(constants=set()), convolutions=True)
    assert isinstance(match, ModuleMatch)
    assert (match.form, match.module, match.k, match.n, match.has_bias) == (form, "module", 8, 6, True)
