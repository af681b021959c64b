"""Every private API of torch that fp8fx uses, in one place: what it is for, and why no public one serves.

A release of torch that moves one of them is mended here and nowhere else. Each is there from torch 2.11 to 2.15 unless
it says otherwise. `tests/test_torch_internals.py` reads the sources: no other file names anything private of torch.
nn.Module's own dictionaries (`_parameters`, `_buffers`, `_modules` and the hooks) are left where they are used: pickles
of every release depend on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

# Tensors inside transforms of torch.func, for which our operators have no rule.
from torch._C._functorch import is_functorch_wrapped_tensor, is_gradtrackingtensor

# Settings of the compiler, patched around one compilation.
from torch._dynamo import config as dynamo_config
from torch._dynamo import eval_frame

# What a compiled graph has to be for torch to save it, and what makes that of Inductor's.
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as CompiledCallable
from torch._dynamo.aot_compile_types import SerializableCallable

# What torch.compile made something of; errors by which Dynamo is told to trace again, or not at all.
from torch._dynamo.eval_frame import innermost_fn
from torch._dynamo.exc import RestartAnalysis, SkipFrame

# Where an input of Dynamo's graph comes from: a parameter of a module, or an argument of the call.
from torch._dynamo.source import AttrSource, ConstantSource
from torch._functorch import config as functorch_config

# Common subexpressions, which AOTAutograd's partitioner eliminates from training graphs alone.
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass, list_mode_options

# How Inductor makes kernels of a graph.
from torch._inductor.choices import InductorChoices

# Inductor, as torch.compile's own backend calls it.
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

# Passes over Inductor's graphs that put their sources into the compile caches' keys.
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

# The order of two nodes of which neither reads the other.
from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
from torch._inductor.virtualized import V  # what Inductor has while it compiles a graph, such as its choices

# What nodes compute, without computing it.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

# Documented under `experimental`: the graph of a function's ATen operators; conditions on sizes that leave no guard.
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext, guard_or_false

# What all convolutions are, and all norms that keep statistics.
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.modules.module import _WrappedHook as WrappedHook
from torch.utils import _pytree as pytree  # nested arguments of nodes, as torch.fx itself reads them
from torch.utils._ordered_set import OrderedSet

# Real tensors while a graph is traced: measurements, and bitsandbytes' kernels. Tensor subclasses: what a view shares
# memory with.
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes
from torch.utils._python_dispatch import return_and_correct_aliasing

__all__ = [
    "FUNCTIONS",
    "REALIZE",
    "SCALED_MM",
    "SET_GRAD_ENABLED",
    "AttrSource",
    "CompiledCallable",
    "ConstantSource",
    "Convolution",
    "CustomGraphPass",
    "DataDependentOutputException",
    "DisableTorchFunctionSubclass",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "InductorChoices",
    "InferenceAwarePass",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "OrderedSet",
    "RestartAnalysis",
    "SerializableCallable",
    "SkipFrame",
    "UnsupportedFakeTensorException",
    "UnsupportedOperatorException",
    "V",
    "WrappedHook",
    "compile_fx",
    "compile_fx_inner",
    "compiled_call",
    "copy_provenance",
    "declare_static",
    "decompose",
    "disable_current_modes",
    "disabled_torch_function",
    "dispatch_modes",
    "dynamo_config",
    "forward_mode_level",
    "functorch_config",
    "fx_graph_cse",
    "get_hash_for_files",
    "guard_or_false",
    "inductor_config",
    "inductor_settings",
    "innermost_fn",
    "is_functorch_wrapped_tensor",
    "is_gradtrackingtensor",
    "is_in_backward",
    "is_module_source",
    "list_mode_options",
    "make_fx",
    "make_wrapper_subclass",
    "occupy",
    "parameter_sources",
    "preserve_node_ordering",
    "pytree",
    "return_and_correct_aliasing",
    "scaled_grouped_mm",
    "scaled_mm",
    "schema_of",
    "set_parameter_sources",
    "set_source",
    "source_name",
    "source_of",
    "storage_of",
    "tracer_of",
    "uncompiled_call",
    "version_of",
]

# FP8 GEMMs. F.scaled_mm and F.scaled_grouped_mm are public, but Dynamo of torch 2.11 does not trace what they call
# (`_scaled_mm_v2`), and up to 2.15 DTensor has a sharding rule for `_scaled_mm` alone.
scaled_mm = torch._scaled_mm
scaled_grouped_mm = torch._scaled_grouped_mm
SCALED_MM = torch.ops.aten._scaled_mm.default

# Tensor subclasses that hold other tensors: how one is made, and that its functions are torch's own.
make_wrapper_subclass: Callable[..., Any] = torch.Tensor._make_wrapper_subclass
disabled_torch_function: Any = torch._C._disabled_torch_function_impl
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass

# In a node's meta, as Inductor's own passes set it: its value is written to memory before anything reads it.
REALIZE = "inductor_realize_to_strides"

# Keeps the device busy for so many clock cycles, while the host runs ahead.
occupy: Callable[[int], None] = torch.cuda._sleep

# What nodes call, for which torch.fx has no other name.
OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
HigherOrderOperator = torch._ops.HigherOrderOperator
SET_GRAD_ENABLED = torch._C._set_grad_enabled  # as Dynamo and torch.export write torch.set_grad_enabled

# Where functions are found that torch's public names only refer to, and `.data` as Dynamo writes it.
FUNCTIONS: tuple[Any, ...] = (torch._C._nn, torch._C._linalg, torch._C._autograd)  # type: ignore[attr-defined]

# A pass that is told whether the graph is for inference; torch 2.11 has no such passes.
InferenceAwarePass: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", CustomGraphPass)


def inductor_settings(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's own reading of torch.compile's mode and options; RuntimeError if a value has not Inductor's type."""
    settings: dict[str, Any] = torch._TorchCompileInductorWrapper(mode, dict(options), None).config
    return settings


def uncompiled_call(called: Any) -> Callable[..., Any] | None:
    """What `model.compile()` replaced, a method of the model; None if the model was not compiled in place."""
    compiled = getattr(called, "_compiled_call_impl", None) is not None
    return called._call_impl if compiled else None


def compiled_call() -> Mapping[str, Any]:
    """The variables of Dynamo's around the call of a compiled function that the program is in; empty outside of one.

    Dynamo tells a backend neither which function a graph is part of, nor when the call that compiles the function's
    graphs is over. Its `compile_wrapper` has both: `self`, one for each torch.compile, `fn`, what that compiles, and
    `cleanups`, a list of what it calls in the end.
    """
    wrapper = "compile_wrapper", eval_frame.__file__
    frame = inspect.currentframe()
    while frame is not None and (frame.f_code.co_name, frame.f_code.co_filename) != wrapper:
        frame = frame.f_back
    variables = {} if frame is None else frame.f_locals
    return variables if {"self", "fn", "cleanups"} <= variables.keys() else {}


def schema_of(overload: torch._ops.OpOverload) -> torch.FunctionSchema:
    """An operator's arguments and results, and which of them share memory."""
    return overload._schema


def decompose(overload: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator made of others computes, as subclasses meet in inference mode; NotImplemented of any other."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CompositeImplicitAutograd"):
        return NotImplemented
    return overload.decompose(*args, **kwargs)


def version_of(x: Tensor) -> int:
    """How often the tensor was written to, unless through `.data`; 0 of one that was made in inference mode."""
    return 0 if x.is_inference() else x._version


def storage_of(x: Tensor) -> int:
    """Equal for tensors that share memory, and for no others that live; `data_ptr` is equal for all empty ones.

    NotImplementedError, RuntimeError or ValueError if the tensor has no memory that can be told.
    """
    return int(x.untyped_storage()._cdata)


def is_in_backward() -> bool:
    """Whether autograd computes gradients, in this thread."""
    return torch._C._current_graph_task_id() != -1


def forward_mode_level() -> int:
    """How many levels of forward-mode differentiation are entered, less one: -1 outside."""
    return torch.autograd.forward_ad._current_level


def _value(x: Any) -> Any:
    """A source's name and guard_source are methods up to torch 2.11 and properties from 2.12 on."""
    return x() if callable(x) else x


def source_of(node: fx.Node) -> Any:
    """Where Dynamo took an input from; None if the node is no such input."""
    return getattr(node, "_dynamo_source", None)


def set_source(node: fx.Node, source: Any) -> None:
    """See `source_of`."""
    node._dynamo_source = source


def source_name(source: Any) -> str:
    """A source as an expression: `L['self']._modules['fc']._parameters['weight']`."""
    return str(_value(source.name))


def is_module_source(source: Any) -> bool:
    """Whether it is an attribute of a module."""
    return "MODULE" in _value(source.guard_source).name


def copy_provenance(new: fx.Graph, old: fx.Graph, nodes: Mapping[fx.Node, fx.Node]) -> None:
    """Gives a copied graph what `graph_copy` drops: the sources of its inputs and how its code is written."""
    for old_node, node in nodes.items():
        if (source := source_of(old_node)) is not None:
            node._dynamo_source = source
        node.meta.pop("grapharg", None)  # Dynamo's alone: it refers to the inputs of the call
    new._codegen = old._codegen


def tracer_of(graph: fx.Graph) -> Any:
    """The class that traced the graph; it says which modules are leaves."""
    return getattr(graph, "_tracer_cls", None)


def parameter_sources(gm: fx.GraphModule) -> dict[str, Any] | None:
    """By name the sources of inputs that are weights. Without it AOTAutograd copies them into each CUDA graph."""
    return getattr(gm, "_param_name_to_source", None)


def set_parameter_sources(gm: fx.GraphModule, sources: Mapping[str, Any]) -> None:
    """See `parameter_sources`."""
    gm._param_name_to_source = dict(sources)  # type: ignore[assignment]


def declare_static(x: Tensor, name: str) -> None:
    """AOTAutograd takes a tensor, which Dynamo did not trace, as one of these sizes: no guard could name symbols."""
    context = torch._guards.TracingContext.try_get()
    if context is not None and x not in context.tensor_to_context:
        sizes: Any = {"dynamic_sizes": [DimDynamic.STATIC] * x.dim()}
        context.tensor_to_context[x] = StatefulSymbolicContext(**sizes, tensor_source=ConstantSource(name))
