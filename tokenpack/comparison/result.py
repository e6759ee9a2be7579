"""What a comparison found, and its table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..adapters import PackingStats
from ..table import format_table
from .differences import Comparison

EQUAL, DIFFERS = "equal", "differs"
NOTHING_PACKED, NOTHING_COMPARED = "nothing packed", "nothing compared"


@dataclass
class PatchCheck:
    """A model on a batch, padded and packed. ``print`` shows it as a table.

    Attributes:
        comparisons: the loss, the outputs at real slots, and the gradients of each module.
        stats: what the packed run packed, and what it did not pack and why.
        setting: dtype, mode and device, in words.
        losses: of the padded and the packed run; None if there is none.
        seconds: of forward and backward, padded and packed.
        peak_bytes: memory of forward and backward, padded and packed; None if not measured.
        error: what the packed run raised, where the padded one ran.
        notes: what else matters to the result.
    """

    comparisons: list[Comparison]
    stats: PackingStats
    setting: str = ""
    losses: tuple[float | None, float | None] = (None, None)
    seconds: tuple[float, float] = (0.0, 0.0)
    peak_bytes: tuple[int, int] | None = None
    error: Exception | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """``"equal"`` or ``"differs"``, and if the patch was not tested ``"nothing packed"``, or
        ``"nothing compared"`` if the outputs hold no tensor that can be compared."""
        if self.error is not None or self.differences:
            return DIFFERS
        if not self.stats.packed_calls:
            return NOTHING_PACKED
        return EQUAL if any(not c.note for c in self.comparisons) else NOTHING_COMPARED

    @property
    def ok(self) -> bool:
        """Whether the call was packed and gives the right numbers."""
        return self.verdict == EQUAL

    @property
    def differences(self) -> list[Comparison]:
        """The quantities in which the packed run is not right."""
        return [comparison for comparison in self.comparisons if not comparison.ok]

    @property
    def packed_calls(self) -> int:
        """Number of packed forwards: ``packing_stats(model).packed_calls`` of this run."""
        return self.stats.packed_calls

    @property
    def fallbacks(self) -> Counter[str]:
        """Number of forwards that ran padded, by reason."""
        return self.stats.fallbacks

    @property
    def unseen_calls(self) -> int:
        """Number of forwards in training that went around every patched part."""
        return self.stats.unseen_calls

    def table(self) -> str:
        """The comparison as text of several lines."""
        parts = [self._title(), self._rows(), *self._measurements(), *self._packing()]
        parts += [f"note: {note}" for note in self.notes]
        return "\n".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.table()

    def _title(self) -> str:
        words = {
            EQUAL: "the packed run equals the padded one",
            DIFFERS: "the packed run DIFFERS from the padded one",
            NOTHING_PACKED: "NOTHING PACKED, so the patch was not tested",
            NOTHING_COMPARED: "NOTHING COMPARED, so the patch was not tested",
        }
        lines = [f"{words[self.verdict]} ({self.setting})"]
        if self.error is not None:
            lines.append(f"the packed run raised {type(self.error).__name__}: {self.error}")
        return "\n".join(lines)

    def _rows(self) -> str:
        if not self.comparisons:
            return ""
        has_errors = any(c.padded_error is not None for c in self.comparisons)
        heads = ["", "difference", "allowed"]
        heads += ["padded,\noff float64", "packed,\noff float64"] if has_errors else []
        width = max(len(comparison.result) for comparison in self.comparisons)
        rows = []
        for comparison in self.comparisons:
            numbers: list[float | None] = [comparison.difference, comparison.allowed]
            numbers += [comparison.padded_error, comparison.packed_error] if has_errors else []
            cells = ["-" if number is None else f"{number:.1e}" for number in numbers]
            rows.append([comparison.name, *cells, comparison.result.ljust(width)])
        return "\n" + format_table([*heads, "result".ljust(width)], rows) + "\n"

    def _measurements(self) -> list[str]:
        lines = []
        if None not in self.losses:
            lines.append("loss: padded {:.8g}, packed {:.8g}".format(*self.losses))
        if self.error is None:
            lines.append("seconds: padded {:.3g}, packed {:.3g}".format(*self.seconds))
        if self.peak_bytes is not None:
            padded, packed = (size / 2**20 for size in self.peak_bytes)
            lines.append(f"peak MiB: padded {padded:,.1f}, packed {packed:,.1f}")
        return lines

    def _packing(self) -> list[str]:
        stats = self.stats
        lines = []
        if stats.packed_calls:
            lines.append(
                f"packed calls: {stats.packed_calls}, {stats.packed_tokens:,} tokens in "
                f"{stats.padded_tokens:,} slots ({stats.padding_share:.0%} padding)"
            )
            for choice in dict.fromkeys(stats.attention.values()):
                kinds = ", ".join(k for k, other in stats.attention.items() if other == choice)
                lines.append(f"attention ({kinds}): {choice}")
            lines += [f"loss: {stats.loss}"] if stats.loss else []
        lines += [f"ran padded: {reason} ({n})" for reason, n in stats.fallbacks.items()]
        if stats.unseen_calls:
            lines.append(f"went around every patched part: {stats.unseen_calls}")
        return lines


class PatchCheckError(RuntimeError):
    """`patch_model` with ``check=True`` found a difference on the first batch in training.

    Attributes:
        check: the comparison.
    """

    def __init__(self, check: PatchCheck) -> None:
        super().__init__(
            "the patched model must compute what the unpatched one does, got another result on the "
            f"first training batch:\n{check}"
        )
        self.check = check
