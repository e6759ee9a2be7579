"""How one family of models differs from the general mechanism."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from .swap import Replacement

Positions = Callable[[Any, Tensor], Tensor]
Kind = Literal["encoder_decoder", "decoder", "encoder"]


@dataclass(frozen=True)
class Family:
    """The properties of one family of models.

    Attributes:
        name: the name in tables and messages.
        kind: determines the inputs and how labels are shifted.
        swaps: the forwards to replace, by class name.
        positions: computes ``(rows, columns)`` position ids from a stack (or a model that is not
            an encoder-decoder) and the padded ids. None if a token's position is its column.
        has_relative_bias: attention depends on the number of columns between two tokens. Packing
            closes the holes of a mask, and so would change the result for a mask with holes.
        embeds_match_ids: a stack only calls its own embedding module on ids, so it gives the same
            result for the module's output as ``inputs_embeds``. False for Marian and Pegasus, which
            also scale the embeddings of ids.
        labels_end_cache: its head turns the cache off if labels are given.
        minimum_transformers: the oldest version that computes this family correctly.
    """

    name: str
    kind: Kind
    swaps: Mapping[str, Replacement] = field(default_factory=dict)
    positions: Positions | None = None
    has_relative_bias: bool = False
    embeds_match_ids: bool = False
    labels_end_cache: bool = False
    minimum_transformers: str | None = None
