"""Which parameters of a model are the weights of linears, as the modules that hold them tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Slot", "linear_weights"]


@dataclass(frozen=True)
class Slot:
    """A parameter of a model that is a weight.

    Attributes:
        path: of the module that holds it; empty for the root.
        module: which holds it.
        attribute: its name there.
        form: what it is to be shown as: the module's class.
        transposed: whether it is (K, N), or (E, K, N), rather than (N, K).
    """

    path: str
    module: nn.Module
    attribute: str
    form: str
    transposed: bool = False

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def tensor(self) -> Tensor:
        """The parameter."""
        x = self.module._parameters[self.attribute]
        assert x is not None
        return x

    @property
    def k(self) -> int:
        """How many values a linear sums."""
        return self.tensor.shape[-2 if self.transposed else -1]

    @property
    def n(self) -> int:
        """How many columns its result has."""
        return self.tensor.shape[-1 if self.transposed else -2]


def _weights_of(module: nn.Module) -> dict[str, bool]:
    """The names of a module's weights, and whether each is transposed."""
    kind = type(module)
    if isinstance(module, nn.Linear):
        return {"weight": False}
    if isinstance(module, nn.MultiheadAttention):
        return dict.fromkeys(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), False)
    # Of transformers, which is not imported for it: GPT-2's linear, and the experts of a mixture, (E, N, K).
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return {"weight": True}
    if kind.__name__.endswith("Experts") and kind.__module__.startswith("transformers."):
        names = [name for name, x in module._parameters.items() if x is not None and x.dim() == 3]
        return dict.fromkeys(names, bool(getattr(module, "is_transposed", False)))
    return {}


def linear_weights(model: nn.Module) -> Iterator[Slot]:
    """Each weight of the model that its module tells; one that several modules hold, once for each."""
    for path, module in model.named_modules():
        for attribute, transposed in _weights_of(module).items():
            if module._parameters.get(attribute) is not None:
                yield Slot(path, module, attribute, type(module).__name__, transposed)
