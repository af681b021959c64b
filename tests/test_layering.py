"""Who may import whom, read from the sources."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fp8fx"

# A room is a folder, or a file of its own. It imports only from rooms above it.
ROOMS = (
    "errors",
    "reasons",
    "torch_internals",
    "torch_versions",
    "triton_internals",
    "recipes",
    "executors",
    "config",
    "ops",
    "nn",
    "graph",
    "linears",
    "profit",
    "weights",
    "pipeline",
    "report",
    "notice",
    "unseen",
    "passes",
    "convert",
    "whole_rows",
    "lowering",
    "layers",
    "prologue",
    "capture",
    "backend",
    "used_weights",
    "freeze",
    "transformers",
    "cli",
)
OUTSIDE = ("__init__", "__main__")  # the public names, and the program that prints


def _sources() -> list[Path]:
    """Every source file, relative to the package; the passes by the package's link to them."""
    own = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if "passes" not in path.parts]
    return sorted(
        {*own, *(Path("passes") / path.relative_to(ROOT / "passes") for path in (ROOT / "passes").rglob("*.py"))}
    )


FILES = _sources()
PASSES = [path for path in FILES if path.parts[0] == "passes" and path.stem != "__init__"]


def module_of(path: Path) -> str:
    """`graph.values` of `graph/values.py`, `graph` of `graph/__init__.py`."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


@functools.cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """Every module that a file imports, and whether it does so inside a function.

    `from fp8fx.graph import values` imports `fp8fx.graph.values`, as that is a file.
    """

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                yield longer if longer.removeprefix("fp8fx.") in MODULES else node.module, inside
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return tuple(visit(ast.parse((PACKAGE / path).read_text()), False))


def imported(path: Path) -> list[str]:
    """What a file imports of fp8fx, as `executors.simulated`."""
    return [name.removeprefix("fp8fx").removeprefix(".") for name, _ in imports(path) if name.split(".")[0] == "fp8fx"]


def test_the_list_has_every_room() -> None:
    rooms = {path.parts[0].removesuffix(".py") for path in FILES}
    assert rooms == {*ROOMS, *OUTSIDE}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_rooms_above_its_own(path: Path) -> None:
    own = path.parts[0].removesuffix(".py")
    if own in OUTSIDE or own == "cli":
        return  # it prints the public names
    for name in imported(path):
        room = name.split(".")[0]
        assert room, f"{path} imports fp8fx itself"
        assert ROOMS.index(room) <= ROOMS.index(own), f"{path} imports fp8fx.{name}, which does not stand above it"


def test_no_file_imports_itself_by_way_of_others() -> None:
    arrows = {module_of(path): [name for name in imported(path) if name in MODULES] for path in FILES}
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", PASSES, ids=str)
def test_a_pass_imports_no_other_pass_and_nothing_of_the_way_out(path: Path) -> None:
    way_out = ROOMS[ROOMS.index("report") :]
    assert not {name.split(".")[0] for name in imported(path)} & set(way_out)


@pytest.mark.parametrize("kind", ["rewrite", "inductor"])
def test_each_kind_of_pass_is_listed_in_one_place(kind: str) -> None:
    files = {module_of(path) for path in PASSES if path.parts[1] == kind}
    assert files == set(imported(Path("passes") / kind / "__init__.py")) - {"pipeline"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_bitsandbytes_is_imported_only_where_it_runs(path: Path) -> None:
    foreign = ["bitsandbytes", "transformers"]
    if path == Path("transformers.py"):  # the user imports it, who has transformers
        foreign.remove("transformers")
    outside = [name for name, inside in imports(path) if name.split(".")[0] in foreign and not inside]
    assert outside == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_module_has_at_most_300_lines(path: Path) -> None:
    assert len((PACKAGE / path).read_text().splitlines()) <= 300


def test_the_reader_of_imports_reads() -> None:
    """The tests above would pass on a reader that finds nothing."""
    executor = imports(Path("executors/bitsandbytes.py"))
    assert ("bitsandbytes", True) in {(name.split(".")[0], inside) for name, inside in executor}
    assert "pipeline" in imported(Path("passes/rewrite/match.py"))
    assert "convert" in imported(Path("backend.py"))
    assert {"pipeline", "passes.rewrite", "report"} <= set(imported(Path("convert.py")))


def test_passes_is_no_name_of_its_own() -> None:
    assert importlib.import_module("fp8fx.passes.rewrite").PIPELINE
    sys.modules.pop("passes", None)
    with pytest.raises(ImportError, match=r"this folder is fp8fx's; import it as fp8fx\.passes"):
        importlib.import_module("passes")


@pytest.mark.slow
def test_importing_fp8fx_is_quiet_and_imports_nothing_it_does_not_need() -> None:
    unneeded = ("bitsandbytes", "transformers", "fp8fx.transformers", "fp8fx.executors.gemv", "passes")
    code = f"import sys, fp8fx; print([name for name in {unneeded} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
