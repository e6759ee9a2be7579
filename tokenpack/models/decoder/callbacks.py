"""What a ``Trainer`` has to do for the decoder after each step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class RouterBiasCallback(TrainerCallback):
    """Calls `DecoderForCausalLM.update_router_bias` after each optimizer step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
        model = kwargs["model"]
        while not hasattr(model, "update_router_bias"):
            model = model.module  # DDP's wrapper
        model.update_router_bias()
