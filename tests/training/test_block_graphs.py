"""What training a transformer's block compiles to: which GEMMs in which formats, one amax a tensor, what is saved for
backward.

tests/gpu/test_training_cuda.py has some of it on FP8 tensor cores, where the graphs become kernels too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from tests.support.steps import (
    BF16,
    DGRAD,
    E4M3,
    FORWARD,
    FP8,
    MM,
    SCALED_MM,
    WGRAD,
    Block,
    Step,
    aten,
    calls,
    gemm,
    operands,
    origin,
    recipes,
    rows,
    steps_of_a_block,
    training_step,
    value,
)

pytestmark = pytest.mark.slow  # each builds a block and traces its training step


@pytest.fixture(scope="module")
def blocks() -> dict[str, Step]:
    return steps_of_a_block("cpu")


@recipes
def test_each_linear_has_the_gemms_of_its_recipe_and_no_others(blocks: dict[str, Step], recipe: str) -> None:
    step = blocks[recipe]
    for name in Block.LINEARS:
        assert step.gemms(name) == ([FORWARD], [DGRAD], [WGRAD[recipe]])
    count = len(Block.LINEARS)
    forward, backward = (
        Counter(map(gemm, calls(graph, SCALED_MM, MM, aten.addmm.default))) for graph in (step.forward, step.backward)
    )
    assert forward == {FORWARD: count}
    assert backward == Counter({DGRAD: count}) + Counter({WGRAD[recipe]: count})


@recipes
def test_every_tensor_is_quantized_by_one_amax(blocks: dict[str, Step], recipe: str) -> None:
    step = blocks[recipe]
    weights = {step.weight(name) for name in Block.LINEARS}
    inputs = {step.input(name) for name in Block.LINEARS}
    assert len(inputs) == 4
    assert (
        len({step.input(name) for name in ("q", "k", "v")}) == len({step.input(name) for name in ("gate", "up")}) == 1
    )
    gradients = {step.name(operands(step.reading(step.backward, weight)[0])[0]) for weight in weights}
    assert len(gradients) == len(weights) == 7
    assert step.amaxes() == dict.fromkeys(weights | inputs | gradients, 1)
    assert step.amaxes(step.backward) == dict.fromkeys(gradients, 1)


@recipes
def test_a_gradient_is_the_same_tensor_for_dgrad_and_wgrad(blocks: dict[str, Step], recipe: str) -> None:
    step = blocks[recipe]
    for name in Block.LINEARS:
        (dgrad,), wgrad = step.reading(step.backward, step.weight(name)), step.wgrad(name)
        assert wgrad is not None
        gradient = step.name(operands(dgrad)[0])
        assert [step.name(x) for x in operands(wgrad)] == [gradient, step.input(name)]
        assert step.casts()[gradient] == (2 if recipe == "global" else 1)  # once for each layout


@recipes
def test_siblings_read_one_fp8_tensor(blocks: dict[str, Step], recipe: str) -> None:
    step = blocks[recipe]
    for names in (("q", "k", "v"), ("gate", "up")):
        gemms = [gemm for name in names for gemm in step.reading(step.forward, step.weight(name))]
        assert len({operands(gemm)[0] for gemm in gemms}) == 1


def saved_of_weights(step: Step) -> list[torch.Size]:
    """The shapes of what is saved and computed from weights alone."""
    made = {node for node in step.forward.find_nodes(op="placeholder") if node.name in step.parameters.values()}
    for node in step.forward.nodes:
        if node.all_input_nodes and made.issuperset(node.all_input_nodes):
            made.add(node)
    return [value(node).shape for node in step.saved if node in made]


@recipes
def test_of_a_weight_only_a_number_is_saved(blocks: dict[str, Step], recipe: str) -> None:
    assert saved_of_weights(blocks[recipe]) == [()] * len(Block.LINEARS)


@recipes
def test_no_tensor_is_saved_both_in_fp8_and_in_high_precision(blocks: dict[str, Step], recipe: str) -> None:
    step = blocks[recipe]
    tensors = [node for node in step.saved if value(node).dim() == 2]
    quantized = [step.name(node) for node in tensors if value(node).dtype in FP8]
    assert bool(quantized) == (recipe == "global")
    assert not set(quantized) & {step.name(node) for node in tensors if value(node).dtype not in FP8}
    assert len(set(quantized)) == len(quantized)


@recipes
def test_what_wgrad_alone_reads_is_saved_in_the_format_it_is_read_in(blocks: dict[str, Step], recipe: str) -> None:
    saved = blocks[recipe].read_by_gemms_alone()
    assert {value(node).dtype for node in saved} == {E4M3 if recipe == "global" else BF16}
    assert blocks[recipe].input("o") in map(blocks[recipe].name, saved)


@recipes
def test_what_follows_from_saved_tensors_is_recomputed(blocks: dict[str, Step], recipe: str) -> None:
    """SwiGLU's product, which wgrad reads, follows from its factors, which the product's own backward reads."""
    step = blocks[recipe]
    assert [origin(node).target for node in step.saved if 96 in value(node).shape] == [SCALED_MM, SCALED_MM]
    assert step.input("down") not in map(step.name, step.saved)


OF_A_BLOCK: tuple[Callable[[dict[str, Step], str], None], ...] = (
    test_each_linear_has_the_gemms_of_its_recipe_and_no_others,
    test_every_tensor_is_quantized_by_one_amax,
    test_a_gradient_is_the_same_tensor_for_dgrad_and_wgrad,
    test_siblings_read_one_fp8_tensor,
    test_of_a_weight_only_a_number_is_saved,
    test_no_tensor_is_saved_both_in_fp8_and_in_high_precision,
    test_what_wgrad_alone_reads_is_saved_in_the_format_it_is_read_in,
    test_what_follows_from_saved_tensors_is_recomputed,
)


def test_rowwise_has_an_amax_for_each_layout_and_saves_inputs_in_fp8_and_nothing_of_weights() -> None:
    step, gemms = training_step(Block(), rows(80), recipe="rowwise"), [FORWARD]
    assert [step.gemms(name) for name in Block.LINEARS] == [(gemms, gemms, gemms)] * 7
    assert (
        list(step.amaxes().values()) == list(step.casts().values()) == [2] * (7 + 4 + 7)
    )  # weights, inputs, gradients
    assert {value(node).dtype for node in step.read_by_gemms_alone()} == {E4M3}
    assert saved_of_weights(step) == []
