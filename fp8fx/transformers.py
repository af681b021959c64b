"""FP8 models in transformers: frozen while they are loaded, saved in FP8, and loaded as they were saved.

    import fp8fx.transformers                                                # tells transformers of "fp8fx"

    model = AutoModel.from_pretrained("a model in bfloat16", quantization_config=FP8Config(recipe="rowwise"))
    model.save_pretrained("fp8")                                             # half of the bytes
    model = AutoModel.from_pretrained("fp8")                                 # equal to the bit

A file has the data of an FP8 weight as (N, K, 1), and its scale beside it. So a transformers that was not told of
"fp8fx" raises that sizes differ. Otherwise it would only warn, and take the codes for values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fp8fx.config import Config
from fp8fx.errors import FreezeError, GraphError, unknown
from fp8fx.freeze import freeze as freeze_weights
from fp8fx.freeze import why_not
from fp8fx.ops.fp8_weight import FP8Weight
from fp8fx.recipes.recipe import RECIPES
from fp8fx.report import Report
from fp8fx.weights.linear_weights import Slot, linear_weights
from fp8fx.weights.saved import SCALE, attach, joined, what_is_wrong

__all__ = ["FP8Config", "FP8Quantizer", "freeze"]

_METHOD = "fp8fx"

_LOADED = "_is_hf_initialized"
"""The attribute of a parameter or a module that transformers has loaded, and will not initialize."""


@register_quantization_config(_METHOD)
@dataclass(kw_only=True)  # not frozen, since transformers' own is not
class FP8Config(QuantizationConfigMixin):
    """Which weights of a transformers model are FP8, for `from_pretrained(..., quantization_config=)`.

    Args:
        recipe: the name of one of `fp8fx.recipes.recipe.RECIPES`.
        include, exclude: fnmatch patterns of module paths or weights' names; `exclude` wins.
        min_features: a weight with K or N below this is left alone.
        weights: the recipe of each FP8 weight, by its name. `save_pretrained` writes it down; None before.
        transposed: the names of those that are (K, N), or (E, K, N), rather than (N, K).
        quant_method: "fp8fx".

    Raises:
        ConfigError: an unknown recipe, or a value that is none.

    >>> FP8Config(recipe="rowwise", exclude="lm_head").to_dict()["exclude"]
    'lm_head'
    """

    recipe: str = "rowwise"
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    min_features: int = 0
    weights: Mapping[str, str] | None = None
    transposed: Sequence[str] = ()
    quant_method: Any = _METHOD

    def __post_init__(self) -> None:
        self.as_config()
        for recipe in (self.weights or {}).values():
            if recipe not in RECIPES:
                raise unknown("recipe", recipe, RECIPES)

    def as_config(self) -> Config:
        """The same choice, as our own configuration."""
        given = {"include": self.include, "exclude": self.exclude, "min_features": self.min_features}
        return Config(recipe=self.recipe, **given)  # type: ignore[arg-type]


def freeze(model: PreTrainedModel, recipe: str = "rowwise", **choice: Any) -> Report:
    """`fp8fx.freeze` of a transformers model, which `save_pretrained` then saves in FP8.

    Weights that are FP8 already stay as they are.

    Args:
        model: a transformers model, whole or a part of one.
        recipe: the name of one of `fp8fx.recipes.recipe.RECIPES`.
        choice: `include`, `exclude` and what else `fp8fx.freeze` takes.

    Returns:
        A Report with a row for each weight.

    Raises:
        GraphError: `model` is no transformers model.
        ConfigError: an unknown recipe, or a value that is none.
        FreezeError: a weight requires grad in grad mode, or is not finite. Nothing has been changed then.

    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(n_embd=64, n_head=2, n_layer=1)).requires_grad_(False)
    >>> [row.name for row in freeze(model, exclude="*.attn.*").rewritten]
    ['h.0.mlp.c_fc.weight', 'h.0.mlp.c_proj.weight']
    """
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        raise GraphError(f"fp8fx.transformers.freeze got a {kind}; expected a transformers model (use fp8fx.freeze)")
    report = freeze_weights(model, recipe, **choice)
    kept = {name: choice[name] for name in ("include", "exclude", "min_features") if name in choice}
    _mark(model, FP8Config(recipe=recipe, **kept))
    return report


@register_quantizer(_METHOD)
class FP8Quantizer(HfQuantizer):
    """What transformers asks while it loads or saves a model with FP8 weights."""

    quantization_config: FP8Config
    report: Report | None = None
    """What became of each weight, if they were quantized while they were loaded."""

    def __init__(self, quantization_config: FP8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._expected: dict[str, FP8Weight] = {}  # of a model that is loaded, on the meta device
        self._chosen: dict[str, Slot] = {}  # of a model that is quantized while it is loaded

    def is_serializable(self) -> bool:  # noqa: D102
        return True

    @property
    def is_trainable(self) -> bool:  # noqa: D102
        return True  # adapters beside the FP8 weights

    @property
    def is_compileable(self) -> bool:  # noqa: D102
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            config = self.quantization_config.as_config()
            self._chosen = {slot.name: slot for slot in linear_weights(model) if why_not(slot, config) is None}
            return
        if self.quantization_config.weights is None:
            raise FreezeError(
                "config.json says quant_method 'fp8fx' and names no weights; expected a directory that save_pretrained "
                "wrote. To quantize a checkpoint, pass quantization_config=FP8Config() to from_pretrained"
            )
        for slot, recipe in _slots_of(model, self.quantization_config):
            self._expected[slot.name] = _make_room(slot, recipe)
        for name in self._expected:  # an FP8 head is not tied to an embedding in high precision
            if model.all_tied_weights_keys.get(name) not in self._expected:
                model.all_tied_weights_keys.pop(name, None)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter that is loaded now is to be FP8. One that is tied becomes so after all are loaded."""
        is_tied = param_name in model.all_tied_weights_keys
        return not self.pre_quantized and param_name in self._chosen and not is_tied

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes a parameter that is loaded."""
        return _Quantize(self.quantization_config.recipe, self._chosen)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """What a loaded tensor is cast to. FP8 data is not cast: the file has FP8 data, or an error is raised."""
        is_fp8 = dtype is not None and dtype.is_floating_point and dtype.itemsize == 1
        new: torch.dtype | None = None if is_fp8 else super().get_new_dtype(converter, param, dtype)
        return new

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            _join(model, self._expected)
            attach(model)
        else:
            choice = {"include": config.include, "exclude": config.exclude, "min_features": config.min_features}
            with torch.no_grad():
                self.report = freeze_weights(model, config.recipe, **choice)  # type: ignore[arg-type]
        self._expected, self._chosen = {}, {}
        _mark(model, config, self)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, str]]:
        """What `save_pretrained` is to write; writes the weights' recipes into the model's config."""
        parameters = model.named_parameters(remove_duplicate=False)  # tied ones under each name
        found = {name: x for name, x in parameters if isinstance(x, FP8Weight)}
        weights = {name: x.recipe for name, x in found.items()}
        transposed = sorted(name for name, x in found.items() if x.is_transposed)
        model.config.quantization_config = replace(self.quantization_config, weights=weights, transposed=transposed)
        state: dict[str, Any] = model.state_dict()
        for name in weights.keys() & state.keys():
            state[name] = state[name].as_subclass(Tensor).unsqueeze(-1)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for module in model.modules():
            for name, x in module._parameters.items():
                if isinstance(x, FP8Weight):
                    value = x.dequantize().to(dtype or x.dtype)
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
        return model


class _Quantize(ConversionOps):
    """A weight in high precision -> FP8Weight."""

    def __init__(self, recipe: str, chosen: Mapping[str, Slot]) -> None:
        self.recipe = recipe
        self.chosen = chosen

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: self._converted(name, value) for name, value in input_dict.items()}

    def _converted(self, name: str, value: Any) -> Any:
        value = value[0] if isinstance(value, list) else value
        slot = self.chosen.get(name)
        return value if slot is None else FP8Weight(value, self.recipe, transposed=slot.transposed)


def _slots_of(model: PreTrainedModel, config: FP8Config) -> Iterator[tuple[Slot, str]]:
    """The weights that the config names, and their recipes.

    A model without its head, or with one, has them under other names. What it does not have is left out.
    """
    owned = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    for saved_as, recipe in (config.weights or {}).items():
        for name in (saved_as, prefix + saved_as, saved_as.removeprefix(prefix)):
            if name in owned:
                path, _, attribute = name.rpartition(".")
                module = model.get_submodule(path)
                yield Slot(path, module, attribute, type(module).__name__, saved_as in config.transposed), recipe
                break


def _make_room(slot: Slot, recipe: str) -> FP8Weight:
    """Puts parameters for data and scale, as a file has them, in the place of a weight on the meta device."""
    expected = FP8Weight(slot.tensor.detach(), recipe, transposed=slot.transposed)
    data = torch.empty((*expected.shape, 1), dtype=expected.qdata.dtype, device="meta")
    scale = torch.empty(expected.scale.shape, dtype=torch.float32, device="meta")
    slot.module.register_parameter(slot.attribute, nn.Parameter(data, requires_grad=False))
    slot.module.register_parameter(slot.attribute + SCALE, nn.Parameter(scale, requires_grad=False))
    setattr(slot.module, _LOADED, True)  # transformers draws no random values for what is missing; _join raises
    return expected


def _join(model: PreTrainedModel, expected: Mapping[str, FP8Weight]) -> None:
    """Makes FP8 weights of the data and the scales that were loaded.

    Raises:
        FreezeError: one is missing, is offloaded, or is not what the config says.
    """
    owners = {name: _owner(model, name) for name in expected}
    scales: dict[int, Tensor] = {}  # of tied weights, which are one parameter, only one was loaded
    for module, attribute in owners.values():
        data, scale = module._parameters[attribute], module._parameters.pop(attribute + SCALE)
        if getattr(scale, _LOADED, False) or id(data) not in scales:
            scales[id(data)] = scale  # type: ignore[assignment]
    for name, (module, _) in owners.items():
        if any(x is not None and x.is_meta for x in module._parameters.values()):
            hint = "expected a device_map of GPUs alone, or none: load the model on the CPU and call cpu_offload"
            raise FreezeError(f"{name} was offloaded while it was loaded; {hint} of accelerate")
        missing = [other for other, x in module._parameters.items() if x is not None and not hasattr(x, _LOADED)]
        if missing:
            raise FreezeError(f"{name.rpartition('.')[0]}.{missing[0]} is missing in the files of an FP8 model")
    made: dict[int, FP8Weight] = {}
    for name, (module, attribute) in owners.items():
        data = module._parameters[attribute]
        if id(data) in scales:
            made[id(data)] = _joined(name, expected[name], data, scales.pop(id(data)))
        module.register_parameter(attribute, made[id(data)])  # type: ignore[arg-type]


def _joined(name: str, expected: FP8Weight, data: Any, scale: Tensor) -> FP8Weight:
    if not hasattr(scale, _LOADED):
        raise FreezeError(f"{name}: FP8 data without a scale in the files")
    data, scale = data.detach().squeeze(-1), scale.detach()
    why = what_is_wrong(expected, data, scale, expected.recipe)
    if why is not None:
        raise FreezeError(f"{name}: {why}")
    return FP8Weight(joined(expected, data, scale), expected.recipe)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _mark(model: PreTrainedModel, config: FP8Config, quantizer: FP8Quantizer | None = None) -> None:
    """Lets transformers know that the model, and each model in it, has FP8 weights."""
    quantizer = quantizer or FP8Quantizer(config)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.quantization_config = config
            for name, x in (("hf_quantizer", quantizer), ("is_quantized", True), ("quantization_method", _METHOD)):
                setattr(module, name, x)
