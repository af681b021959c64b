"""Everything private of torch is in one file, and there in the running torch; a newer torch is warned of once."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fp8fx
from fp8fx import torch_internals, torch_versions
from fp8fx.torch_versions import NEWEST, OLDEST

PACKAGE = Path(fp8fx.__file__).parent
PASSES = (PACKAGE / "passes").resolve()  # rglob follows no link
FILES = sorted({*PACKAGE.rglob("*.py"), *PASSES.rglob("*.py")} - {PACKAGE / "torch_internals.py"})

# What every pickle of a module depends on.
OF_MODULES = set(nn.Module().__dict__) | {"_orig_mod"}
OF_PYTHON = {"_replace", "_asdict", "_fields", "_make"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """The private names that a file defines itself."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            names |= {node.attr} if node.value.id in ("self", "cls") else set()
        elif isinstance(node, (ast.AnnAssign, ast.arg)):
            names |= {node.arg} if isinstance(node, ast.arg) else set()
    return names


def private_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """What a file names that is private to somebody else; torch.fx.experimental counts as private."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            path = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(is_private(part) for part in path) or "experimental" in path:
                yield f"from {node.module} import {', '.join(alias.name for alias in node.names)}"
        elif isinstance(node, ast.Import):
            yield from (
                a.name for a in node.names if a.name.startswith("torch.") and any(map(is_private, a.name.split(".")))
            )
        elif (
            isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own | OF_MODULES | OF_PYTHON
        ):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_no_other_file_names_anything_private(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert sorted(set(private_names(tree, own_names(tree)))) == []


def test_the_reader_reads() -> None:
    tree = ast.parse((PACKAGE / "torch_internals.py").read_text())
    found = set(private_names(tree, own_names(tree)))
    assert {
        "from torch._dynamo.exc import RestartAnalysis, SkipFrame",
        "torch._scaled_mm",
        "overload._schema",
    } <= found
    assert "from torch.fx.experimental.proxy_tensor import make_fx" in found


def test_all_of_it_is_there_and_used() -> None:
    sources = "\n".join(path.read_text() for path in FILES)
    for name in set(torch_internals.__all__) - {"Assembler"}:
        assert getattr(torch_internals, name) is not None
        assert name in sources, f"nothing uses {name}"


def test_the_running_torch_is_one_of_those_tested() -> None:
    assert OLDEST <= tuple(map(int, torch.__version__.split(".")[:2])) <= NEWEST


@pytest.mark.parametrize("version", ["2.16.0", "2.16.0.dev20261201+cpu", "3.0.0a0"])
def test_a_newer_torch_is_warned_of_once(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_versions.warn_of_untested.cache_clear()
    monkeypatch.setattr(torch, "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fp8fx.Backend()
        fp8fx.convert(nn.Linear(16, 16))
    torch_versions.warn_of_untested.cache_clear()
    (found,) = [one for one in caught if one.category is fp8fx.FP8Warning]
    assert str(found.message).startswith(f"fp8: torch {version} is newer than 2.15")
    assert found.filename == __file__


@pytest.mark.parametrize("version", ["2.11.0", "2.15.0+cu132", "2.15.3"])
def test_a_tested_torch_is_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_versions.warn_of_untested.cache_clear()
    monkeypatch.setattr(torch, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_versions.warn_of_untested()
