"""The sequences of a batch: where each one is in the inputs and in the outputs.

    padded rows    sequence s is row s. Its tokens are the slots that the mask marks
    a stream       row 0, columns cu_seqlens[s] ... cu_seqlens[s + 1]
    packed rows    the slots that cu_seqlens_padded gives
    position_ids   without a mask, a sequence begins wherever positions do not count up

Outputs are compared at the slots of sequences, and each sequence can be cut out of a batch to run
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import IGNORE_INDEX
from ..kernels import layout_from_mask, repad

_BOUNDARIES = (
    *("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "decoder_cu_seqlens", "decoder_max_seqlen"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    "dead_tokens",
)


class Model(NamedTuple):
    """What must be known of a model to read its batches.

    Attributes:
        sides: of the entry that is called: ``("self",)``, ``("enc",)``, ``("dec",)`` or both.
        kind: of its family. None if the family is unknown.
        shifts_labels: each token predicts the label of the next one.
        token_labels: a head reads each token, and labels belong to tokens.
        takes_positions: the forward has the argument ``position_ids``.
        virtual_tokens: columns that PEFT puts before those of the batch.
    """

    sides: tuple[str, ...]
    kind: str | None
    shifts_labels: bool
    token_labels: bool
    takes_positions: bool
    virtual_tokens: int = 0


class Piece(NamedTuple):
    """The slots of one sequence: a row, and ``(n,)`` columns in rising order."""

    row: int
    columns: Tensor


class Side:
    """The slots of all sequences, of an encoder, of a decoder, or of a model with one side."""

    def __init__(self, shape: tuple[int, int], pieces: list[Piece]) -> None:
        self.shape = shape
        self.pieces = pieces

    def gather(self, value: Tensor, virtual: int = 0) -> list[Tensor]:
        """The values at the slots of each sequence, each ``(n, ...)``."""
        found = []
        for piece in self.pieces:
            columns = piece.columns.to(value.device)
            if virtual:
                before = torch.arange(virtual, device=value.device)
                columns = torch.cat([before, columns + virtual])
            found.append(value[piece.row].index_select(0, columns))
        return found


class NoReferenceError(Exception):
    """The sequences of a call cannot run alone in float64. The message is the reason."""


class Batch:
    """The arguments of a call, and the sequences in them.

    Attributes:
        inputs: the arguments that are not None, by name.
        sides: by prefix of the arguments: ``""``, and ``"decoder_"`` of a whole encoder-decoder.
    """

    def __init__(self, inputs: Mapping[str, Any], model: Model) -> None:
        self.inputs = {name: value for name, value in inputs.items() if value is not None}
        self.model = model
        # A value for each token of a stream, as TRL returns, must be put into the rows to compare.
        self.reads_vectors = self.is_stream
        self.sides: dict[str, Side] = {}
        first = self._side("")
        if first is not None:
            self.sides[""] = first
        if model.sides == ("enc", "dec"):
            decoder = self._side("decoder_")
            if decoder is not None:
                self.sides["decoder_"] = decoder

    @property
    def is_stream(self) -> bool:
        """Whether boundaries come with the batch in a way that an unpatched model ignores."""
        return "cu_seqlens" in self.inputs and "cu_seqlens_padded" not in self.inputs

    def side_of(self, output: str, value: Tensor) -> Side | None:
        """The side whose slots an output has. None if it has none, or a value for each row."""
        whole = self.model.sides == ("enc", "dec")
        side = self.sides.get("decoder_" if whole and not output.startswith("encoder_") else "")
        if side is None or value.dim() < (2 if self.reads_vectors else 3):
            return None
        rows, columns = side.shape
        own = value.shape[0] == rows and value.shape[1] - columns in (0, self.model.virtual_tokens)
        return side if own else None

    def as_padded(self) -> Batch:
        """The sequences of a stream in padded rows, which an unpatched model reads."""
        inputs = {name: v for name, v in self.inputs.items() if name not in _BOUNDARIES}
        for prefix, side in self.sides.items():
            longest = max(len(piece.columns) for piece in side.pieces)
            lengths = torch.tensor([[len(piece.columns)] for piece in side.pieces])
            mask = torch.arange(longest) < lengths
            layout = layout_from_mask(mask.to(self._tokens(prefix).device))
            for name in self._names(prefix):
                fill = IGNORE_INDEX if name == "labels" else 0
                if name in inputs and f"{prefix}attention_mask" != name:
                    value = inputs[name]
                    inputs[name] = repad(value.reshape(side.shape[1], *value.shape[2:]), layout,
                                         fill=fill)  # fmt: skip
            inputs[f"{prefix}attention_mask"] = mask.long().to(self._tokens(prefix).device)
        return self.with_inputs(inputs)

    def with_inputs(self, inputs: Mapping[str, Any]) -> Batch:
        """A batch of the same kind with other arguments."""
        batch = Batch(inputs, self.model)
        batch.reads_vectors = self.reads_vectors
        return batch

    # ------------------------------------------------------------------------------ one sequence

    def __len__(self) -> int:
        return len(self.sides[""].pieces) if self.sides else 0

    def alone(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The number of each sequence that is not empty, and its arguments as a batch of one.

        Raises:
            NoReferenceError: if an argument cannot be cut.
        """
        if not self.sides:
            raise NoReferenceError("the sequences of the batch are not known")
        for number in range(len(self)):
            if all(len(side.pieces[number].columns) for side in self.sides.values()):
                yield number, self._cut(number)

    def slots_alone(self, name: str, number: int) -> Any:
        """The index of what a sequence that runs alone has of an input."""
        prefix = self._prefix_of(name)
        side = self.sides[prefix]
        piece = side.pieces[number]
        if self.inputs[name].shape[:2] == side.shape and not name.startswith("encoder_"):
            return piece.row, self._columns_alone(prefix, piece)
        return piece.row

    def pieces_of(self, output: str, value: Tensor) -> list[Tensor] | None:
        """An output at the slots of each sequence, or by row. None if it belongs to no sequence."""
        side = self.side_of(output, value)
        if side is not None:
            return side.gather(value, value.shape[1] - side.shape[1])
        rows = next(iter(self.sides.values())).shape[0] if self.sides else 0
        if value.dim() and value.shape[0] == rows and not self._is_split:
            return list(value)
        return None

    def label_counts(self) -> list[int] | None:
        """The number of labels of each sequence that its loss has. None if labels are by row."""
        labels = self.inputs.get("labels")
        side = self.sides.get("decoder_", self.sides.get(""))
        if labels is None or side is None or not self.model.token_labels:
            return None
        if labels.shape[:2] != side.shape:
            return None
        first = 1 if self.model.shifts_labels else 0
        found = side.gather(labels)
        return [int((sequence[first:] != IGNORE_INDEX).sum()) for sequence in found]

    def _cut(self, number: int) -> dict[str, Any]:
        cut: dict[str, Any] = {}
        for name, value in self.inputs.items():
            if name not in _BOUNDARIES and name != "num_items_in_batch":
                cut[name] = self._cut_value(name, value, number)
        for prefix, side in self.sides.items():
            piece = side.pieces[number]
            columns = self._columns_alone(prefix, piece)
            real = torch.isin(columns, piece.columns)
            if prefix == "" or f"{prefix}attention_mask" in cut:
                cut[f"{prefix}attention_mask"] = real.long()[None]
        piece = self.sides[""].pieces[number]
        if self._selects("") and "position_ids" not in cut and not self._is_split:
            cut["position_ids"] = piece.columns[None]
        return cut

    def _cut_value(self, name: str, value: Any, number: int) -> Any:
        prefix = self._prefix_of(name)
        side = self.sides.get(prefix)
        if isinstance(value, (list, tuple)) and len(value) == self.sides[""].shape[0]:
            return type(value)([value[self.sides[""].pieces[number].row]])
        if not isinstance(value, Tensor) or side is None:
            if hasattr(value, "keys") or hasattr(value, "get_seq_length"):
                raise NoReferenceError(f"{name} cannot be cut into sequences")
            return value
        piece = side.pieces[number]
        if name.endswith("attention_mask") and value.dim() != 2:
            raise NoReferenceError(f"{name} is {value.dim()}-dimensional")
        if value.dim() >= 2 and value.shape[0] == 1 and name.endswith("position_ids"):
            value = value.expand(side.shape[0], *value.shape[1:])
        if value.dim() >= 2 and value.shape[:2] == side.shape and not name.startswith("encoder_"):
            columns = self._columns_alone(prefix, piece).to(value.device)
            return value[piece.row].index_select(0, columns)[None]
        if value.dim() >= 1 and value.shape[0] == side.shape[0] and not self._is_split:
            return value[piece.row : piece.row + 1]
        return value

    def _columns_alone(self, prefix: str, piece: Piece) -> Tensor:
        """The columns that a sequence has alone.

        A decoder that takes positions gets its tokens and their columns. In other models positions
        may depend on the padding before a token, so only the padding after the last one is cut.
        """
        if self._selects(prefix) or self._is_split:
            return piece.columns
        return torch.arange(int(piece.columns[-1]) + 1, device=piece.columns.device)

    def _selects(self, prefix: str) -> bool:
        model = self.model
        return prefix == "" and model.kind == "decoder" and model.takes_positions and (
            not model.virtual_tokens
        )  # fmt: skip

    # ------------------------------------------------------------------------------ boundaries

    @property
    def _is_split(self) -> bool:
        """Whether a row may have several sequences."""
        return any(len(side.pieces) != side.shape[0] for side in self.sides.values()) or (
            "cu_seqlens" in self.inputs
        )

    def _side(self, prefix: str) -> Side | None:
        tokens = self._tokens(prefix)
        labels = self.inputs.get("labels")
        if tokens is None and prefix == "decoder_" and isinstance(labels, Tensor):
            tokens = labels if labels.dim() == 2 and self.model.token_labels else None
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return None
        shape = (tokens.shape[0], tokens.shape[1])
        return Side(shape, list(self._pieces(prefix, shape, tokens.device)))

    def _pieces(self, prefix: str, shape: tuple[int, int], device: torch.device) -> Sequence[Piece]:
        mask = self.inputs.get(f"{prefix}attention_mask")
        labels = self.inputs.get("labels")
        ends = self.inputs.get(f"{prefix}cu_seqlens")
        if ends is not None:
            ends = torch.as_tensor(ends).tolist()
            starts = torch.as_tensor(self.inputs.get(f"{prefix}cu_seqlens_padded", ends)).tolist()
            lengths = [end - start for start, end in zip(ends, ends[1:])]
            return [
                Piece(start // shape[1], start % shape[1] + torch.arange(length, device=device))
                if length else Piece(0, torch.arange(0, device=device))
                for start, length in zip(starts, lengths)
            ]  # fmt: skip
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == shape:
            real = mask.to(device) != 0
        elif mask is None and prefix == "" and self._begins(shape) is not None:
            return _split_rows(self._begins(shape), shape)
        elif mask is None and prefix == "decoder_" and isinstance(labels, Tensor) and (
            labels.shape == shape
        ):  # fmt: skip
            kept = (labels != IGNORE_INDEX).to(device)
            real = kept.flip(1).cumsum(1).flip(1) > 0  # up to the last label
        else:
            real = torch.ones(shape, dtype=torch.bool, device=device)
        return [Piece(row, found.nonzero().flatten()) for row, found in enumerate(real)]

    def _begins(self, shape: tuple[int, int]) -> Tensor | None:
        """Where ``position_ids`` begin sequences, as transformers reads them. None if nowhere."""
        positions = self.inputs.get("position_ids")
        if self.model.kind != "decoder" or not isinstance(positions, Tensor):
            return None
        if positions.dim() != 2 or positions.shape[1] != shape[1]:
            return None
        begins = positions.expand(shape).diff(dim=1) != 1
        return torch.nn.functional.pad(begins, (1, 0), value=True) if bool(begins.any()) else None

    # ------------------------------------------------------------------------------ names

    def _tokens(self, prefix: str) -> Any:
        inputs = self.inputs
        tokens = inputs.get(f"{prefix}input_ids", inputs.get(f"{prefix}inputs_embeds"))
        return inputs.get("labels") if tokens is None and prefix == "decoder_" else tokens

    def _prefix_of(self, name: str) -> str:
        whole = "decoder_" in self.sides
        return "decoder_" if whole and (name == "labels" or name.startswith("decoder_")) else ""

    def _names(self, prefix: str) -> list[str]:
        shape = self.sides[prefix].shape
        return [
            name
            for name, value in self.inputs.items()
            if self._prefix_of(name) == prefix
            and isinstance(value, Tensor)
            and value.dim() >= 2
            and value.shape[:2] == shape
        ]


def _split_rows(begins: Tensor | None, shape: tuple[int, int]) -> list[Piece]:
    assert begins is not None
    starts = begins.flatten().nonzero().flatten().tolist()
    ends = [*starts[1:], shape[0] * shape[1]]
    return [
        Piece(start // shape[1], torch.arange(start % shape[1], start % shape[1] + end - start,
                                              device=begins.device))
        for start, end in zip(starts, ends)
    ]  # fmt: skip
