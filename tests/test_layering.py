"""Who may import whom, read from the sources."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fp8fx"

# A file imports only from those above it. passes/ stands where convert, its only user, needs it.
ORDER = (
    "errors",
    "torch_internals",
    "formats",
    "config",
    "numerics",
    "hardware",
    "kernels",
    "measure",
    "ops",
    "grouped",
    "nn",
    "operators",
    "graph",
    "writes",
    "frozen",
    "contraction",
    "forms",
    "match",
    "profit",
    "rewrite",
    "siblings",
    "report",
    "notice",
    "unseen",
    "passes",
    "convert",
    "backend",
    "__main__",
)
FILES = sorted(path.relative_to(PACKAGE) for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("kernels/*.py"), *PACKAGE.glob("passes/*.py")])
PASSES = [path for path in FILES if path.parts[0] == "passes" and path.stem != "__init__"]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether it does so inside a function. `from fp8fx import ops` imports fp8fx.ops."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            if node.module in ("fp8fx", "fp8fx.kernels", "fp8fx.passes"):
                yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
            else:
                yield node.module, inside
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse((PACKAGE / path).read_text()), False)


def rooms(path: Path) -> list[str]:
    """What a file imports of fp8fx, as `kernels.simulated`."""
    return [name.removeprefix("fp8fx").removeprefix(".") for name, _ in imports(path) if name.split(".")[0] == "fp8fx"]


def test_the_order_lists_every_file() -> None:
    assert {path.parts[0].removesuffix(".py") for path in FILES} - {"__init__"} <= set(ORDER)
    assert {path.parts[0].removesuffix(".py") for path in FILES} >= set(ORDER) - {"__main__"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_those_above_it(path: Path) -> None:
    own = path.parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return  # the public names of all the others, and their user
    for name in rooms(path):
        room = name.split(".")[0]
        assert room, f"{path} imports fp8fx itself"
        if room != own:
            assert ORDER.index(room) < ORDER.index(own), f"{path} imports fp8fx.{name}, which does not stand above it"


@pytest.mark.parametrize("path", PASSES, ids=str)
def test_a_pass_imports_no_other_pass_and_nothing_of_the_way_out(path: Path) -> None:
    assert not {name.split(".")[0] for name in rooms(path)} & {"passes", "report", "notice", "unseen", "convert", "backend"}


def test_the_pipeline_alone_imports_passes() -> None:
    found = rooms(Path("passes/__init__.py"))
    assert {f"passes.{name}" for name in ("match", "check", "decide", "replace", "merge", "freeze")} <= set(found)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_bitsandbytes_is_imported_only_where_it_runs(path: Path) -> None:
    outside = [name for name, inside in imports(path) if name.split(".")[0] in ("bitsandbytes", "transformers") and not inside]
    assert outside == []


def test_the_reader_of_imports_reads() -> None:
    """The tests above would pass on a reader that finds nothing."""
    assert ("bitsandbytes", True) in {(name.split(".")[0], inside) for name, inside in imports(Path("kernels/bitsandbytes.py"))}
    assert "rewrite" in rooms(Path("passes/match.py"))
    assert "convert" in rooms(Path("backend.py"))
    assert {"graph", "passes.PIPELINE", "report", "rewrite"} <= set(rooms(Path("convert.py")))


def test_passes_is_no_name_of_its_own() -> None:
    assert importlib.import_module("fp8fx.passes").PIPELINE
    sys.modules.pop("passes", None)
    with pytest.raises(ImportError, match=r"this folder is fp8fx's; import it as fp8fx\.passes"):
        importlib.import_module("passes")


def test_importing_fp8fx_is_quiet_and_imports_nothing_it_does_not_need() -> None:
    unneeded = ("bitsandbytes", "transformers", "fp8fx.kernels.gemv", "passes")
    code = f"import sys, fp8fx; print([name for name in {unneeded} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
