"""FP8 as a property of the compiler: `torch.compile(model, backend="fp8")`, `fp8fx.convert(gm)`, `fp8fx.explain(model,
x)`."""

from fp8fx import errors, nn, ops
from fp8fx.backend import Backend, explain
from fp8fx.config import Config
from fp8fx.convert import convert
from fp8fx.errors import FP8Error, FP8Warning
from fp8fx.freeze import freeze
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.report import Report
from fp8fx.weights.refresh import refresh

__all__ = [
    "Backend",
    "Config",
    "FP8Error",
    "FP8Warning",
    "FP8Weight",
    "Report",
    "convert",
    "errors",
    "explain",
    "freeze",
    "nn",
    "ops",
    "refresh",
]
__version__ = "0.1.0"
