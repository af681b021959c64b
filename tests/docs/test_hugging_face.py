"""Trainer, Accelerate, generate and diffusers over our backend: the code of docs/hugging_face.md, and what the page
says of it."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is downloaded

import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager

import fp8fx
from fp8fx.config import Config

accelerate = pytest.importorskip("accelerate", reason="the test extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the test extra is not installed")
transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")

from accelerate.state import AcceleratorState  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.slow  # Dynamo traces transformers, accelerate and diffusers; Inductor is left out

PAGE = Path(__file__).parents[2] / "docs" / "hugging_face.md"
NO_STOP = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
PROMPT = {"input_ids": torch.arange(7)[None], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
LINEARS = 8  # of a Llama of one layer, the head included


def blocks() -> dict[str, list[str]]:
    """The Python of each section of the page, by the section's title."""
    sections = re.split(r"^#+ (.*)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {
        title: re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        for title, text in zip(sections[::2], sections[1::2], strict=True)
    }


def run(title: str, index: int, **names: Any) -> dict[str, Any]:
    """Runs one block of the page among these names; returns all names afterwards."""
    exec(blocks()[title][index], names)
    return names


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **NO_STOP))


def flux() -> Any:
    torch.manual_seed(0)
    sizes = {
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    }
    widths = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    return diffusers.FluxTransformer2DModel(**sizes, **widths).eval().requires_grad_(False)


def latents() -> dict[str, Tensor]:
    image, text = torch.randn(1, 16, 4), torch.randn(1, 8, 32)
    places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
    return {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.ones(1),
        **places,
    }


def dataset() -> list[dict[str, Tensor]]:
    """Sixteen sequences that count upwards."""
    rows = [torch.arange(16) + start for start in range(16)]
    return [{"input_ids": row, "labels": row} for row in rows]


def batch(start: int = 0) -> dict[str, Tensor]:
    """Four of the dataset's sequences."""
    rows = torch.stack([row["input_ids"] for row in dataset()[start : start + 4]])
    return {"input_ids": rows, "labels": rows}


def trainer(model: nn.Module, output_dir: Path, **changes: Any) -> Any:
    arguments = {
        "output_dir": output_dir,
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = transformers.TrainingArguments(**arguments | changes)
    return transformers.Trainer(
        model=model, args=found, train_dataset=dataset(), eval_dataset=dataset(), optimizers=(optimizer, None)
    )


def losses(trainer: Any) -> Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.fixture(autouse=True)
def _one_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has an Accelerator's state of its own, and runs on the CPU, on which generate compiles, too."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(transformers.CompileConfig, "_compile_all_devices", True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def linears(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many FP8 matmuls each graph has that our backend lowers.

    What AOTAutograd makes of a graph runs as it is: Inductor's C++ would take minutes.
    """
    counts: list[int] = []

    def lower(
        gm: fx.GraphModule, example_inputs: Sequence[Any], *inner: Any, config_patches: Any
    ) -> Callable[..., Any]:
        graphs = [part.graph for part in gm.modules() if isinstance(part, fx.GraphModule)]
        counts.append(sum(str(node.target).startswith("fp8fx.matmul") for graph in graphs for node in graph.nodes))
        return aot_eager(gm, example_inputs)

    monkeypatch.setattr("fp8fx.lowering.compile_fx", lower)
    return counts


def test_every_block_of_the_page_is_run_here() -> None:
    counts = {title: len(found) for title, found in blocks().items()}
    assert counts == {
        "Trainer, Accelerate, generate and diffusers": 1,
        "Leave `attention_mask` out if nothing is padded": 0,
        "Trainer": 1,
        "Accelerate": 1,
        "generate": 2,
        "diffusers": 1,
    }


def test_reports(linears: list[int]) -> None:
    found = run("Trainer, Accelerate, generate and diffusers", 0, model=llama(), batch=PROMPT, fp8fx=fp8fx)
    assert [len(report.rewritten) for report in found["backend"].reports] == linears == [LINEARS - 1]


@pytest.mark.parametrize("given", [{"torch_compile_backend": "fp8"}, {"dynamo_backend": "fp8"}])
def test_accelerates_list_of_backends_is_closed(given: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'FP8' is not a valid DynamoBackend"):
        accelerate.Accelerator(**given) if "dynamo_backend" in given else trainer(llama(), tmp_path, **given)


def test_trainer(linears: list[int], tmp_path: Path) -> None:
    model = llama()
    on_the_cpu = functools.partial(transformers.TrainingArguments, use_cpu=True)
    names = {"Trainer": transformers.Trainer, "TrainingArguments": on_the_cpu}
    found = run("Trainer", 0, model=model, dataset=dataset(), output_dir=tmp_path, **names)
    assert linears == [LINEARS, LINEARS]  # training and evaluation
    assert found["trainer"].evaluate()["eval_loss"] < llama()(**batch()).loss.item()

    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() <= model.state_dict().keys()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_trainer_trains_as_a_loop_does(linears: list[int], tmp_path: Path) -> None:
    model = llama()
    model.compile(backend="fp8")
    trained = trainer(model, tmp_path)
    trained.train()

    looped, expected = llama(), []
    compiled, optimizer = torch.compile(looped, backend="fp8"), torch.optim.SGD(looped.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss = compiled(**batch(4 * step)).loss
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    torch.testing.assert_close(losses(trained), torch.tensor(expected), rtol=1e-4, atol=0)
    assert set(linears) == {LINEARS}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # gradient_checkpointing, by which everyone knows it
@pytest.mark.parametrize(
    "changes",
    [{"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=["accumulation", "checkpointing"],
)
def test_trainers_ways_to_train(changes: dict[str, Any], linears: list[int], tmp_path: Path) -> None:
    plain, model = llama(), llama()
    expected = trainer(plain, tmp_path, **changes)
    expected.train()
    model.compile(backend="fp8")
    trained = trainer(model, tmp_path, **changes)
    trained.train()
    assert set(linears) == {LINEARS}
    assert losses(trained)[-1] < losses(trained)[0]
    assert 0 < error(losses(trained), losses(expected)) < 1e-2


def test_trainer_finds_no_columns_for_a_wrapped_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The batch received was empty"):
        trainer(torch.compile(llama(), backend="fp8"), tmp_path).train()


def test_accelerate(linears: list[int], tmp_path: Path) -> None:
    model = llama()
    before = model(**batch()).loss.item()
    loader = torch.utils.data.DataLoader(dataset(), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"Accelerator": accelerate.Accelerator, "optimizer": optimizer, "loader": loader, "output_dir": tmp_path}
    found = run("Accelerate", 0, model=model, **names)
    assert found["model"] is model
    assert linears == [LINEARS]
    assert model(**batch()).loss.item() < before
    assert load_file(tmp_path / "model.safetensors").keys() <= model.state_dict().keys()


@pytest.mark.parametrize("when", ["before", "after", "called before"])
def test_a_prepared_model_is_compiled_with_its_autocast(when: str, linears: list[int]) -> None:
    plain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    model, x = copy.deepcopy(plain), torch.randn(4, 32)
    if when != "after":
        model.compile(backend="fp8")
    if when == "called before":
        model(x)
    prepared = accelerate.Accelerator(mixed_precision="bf16").prepare(model)
    if when == "after":
        prepared.compile(backend="fp8")
    found = prepared(x)

    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.compile(plain, backend="fp8")(x)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(found, expected.float())
    assert set(linears) == {2}


def test_generate(linears: list[int]) -> None:
    model = llama().eval()
    expected = model.generate(**PROMPT, max_new_tokens=8, cache_implementation="static", disable_compile=True)
    names = {"prompt": PROMPT, "CompileConfig": transformers.CompileConfig, "fp8fx": fp8fx}
    found = run("generate", 0, model=model, **names)
    assert found["tokens"].shape == expected.shape
    assert len(linears) == 1  # decoding alone
    again = run("generate", 0, model=model, **names)
    assert torch.equal(again["tokens"], found["tokens"])
    assert len(linears) == 1  # an equal configuration compiles nothing anew


def test_generate_with_a_backend_that_is_an_object(linears: list[int]) -> None:
    model, backend = llama().eval(), fp8fx.Backend(Config(recipe="rowwise"))
    for _ in range(2):  # transformers copies the configuration
        config = transformers.CompileConfig(backend=backend, mode=None)
        model.generate(**PROMPT, max_new_tokens=4, cache_implementation="static", compile_config=config)
    assert [len(report.rewritten) for report in backend.reports] == linears == [LINEARS]


def test_generate_takes_a_mode_or_options() -> None:
    both = transformers.CompileConfig(backend="fp8", options={"recipe": "rowwise"})
    with pytest.raises(RuntimeError, match="Either mode or options"):
        llama().generate(**PROMPT, max_new_tokens=4, cache_implementation="static", compile_config=both)


def test_generate_on_a_compiled_model(linears: list[int]) -> None:
    run("generate", 1, model=llama().eval(), prompt=PROMPT, fp8fx=fp8fx)
    assert len(linears) == 2  # prefill and decoding
    assert all(linears)


def test_what_generate_compiles_itself_leaves_a_compiled_model_in_fp8(linears: list[int]) -> None:
    model = llama().eval()
    model.compile(backend="fp8")
    config = transformers.CompileConfig(backend="eager", mode=None)
    model.generate(**PROMPT, max_new_tokens=4, cache_implementation="static", compile_config=config)
    assert linears == [LINEARS, LINEARS]  # prefill and decoding


def test_diffusers(linears: list[int]) -> None:
    model, given = flux(), latents()
    expected = model(**given).sample
    found = run("diffusers", 0, transformer=model, latents=given, torch=torch, fp8fx=fp8fx)
    assert len(linears) >= 2  # blocks of two kinds
    assert all(linears)
    assert 0 < error(found["sample"], expected) < 5e-2
