"""What training keeps on every device: tests/training/test_training.py holds a CPU to it,
tests/gpu/test_training_cuda.py FP8 tensor cores.

Weights and inputs are drawn on the CPU, so that they are the same numbers everywhere. `profit` is "always": the models
are small.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8fx
from fp8fx.errors import DifferentiationError
from fp8fx.ops.matmul import op

# Inductor's GEMMs sum in another order than eager ones. Such an ulp may push a value of the next layer's input over to
# the next FP8 value.
EXACT, FLIPS = 1e-5, 1e-2
# FP8 tensor cores keep fewer bits of a sum, and cuBLASLt has several kernels for one GEMM.
ORDER = {"cpu": EXACT, "cuda": FLIPS}
# Of the same training, compiled in two ways.
LOSSES = {"cpu": 1e-3, "cuda": 1e-2}


def fp8(model: Callable[..., Any], recipe: str, **kwargs: Any) -> tuple[Callable[..., Any], fp8fx.Backend]:
    backend = fp8fx.Backend(fp8fx.Config(recipe=recipe, profit="always"))
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


def mlp(device: str | torch.device = "cpu") -> nn.Sequential:
    """Most tests compile this one, for batches of 16, so that Inductor's cache spares them the compiler."""
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(device)


def losses(call: Callable[..., Any], optimizer: torch.optim.Optimizer, batches: Iterable[Tensor]) -> list[float]:
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


# Gradients that add up.


def assert_micro_batches_add_up(recipe: str, device: str) -> None:
    model, batches = mlp(device), torch.randn(3, 16, 64).to(device)
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


def assert_a_tied_embedding_gets_both_gradients(recipe: str, device: str) -> None:
    embedding, head = nn.Embedding(128, 64).to(device), nn.Linear(64, 128, bias=False).to(device)
    tokens = torch.randint(100, (4, 16)).to(device)
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
    grad = torch.randint(-7, 8, (4, 16, 128)).float().to(device)
    grad[..., 0] = 7
    compiled(tokens).backward(grad)
    of_embedding, of_head = parts(F.linear, grad)
    assert torch.equal(gradients(model)[0], of_embedding + of_head)
    assert of_embedding[:100].any() and not of_embedding[100:].any() and of_head[100:].any()  # 28 tokens never occur
    # Any numbers.
    with torch.no_grad():
        head.weight.copy_(torch.randn(128, 64))
    grad = torch.randn(4, 16, 128).to(device)
    model.zero_grad()
    compiled(tokens).backward(grad)
    of_embedding, of_head = parts(lambda x, w: op(recipe)(x, w.t()), grad)
    assert_near(gradients(model), [of_embedding + of_head], ORDER[device])
    assert_fp8_noise([of_embedding], [parts(F.linear, grad)[0]])
    assert [row.path for row in backend.reports[0].rewritten] == ["1"]


def assert_a_shared_block_gets_both_gradients(recipe: str, device: str) -> None:
    block = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh()).to(device)
    x, grad = torch.randn(2, 16, 64).to(device)
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


def assert_an_adapter_of_a_frozen_weight_trains(recipe: str, device: str) -> None:
    base = nn.Linear(64, 128, bias=False).requires_grad_(False).to(device)
    down, up = nn.Linear(64, 8, bias=False).to(device), nn.Linear(8, 128, bias=False).to(device)

    def lora(x: Tensor) -> Tensor:
        out: Tensor = base(x) + up(down(x))
        return out

    x, *_ = leaves = torch.randn(16, 64).to(device).requires_grad_(), down.weight, up.weight
    compiled, backend = fp8(lora, recipe)
    out, grad, matmul = compiled(x), torch.randn(16, 128).to(device), op(recipe)
    out.backward(grad)
    assert base.weight.grad is None
    found = [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    by_hand = matmul(x, base.weight.t()) + matmul(matmul(x, down.weight.t()), up.weight.t())
    assert_near(found, [by_hand, *torch.autograd.grad(by_hand, leaves, grad)], FLIPS)
    plain = lora(x)
    assert_fp8_noise(found, [plain, *torch.autograd.grad(plain, leaves, grad)])
    assert len(backend.reports[0].rewritten) == 3


REDUCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    # The gradient repeats one value, a row, or a column; is a part of zeros; or is copied, as rows of a batch.
    lambda y: y.sum(),
    lambda y: y.sum(0),
    lambda y: y.mean(1),
    lambda y: y[:5, 3:].mean(),
    lambda y: y.unflatten(0, (2, -1)).mean(1),
)


def assert_the_gradient_of_each_reduction_is_right(recipe: str, device: str) -> None:
    """Each stands behind a linear of its own, and all are one compilation.

    An energy is the sum of a head with one output.
    """
    linears = [nn.Linear(64, 48) for _ in REDUCTIONS]
    head = nn.Linear(64, 1)
    model = nn.ModuleList([*linears, head]).to(device)

    def reduced(*ys: Tensor) -> list[Tensor]:
        *outs, energies = ys
        return [*(reduction(y) for reduction, y in zip(REDUCTIONS, outs, strict=True)), energies.sum()]

    def written(x: Tensor) -> list[Tensor]:
        return reduced(*(linear(x) for linear in model))

    def by_hand(x: Tensor) -> list[Tensor]:
        return reduced(*(op(recipe)(x, linear.weight.t(), bias=linear.bias) for linear in model))

    x, results = torch.randn(16, 64).to(device).requires_grad_(), []
    compiled, backend = fp8(written, recipe, fullgraph=True)
    for call in (compiled, by_hand):
        outs = call(x)
        loss = sum(out.sum() for out in outs)
        results.append([*outs, *torch.autograd.grad(loss, [x, *model.parameters()])])
    assert_near(results[0], results[1], FLIPS)
    (report,) = backend.reports
    assert (len(report.rewritten), report.skipped) == (len(model), ())


GEMMS = ("forward", "dgrad", "wgrad")


def assert_each_gemm_may_stay_in_high_precision(recipe: str, device: str) -> None:
    """Of three linears each leaves another one there: that is the plain linear's, and the others are FP8."""
    xs = [torch.randn(80, 64).to(device).requires_grad_() for _ in GEMMS]
    weights = [(torch.randn(128, 64) / 8).to(device).requires_grad_() for _ in GEMMS]
    grads = [torch.randn(80, 128).to(device) for _ in GEMMS]

    def linears(xs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        return [op(recipe)(x, w.t(), **{gemm: False}) for gemm, x, w in zip(GEMMS, xs, weights, strict=True)]

    outs = torch.compile(linears, fullgraph=True)(xs, weights)
    torch.autograd.backward(outs, grads)
    for exact, x, w, out, grad in zip(GEMMS, xs, weights, outs, grads, strict=True):
        plain = F.linear(x, w)
        expected = (plain, *torch.autograd.grad(plain, (x, w), grad))
        for gemm, value, reference in zip(GEMMS, (out, x.grad, w.grad), expected, strict=True):
            assert value is not None
            if gemm == exact or (gemm == "wgrad" and recipe == "mixed"):
                assert_near([value], [reference], EXACT)
            else:
                assert_fp8_noise([value], [reference])


# Weights that change between steps.


def in_place(change: Callable[[Tensor], object]) -> Callable[[nn.Module], Callable[[], object]]:
    return lambda model: torch.no_grad()(lambda: [change(p) for p in model.parameters()])


def noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape).to(like.device)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Another model's, on the same device."""
    return mlp(next(model.parameters()).device).state_dict()


def from_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(noise(vector) / 8, model.parameters())


def through_half(model: nn.Module) -> None:
    for p in model.half().parameters():
        p.data.neg_()
    model.float()


UPDATES: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    # Down to .half() they leave Tensor._version as it was. In this order each is seen also behind the one before.
    "Adam(fused=True)": lambda model: torch.optim.Adam(model.parameters(), lr=0.05, fused=True).step,
    "AdamW(fused=True)": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step,
    "SGD(fused=True)": lambda model: torch.optim.SGD(model.parameters(), lr=1.0, fused=True).step,
    ".data =": in_place(lambda p: setattr(p, "data", noise(p) / 8)),
    ".data.add_": in_place(lambda p: p.data.add_(noise(p), alpha=0.1)),
    "vector_to_parameters": lambda model: lambda: from_vector(model),
    ".half() and back": lambda model: lambda: through_half(model),
    "add_": in_place(lambda p: p.add_(noise(p), alpha=0.1)),
    "copy_": in_place(lambda p: p.copy_(noise(p) / 8)),
    "load_state_dict": lambda model: lambda: model.load_state_dict(state(model)),
    "load_state_dict(assign=True)": lambda model: lambda: model.load_state_dict(state(model), assign=True),
}


def assert_steps_compute_with_new_weights(updates: Sequence[str], recipe: str, device: str) -> None:
    """One step, and one after each of these updates, all in the same compiled code."""
    model, x, grad = mlp(device), torch.randn(16, 64).to(device), torch.randn(16, 64).to(device)
    compiled, backend = fp8(model, recipe)
    changes = {update: UPDATES[update](model) for update in updates}
    before: Tensor | None = None
    for update in (None, *updates):
        if update is not None:
            changes[update]()
        model.zero_grad()
        out = compiled(x)
        out.backward(grad)
        w, b, v, c = leaves = clones(model)
        expected = op(recipe)(op(recipe)(x, w.t(), bias=b).tanh(), v.t(), bias=c)
        assert_near([out, *gradients(model)], [expected, *torch.autograd.grad(expected, leaves, grad)], FLIPS)
        assert before is None or error(before, expected) > 10 * FLIPS, update
        before = expected
    assert len(backend.reports) == 1


def assert_a_copy_and_a_resumed_run_go_on_with_the_same_losses(recipe: str, device: str) -> None:
    model, uninterrupted, batches, file = mlp(device), mlp(device), torch.randn(6, 16, 64).to(device), io.BytesIO()
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
    resumed = mlp(device)
    resumed.load_state_dict(saved["model"])
    optimizer = adamw(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    assert losses(fp8(resumed, recipe)[0], optimizer, batches[3:]) == expected[3:]


# What a model may do.


def assert_autocast_around_the_model_and_inside_it(recipe: str, device: str) -> None:
    first, second, third = (nn.Linear(64, 64, bias=False).to(device) for _ in range(3))

    def regions(x: Tensor) -> tuple[Tensor, ...]:
        a = first(x)
        with torch.autocast(device, enabled=False):
            b = second(a.float().tanh())
            with torch.autocast(device, dtype=torch.bfloat16):
                c = third(b.tanh())
        return a, b, c

    (compiled, backend), x, results = fp8(regions, recipe, fullgraph=True), torch.randn(16, 64).to(device), []
    for call in (compiled, regions):
        with torch.autocast(device, dtype=torch.bfloat16):
            outs = call(x)
        assert [out.dtype for out in outs] == [torch.bfloat16, torch.float32, torch.bfloat16]
        squares = [out.float().square().sum() for out in outs]
        results.append([*outs, *torch.autograd.grad(squares, [first.weight, second.weight, third.weight])])
        assert all(grad.dtype == torch.float32 for grad in results[-1][3:])
    assert_fp8_noise(results[0], results[1], least=1e-2)  # bfloat16 alone stays below
    assert len(backend.reports[0].rewritten) == 3


def assert_dropout_in_training_only(recipe: str, device: str) -> None:
    """And each mode is compiled once."""
    linear, x = nn.Linear(64, 128).to(device), torch.randn(16, 64).to(device)
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
    assert_near(evaluated[:1], [op(recipe)(x, linear.weight.t(), bias=linear.bias)], ORDER[device])


def assert_a_graph_break_changes_no_loss(recipe: str, device: str) -> None:
    model, batches, found = mlp(device), torch.randn(6, 16, 64).to(device), []
    initial = copy.deepcopy(model.state_dict())

    def broken(x: Tensor) -> Any:
        h = model[0](x)
        torch._dynamo.graph_break()
        return model[2](model[1](h))

    for call, graphs in ((broken, [1, 1]), (model, [2])):
        model.load_state_dict(initial)
        compiled, backend = fp8(call, recipe)
        found.append(losses(compiled, adamw(model), batches))
        assert [len(report.rewritten) for report in backend.reports] == graphs
    assert found[0] == pytest.approx(found[1], rel=LOSSES[device])


def assert_integers_pass_through(recipe: str, device: str) -> None:
    embedding, head = nn.Embedding(128, 64).to(device), nn.Linear(64, 128, bias=False).to(device)

    def model(tokens: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        x = embedding(tokens)
        return head(x), x, tokens, counts * 3 + tokens[0, 0]

    tokens, counts, grad = (
        x.to(device) for x in (torch.randint(128, (4, 16)), torch.randint(10**9, (4, 4)), torch.randn(4, 16, 128))
    )
    given, (compiled, _) = (tokens.clone(), counts.clone()), fp8(model, recipe)
    (out, *others), (plain, *expected) = compiled(tokens, counts), model(tokens, counts)
    for value, reference in zip((*others, tokens, counts), (*expected, *given), strict=True):
        assert value.dtype == reference.dtype and torch.equal(value, reference)
    found, reference = (torch.autograd.grad(y, [embedding.weight, head.weight], grad) for y in (out, plain))
    assert_fp8_noise([out, found[0]], [plain, reference[0]])
    assert_near(found[1:], reference[1:], 0.1)


# Gradients of gradients.


def assert_a_gradient_is_not_differentiated_again(of: int, recipe: str, device: str) -> None:
    """That of the input or of one of the three parameters behind it; it is itself the one that can be had without a
    graph."""
    model, x = mlp(device), torch.randn(16, 64).to(device).requires_grad_()
    leaf, converted = [x, *model.parameters()][of], fp8fx.convert(model, recipe=recipe, profit="always")
    (once,) = torch.autograd.grad(converted(x).square().sum(), leaf)
    (grad,) = torch.autograd.grad(converted(x).square().sum(), leaf, create_graph=True)
    assert torch.equal(grad, once)
    with pytest.raises(
        DifferentiationError, match=rf"^a gradient of matmul_fp8_{recipe} was differentiated again; .*: exclude them by"
    ):
        grad.square().sum().backward()


def assert_a_compiled_model_refuses_to_be_differentiated_again(recipe: str, device: str) -> None:
    model = mlp(device)
    out, weight = fp8(model, recipe)[0](torch.randn(16, 64).to(device)), next(model.parameters())
    # AOTAutograd's own errors, as of any compiled model: at once where backward overwrites what was saved, else the
    # second time.
    with pytest.raises(RuntimeError, match=r"requires create_graph=False|does not currently support double backward"):
        torch.autograd.grad(torch.autograd.grad(out.square().sum(), weight, create_graph=True)[0].sum(), weight)
