"""The two models of a condenser: what each must be, how it is packed, and the calls into it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import is_patched, patch_model
from ...adapters.call import AfterHead
from ...adapters.head import after_head
from ...adapters.hooks import changed_by
from ...adapters.patching import transformers_model
from ...kernels import packed_cross_entropy, packed_linear_cross_entropy

_ROWS = 1024  # of logits at a time


def pack_part(name: str, model: Any) -> None:
    """Patch a causal model in place, unless it packs by itself or is patched already.

    Raises:
        TypeError: if the model contains no transformers model.
        ValueError: if it is not a causal language model, or cannot be packed.
    """
    try:
        inner = transformers_model(model)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    config = inner.config
    causal = inner.get_output_embeddings() is not None
    if not causal or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} must be a causal language model with its head (AutoModelForCausalLM), got a "
            f"{type(inner).__name__}"
        )
    if "cu_seqlens" in inspect.signature(inner.forward).parameters or is_patched(inner):
        return
    try:
        patch_model(inner, strict=True)
    except ValueError as reason:
        raise ValueError(f"{name} must be a model that can be packed, but {reason}") from None
    patch_model(inner)  # not strict: `generate` runs with a cache, padded


def check_adapter(model: Any) -> None:
    """Check that PEFT's adapter is part of the model's layers, because its wrapper does not run.

    Raises:
        ValueError: if it adds virtual tokens, or reads the ids of the batch (aLoRA).
    """
    for config in getattr(model, "peft_config", {}).values():
        reads_ids = getattr(config, "alora_invocation_tokens", None) is not None
        if config.is_prompt_learning or reads_ids:
            raise ValueError(
                "condenser must have an adapter inside of its layers, such as LoRA, got "
                f"{'activated LoRA' if reads_ids else config.peft_type.value}"
            )


def base_of(model: Any) -> Any:
    """The model without its head, inside of PEFT's wrappers. LoRA's layers are part of it."""
    return transformers_model(model).base_model


def embedding_of(model: Any) -> Any:
    """The module that embeds ids."""
    return transformers_model(model).get_input_embeddings()


def embedding_width(model: Any) -> int:
    """The width of a model's input embeddings."""
    return int(embedding_of(model).weight.shape[1])


def root_mean_square(weight: Tensor) -> float:
    """Of the values of a tensor, computed in float32. 1 if they are all 0."""
    found = float(weight.detach().float().square().mean().sqrt())
    return found if found > 0 else 1.0


def max_positions(model: Any) -> int | None:
    """The number of positions that a model was made for, if its config names one."""
    found = getattr(transformers_model(model).config, "max_position_embeddings", None)
    return None if found is None else int(found)


def run_base(
    model: Any, embeddings: Tensor, cu_seqlens: Tensor, position_ids: Tensor, num_last: int = 1
) -> Tensor:
    """Run a model without its head on a stream, in one call.

    Args:
        model: a causal model that packs.
        embeddings: ``(total, width)``.
        cu_seqlens: ``(num_seqs + 1,)`` int32.
        position_ids: ``(total,)`` int64.
        num_last: how many of the last layers' hidden states to concatenate.

    Returns:
        ``(total, num_last * width)``.
    """
    options: dict[str, Any] = {"output_hidden_states": True} if num_last > 1 else {}
    outputs = base_of(model)(
        inputs_embeds=embeddings[None],
        cu_seqlens=cu_seqlens,
        position_ids=position_ids[None],
        use_cache=False,
        return_dict=True,
        **options,
    )
    if num_last == 1:
        return outputs.last_hidden_state[0]
    return torch.cat([state[0] for state in outputs.hidden_states[-num_last:]], dim=-1)


class Head:
    """The decoder's head, for the tokens that have a target alone.

    What the decoder does to its logits after the head is checked once against its own forward.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder = transformers_model(decoder)
        self._is_checked = False

    def logits(self, hidden: Tensor) -> Tensor:
        """``(n, classes)`` for ``(n, width)``."""
        self._check()
        return self._after()(self.decoder.get_output_embeddings()(hidden))

    def loss_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum of the cross entropies of ``targets (n,)``, from ``hidden (n, width)``."""
        self._check()
        head, after = self.decoder.get_output_embeddings(), self._after()
        plain = isinstance(head, nn.Linear) and type(head.weight) in (Tensor, nn.Parameter)
        if plain and changed_by(head) is None:
            bias = head.bias
            if after.bias is not None:
                bias = after.bias if bias is None else bias + after.bias
            loss = packed_linear_cross_entropy(
                hidden,
                head.weight,
                bias,
                targets,
                num_items=1.0,
                softcap=after.softcap,
                scale=after.scale,
                num_valid=len(targets),
            )
        else:
            loss = packed_cross_entropy(after(head(hidden)), targets, num_items=1.0)
        assert isinstance(loss, Tensor)
        return loss

    def token_losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each target and whether it has the largest logit, ``(n,)`` each."""
        losses, correct = [], []
        for ours, wanted in zip(hidden.split(_ROWS), targets.split(_ROWS)):
            logits = self.logits(ours)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses.append(nn.functional.cross_entropy(logits, wanted, reduction="none"))
            correct.append(logits.argmax(-1) == wanted)
        return torch.cat(losses), torch.cat(correct)

    def _after(self) -> AfterHead:
        return after_head(self.decoder)

    @torch.no_grad()
    def _check(self) -> None:
        """Compare our logits with the decoder's own, for one batch of two tokens.

        Raises:
            ValueError: if they differ.
        """
        if self._is_checked:
            return
        self._is_checked = True
        ids = torch.tensor([[0, 1]], device=embedding_of(self.decoder).weight.device)
        theirs = self.decoder(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        hidden = self.decoder.base_model(input_ids=ids, use_cache=False, return_dict=True)
        ours = self.logits(hidden.last_hidden_state[0])
        bound = 1e-2 if theirs.element_size() < 4 else 1e-4
        if float((ours - theirs).abs().max()) > bound * float(theirs.abs().max()) + 1e-6:
            raise ValueError(
                f"decoder must not change its logits after the head in an unknown way, but a "
                f"{type(self.decoder).__name__} does"
            )
