"""Frozen transformers models: saved, loaded, quantized while they are loaded, and what they generate."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import fp8fx
from fp8fx import FP8Weight
from fp8fx.errors import ConfigError, FreezeError, GraphError

transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")

import fp8fx.transformers  # noqa: E402
from fp8fx.transformers import FP8Config  # noqa: E402
from tests.support.tiny_transformers import (  # noqa: E402
    FAMILIES,
    IDS,
    PROMPT,
    VOCABULARY,
    Own,
    gpt2,
    llama,
    own,
    qwen3_moe,
    tied_llama,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:transformers")]

families = pytest.mark.parametrize("family", FAMILIES)
NAME = "model.layers.0.self_attn.q_proj.weight"


def fp8_weights(model: nn.Module) -> dict[str, FP8Weight]:
    return {name: x for name, x in model.named_parameters() if isinstance(x, FP8Weight)}


def assert_same(model: Any, other: Any) -> None:
    """The same FP8 weights, to the bit, laid out alike, and the same logits."""
    weights, others = fp8_weights(model), fp8_weights(other)
    assert weights.keys() == others.keys()
    assert weights
    for name, weight in weights.items():
        assert torch.equal(weight.qdata.view(torch.uint8), others[name].qdata.view(torch.uint8)), name
        assert torch.equal(weight.scale, others[name].scale), name
        assert weight.qdata.stride() == others[name].qdata.stride(), name
        assert (weight.recipe, weight.dtype) == (others[name].recipe, others[name].dtype), name
    assert torch.equal(model(IDS).logits, other(IDS).logits)


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


# Saved and loaded.


@families
@pytest.mark.parametrize("recipe", ["rowwise", "global"])
def test_a_frozen_model_is_saved_and_loaded(family: str, recipe: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    report = fp8fx.transformers.freeze(model, recipe)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(model, loaded)
    assert config_of(tmp_path)["quantization_config"]["quant_method"] == "fp8fx"
    assert len(fp8_weights(loaded)) == len(report.rewritten)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert not isinstance(loaded.get_input_embeddings().weight, FP8Weight)

    loaded.save_pretrained(tmp_path / "again")
    assert_same(model, type(model).from_pretrained(tmp_path / "again"))


def test_siblings_that_lie_side_by_side_are_saved_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8fx.lowering.compile_fx", lambda gm, inputs, *inner, config_patches: gm.forward)
    model = llama()
    fp8fx.transformers.freeze(model)
    torch.compile(model, backend="fp8")(IDS)
    attention = model.model.layers[0].self_attn
    q, k = attention.q_proj.weight.qdata, attention.k_proj.weight.qdata
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    model.save_pretrained(tmp_path)
    assert_same(model, type(model).from_pretrained(tmp_path).eval())


def test_the_files(tmp_path: Path) -> None:
    model = llama()
    fp8fx.transformers.freeze(model, "rowwise", exclude="lm_head")
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert (found[NAME].dtype, found[NAME].shape) == (torch.float8_e4m3fn, (32, 32, 1))
    assert (found[f"{NAME}_scale"].dtype, found[f"{NAME}_scale"].shape) == (torch.float32, (32, 1))
    assert found["lm_head.weight"].dtype == torch.float32
    saved = config_of(tmp_path)["quantization_config"]
    assert saved["weights"] == dict.fromkeys(fp8_weights(model), "rowwise")
    assert (saved["recipe"], saved["exclude"]) == ("rowwise", "lm_head")


def test_two_recipes_in_one_model(tmp_path: Path) -> None:
    model = llama()
    fp8fx.transformers.freeze(model, "global", include="*mlp*")
    fp8fx.transformers.freeze(model, "rowwise")
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(model, loaded)
    assert {x.recipe for x in fp8_weights(loaded).values()} == {"global", "rowwise"}


def test_weights_that_are_shared_or_that_a_call_shows(tmp_path: Path) -> None:
    model, x = own(), torch.randn(4, 32)
    assert model.a.weight is model.b.weight
    fp8fx.transformers.freeze(model, inputs=(x,))
    model.save_pretrained(tmp_path)
    loaded = Own.from_pretrained(tmp_path)
    assert loaded.a.weight is loaded.b.weight
    assert loaded.w.is_transposed
    assert all(isinstance(weight, FP8Weight) for weight in (loaded.a.weight, loaded.w))
    assert torch.equal(loaded(x), model(x))


def test_in_shards_in_another_dtype_on_a_device_and_without_the_head(tmp_path: Path) -> None:
    model = llama()
    fp8fx.transformers.freeze(model)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu"))
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {x.dtype for x in fp8_weights(half).values()} == {torch.bfloat16}
    base = transformers.LlamaModel.from_pretrained(tmp_path)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_part_of_a_model_is_saved(tmp_path: Path) -> None:
    model = llama()
    fp8fx.transformers.freeze(model)
    model.model.save_pretrained(tmp_path)
    base = transformers.LlamaModel.from_pretrained(tmp_path)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_copy_and_a_state_dict(tmp_path: Path) -> None:
    model = llama()
    fp8fx.transformers.freeze(model)
    copied = copy.deepcopy(model)
    assert_same(model, copied)
    copied.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert sorted(loaded.state_dict()) == sorted(model.state_dict())
    loaded.load_state_dict(model.state_dict())
    assert_same(model, loaded)


def test_dequantize(tmp_path: Path) -> None:
    model = tied_llama()
    fp8fx.transformers.freeze(model)
    values = {name: x.dequantize() for name, x in fp8_weights(model).items()}
    model.dequantize()
    assert fp8_weights(model) == {}
    assert all(torch.equal(model.get_parameter(name), value) for name, value in values.items())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in config_of(tmp_path)
    assert torch.equal(transformers.LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


# What must not be loaded.


def _spoil(state: dict[str, Tensor], name: str, value: Tensor | None) -> None:
    if value is None:
        del state[name]
    else:
        state[name] = value


SCALE = f"{NAME}_scale"
SPOILT: dict[str, tuple[str, Tensor | None, type[Exception], str]] = {
    "no data": (NAME, None, FreezeError, f"{NAME} is missing in the files"),
    "no scale": (SCALE, None, FreezeError, f"{NAME}: FP8 data without a scale in the files"),
    "a scale that is NaN": (SCALE, torch.full((32, 1), torch.nan), FreezeError, "its scale is not finite"),
    "a scale of another shape": (SCALE, torch.ones(3, 1), RuntimeError, "ignore_mismatched_sizes"),
    "high precision": (NAME, torch.ones(32, 32), RuntimeError, "ignore_mismatched_sizes"),
    "high precision in FP8's shape": (NAME, torch.ones(32, 32, 1), FreezeError, "torch.float32 with a scale"),
    "another format": (NAME, torch.ones(32, 32, 1).to(torch.float8_e5m2), FreezeError, "torch.float8_e5m2"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_spoilt_files_are_refused(fault: str, tmp_path: Path) -> None:
    model = llama()
    fp8fx.transformers.freeze(model)
    model.save_pretrained(tmp_path)
    name, value, kind, text = SPOILT[fault]
    state = load_file(tmp_path / "model.safetensors")
    _spoil(state, name, value)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(kind, match=text):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_transformers_that_was_not_told_raises(tmp_path: Path) -> None:
    """Codes are never taken for values."""
    model = llama()
    fp8fx.transformers.freeze(model)
    model.save_pretrained(tmp_path)
    code = f"import transformers; transformers.LlamaForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Unknown quantization type, got fp8fx" in done.stderr
    assert "You set `ignore_mismatched_sizes` to `False`, thus raising an error" in done.stderr


@pytest.mark.parametrize("build", [gpt2, qwen3_moe])
def test_another_config_raises(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build()
    fp8fx.transformers.freeze(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, config=build().config)


def test_a_config_that_names_no_weights(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = config_of(tmp_path) | {"quantization_config": {"quant_method": "fp8fx"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FreezeError, match=r"pass quantization_config=FP8Config\(\)"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_offloading_while_loading_is_refused(tmp_path: Path) -> None:
    model = llama()
    fp8fx.transformers.freeze(model)
    model.save_pretrained(tmp_path)
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(FreezeError, match=r"lm_head\.weight was offloaded"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")


def test_save_pretrained_after_fp8fx_freeze_says_what_to_do(tmp_path: Path) -> None:
    model = llama()
    fp8fx.freeze(model)
    with pytest.raises(FreezeError, match=r"call fp8fx\.transformers\.freeze\(model\)"):
        model.save_pretrained(tmp_path)
    with pytest.raises(FreezeError, match=r"call fp8fx\.transformers\.freeze\(model\)"):
        model.model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    fp8fx.transformers.freeze(model)
    model.save_pretrained(tmp_path)
    assert_same(model, transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def test_bad_input() -> None:
    with pytest.raises(GraphError, match=r"got a Linear; expected a transformers model \(use fp8fx\.freeze\)"):
        fp8fx.transformers.freeze(nn.Linear(32, 32))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Did you mean 'rowwise'"):
        FP8Config(recipe="rowise")
    with pytest.raises(ConfigError, match="unknown recipe 'row'"):
        FP8Config(weights={"lm_head.weight": "row"})
    model = llama()
    with pytest.raises(FreezeError, match="requires grad"):
        fp8fx.transformers.freeze(model.requires_grad_(True))
    assert not hasattr(model, "hf_quantizer")


# Quantized while they are loaded.


@families
def test_a_checkpoint_is_quantized_while_it_is_loaded(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "high")
    loaded = type(model).from_pretrained(tmp_path / "high", quantization_config=FP8Config(recipe="rowwise"))
    fp8fx.transformers.freeze(model)
    assert_same(model, loaded)
    assert loaded.hf_quantizer.report.refused == ()
    loaded.save_pretrained(tmp_path / "fp8")
    assert_same(model, type(model).from_pretrained(tmp_path / "fp8"))


def test_a_choice_of_weights_is_quantized_while_they_are_loaded(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = FP8Config(recipe="global", include="model.*", exclude="*.mlp.*")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert fp8_weights(model).keys() == {
        f"model.layers.{i}.self_attn.{name}_proj.weight" for i in (0, 1) for name in "qkvo"
    }
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert {str(row.reason) for row in model.hf_quantizer.report.refused} == {
        "excluded by '*.mlp.*'",
        "not among include='model.*'",
    }


def test_a_checkpoint_that_is_not_finite(tmp_path: Path) -> None:
    model = llama()
    model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=FP8Config())


def test_one_weight_in_high_precision_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(layers=4).save_pretrained(tmp_path)
    sizes = {(64, 32), (32, 64)}  # those of the MLPs, and of the embedding, which stays
    alive: list[int] = []
    quantized = FP8Weight._quantized.__func__  # type: ignore[attr-defined]

    def count(cls: Any, value: Tensor, *args: Any) -> Any:
        found = {
            x.untyped_storage().data_ptr()
            for x in gc.get_objects()
            if type(x) in (Tensor, nn.Parameter) and not x.is_meta and tuple(x.shape) in sizes
            if x.dtype == torch.float32
        }
        alive.append(len(found))
        return quantized(cls, value, *args)

    monkeypatch.setattr(FP8Weight, "_quantized", classmethod(count))
    gc.collect()
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=FP8Config())
    assert len(alive) == len(fp8_weights(model)) == 29
    assert max(alive) == 2  # the embedding, and the weight that is quantized


# What they generate: greedily, the tokens of the frozen model itself.


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has generate compile on a CPU, as it does on a GPU."""
    monkeypatch.setattr(transformers.CompileConfig, "_compile_all_devices", True)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our backend's graphs run as AOTAutograd makes them: Inductor's C++ takes a while."""
    monkeypatch.setattr("fp8fx.lowering.compile_fx", lambda gm, inputs, *inner, config_patches: aot_eager(gm, inputs))


def generated(model: Any, **how: Any) -> list[int]:
    tokens: list[int] = model.generate(**PROMPT, max_new_tokens=8, do_sample=False, **how)[0, 7:].tolist()
    assert len(tokens) == 8
    return tokens


def frozen(build: Callable[[], Any] = llama) -> Any:
    model = build()
    fp8fx.freeze(model)
    return model


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@families
def test_static_caches_change_no_token(family: str) -> None:
    model = frozen(FAMILIES[family])
    counters.clear()
    assert generated(model, cache_implementation="static") == generated(model)
    assert graphs() == 0  # on a CPU transformers compiles nothing


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "fp8"])
@pytest.mark.usefixtures("on_a_cpu", "without_inductor")
def test_decoding_that_generate_compiles(backend: str) -> None:
    model = frozen()
    expected = generated(model)
    counters.clear()
    config = transformers.CompileConfig(backend=backend, mode=None)
    assert generated(model, cache_implementation="static", compile_config=config) == expected
    assert graphs() == 1  # decoding alone


@pytest.mark.usefixtures("on_a_cpu", "without_inductor")
def test_the_options_of_generates_compilation() -> None:
    model, backend = frozen(tied_llama), fp8fx.Backend(fp8fx.Config(recipe="rowwise"))
    config = transformers.CompileConfig(backend=backend, mode=None)
    expected = generated(model)
    assert generated(model, cache_implementation="static", compile_config=config) == expected
    assert [len(report.rewritten) for report in backend.reports] == [15]
    config = transformers.CompileConfig(backend="fp8", mode=None, options={"recipe": "rowwise"})
    assert generated(model, cache_implementation="static", compile_config=config) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.usefixtures("without_inductor")
def test_a_compiled_model_generates(family: str) -> None:
    """Also the prefill; what a graph writes to the cache in place stays."""
    model = frozen(FAMILIES[family])
    expected = generated(model)
    model.compile(backend="fp8")
    counters.clear()
    assert generated(model, cache_implementation="static", disable_compile=True) == expected
    assert graphs() == 2


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["inductor", "fp8"])
@pytest.mark.usefixtures("on_a_cpu")
def test_decoding_by_inductor(backend: str) -> None:
    model = frozen(lambda: llama(layers=1))
    expected = generated(model)
    config = transformers.CompileConfig(backend=backend, mode=None)
    assert generated(model, cache_implementation="static", compile_config=config) == expected


def test_assisted_decoding() -> None:
    model, assistant = frozen(), frozen(lambda: llama(layers=1))
    expected = generated(model)
    assert generated(model, assistant_model=assistant) == expected
    assert generated(model, assistant_model=llama(layers=1)) == expected
    assert generated(llama(), assistant_model=assistant) == generated(llama())


def test_a_pipeline() -> None:
    model = frozen()
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0")
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=wrapped, device="cpu")
    prompt = " ".join(f"w{i}" for i in PROMPT["input_ids"][0].tolist())
    text = pipeline(prompt, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert text.split() == [f"w{i}" for i in generated(model)]


def test_a_loaded_model_generates_as_the_saved_one(tmp_path: Path) -> None:
    model = qwen3_moe()
    fp8fx.transformers.freeze(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert generated(loaded, cache_implementation="static") == generated(model)
