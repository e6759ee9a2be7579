"""The configuration of a condenser. Every rule is checked when the configuration is made."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CARRIERS = ("slots", "mean_pool")
SLOT_POSITIONS = ("end", "spread", "span_starts")
NORMS = ("layer_norm", "rms_norm", "none")
PROJECTIONS = ("linear", "mlp", "none")
OBJECTIVES = ("completion", "continuation", "reconstruction", "distillation")


@strict
class CondenserConfig(PreTrainedConfig):
    """Configuration of `Condenser`.

    Attributes:
        condenser_name_or_path: where the condenser model comes from: a folder, or a hub name.
        decoder_name_or_path: where the decoder comes from.
        condenser_hidden_size: width of the condenser model. `Condenser` sets it.
        decoder_hidden_size: width of the decoder's embeddings. `Condenser` sets it.
        carrier: what carries the context: ``"slots"``, learned tokens behind each segment (ICAE),
            or ``"mean_pool"``, means of the last hidden states over equal spans (arXiv 2510.20797).
        num_condense_tokens: vectors of each segment; with ``"mean_pool"``, at most its tokens.
        ratios: instead of a fixed number, ``ceil(n / ratio)`` vectors for a segment of n tokens. In
            training, each document gets one of these ratios at random. Otherwise the first one is
            the default. Default: 4, if no number is fixed.
        segment_length: longest segment, in tokens of the condenser. Longer contexts are cut into
            several. None: a context is one segment.
        num_slot_embeddings: rows of the table of learned slots. Slot j of a segment is row j; with
            1 row, all slots share it and differ by their positions. Default: the most slots that a
            segment can have, or 1 if that has no bound.
        slot_positions: position ids of the slots: ``"end"``, behind the segment; ``"spread"``, in
            the middles of equal spans of it (EPL, arXiv 2409.14364); or ``"span_starts"``, at the
            first tokens of the spans.
        num_last_layers: how many of the last layers' hidden states are concatenated.
        norm: of the carriers, before the projection: ``"layer_norm"``, ``"rms_norm"``, ``"none"``.
        norm_eps: epsilon of the norm.
        projection: to the decoder's width: ``"linear"``, ``"mlp"`` (two layers with GELU between),
            or ``"none"``, which needs equal widths.
        projection_bias: whether its layers have a bias.
        num_reconstruction_flags: learned vectors that ask the decoder for the context itself.
        num_completion_flags: learned vectors between the condensed vectors and the prompt.
        separate_segments: a learned vector follows the vectors of each segment.
        decoder_bos: begin the decoder's sequences with its BOS, if it has one.
        fixed_bos_embedding: begin them with a vector of the checkpoint instead, which is not
            trained. Published checkpoints have one.
        completion_weight, continuation_weight, reconstruction_weight, distillation_weight: weights
            of the objectives, 0 or more.
        distillation_temperature: divides the logits of both sides of the distillation.
    """

    model_type = "tokenpack_condenser"

    condenser_name_or_path: str | None = None
    decoder_name_or_path: str | None = None
    condenser_hidden_size: int | None = None
    decoder_hidden_size: int | None = None
    carrier: str = "slots"
    num_condense_tokens: int | None = None
    ratios: list[int] | tuple[int, ...] | None = None
    segment_length: int | None = None
    num_slot_embeddings: int | None = None
    slot_positions: str = "end"
    num_last_layers: int = 1
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    projection: str = "linear"
    projection_bias: bool = True
    num_reconstruction_flags: int = 1
    num_completion_flags: int = 0
    separate_segments: bool = False
    decoder_bos: bool = True
    fixed_bos_embedding: bool = False
    completion_weight: float | int = 1.0
    continuation_weight: float | int = 1.0
    reconstruction_weight: float | int = 0.0
    distillation_weight: float | int = 0.0
    distillation_temperature: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.ratios is None and self.num_condense_tokens is None:
            self.ratios = [4]
        if self.ratios is not None:
            self.ratios = list(self.ratios)
        super().__post_init__(**kwargs)
        if self.num_slot_embeddings is None:
            self.num_slot_embeddings = self._most_slots()

    def validate_architecture(self) -> None:
        """Check the fields against each other. transformers calls this.

        Raises:
            ValueError: if a field is out of range, or does not go together with another one.
        """
        for name, known in (
            ("carrier", CARRIERS),
            ("slot_positions", SLOT_POSITIONS),
            ("norm", NORMS),
            ("projection", PROJECTIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name, least in (
            ("num_condense_tokens", 1),
            ("segment_length", 1),
            ("num_slot_embeddings", 1),
            ("num_last_layers", 1),
            ("num_reconstruction_flags", 0),
            ("num_completion_flags", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self._check_numbers()
        for name in OBJECTIVES:
            weight = getattr(self, f"{name}_weight")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}_weight must be 0 or more, got {weight}")
        if not any(getattr(self, f"{name}_weight") for name in OBJECTIVES):
            raise ValueError("one of the weights of the objectives must be above 0, got none")
        if self.reconstruction_weight and not self.num_reconstruction_flags:
            raise ValueError(
                "num_reconstruction_flags must be 1 or more with reconstruction_weight="
                f"{self.reconstruction_weight}, got 0"
            )
        if not 0 < self.distillation_temperature < float("inf"):
            raise ValueError(
                f"distillation_temperature must be above 0, got {self.distillation_temperature}"
            )
        if self.projection == "none" and self.condenser_hidden_size is not None:
            width = self.condenser_hidden_size * self.num_last_layers
            if width != self.decoder_hidden_size:
                raise ValueError(
                    "projection must be 'linear' or 'mlp' where the carriers are not as wide as "
                    f"the decoder's embeddings ({width} and {self.decoder_hidden_size}), got 'none'"
                )

    def _check_numbers(self) -> None:
        """Check how many vectors a segment gets, and the slots for them."""
        if (self.ratios is None) == (self.num_condense_tokens is None):
            raise ValueError(
                "one of ratios and num_condense_tokens must be given, got "
                f"{self.ratios} and {self.num_condense_tokens}"
            )
        if self.ratios is not None and (not self.ratios or min(self.ratios) < 1):
            raise ValueError(f"ratios must be integers of 1 or more, got {self.ratios}")
        most, rows = self._most_slots(), self.num_slot_embeddings
        if self.carrier == "slots" and rows is not None and 1 < rows < most:
            raise ValueError(
                f"num_slot_embeddings must be 1 or at least {most}, the most slots of a segment, "
                f"got {rows}"
            )

    def _most_slots(self) -> int:
        """The most slots that a segment can have; 1 if that has no bound."""
        if self.num_condense_tokens is not None:
            return self.num_condense_tokens
        if self.segment_length is None or not self.ratios:
            return 1
        return -(-self.segment_length // min(self.ratios))

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each objective, by name."""
        return {name: float(getattr(self, f"{name}_weight")) for name in OBJECTIVES}
