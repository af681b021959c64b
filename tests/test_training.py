"""Training through the backend: convergence, optimizers, mixed precision, shared and frozen weights, checkpoints, second derivatives."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8fx
from fp8fx.errors import DifferentiationError
from fp8fx.ops import op

recipes = pytest.mark.parametrize("recipe", ["mixed", "global"])

# Inductor's GEMMs sum in another order than eager ones. Such an ulp may push a value of the next layer's input over to the next FP8 value.
ORDER, FLIPS = 1e-5, 1e-2


def fp8(model: Callable[..., Any], recipe: str, **kwargs: Any) -> tuple[Callable[..., Any], fp8fx.Backend]:
    backend = fp8fx.Backend(fp8fx.Config(recipe=recipe))
    return torch.compile(model, backend=backend, **kwargs), backend


def error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def assert_near(values: Sequence[Tensor], references: Sequence[Tensor], most: float) -> None:
    for value, reference in zip(values, references, strict=True):
        assert (value.dtype, value.shape) == (reference.dtype, reference.shape)
        assert error(value, reference) < most


def assert_fp8_noise(values: Sequence[Tensor], references: Sequence[Tensor], least: float = 1e-3) -> None:
    """Near what high precision gives, and not it."""
    assert_near(values, references, 0.1)
    assert all(error(value, reference) > least for value, reference in zip(values, references, strict=True))


def gradients(model: nn.Module) -> list[Tensor]:
    """Copies of the gradients of all parameters."""
    found = [p.grad for p in model.parameters()]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


def clones(model: nn.Module) -> list[Tensor]:
    """The parameters as they are now, as leaves of their own."""
    return [p.detach().clone().requires_grad_() for p in model.parameters()]


def mlp() -> nn.Sequential:
    """Most tests compile this one, for batches of 16, so that Inductor's cache spares them the C++ compiler."""
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


# Convergence.


def digits_accuracy(model: nn.Module, call: Callable[..., Any], seed: int) -> float:
    """In percent, of the half of the digits that was held out."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float() / 16
    train, test = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split([901, 896])
    torch.manual_seed(seed)
    model.apply(lambda layer: layer.reset_parameters() if isinstance(layer, nn.Linear) else None)
    batches = torch.randint(len(train), (300, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(call(images[train[batch]]), labels[train[batch]]).backward()
        optimizer.step()
        schedule.step()
    right = [call(images[part]).argmax(1) == labels[part] for part in test.split(128)]
    return float(torch.cat(right).double().mean() * 100)


def test_digits_are_learned_as_well_as_in_float32() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    accuracies = {"float32": [digits_accuracy(model, model, seed) for seed in range(3)]}
    for recipe in ("mixed", "global"):
        compiled, backend = fp8(model, recipe)
        accuracies[recipe] = [digits_accuracy(model, compiled, seed) for seed in range(3)]
        assert [len(report.rewritten) for report in backend.reports] == [2]
    for found in accuracies.values():
        for accuracy, reference in zip(found, accuracies["float32"], strict=True):
            assert accuracy > 95 and abs(accuracy - reference) <= 0.5, accuracies  # 4 of 896 images


# Gradients that add up.


@recipes
def test_gradients_of_micro_batches_add_up_to_the_bit(recipe: str) -> None:
    model, batches = mlp(), torch.randn(3, 16, 64)
    compiled, _ = fp8(model, recipe)
    separate = []
    for x in batches:
        model.zero_grad()
        compiled(x).square().sum().backward()
        separate.append(gradients(model))
    model.zero_grad()
    for x in batches:
        compiled(x).square().sum().backward()
    for total, first, second, third in zip(gradients(model), *separate, strict=True):
        assert torch.equal(total, first + second + third)
        assert not torch.equal(first, second)


@recipes
def test_a_tied_embedding_gets_both_gradients(recipe: str) -> None:
    embedding, head, tokens = nn.Embedding(128, 64), nn.Linear(64, 128, bias=False), torch.randint(100, (4, 16))
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    compiled, backend = fp8(model, recipe)

    def parts(linear: Callable[[Tensor, Tensor], Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        """The embedding's gradient and the head's, as if the two weights were not tied."""
        (first,), (second,) = clones(head), clones(head)
        return torch.autograd.grad(linear(F.embedding(tokens, first), second), (first, second), grad)

    # Operands and gradient are FP8 values and every sum is exact: the plain model's gradient, to the bit.
    with torch.no_grad():
        head.weight.copy_(torch.randint(-7, 8, (128, 64)))[:, 0] = 240
    grad = torch.randint(-7, 8, (4, 16, 128)).float()
    grad[..., 0] = 7
    compiled(tokens).backward(grad)
    of_embedding, of_head = parts(F.linear, grad)
    assert torch.equal(gradients(model)[0], of_embedding + of_head)
    assert of_embedding[:100].any() and not of_embedding[100:].any() and of_head[100:].any()  # 28 tokens never occur
    # Any numbers.
    with torch.no_grad():
        head.weight.normal_()
    grad.normal_()
    model.zero_grad()
    compiled(tokens).backward(grad)
    of_embedding, of_head = parts(lambda x, w: op(recipe)(x, w.t()), grad)
    assert_near(gradients(model), [of_embedding + of_head], ORDER)
    assert_fp8_noise([of_embedding], [parts(F.linear, grad)[0]])
    assert [row.path for row in backend.reports[0].rewritten] == ["1"]


@recipes
def test_a_block_called_twice_gets_the_sum_of_both_gradients(recipe: str) -> None:
    block, x, grad = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh()), torch.randn(16, 64), torch.randn(16, 64)
    compiled, backend = fp8(nn.Sequential(block, block), recipe)
    compiled(x).backward(grad)
    leaves = [*clones(block), *clones(block)]
    for w in leaves:
        x = op(recipe)(x, w.t()).tanh()
    first, second = torch.autograd.grad(x, leaves, grad)
    (total,) = gradients(block)
    assert error(total, first + second) < FLIPS
    assert min(error(total, first), error(total, second)) > 10 * FLIPS
    assert len(backend.reports[0].rewritten) == 2


@recipes
def test_an_adapter_of_a_frozen_weight(recipe: str) -> None:
    base = nn.Linear(64, 128, bias=False).requires_grad_(False)
    down, up = nn.Linear(64, 8, bias=False), nn.Linear(8, 128, bias=False)

    def lora(x: Tensor) -> Tensor:
        out: Tensor = base(x) + up(down(x))
        return out

    x, *_ = leaves = torch.randn(16, 64, requires_grad=True), down.weight, up.weight
    compiled, backend = fp8(lora, recipe)
    out, grad, matmul = compiled(x), torch.randn(16, 128), op(recipe)
    out.backward(grad)
    assert base.weight.grad is None
    found = [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    by_hand = matmul(x, base.weight.t()) + matmul(matmul(x, down.weight.t()), up.weight.t())
    assert_near(found, [by_hand, *torch.autograd.grad(by_hand, leaves, grad)], FLIPS)
    plain = lora(x)
    assert_fp8_noise(found, [plain, *torch.autograd.grad(plain, leaves, grad)])
    assert len(backend.reports[0].rewritten) == 3


# Weights that change between steps.


def in_place(change: Callable[[Tensor], object]) -> Callable[[nn.Module], Callable[[], object]]:
    return lambda model: torch.no_grad()(lambda: [change(p) for p in model.parameters()])


def through_half(model: nn.Module) -> None:
    for p in model.half().parameters():
        p.data.neg_()
    model.float()


UPDATES: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    # Down to .half() they leave Tensor._version as it was.
    "Adam(fused=True)": lambda model: torch.optim.Adam(model.parameters(), lr=0.05, fused=True).step,
    "AdamW(fused=True)": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step,
    "SGD(fused=True)": lambda model: torch.optim.SGD(model.parameters(), lr=1.0, fused=True).step,
    ".data.add_": in_place(lambda p: p.data.add_(torch.randn_like(p), alpha=0.1)),
    ".data =": in_place(lambda p: setattr(p, "data", torch.randn_like(p) / 8)),
    "vector_to_parameters": lambda model: lambda: nn.utils.vector_to_parameters(torch.randn(16576) / 8, model.parameters()),
    ".half() and back": lambda model: lambda: through_half(model),
    "add_": in_place(lambda p: p.add_(torch.randn_like(p), alpha=0.1)),
    "copy_": in_place(lambda p: p.copy_(torch.randn_like(p) / 8)),
    "load_state_dict": lambda model: lambda: model.load_state_dict(mlp().state_dict()),
    "load_state_dict(assign=True)": lambda model: lambda: model.load_state_dict(mlp().state_dict(), assign=True),
}


@recipes
@pytest.mark.parametrize("update", UPDATES)
def test_the_step_after_an_update_computes_with_the_new_weights(update: str, recipe: str) -> None:
    model, x, grad = mlp(), torch.randn(16, 64), torch.randn(16, 64)
    (compiled, backend), change = fp8(model, recipe), UPDATES[update](model)
    before: Tensor | None = None
    for _ in range(4):
        model.zero_grad()
        out = compiled(x)
        out.backward(grad)
        w, b, v, c = leaves = clones(model)
        expected = op(recipe)(op(recipe)(x, w.t(), bias=b).tanh(), v.t(), bias=c)
        assert_near([out, *gradients(model)], [expected, *torch.autograd.grad(expected, leaves, grad)], FLIPS)
        assert before is None or error(before, expected) > 10 * FLIPS
        before = expected
        change()
    assert len(backend.reports) == 1


def losses(call: Callable[..., Any], optimizer: torch.optim.Optimizer, batches: Tensor) -> list[float]:
    """Of one step a batch: the model is to learn the identity."""
    found = []
    for x in batches:
        optimizer.zero_grad()
        loss = F.mse_loss(call(x), x)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


@recipes
def test_a_copy_and_a_resumed_run_go_on_with_the_same_losses_to_the_bit(recipe: str) -> None:
    model, uninterrupted, batches, file = mlp(), mlp(), torch.randn(6, 16, 64), io.BytesIO()
    uninterrupted.load_state_dict(model.state_dict())
    expected = losses(fp8(uninterrupted, recipe)[0], adamw(uninterrupted), batches)
    assert expected[5] < expected[0]

    (compiled, _), optimizer = fp8(model, recipe), adamw(model)
    assert losses(compiled, optimizer, batches[:3]) == expected[:3]
    copied, its_optimizer = copy.deepcopy((model, optimizer))  # together, or the optimizer would hold other parameters
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    assert losses(compiled, optimizer, batches[3:]) == expected[3:]
    assert losses(fp8(copied, recipe)[0], its_optimizer, batches[3:]) == expected[3:]

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = mlp()
    resumed.load_state_dict(saved["model"])
    optimizer = adamw(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    assert losses(fp8(resumed, recipe)[0], optimizer, batches[3:]) == expected[3:]


@recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_a_converted_model_changes_no_bit(use_reentrant: bool, dtype: torch.dtype, recipe: str) -> None:
    model, x = mlp().to(dtype), torch.randn(16, 64, dtype=dtype, requires_grad=True)
    converted = fp8fx.convert(model, recipe=recipe)
    found = []
    for call in (converted, lambda x: checkpoint(converted, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        x.grad = None
        out = call(x)
        out.float().square().sum().backward()
        found.append([out, x.grad, *gradients(model)])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*found, strict=True))


# Mixed precision.

ONES, NAN = torch.ones(16, 64), torch.ones(16, 64)
NAN[3, 5] = math.nan
SPOILED = {  # the input, the scale of the loss, and where the values stop being finite
    "an activation that overflows": (ONES * 5.5e4, 2.0**10, "forward"),
    "a NaN in the input": (NAN, 2.0**10, "forward"),
    "a gradient that arrives as inf": (ONES, 2.0**40, "loss"),
    "a gradient that overflows on its way": (ONES, 2.0**14, "backward"),
}


@recipes
@pytest.mark.parametrize("what", SPOILED)
def test_grad_scaler_skips_a_step_that_is_not_finite_and_takes_a_clean_one(what: str, recipe: str) -> None:
    model, target = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), torch.rand(16, 64) + 0.5
    compiled, _ = fp8(model, recipe)
    x, scale, where = SPOILED[what]
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=scale), torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor) -> tuple[bool, Tensor]:
        """Whether it was taken, and the output."""
        before = clones(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            out: Tensor = compiled(x)
        out.retain_grad()
        scaler.scale((out.float() * target).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        return any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)), out

    taken, out = step(x)
    assert not taken and scaler.get_scale() == scale / 2
    assert out.dtype == torch.float16 and bool(out.isfinite().all()) == (where != "forward")
    assert out.grad is not None and bool(out.grad.isfinite().all()) == (where != "loss")
    assert not any(grad.isfinite().all() for grad in gradients(model)[::2])  # of both weights, not only of a bias
    clean, plain, halved = torch.randn(16, 64), copy.deepcopy(model), 1
    plain.zero_grad()
    (plain(clean) * target).sum().backward()
    while not step(clean)[0]:
        halved += 1
        assert where != "forward" and halved < 40  # only the scale was at fault
    assert scaler.get_scale() == scale / 2**halved
    assert_near(gradients(model), gradients(plain), 0.1)  # unscaled by the step


@recipes
def test_autocast_around_the_model_and_inside_it(recipe: str) -> None:
    first, second, third = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def regions(x: Tensor) -> tuple[Tensor, ...]:
        a = first(x)
        with torch.autocast("cpu", enabled=False):
            b = second(a.float().tanh())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                c = third(b.tanh())
        return a, b, c

    (compiled, backend), x, results = fp8(regions, recipe, fullgraph=True), torch.randn(16, 64), []
    for call in (compiled, regions):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs = call(x)
        assert [out.dtype for out in outs] == [torch.bfloat16, torch.float32, torch.bfloat16]
        squares = [out.float().square().sum() for out in outs]
        results.append([*outs, *torch.autograd.grad(squares, [first.weight, second.weight, third.weight])])
        assert all(grad.dtype == torch.float32 for grad in results[-1][3:])
    assert_fp8_noise(results[0], results[1], least=1e-2)  # bfloat16 alone stays below
    assert len(backend.reports[0].rewritten) == 3


# What a model may do.


@recipes
def test_dropout_is_active_in_training_only_and_each_mode_is_compiled_once(recipe: str) -> None:
    linear, x = nn.Linear(64, 128), torch.randn(16, 64)
    model = nn.Sequential(linear, nn.Dropout(0.5))
    compiled, backend = fp8(model, recipe)
    evaluated = []
    for _ in range(2):
        model.train()
        out, other = compiled(x), compiled(x)
        assert 0.4 < float((out == 0).double().mean()) < 0.6
        assert not torch.equal(out == 0, other == 0)
        model.zero_grad()
        out.sum().backward()
        assert torch.equal(gradients(linear)[1], (out != 0).sum(0) * 2.0)  # through the forward's own mask
        model.eval()
        evaluated.append(compiled(x))
    assert len(backend.reports) == 2
    assert torch.equal(*evaluated)
    assert_near(evaluated[:1], [op(recipe)(x, linear.weight.t(), bias=linear.bias)], ORDER)


def test_a_graph_break_changes_no_loss() -> None:
    model, batches, found = mlp(), torch.randn(6, 16, 64), []
    initial = copy.deepcopy(model.state_dict())

    def broken(x: Tensor) -> Any:
        h = model[0](x)
        torch._dynamo.graph_break()
        return model[2](model[1](h))

    for call, graphs in ((broken, [1, 1]), (model, [2])):
        model.load_state_dict(initial)
        compiled, backend = fp8(call, "mixed")
        found.append(losses(compiled, adamw(model), batches))
        assert [len(report.rewritten) for report in backend.reports] == graphs
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_integers_pass_through_untouched() -> None:
    embedding, head, table = nn.Embedding(128, 64), nn.Linear(64, 128), nn.Buffer(torch.randint(10**6, (4, 4)))

    def model(tokens: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        x = embedding(tokens)
        return head(x), x, tokens, counts @ table, counts + tokens[0, 0]

    tokens, counts = torch.randint(128, (4, 16)), torch.randint(10**6, (4, 4))
    given, (compiled, backend) = (tokens.clone(), counts.clone()), fp8(model, "mixed")
    with torch.no_grad():
        (out, *others), (plain, *expected) = compiled(tokens, counts), model(tokens, counts)
    for value, reference in zip((*others, tokens, counts), (*expected, *given), strict=True):
        assert value.dtype == reference.dtype and torch.equal(value, reference)
    assert_fp8_noise([out], [plain])
    (row,) = backend.reports[0].refused
    assert row.reason == "the input is int64; FP8 takes float32, float16 or bfloat16"


@recipes
def test_batches_of_any_size_are_one_compilation(recipe: str) -> None:
    model, graphs = nn.Linear(64, 128), []
    peek = {"post_grad_custom_post_pass": lambda graph: graphs.append(graph)}
    compiled, backend = fp8(model, recipe, dynamic=True, options=peek)
    for m in (7, 12, 33, 16):
        x, grad = torch.randn(m, 64, requires_grad=True), torch.randn(m, 128)
        outs = compiled(x), op(recipe)(x, model.weight.t(), bias=model.bias)
        found, expected = ([out, *torch.autograd.grad(out, [x, *model.parameters()], grad)] for out in outs)
        assert_near(found, expected, ORDER)
    assert (len(backend.reports), len(graphs)) == (1, 2)  # forward and backward


# Gradients of gradients.


@recipes
@pytest.mark.parametrize("of", [0, 1, 2], ids=["input", "weight", "bias"])
def test_a_gradient_of_a_converted_model_is_not_differentiated_again(of: int, recipe: str) -> None:
    model, x = mlp(), torch.randn(16, 64, requires_grad=True)
    leaf, converted = [x, *model.parameters()][of], fp8fx.convert(model, recipe=recipe)
    (once,) = torch.autograd.grad(converted(x).square().sum(), leaf)
    (grad,) = torch.autograd.grad(converted(x).square().sum(), leaf, create_graph=True)
    assert torch.equal(grad, once)
    with pytest.raises(DifferentiationError, match=rf"^a gradient of matmul_fp8_{recipe} was differentiated again; .*: exclude them by"):
        grad.square().sum().backward()


@recipes
def test_no_second_derivative_is_silently_left_out(recipe: str) -> None:
    """Of a loss and a penalty on the second weight's gradient, with respect to the first weight alone."""
    model = mlp()
    first, _, second, _ = model.parameters()
    loss = fp8fx.convert(model, recipe=recipe)(torch.randn(16, 64)).sum()
    (grad,) = torch.autograd.grad(loss, second, create_graph=True)
    with pytest.raises(DifferentiationError, match=f"matmul_fp8_{recipe}"):
        torch.autograd.grad(loss + grad.square().sum(), first)


@recipes
def test_a_penalty_behind_which_no_linear_is_fp8_trains_those_before(recipe: str) -> None:
    """What DifferentiationError advises."""
    model, x, hidden, found = mlp(), torch.randn(16, 64), [], []
    model[1].register_forward_hook(lambda module, args, out: hidden.append(args[0]))
    for call in (fp8fx.convert(model, recipe=recipe, exclude="2"), model):
        model.zero_grad()
        (grad,) = torch.autograd.grad(call(x).square().sum(), hidden[-1], create_graph=True)
        grad.square().sum().backward()
        found.append(gradients(model))
    assert_fp8_noise(found[0], found[1])


@recipes
def test_a_compiled_model_refuses_to_be_differentiated_again(recipe: str) -> None:
    model = mlp()
    out, weight = fp8(model, recipe)[0](torch.randn(16, 64)), next(model.parameters())
    # AOTAutograd's own errors, as of any compiled model: at once where backward overwrites what was saved, else the second time.
    with pytest.raises(RuntimeError, match=r"requires create_graph=False|does not currently support double backward"):
        torch.autograd.grad(torch.autograd.grad(out.square().sum(), weight, create_graph=True)[0].sum(), weight)
