"""Whole models of transformers and diffusers at their real sizes, with random weights: bf16 Inductor, torchao's float8
linears and ours, each in a process of its own and written as its users write it.

Ours has FP8 weights where a case is inference. `bf16 causal` is Inductor with our pass `causal` alone, which tells what
part of a gain is not FP8's.

    python -m benchmarks.whole [--cases llama-prefill flux ...] [--contenders bf16 rowwise ...]

Prints a table with ratios against bf16 and writes the raw figures, with every kernel's time, to
benchmarks/results/whole_<case>.json.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fp8fx
from benchmarks.harness import arguments, await_turn, compare, kernel_times, milliseconds

TORCHAO = "torchao"  # PerRow in inference, tensorwise in training: its fastest
CAUSAL = "bf16 causal"
OURS = ("mixed", "global", "rowwise")
CONTENDERS = ("bf16", CAUSAL, TORCHAO, *OURS)
HEADS = ("lm_head*",)  # left in bfloat16 by each contender in inference


@dataclass(frozen=True)
class Case:
    """One model and what its users do with it.

    Attributes:
        create: makes the model in the current default device, here the meta device.
        inputs: the arguments of `call`, for the device.
        prepare: compiles the model, given the arguments that name a contender's backend; returns what is timed.
        steps: what one call counts as, such as tokens.
        trains: whether a call is a training step, whose result is the loss.
    """

    create: Callable[..., nn.Module]
    inputs: Callable[[Any, str], dict[str, Any]]
    prepare: Callable[[Any, dict[str, Any]], Callable[..., Any]]
    steps: int = 1
    trains: bool = False


def llama(**sizes: int) -> nn.Module:
    """Llama-3-8B, or one of these sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    rope: Any = {"rope_theta": 500000.0, "rope_type": "default"}
    return LlamaForCausalLM(LlamaConfig(**{**own, **sizes}, rope_parameters=rope))


_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_LLAMA_3B = {**_LLAMA_1B, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}


def qwen3_moe(**sizes: int) -> nn.Module:
    """Qwen3-30B-A3B: 128 experts, 8 of them for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    own = {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    }
    config = Qwen3MoeConfig(**{**own, **sizes}, norm_topk_prob=True)
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config)


def bert(**sizes: int) -> nn.Module:
    """BERT-large."""
    from transformers import BertConfig, BertModel

    own = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return BertModel(BertConfig(**{**own, **sizes}))


def flux(**sizes: Any) -> nn.Module:
    """FLUX.1's transformer, whose defaults these sizes are."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True, **sizes)


def _tokens(model: Any, device: str, count: int, batch: int = 1) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, model.config.vocab_size, (batch, count), device=device)}


def _latents(model: Any, device: str, image: int = 4096, text: int = 512) -> dict[str, Any]:
    config, bf16 = model.config, {"device": device, "dtype": torch.bfloat16}
    return {
        "hidden_states": torch.randn(1, image, config.in_channels, **bf16),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, **bf16),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, **bf16),
        "timestep": torch.ones(1, **bf16),
        "guidance": torch.full((1,), 3.5, **bf16),
        "img_ids": torch.zeros(image, 3, **bf16),
        "txt_ids": torch.zeros(text, 3, **bf16),
    }


def _prefill(model: Any, backend: dict[str, Any]) -> Callable[..., Tensor]:
    compiled = torch.compile(model, **backend)
    return lambda **given: compiled(use_cache=False, **given).logits


def _encode(model: Any, backend: dict[str, Any]) -> Callable[..., Tensor]:
    compiled = torch.compile(model, **backend)
    return lambda **given: compiled(**given).last_hidden_state


def _training(model: Any, backend: dict[str, Any], checkpointing: bool = False) -> Callable[..., Tensor]:
    if checkpointing:
        model.gradient_checkpointing_enable()
    compiled = torch.compile(model, **backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(input_ids: Tensor) -> Tensor:
        loss: Tensor = compiled(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _in_cuda_graphs(backend: dict[str, Any]) -> dict[str, Any]:
    """torch.compile's arguments with the mode, which stands among the options if there are any."""
    if not backend:
        return {"mode": "reduce-overhead"}
    return {**backend, "options": {**backend.get("options", {}), "mode": "reduce-overhead"}}


def _decode(model: Any, backend: dict[str, Any], tokens: int) -> Callable[..., Tensor]:
    from transformers import StaticCache

    compiled = torch.compile(model, fullgraph=True, **_in_cuda_graphs(backend))
    config = model.config
    cache = StaticCache(config, max_cache_len=256)
    sizes = {
        "batch_size": 1,
        "num_heads": config.num_key_value_heads,
        "head_dim": model.model.layers[0].self_attn.head_dim,
    }
    cache.early_initialization(**sizes, dtype=model.dtype, device=model.device)  # what a CUDA graph writes is its input

    def call(input_ids: Tensor) -> Tensor:
        cache.reset()
        for position in torch.arange(tokens, device=input_ids.device).view(-1, 1, 1):
            torch.compiler.cudagraph_mark_step_begin()
            logits: Tensor = compiled(input_ids=input_ids, position_ids=position, past_key_values=cache).logits
            input_ids = logits.argmax(-1)
        return logits.clone()

    return call


def _generate(model: Any, backend: dict[str, Any], tokens: int) -> Callable[..., Tensor]:
    from transformers import CompileConfig

    # transformers compiles the decoding over a static cache itself, in CUDA graphs unless it is told otherwise.
    config = CompileConfig(**{"mode": None, **_in_cuda_graphs(backend)})
    count = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def call(input_ids: Tensor) -> Tensor:
        mask = torch.ones_like(input_ids)
        sequences: Tensor = model.generate(
            input_ids, attention_mask=mask, cache_implementation="static", compile_config=config, **count
        )
        return sequences

    return call


def _repeated_blocks(model: Any, backend: dict[str, Any]) -> Callable[..., Tensor]:
    model.compile_repeated_blocks(fullgraph=True, **backend)
    return lambda **given: model(**given).sample


TOKENS = 64
CASES = {
    "llama-1-layer": Case(
        functools.partial(llama, num_hidden_layers=1), functools.partial(_tokens, count=512), _prefill
    ),
    "llama-prefill": Case(llama, functools.partial(_tokens, count=2048), _prefill),
    "llama-generate": Case(
        llama, functools.partial(_tokens, count=64), functools.partial(_generate, tokens=TOKENS), steps=TOKENS
    ),
    "llama-decode": Case(
        llama, functools.partial(_tokens, count=1), functools.partial(_decode, tokens=TOKENS), steps=TOKENS
    ),
    "llama-1b-training": Case(
        functools.partial(llama, **_LLAMA_1B), functools.partial(_tokens, count=4096, batch=2), _training, trains=True
    ),
    "llama-1b-checkpointed": Case(
        functools.partial(llama, **_LLAMA_1B),
        functools.partial(_tokens, count=4096, batch=2),
        functools.partial(_training, checkpointing=True),
        trains=True,
    ),
    "llama-3b-training": Case(
        functools.partial(llama, **_LLAMA_3B), functools.partial(_tokens, count=4096, batch=2), _training, trains=True
    ),
    "flux": Case(flux, _latents, _repeated_blocks),
    "qwen3-moe-prefill": Case(qwen3_moe, functools.partial(_tokens, count=2048), _prefill),
    "bert-large": Case(bert, functools.partial(_tokens, count=512, batch=32), _encode),
}


def load(case: Case, contender: str, device: str = "cuda", **sizes: Any) -> Any:
    """The case's model in bfloat16 with random weights, which are the same for each contender.

    It starts on the meta device. For inference ours is frozen there, so that each weight is quantized as soon as it is
    drawn.
    """
    with torch.device("meta"):
        model: Any = case.create(**sizes).bfloat16().train(case.trains).requires_grad_(False)
    if contender in OURS and not case.trains:
        fp8fx.freeze(model, contender, exclude=HEADS)
    model.to_empty(device=device)
    if hasattr(model, "tie_weights"):  # diffusers' models have no such method
        model.tie_weights()
    for name, weight in model.named_parameters():
        torch.manual_seed(zlib.crc32(name.encode()))
        if weight.dim() == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        elif isinstance(weight, fp8fx.FP8Weight):
            weight.copy_(torch.empty(weight.shape, dtype=weight.dtype, device=device).normal_(std=0.02))
        else:
            weight.normal_(std=0.02)
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    if rotary is not None:  # its frequencies are in no state dict
        model.model.rotary_emb = type(rotary)(model.config).to(device)
    for name, buffer in model.named_buffers():
        if name.endswith("_ids"):  # BERT's positions and token types
            positions = torch.arange(buffer.shape[-1]) if "position" in name else torch.zeros(buffer.shape[-1])
            buffer.copy_(positions.expand_as(buffer))
    if contender == TORCHAO:
        _convert_by_torchao(model, case.trains)
    return model.requires_grad_(case.trains)


def _convert_by_torchao(model: nn.Module, trains: bool) -> None:
    if trains:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("tensorwise"))
        return
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(
        model,
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and not name.startswith("lm_head"),
    )


def backend_of(contender: str, trains: bool) -> dict[str, Any]:
    """What a contender gives torch.compile."""
    if contender == CAUSAL:
        return {"backend": "fp8", "options": {"profit": "never"}}
    if contender not in OURS:
        return {}
    return {"backend": "fp8", "options": {"recipe": contender}} if trains else {"backend": "fp8"}


def one(name: str, contender: str) -> dict[str, Any]:
    """Seconds of loading and of the first call, GiB while loading, at rest and in a call, error against bf16's output
    and milliseconds of a step."""
    case = CASES[name]
    with torch.set_grad_enabled(case.trains):
        return _figures(name, case, contender)


def _figures(name: str, case: Case, contender: str) -> dict[str, Any]:
    """See `one`."""
    figures: dict[str, Any] = {}
    start = time.perf_counter()
    with torch.no_grad():
        model = load(case, contender)
    torch.cuda.synchronize()
    figures["load_s"] = time.perf_counter() - start
    torch.manual_seed(0)
    given = case.inputs(model, "cuda")
    run = functools.partial(case.prepare(model, backend_of(contender, case.trains)), **given)

    start = time.perf_counter()
    y = run()
    torch.cuda.synchronize()
    figures["compile_s"] = time.perf_counter() - start
    figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30  # from nothing to the first call's end
    y = y.double()

    exact = Path(tempfile.gettempdir()) / f"fp8fx_whole_{name}.pt"  # bf16's output, which the first contender leaves
    if contender == "bf16":
        torch.save(y, exact)
    elif exact.exists() and case.steps == 1:
        expected = torch.load(exact, map_location="cuda")
        figures["relative_error"] = float((y - expected).norm() / expected.norm())
        del expected
    del y
    await_turn()
    run()
    figures["weights_gib"] = sum(x.untyped_storage().nbytes() for x in _memory(model)) / 2**30
    torch.cuda.reset_peak_memory_stats()
    run()
    figures["call_gib"] = torch.cuda.max_memory_allocated() / 2**30
    long = {"batches": 3, "least": 50, "warmup": 1} if case.steps > 1 else {}
    figures["ms"] = milliseconds(run, **long) / case.steps
    kinds, kernels = kernel_times(run, 1 if case.steps > 1 else 3)
    figures["kernel_ms"] = {kind: spent / case.steps for kind, spent in kinds.items()}
    figures["kernels"] = [(kernel, spent / case.steps, count / case.steps) for kernel, spent, count in kernels[:40]]
    return figures


def _memory(model: nn.Module) -> list[Tensor]:
    """A tensor of each memory that the model's parameters and buffers use."""
    plain = [part for x in (*model.parameters(), *model.buffers()) for part in _parts(x)]
    return list({x.untyped_storage().data_ptr(): x for x in plain}.values())


def _parts(x: Tensor) -> list[Tensor]:
    names = x.__tensor_flatten__()[0] if hasattr(x, "__tensor_flatten__") else ()
    return [part for name in names for part in _parts(getattr(x, name))] if names else [x]


_FIGURES = {
    "load s": ("load_s", ".1f"),
    "compile s": ("compile_s", ".1f"),
    "weights GiB": ("weights_gib", ".2f"),
    "peak GiB": ("peak_gib", ".2f"),
    "call GiB": ("call_gib", ".2f"),
    "error": ("relative_error", ".1e"),
}
_KINDS = ("GEMM", "quantize", "attention", "other")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The contenders' figures side by side, kernels' milliseconds by kind last."""
    base, lines = rows.get("bf16", {}), []
    for contender, row in rows.items():
        if "ms" not in row:
            lines.append([contender, str(row["error"])[:80]])
            continue
        figures = [format(row[key], spec) if key in row else "" for key, spec in _FIGURES.values()]
        kernels = [f"{row['kernel_ms'].get(kind, 0):.3f}" for kind in _KINDS]
        speed = f"{base['ms'] / row['ms']:.3f}x" if "ms" in base else ""
        lines.append([contender, f"{row['ms']:.3f}", speed, *figures, *kernels])
    headers = ("", "ms", "against bf16", *_FIGURES, *(f"{kind} ms" for kind in _KINDS))
    return tabulate(lines, headers, disable_numparse=True)


def main() -> None:
    """Runs every contender on every case."""
    args = arguments(__doc__, CASES, CONTENDERS)
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    compare("whole", [(case, name) for case in args.cases for name in args.contenders], args, table)


if __name__ == "__main__":
    main()
