"""peft's adapters on a frozen model: they train beside its FP8 weights, are swapped, and are merged into these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import fp8fx
from fp8fx import FP8Weight
from fp8fx.errors import FreezeError
from tests.support.numbers import error

LINEARS = ["q_proj", "k_proj", "v_proj", "down_proj"]
METHODS: dict[str, Callable[..., Any]] = {
    "LoRA": lambda **options: LoraConfig(r=4, lora_alpha=16, target_modules=LINEARS, **options),
    "DoRA": lambda **options: LoraConfig(r=4, lora_alpha=16, target_modules=LINEARS, use_dora=True, **options),
    "IA3": lambda **options: IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"], **options),
}
FROZEN_ONLY = fp8fx.Config(include="*base_layer*")
methods = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    """A block of attention and a layer behind it, and a head: what Dynamo traces in a moment."""

    checkpoints = False

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.down_proj = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 48)

    def block(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return x + self.down_proj(mixed.relu())

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpoints else self.block(x)
        return self.lm_head(x)


IDS = torch.arange(24).view(2, 12)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def frozen(model: Any) -> Any:
    model.requires_grad_(False)
    fp8fx.freeze(model, exclude="lm_head")
    return model


def adapted(model: Any, config: Any, is_trained: bool = False) -> Any:
    """The model with adapters, which differ from their first values if they are to be as if they were trained."""
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    if is_trained:
        with torch.no_grad():
            for x in model.parameters():
                if x.requires_grad:
                    x.add_(0.05 * torch.randn_like(x))
    return model


def fp8_weights(model: nn.Module) -> dict[str, FP8Weight]:
    return {name: x for name, x in model.named_parameters() if isinstance(x, FP8Weight)}


def train(model: Any, call: Callable[..., Any], steps: int = 4, autocast: bool = False) -> list[float]:
    """The losses; the frozen weights are as before, and have no gradients."""
    before = {name: x.dequantize() for name, x in fp8_weights(model).items()}
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            given = call(input_ids=IDS)
            logits = given if isinstance(given, Tensor) else given.logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), IDS.flatten())
        loss.backward()
        assert all(x.grad is not None for x in model.parameters() if x.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = fp8_weights(model)
    assert list(after) == list(before)
    assert all(x.grad is None and torch.equal(x.dequantize(), before[name]) for name, x in after.items())
    assert losses[-1] < losses[0]
    return losses


def far(losses: list[float], others: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


# They train.


@methods
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_they_train_on_a_llama(method: str, autocast: bool) -> None:
    exact = adapted(llama().requires_grad_(False), METHODS[method]())
    expected = train(exact, exact, autocast=autocast)
    model = adapted(frozen(llama()), METHODS[method]())
    assert len(fp8_weights(model)) == 7
    losses = train(model, model, autocast=autocast)
    assert 0 < far(losses, expected) < 0.01


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_change_no_loss(use_reentrant: bool) -> None:
    losses = []
    for checkpoints in (False, True):
        model = adapted(frozen(llama()), METHODS["DoRA"]())
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        losses.append(train(model.train(), model))
    assert losses[0] == losses[1]


@methods
def test_the_gradient_of_the_input_arrives(method: str) -> None:
    gradients = []
    for model in (llama().requires_grad_(False), frozen(llama())):
        model = adapted(model, METHODS[method](), is_trained=True)
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=x).logits.square().sum(), x)
        gradients.append(gradient)
    assert 0 < error(gradients[1], gradients[0]) < 0.1


@pytest.fixture
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd, which takes a graph apart as Inductor would get it, and no compiler behind it."""
    monkeypatch.setattr("fp8fx.lowering.compile_fx", lambda gm, inputs, *inner, config_patches: aot_eager(gm, inputs))


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize(
    ("method", "autocast", "checkpoints"),
    [("LoRA", False, False), ("LoRA", True, True), ("DoRA", False, False), ("DoRA", True, False), ("IA3", True, True)],
)
def test_they_train_in_a_graph(method: str, autocast: bool, checkpoints: bool) -> None:
    """Dynamo does not trace a DoRA inside a checkpoint, frozen or not: it clears a cache there."""
    model = adapted(frozen(net()), METHODS[method]())
    expected = train(model, model, autocast=autocast)
    model = adapted(frozen(net()), METHODS[method]())
    model.base_model.model.checkpoints = checkpoints
    backend = fp8fx.Backend(FROZEN_ONLY)
    assert far(train(model, torch.compile(model, backend=backend), autocast=autocast), expected) < 0.01
    (report,) = backend.reports
    rewritten = [name for row in report.rewritten for name in LINEARS if name in row.name]
    assert {*rewritten} == {*LINEARS}


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_they_train_in_a_graph_of_anothers(method: str) -> None:
    model = adapted(frozen(net()), METHODS[method]())
    expected = train(model, model)
    model = adapted(frozen(net()), METHODS[method]())
    assert far(train(model, torch.compile(model, backend="aot_eager")), expected) < 1e-4


def compiled_far(start: Callable[[], Any], method: str, backend: str) -> float:
    model = adapted(frozen(start()), METHODS[method]())
    expected = train(model, model)
    model = adapted(frozen(start()), METHODS[method]())
    options = {"include": FROZEN_ONLY.include} if backend == "fp8" else None
    return far(train(model, torch.compile(model, backend=backend, options=options)), expected)


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["fp8", "inductor"])
def test_they_train_compiled(backend: str) -> None:
    assert compiled_far(net, "LoRA", backend) < 0.01


@pytest.mark.zoo  # minutes of the C++ compiler's
@pytest.mark.parametrize("backend", ["fp8", "inductor"])
@pytest.mark.parametrize(("start", "method"), [(net, "DoRA"), (llama, "LoRA")])
def test_more_of_them_train_compiled(start: Callable[[], Any], method: str, backend: str) -> None:
    assert compiled_far(start, method, backend) < 0.01


# They are swapped.


@pytest.mark.usefixtures("_traced")
def test_a_compiled_model_sees_other_adapters(tmp_path: Path) -> None:
    torch.manual_seed(2)
    other = adapted(frozen(net()), METHODS["LoRA"](), is_trained=True)
    with torch.no_grad():
        other.base_model.model.q_proj.lora_B["default"].weight.add_(1)
    other.save_pretrained(tmp_path)
    model = adapted(frozen(net()), METHODS["LoRA"](), is_trained=True).eval()
    compiled = torch.compile(model, backend=fp8fx.Backend(FROZEN_ONLY))
    seen: list[Tensor] = []

    def differs() -> bool:
        """Whether the result differs from all before it. It is that of the model as it is now."""
        with torch.no_grad():
            y = compiled(IDS)
            assert error(y, model(IDS)) < 0.01
        is_new = all(error(y, x) > 1e-3 for x in seen)
        seen.append(y)
        return is_new

    assert differs()
    model.load_adapter(tmp_path, "other")
    assert not differs()
    model.set_adapter("other")
    assert differs()
    model.base_model.model.k_proj.lora_B["other"].weight.data = torch.randn(32, 4)
    assert differs()
    model.set_adapter("default")
    assert not differs()
    hotswap_adapter(model, tmp_path, "default")
    assert error(compiled(IDS), other(IDS)) < 0.01
    with model.disable_adapter():
        assert differs()
    model.merge_adapter()
    with torch.no_grad():
        assert error(compiled(IDS), model(IDS)) < 0.01
        assert error(compiled(IDS), other(IDS)) < 0.1


# They are merged.


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linears below adapters whose weights are FP8, or were."""
    for name, module in model.named_modules():
        if name.endswith(".base_layer"):
            yield name, module


def in_high_precision(model: Any) -> Any:
    """A copy with the same values and adapters, without FP8."""
    exact = copy.deepcopy(model)
    for _, layer in layers(exact):
        layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    return exact


def assert_quantized(model: nn.Module, exact: nn.Module) -> None:
    """Each weight is that of `exact`, quantized."""
    expected = dict(layers(exact))
    for name, layer in layers(model):
        assert type(layer.weight) is FP8Weight
        assert torch.equal(layer.weight.dequantize(), FP8Weight(expected[name].weight.data).dequantize())


@methods
@pytest.mark.parametrize("safe_merge", [False, True], ids=["", "safe"])
@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
def test_they_are_merged(method: str, safe_merge: bool) -> None:
    model = adapted(frozen(llama()), METHODS[method](), is_trained=True)
    y = model(IDS).logits
    exact = in_high_precision(model)
    exact.merge_adapter(safe_merge=safe_merge)
    model.merge_adapter(safe_merge=safe_merge)
    assert_quantized(model, exact)
    assert error(model(IDS).logits, y) < 0.05
    # It is undone up to the rounding of both.
    exact = in_high_precision(model)
    exact.unmerge_adapter()
    model.unmerge_adapter()
    assert_quantized(model, exact)
    assert 0 < error(model(IDS).logits, y) < 0.05


@methods
def test_they_are_merged_and_unloaded(method: str) -> None:
    model = adapted(frozen(llama()), METHODS[method](), is_trained=True)
    y = model(IDS).logits
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is LlamaForCausalLM
    assert len(fp8_weights(merged)) == 7
    assert error(merged(IDS).logits, y) < 0.05
    other = frozen(llama())
    other.load_state_dict(merged.state_dict())
    assert torch.equal(other(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_a_safe_merge_of_nan_changes_nothing(method: str) -> None:
    model = adapted(frozen(net()), METHODS[method](), is_trained=True)
    layer = model.base_model.model.q_proj
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    before = layer.base_layer.weight.dequantize()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight.dequantize(), before)


# What else peft does with a model.


def test_modules_to_save(tmp_path: Path) -> None:
    model = adapted(frozen(llama()), METHODS["LoRA"](modules_to_save=["lm_head"]))
    before = model.base_model.model.lm_head.weight.clone()
    train(model, model)
    assert not torch.equal(model.base_model.model.lm_head.weight, before)
    y = model(IDS).logits
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        assert torch.equal(PeftModel.from_pretrained(frozen(llama()), tmp_path, **options)(IDS).logits, y)


def test_a_frozen_weight_is_no_module_to_save() -> None:
    model = llama().requires_grad_(False)
    fp8fx.freeze(model)
    with pytest.raises(FreezeError, match=r"leave this weight in high precision: fp8fx\.freeze"):
        adapted(model, METHODS["LoRA"](modules_to_save=["lm_head"]))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_start_from_the_weight(start: str) -> None:
    """What is left of the weight is quantized."""
    model = frozen(llama())
    y = model(IDS).logits
    model = adapted(model, METHODS["LoRA"](init_lora_weights=start))
    assert len(fp8_weights(model)) == 7
    assert 0 < error(model(IDS).logits, y) < 0.05
