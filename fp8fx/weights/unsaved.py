"""save_pretrained of transformers and diffusers is refused: from_pretrained would take FP8 codes for values.

Both ask a model's `hf_quantizer` before they save it. `fp8fx.transformers` puts one there that saves.
"""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from fp8fx.errors import FreezeError

__all__ = ["refuse_save_pretrained"]


class _NoConfig:
    """Refuses what save_pretrained asks for. Others, such as peft, find that it has nothing else."""

    @property
    def quant_method(self) -> NoReturn:
        raise FreezeError(
            "save_pretrained of a model with FP8 weights, which from_pretrained would not know: call "
            "fp8fx.transformers.freeze(model), which leaves FP8 weights as they are, to save a transformers model; "
            "otherwise save model.state_dict() by safetensors or torch.save, and load it into a model that is frozen"
        )


class _NoQuantizer:
    """Stands in the place of a quantizer. `generate` may compile the model, and Trainer train adapters of it."""

    is_compileable = True
    is_serializable = False
    is_trainable = True
    quantization_config = _NoConfig()


def refuse_save_pretrained(root: nn.Module) -> None:
    """Refuses it for each model below `root` that no quantizer saves."""
    for module in root.modules():
        if hasattr(type(module), "save_pretrained") and getattr(module, "hf_quantizer", None) is None:
            module.hf_quantizer = _NoQuantizer()  # type: ignore[assignment]
