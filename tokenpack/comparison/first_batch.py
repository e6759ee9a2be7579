"""`patch_model` with ``check=True``: compare on the first batch in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ..adapters import patch_model as patch
from ..adapters.patching import Logits
from ..adapters.suspend import before_first_batch
from .check import compare
from .result import DIFFERS, NOTHING_PACKED, PatchCheckError
from .state import refuse_sharded

Module = TypeVar("Module", bound=nn.Module)

_BATCHES = 8  # batches that are tried until one packs


def patch_model(
    model: Module,
    *,
    attention: str = "auto",
    logits: Logits = "auto",
    strict: bool = False,
    check: bool = False,
    pad_to_total: int | None = None,
) -> Module:
    """Make a transformers model compute only real tokens, with the same results.

    This changes the instance in place: its class, the classes of a few of its modules, and the
    attention implementation in its configs. Parameters, state dict and saved files do not change.
    The patched model packs a padded batch before the embedding, and pads its outputs with zeros. A
    batch may also be packed already: ``input_ids`` of shape ``(1, total_tokens)`` with
    ``cu_seqlens``, and for an encoder-decoder ``labels`` or ``decoder_input_ids`` with
    ``decoder_cu_seqlens``. The outputs are then packed too.

    A call that cannot be packed runs the original padded forward, and is counted by reason in
    ``packing_stats(model).fallbacks``.

    Args:
        model: a `transformers.PreTrainedModel`, or one wrapped by PEFT or ``torch.compile``.
            Patching a patched model again replaces its options.
        attention: ``"auto"``, or the name of a backend in `tokenpack.attention.BACKENDS`.
        logits: ``"auto"`` returns logits, except in training with labels, where the loss does not
            need them. ``"always"`` returns them, and ``"never"`` does not.
        strict: raise ValueError with the reason instead of running a call padded. This includes
            ``generate``, which uses a cache.
        check: compare the first batch in training with the unpatched model, as `check_patch` does.
            If another library goes around the model's forward, the part that it calls is compared.
            A batch that runs padded does not count, and the next one is compared, up to eight.
            Later batches cost nothing.
        pad_to_total: fill each stream of tokens up to a multiple of this number with dead tokens,
            and its boundaries up to a power of two. Shapes inside the model are then constant for
            batches of a token budget, which CUDA graphs and ``torch.compile`` without
            ``dynamic=True`` need. No token attends to dead ones, and neither the loss, outputs nor
            ``packed_tokens`` include them; ``packing_stats(model).dead_share`` is their share.
            Dropout draws other random numbers than without them. By default, none are added.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` contains no transformers model, or ``pad_to_total`` is not an
            integer.
        ValueError: if an option is unknown, the family is known to compute wrong results on packed
            input, a submodule is already patched, or a forward set on an instance (by accelerate)
            would hide the patch. With ``strict``, also if the model can never be packed. With
            ``check``, also in the first forward in training, if parameters are sharded by then.
        PatchCheckError: with ``check``, in the first forward in training, if the packed run is not
            right.
    """
    options: dict[str, Any] = {"attention": attention, "logits": logits, "strict": strict}
    patch(model, **options, pad_to_total=pad_to_total)
    before_first_batch(model, FirstBatch() if check else None)
    return model


class FirstBatch:
    """Compares the batch that it is called with."""

    def __init__(self) -> None:
        self._left = _BATCHES

    def __call__(self, part: nn.Module, inputs: dict[str, Any]) -> bool:
        """Compare a batch, and return whether no other one has to be compared.

        Args:
            part: of the patched model that is called.
            inputs: its arguments by name.

        Raises:
            PatchCheckError: if the packed run is not right.
            ValueError: if parameters are sharded.
        """
        refuse_sharded(part)
        check = compare(part, inputs, _own_forward, measure=False)
        if check.verdict == DIFFERS:
            raise PatchCheckError(check) from check.error
        self._left -= 1
        if check.verdict == NOTHING_PACKED and not self._left:
            warnings.warn(
                f"patch_model(check=True) compared nothing: none of the first {_BATCHES} training "
                f"batches was packed. {'; '.join(check.fallbacks)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return check.verdict != NOTHING_PACKED or not self._left


def _own_forward(part: nn.Module) -> Callable[..., Any]:
    """The forward without hooks, which have run already for the call that is compared."""

    def call(**inputs: Any) -> Any:
        return type(part).forward(part, **inputs)

    return call
