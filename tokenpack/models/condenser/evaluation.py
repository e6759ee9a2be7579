"""What condensed vectors are worth, against controls that can beat them.

    NLL of held-out completions, given their prompt and
      none       nothing
      last_k     the last k raw tokens of the context, where k is the number of condensed vectors
      untrained  vectors of the same condenser before training
      other      the vectors of another document
      condensed  the vectors
      full       the whole context

    recovered share = (none - condensed) / (none - full)

The arms see the same targets. A difference has a standard error over documents.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...adapters.patching import transformers_model
from .layout import ContextLayout, Integers
from .objectives import joined
from .parts import embedding_of, root_mean_square
from .texts import condense_ids, evaluating, generate_ids

ARMS = ("none", "last_k", "untrained", "other", "condensed", "full")
CONTROLS = ("none", "last_k", "untrained", "other")
_REPEATS = 5

Rows = Sequence[Mapping[str, Any]]


@dataclass
class RatioResult:
    """The figures of one ratio.

    Attributes:
        ratio: tokens per vector; None for a fixed number of vectors.
        vectors: mean number of vectors of a document.
        nll: mean negative log likelihood per target in nats, by arm.
        difference: condensed minus each control, per target.
        standard_error: of each difference, over documents.
        recovered: the recovered share; NaN if the full context does not help.
        teacher_forced, greedy: share of the context's tokens that the decoder reconstructs; None if
            the condenser has not learned to.
        prefill_seconds: of BOS, vectors and prompt of the longest document.
        cache_bytes: of the decoder's cache after it.
        peak_bytes: what the prefill allocates at most; None without a GPU.
    """

    ratio: int | None
    vectors: float
    nll: dict[str, float]
    difference: dict[str, float]
    standard_error: dict[str, float]
    recovered: float
    teacher_forced: float | None = None
    greedy: float | None = None
    prefill_seconds: float = 0.0
    cache_bytes: int = 0
    peak_bytes: int | None = None

    def beaten(self, control: str) -> bool:
        """Whether the vectors are better than a control by two standard errors."""
        return self.difference[control] < -2 * self.standard_error[control]


@dataclass
class CondenserEvaluation:
    """The figures of all ratios, and of the prefill of the full context."""

    documents: int
    targets: int
    context_tokens: float
    ratios: list[RatioResult] = field(default_factory=list)
    full_prefill_seconds: float = 0.0
    full_cache_bytes: int = 0
    full_peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain numbers."""
        return asdict(self)


@torch.no_grad()
def evaluate_condenser(
    model: Any,
    rows: Rows,
    ratios: Sequence[int | None],
    *,
    max_tokens: int = 8192,
    greedy_documents: int = 8,
    seed: int = 0,
    progress: Callable[[Any], Any] = iter,
) -> CondenserEvaluation:
    """Evaluate a condenser on held-out documents.

    Args:
        model: a `Condenser`.
        rows: at least two rows of `tokenpack.data.condense.tokenize_documents`.
        ratios: tokens per vector; ``[None]`` for a fixed number of vectors.
        max_tokens: context tokens of a batch.
        greedy_documents: documents to reconstruct greedily.
        seed: of the untrained condenser.
        progress: wraps the list of ratios and batches, as ``tqdm`` does.

    Raises:
        ValueError: if there are fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(
            "rows must hold at least two documents, so that one can get the vectors of another, "
            f"got {len(rows)}"
        )
    batches = _batches(rows, max_tokens)
    targets = np.array([len(row["completion_ids"]) for row in rows])
    tokens = float(np.mean([len(row["context_ids"]) for row in rows]))
    result = CondenserEvaluation(len(rows), int(targets.sum()), tokens)
    with evaluating(model):
        shared = {
            name: np.concatenate([_raw_nll(model, part, name) for part in batches])
            for name in ("none", "full")
        }
        for ratio in progress(list(ratios)):
            found = [_of_batch(model, part, ratio, seed) for part in batches]
            sums = {name: np.concatenate([each[0][name] for each in found]) for name in found[0][0]}
            counts = np.concatenate([each[1] for each in found])
            entry = _summary(ratio, float(counts.mean()), {**shared, **sums}, targets)
            if model.reconstruction_flags is not None and model.config.reconstruction_weight:
                _reconstruct(model, batches, ratio, rows[:greedy_documents], entry)
            _time_prefill(model, rows, ratio, entry)
            result.ratios.append(entry)
        longest = max(rows, key=lambda row: len(row["context_ids"]))
        stream = _raw_stream(model, [longest], "full", with_completion=False)[0]
        figures = _prefill(model, stream)
        result.full_prefill_seconds, result.full_cache_bytes, result.full_peak_bytes = figures
    return result


@contextlib.contextmanager
def untrained(model: Any, seed: int = 0) -> Iterator[None]:
    """Run a condenser as it was before training: no adapter, and new slots and projection."""
    own = [p for n, p in model.named_parameters() if not n.startswith(("condenser.", "decoder."))]
    kept = [parameter.detach().clone() for parameter in own]
    rng = torch.get_rng_state()
    torch.manual_seed(seed)
    off = getattr(model.condenser, "disable_adapter", contextlib.nullcontext)
    try:
        with torch.no_grad(), off():
            model.projection.reset_parameters()
            for name, side in _LEARNED.items():
                vectors = getattr(model, name)
                if vectors is not None:
                    scale = root_mean_square(embedding_of(getattr(model, side)).weight)
                    vectors.copy_(torch.randn(vectors.shape) * scale)
            yield
    finally:
        torch.set_rng_state(rng)
        with torch.no_grad():
            for parameter, value in zip(own, kept):
                parameter.copy_(value)


_LEARNED = {
    "slots": "condenser",
    "completion_flags": "decoder",
    "reconstruction_flags": "decoder",
    "separator": "decoder",
}


# ------------------------------------------------------------------------------------ likelihoods


def _batches(rows: Rows, max_tokens: int) -> list[Rows]:
    """Consecutive rows, at least two in each batch."""
    found: list[list[Mapping[str, Any]]] = [[]]
    used = 0
    for row in rows:
        size = len(row["context_ids"]) + len(row["completion_ids"])
        if used + size > max_tokens and len(found[-1]) > 1:
            found.append([])
            used = 0
        found[-1].append(row)
        used += size
    if len(found[-1]) == 1 and len(found) > 1:
        found[-2] += found.pop()
    return list(found)


def _flat(model: Any, lists: Sequence[Sequence[int]]) -> tuple[Tensor, Integers]:
    ids = np.array([token for each in lists for token in each], np.int64)
    device = embedding_of(model.decoder).weight.device
    return torch.from_numpy(ids).to(device), np.array([len(each) for each in lists], np.int64)


def _after(model: Any, rows: Rows) -> tuple[Tensor, Integers, Integers]:
    """Ids and lengths of prompts and completions, and where the completions are."""
    ids, lengths = _flat(model, [[*row["prompt_ids"], *row["completion_ids"]] for row in rows])
    kinds = [
        np.repeat([False, True], [len(row["prompt_ids"]), len(row["completion_ids"])])
        for row in rows
    ]
    return ids, lengths, np.flatnonzero(np.concatenate(kinds))


def _sums(model: Any, stream: Tensor, layout: Any, at: Integers, ids: Tensor, rows: Rows) -> Any:
    """``(num_docs,)``, the summed losses of the completions at the places ``at`` of the stream."""
    hidden = model.run_decoder(stream, layout)
    places = torch.from_numpy(at - 1).to(hidden.device)
    losses, _ = model.head.token_losses(hidden[places], ids)
    document = np.repeat(np.arange(len(rows)), [len(row["completion_ids"]) for row in rows])
    return np.bincount(document, losses.double().cpu().numpy(), len(rows))


def _vector_nll(
    model: Any, rows: Rows, vectors: Tensor, layout: ContextLayout, documents: Integers
) -> NDArray[np.float64]:
    ids, lengths, wanted = _after(model, rows)
    stream, made = model.decoder_stream(
        vectors, layout, documents, np.zeros(len(rows), bool), ids, lengths
    )
    chosen = ids[torch.from_numpy(wanted).to(ids.device)]
    return _sums(model, stream, made, made.token_at[wanted], chosen, rows)


def _raw_stream(
    model: Any,
    rows: Rows,
    kind: str,
    counts: Integers | None = None,
    with_completion: bool = True,
) -> tuple[Tensor, Any, Integers, Tensor]:
    """Stream 2 with raw tokens of the context in place of vectors."""
    contexts: list[Sequence[int]] = [row["reference_ids"] for row in rows]
    if kind == "none":
        contexts = [[] for _ in rows]
    elif counts is not None:
        contexts = [each[max(len(each) - int(k), 0) :] for each, k in zip(contexts, counts)]
    if with_completion:
        ids, lengths, wanted = _after(model, rows)
    else:
        ids, lengths = _flat(model, [row["prompt_ids"] for row in rows])
        wanted = np.zeros(0, np.int64)
    both, sizes, places = joined(_flat(model, contexts), (ids, lengths))
    nobody = np.full(len(rows), -1)
    stream, made = model.decoder_stream(None, None, nobody, nobody > 0, both, sizes)
    chosen = ids[torch.from_numpy(wanted).to(ids.device)]
    return stream, made, made.token_at[places][wanted], chosen


def _raw_nll(
    model: Any, rows: Rows, kind: str, counts: Integers | None = None
) -> NDArray[np.float64]:
    stream, made, at, chosen = _raw_stream(model, rows, kind, counts)
    if len(at) and int(at.min()) < 1:
        raise ValueError(
            "prompt_ids must not be empty for a decoder without BOS: nothing would predict the "
            "first token of a completion without context"
        )
    return _sums(model, stream, made, at, chosen, rows)


def _of_batch(
    model: Any, rows: Rows, ratio: int | None, seed: int
) -> tuple[dict[str, NDArray[np.float64]], Integers]:
    contexts = [row["context_ids"] for row in rows]
    vectors, layout = condense_ids(model, contexts, ratio)
    own = np.arange(len(rows))
    sums = {
        "condensed": _vector_nll(model, rows, vectors, layout, own),
        "other": _vector_nll(model, rows, vectors, layout, np.roll(own, 1)),
        "last_k": _raw_nll(model, rows, "last_k", layout.doc_vectors),
    }
    with untrained(model, seed):
        fresh, _ = condense_ids(model, contexts, ratio)
        sums["untrained"] = _vector_nll(model, rows, fresh, layout, own)
    return sums, layout.doc_vectors


def _summary(
    ratio: int | None, vectors: float, sums: dict[str, NDArray[np.float64]], targets: Integers
) -> RatioResult:
    total = int(targets.sum())
    nll = {name: float(sums[name].sum()) / total for name in ARMS}
    difference, error = {}, {}
    for name in CONTROLS:
        apart = sums["condensed"] - sums[name]
        difference[name] = float(apart.sum()) / total
        # Of a ratio of sums, by linearization.
        rest = apart - difference[name] * targets
        error[name] = float(np.sqrt((rest**2).sum() * len(rest) / (len(rest) - 1))) / total
    gain = nll["none"] - nll["full"]
    recovered = (nll["none"] - nll["condensed"]) / gain if gain > 0 else float("nan")
    return RatioResult(ratio, vectors, nll, difference, error, recovered)


# --------------------------------------------------------------------------------- reconstruction


def _reconstruct(
    model: Any, batches: list[Rows], ratio: int | None, greedy: Rows, entry: RatioResult
) -> None:
    """Set the shares of tokens that the decoder reconstructs, teacher-forced and greedily."""
    right = total = 0
    for rows in batches:
        vectors, layout = condense_ids(model, [row["context_ids"] for row in rows], ratio)
        ids, lengths = _flat(model, [row["reference_ids"] for row in rows])
        stream, made = model.decoder_stream(
            vectors, layout, np.arange(len(rows)), np.ones(len(rows), bool), ids, lengths
        )
        hidden = model.run_decoder(stream, made)
        at = torch.from_numpy(made.token_at - 1).to(hidden.device)
        right += int(model.head.token_losses(hidden[at], ids)[1].sum())
        total += len(ids)
    entry.teacher_forced = right / total
    vectors, layout = condense_ids(model, [row["context_ids"] for row in greedy], ratio)
    wanted = [list(row["reference_ids"]) for row in greedy]
    longest = max(map(len, wanted))
    options: Any = {"max_new_tokens": longest, "min_new_tokens": longest, "do_sample": False}
    nothing: list[list[int]] = [[] for _ in wanted]
    made = generate_ids(model, vectors, layout, nothing, reconstruct=True, **options).tolist()
    same = sum(sum(a == b for a, b in zip(ours, theirs)) for ours, theirs in zip(made, wanted))
    entry.greedy = same / sum(map(len, wanted))


# ---------------------------------------------------------------------------------------- prefill


def _time_prefill(model: Any, rows: Rows, ratio: int | None, entry: RatioResult) -> None:
    row = max(rows, key=lambda each: len(each["context_ids"]))
    vectors, layout = condense_ids(model, [row["context_ids"]], ratio)
    ids, lengths = _flat(model, [row["prompt_ids"]])
    stream, _ = model.decoder_stream(
        vectors, layout, np.zeros(1, np.int64), np.zeros(1, bool), ids, lengths
    )
    entry.prefill_seconds, entry.cache_bytes, entry.peak_bytes = _prefill(model, stream)


def _prefill(model: Any, stream: Tensor) -> tuple[float, int, int | None]:
    """Median seconds, bytes of the cache, and peak bytes of the prefill of one sequence."""
    decoder, on_gpu = transformers_model(model.decoder), stream.is_cuda
    seconds, cache, peak = [], None, None
    for _ in range(_REPEATS):
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        begun = time.perf_counter()
        cache = decoder.base_model(inputs_embeds=stream[None], use_cache=True).past_key_values
        if on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), _bytes_of(cache), peak


def _bytes_of(cache: Any) -> int:
    layers = getattr(cache, "layers", ())
    tensors = [value for layer in layers for value in (layer.keys, layer.values)]
    return sum(value.numel() * value.element_size() for value in tensors)
