"""`make_seq2seq_compute_metrics`: decode, group by language and score generated translations."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

from .datasets import EvaluatedDataset, read_datasets
from .scorers import Meteor, count_edits, edit_rate, sacrebleu_scorers, signature

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

METRICS = ("bleu", "chrf", "ter", "meteor", "exact_match", "gen_len", "copied_source")
"""The metrics that can be computed."""


def make_seq2seq_compute_metrics(
    tokenizer: PreTrainedTokenizerBase,
    eval_dataset: Any = None,
    source_column: str = "source",
    meteor_only_for_english: bool = True,
    *,
    language_column: str | None = "auto",
    bleu_tokenizer: str = "13a",
    metrics: Iterable[str] = METRICS,
) -> Seq2SeqMetrics:
    """Make a function that scores generated translations.

    Pass it as ``Seq2SeqTrainer(compute_metrics=...)`` with ``predict_with_generate=True``. Without
    generation, the Trainer passes logits that were computed from the reference before each token,
    and their scores are far too good.

    Args:
        tokenizer: decodes predictions and labels, without special tokens.
        eval_dataset: the evaluated dataset: a dataset with a length whose rows are mappings, or a
            mapping from names to such datasets, as for the Trainer. None disables scores by
            language and ``copied_source``. With several datasets, the evaluated one is identified
            by its number of rows and its column ``labels``.
        source_column: column of ``eval_dataset`` with the source texts, for ``copied_source``. If
            it is missing, that metric is left out. If every source starts with T5's "translate
            English to German:", the prompt is removed before the comparison, and determines the
            row's language unless there is a language column.
        meteor_only_for_english: compute METEOR only for English targets, because its stems and
            synonyms are English. If no language is known, all rows count.
        language_column: column of ``eval_dataset`` with the target's language. "auto" selects the
            first existing column of `LANGUAGE_COLUMNS`. None uses neither columns nor prompts. With
            languages, every metric is also computed by language: ``bleu_deu_Latn``.
        bleu_tokenizer: sacrebleu's name of the word tokenizer for BLEU: "13a" for languages with
            spaces, "zh", "char", "ja-mecab", "flores200". The last two require packages, which
            sacrebleu names if they are missing. "flores200" downloads its model on first use.
        metrics: the metrics to compute, from `METRICS`. ``ter`` is slow: 2 s for 1,000 rows of 25
            words, and 26 s if long parts of each row are moved.

    Raises:
        ImportError: if sacrebleu is missing and ``metrics`` need it.
        TypeError: if ``eval_dataset`` has no length.
        ValueError: if a metric, tokenizer or language column does not exist, or two datasets cannot
            be told apart.
    """
    chosen = tuple(metrics)
    if unknown := [name for name in chosen if name not in METRICS]:
        raise ValueError(f"metrics must be from {list(METRICS)}, got {unknown}")
    datasets = read_datasets(eval_dataset, source_column, language_column)
    scorers = sacrebleu_scorers(chosen, bleu_tokenizer)
    needs_meteor = "meteor" in chosen and (
        not meteor_only_for_english
        or not datasets
        or any(True in each.scored_by_meteor(only_english=True) for each in datasets.values())
    )
    meteor = Meteor.load() if needs_meteor else None
    return Seq2SeqMetrics(tokenizer, datasets, chosen, scorers, meteor, meteor_only_for_english)


class Seq2SeqMetrics:
    """Callable from an `EvalPrediction` to a dictionary of floats.

    Created by `make_seq2seq_compute_metrics`. The dictionary leaves out metrics without any row to
    compute them from. Without rows, it is empty.

    Attributes:
        signatures: settings and version of ``bleu``, ``chrf``, ``ter`` and ``meteor``. Cite them
            with the scores.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        datasets: Mapping[str, EvaluatedDataset],
        metrics: Sequence[str],
        scorers: Mapping[str, Any],
        meteor: Meteor | None,
        meteor_only_for_english: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._datasets = datasets
        self._metrics = metrics
        self._scorers = scorers
        self._meteor = meteor
        self._meteor_only_for_english = meteor_only_for_english
        self._pending = _Evaluated()
        self._pending_in: tuple[Any, int] | None = None
        self.signatures = {name: signature(scorer) for name, scorer in scorers.items()}
        if meteor is not None:
            self.signatures["meteor"] = meteor.signature

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Score the evaluated rows.

        Args:
            prediction: ``predictions`` are generated ids ``(n, columns)`` or logits
                ``(n, columns, vocabulary)``, or a tuple that starts with one of these.
                ``label_ids`` are ``(n, columns)``. Both are arrays or tensors, or a list of them
                with one item per batch. -100 marks slots without a token.
            compute_result: False stores the rows for the last call of the evaluation, and returns
                an empty dictionary (``batch_eval_metrics=True``). Rows of an evaluation that was
                interrupted do not enter the next one of a Trainer. Between calls of your own, call
                `reset`.

        Raises:
            ValueError: if predictions and labels differ in their number of rows or have other
                shapes, if the tokenizer cannot decode an id, or if no dataset has as many rows.
        """
        evaluation = _running_evaluation()
        if len(self._pending) and self._pending_in != evaluation:
            logger.warning(f"{len(self._pending)} rows of an interrupted evaluation are left out")
            self.reset()
        self._pending_in = evaluation
        self._pending.extend(self._decoded(prediction))
        if not compute_result:
            return {}
        # Reset before scoring, so that rows do not remain if scoring fails.
        rows, self._pending = self._pending, _Evaluated()
        return self._scores(rows) if len(rows) else {}

    def reset(self) -> None:
        """Forget the rows of an evaluation that has not ended."""
        self._pending = _Evaluated()

    def _decoded(self, prediction: EvalPrediction) -> _Evaluated:
        predicted = list(_token_rows(prediction.predictions, "predictions"))
        labels = list(_token_rows(prediction.label_ids, "label_ids"))
        if len(predicted) != len(labels):
            raise ValueError(
                f"predictions must have as many rows as label_ids, {len(labels)}, got "
                f"{len(predicted)}"
            )
        if _dimensions(prediction.predictions) == 3:
            predicted = [_masked_by_labels(*pair) for pair in zip(predicted, labels)]
        pad = self._tokenizer.pad_token_id
        return _Evaluated(
            predictions=self._texts(predicted, "predictions"),
            references=self._texts(labels, "label_ids"),
            lengths=[int(np.sum((ids >= 0) & (ids != pad))) for ids in predicted],
            labels=labels,
        )

    def _texts(self, rows: Sequence[NDArray[np.integer]], argument: str) -> list[str]:
        if not rows:
            return []  # batch_decode returns one text for no rows
        real = [ids[ids >= 0].tolist() for ids in rows]
        try:
            texts = self._tokenizer.batch_decode(real, skip_special_tokens=True)
        except (OverflowError, ValueError, TypeError, IndexError, KeyError) as error:
            largest = max(max(ids, default=-1) for ids in real)
            row = next(at for at, ids in enumerate(real) if largest in ids)
            raise ValueError(
                f"{argument} must be ids that the tokenizer can decode, got {largest} in row {row} "
                f"({type(error).__name__}: {error})"
            ) from error
        return [text.strip() for text in texts]

    def _scores(self, rows: _Evaluated) -> dict[str, float]:
        dataset = self._dataset_of(rows)
        by_row = self._by_row(rows, dataset)
        scores: dict[str, float] = {}
        for suffix, members in dataset.groups():
            for name in self._metrics:
                score = self._score(name, rows, by_row, members)
                if score is not None:
                    scores[name + suffix] = float(score)
        return scores

    def _dataset_of(self, rows: _Evaluated) -> EvaluatedDataset:
        """The columns of these rows."""
        same_length = [each for each in self._datasets.values() if each.num_rows == len(rows)]
        if self._datasets and not same_length:
            sizes = {name: each.num_rows for name, each in self._datasets.items()}
            raise ValueError(
                f"eval_dataset must have as many rows as are evaluated, {len(rows)}, got "
                f"{_describe(sizes)}: pass several datasets as a mapping, or None for no scores by "
                "language"
            )
        found = [each for each in same_length if each.may_have_labels(rows.labels)]
        if not all(each.has_columns_of(found[0]) for each in found):
            # The evaluated labels were truncated before the position where the datasets differ.
            raise ValueError(
                "eval_dataset must have one dataset with the evaluated labels, got "
                f"{len(found)}: pass None for no scores by language"
            )
        if found:
            return found[0]
        if same_length:
            logger.warning(
                "The evaluated labels are not those of eval_dataset in its order (a Trainer that "
                "groups by length changes the order). Left out: scores by language, copied_source, "
                "and METEOR if it is only for English."
            )
        has_languages = any(each.languages is not None for each in same_length)
        return EvaluatedDataset(len(rows), languages=[None] * len(rows) if has_languages else None)

    def _by_row(
        self, rows: _Evaluated, dataset: EvaluatedDataset
    ) -> dict[str, NDArray[np.float64]]:
        """The metrics computed by row; NaN where a row does not count."""
        texts = list(zip(rows.predictions, rows.references))
        values_of: dict[str, Iterable[Any]] = {
            "exact_match": (prediction == reference for prediction, reference in texts),
            "gen_len": rows.lengths,
        }
        if dataset.sources is not None:
            values_of["copied_source"] = (
                _is_copied(*pair, source) for pair, source in zip(texts, dataset.sources)
            )
        if self._meteor is not None:
            is_scored_by_row = dataset.scored_by_meteor(self._meteor_only_for_english)
            values_of["meteor"] = (
                self._meteor.score(*pair) if is_scored else np.nan
                for pair, is_scored in zip(texts, is_scored_by_row)
            )
        if "ter" in self._scorers:
            values_of["ter"] = (count_edits(self._scorers["ter"], *pair) for pair in texts)
        return {
            name: np.array(list(values), np.float64)
            for name, values in values_of.items()
            if name in self._metrics
        }

    def _score(
        self,
        name: str,
        rows: _Evaluated,
        by_row: Mapping[str, NDArray[np.float64]],
        members: NDArray[np.intp],
    ) -> float | None:
        if name in ("bleu", "chrf"):
            predictions = [rows.predictions[i] for i in members]
            references = [rows.references[i] for i in members]
            return self._scorers[name].corpus_score(predictions, [references]).score
        if name not in by_row:
            return None
        values = by_row[name][members]
        if name == "ter":
            return edit_rate(values)
        counted = values[~np.isnan(values)]
        return counted.mean() if counted.size else None


@dataclass
class _Evaluated:
    """The evaluated rows."""

    predictions: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    labels: list[NDArray[np.integer]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.predictions)

    def extend(self, more: _Evaluated) -> None:
        self.predictions += more.predictions
        self.references += more.references
        self.lengths += more.lengths
        self.labels += more.labels


def _running_evaluation() -> tuple[Any, int]:
    """What changes when a Trainer begins another evaluation.

    That is the data loader that accelerate iterates over, and the number of loaders in progress: an
    interrupted loop leaves its loader behind.
    """
    accelerate = sys.modules.get("accelerate.state")
    state = accelerate.GradientState() if accelerate else None
    references = getattr(state, "dataloader_references", None) or [None]
    active = references[-1]
    return None if active is None else weakref.ref(active), len(references)


def _describe(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{size} ({name!r})" if name else str(size) for name, size in sizes.items())


def _dimensions(values: Any) -> int:
    while isinstance(values, (tuple, list)) and values:
        values = values[0]
    return getattr(values, "ndim", 0)


def _token_rows(values: Any, argument: str) -> Iterator[NDArray[np.integer]]:
    """The ids ``(columns,)`` of each row of the Trainer's predictions or labels."""
    if isinstance(values, tuple) and values:
        yield from _token_rows(values[0], argument)  # followed by the model's other outputs
        return
    if isinstance(values, list):  # one item per batch, with eval_do_concat_batches=False
        for batch in values:
            yield from _token_rows(batch, argument)
        return
    if getattr(values, "ndim", 0) == 3:
        values = values.argmax(-1)
    ids = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{argument} must be token ids (n, columns)"
            + (" or logits (n, columns, vocabulary)" if argument == "predictions" else "")
            + f", got {ids.dtype} of shape {ids.shape}"
        )
    yield from ids


def _masked_by_labels(
    predicted: NDArray[np.integer], labels: NDArray[np.integer]
) -> NDArray[np.integer]:
    """Predictions from logits, without those after the end of the reference."""
    return np.where(labels >= 0, predicted, -100) if predicted.shape == labels.shape else predicted


def _is_copied(prediction: str, reference: str, source: str) -> bool:
    prediction, reference, source = map(_folded, (prediction, reference, source))
    return bool(source) and prediction == source != reference


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
