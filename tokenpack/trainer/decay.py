"""Which parameters weight decay applies to.

    "transformers"   those whose module and name say that they are no norm and no bias
    "matrices"       those with two dimensions or more, as in GPT-2's and nanoGPT's training

The two differ in one-dimensional parameters with names of their own (gains, decay rates), and in
tables whose names contain "bias" (T5's relative attention bias).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import TrainerBase

DECAYS = ("transformers", "matrices")


def require_known_decay(decay: Any) -> str:
    """``decay``, if it is one of `DECAYS`.

    Raises:
        ValueError: if it is not.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay must be 'transformers' or 'matrices', got {decay!r}")
    return decay


class DecayMixin(TrainerBase):
    """Weight decay for the trainers."""

    decay: str

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters that are decayed.

        Raises:
            ValueError: if none has two dimensions, as under FSDP 1, which flattens them.
        """
        if self.decay == "transformers":
            return super().get_decay_parameter_names(model)
        names = [name for name, each in model.named_parameters() if _dimensions(each) > 1]
        if not names:
            raise ValueError(
                "decay must be 'transformers' for a model without matrices, got 'matrices': FSDP 1 "
                "flattens parameters (FSDP 2 does not)"
            )
        return names


def _dimensions(parameter: Any) -> int:
    # ZeRO-3 keeps the shape of a parameter whose values are on other ranks.
    return len(getattr(parameter, "ds_shape", parameter.shape))
