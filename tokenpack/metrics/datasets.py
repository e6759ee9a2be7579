"""The columns of an evaluated dataset that scoring uses: labels, languages and sources.

`EvalPrediction` carries only ids, so the languages and sources come from the dataset. They belong
to the predictions only if the rows are in the dataset's order, which transformers changes when it
groups by length. Labels in the dataset are therefore compared with the evaluated labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANGUAGE_COLUMNS = ("target_language", "target_lang", "tgt_lang", "language", "lang")
"""Columns with the target's language, unambiguous names first: "lang" may be the source's."""

# T5's task prefix, "translate English to German: ...".
_PROMPT = re.compile(r"\s*translate\s[^:\n]*?\b(?:in)?to\s+([^:\n]+?)\s*:\s*", re.IGNORECASE)

# Matches en, eng_Latn, en_XX, en-US, English, __en__. Does not match en-de, which is a pair.
_ENGLISH = re.compile(
    r"[^A-Za-z]*(?:[Ee]n|EN|eng|[Ee]nglish)(?:[-_](?:[A-Z]{2}|[A-Z][a-z]{3}|us|gb))*[^A-Za-z]*"
)


@dataclass(frozen=True)
class EvaluatedDataset:
    """The columns of one dataset. A missing column is None."""

    num_rows: int
    labels: Sequence[Sequence[int]] | None = None
    languages: Sequence[str | None] | None = None
    sources: Sequence[str] | None = None

    def groups(self) -> Iterator[tuple[str, NDArray[np.intp]]]:
        """Suffix of the metrics' names and rows of each group: all rows, then each language."""
        yield "", np.arange(self.num_rows)
        languages = self.languages or []
        for language in sorted({each for each in languages if each is not None}):
            members = [i for i, each in enumerate(languages) if each == language]
            yield f"_{language}", np.array(members)

    def scored_by_meteor(self, only_english: bool) -> list[bool]:
        """Whether METEOR scores each row."""
        if not only_english or self.languages is None:
            return [True] * self.num_rows
        return [each is not None and bool(_ENGLISH.fullmatch(each)) for each in self.languages]

    def has_columns_of(self, other: EvaluatedDataset) -> bool:
        """Whether both datasets lead to the same scores."""
        return (self.languages, self.sources) == (other.languages, other.sources)

    def may_have_labels(self, labels: Sequence[Any]) -> bool:
        """False only if ``labels`` certainly belong to other rows."""
        return self.labels is None or all(map(_may_be_equal, self.labels, labels))


def read_datasets(
    eval_dataset: Any, source_column: str, language_column: str | None
) -> dict[str, EvaluatedDataset]:
    """Read the datasets of a Trainer's ``eval_dataset``, by name.

    Raises:
        TypeError: if a dataset has no length.
        ValueError: if a dataset lacks the named language column, or two datasets cannot be told
            apart.
    """
    if eval_dataset is None:
        return {}
    by_name = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    datasets = {
        name: _read_dataset(each, source_column, language_column) for name, each in by_name.items()
    }
    _check_distinct(datasets)
    return datasets


def _read_dataset(
    dataset: Any, source_column: str, language_column: str | None
) -> EvaluatedDataset:
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            "eval_dataset must be a dataset with a length, a mapping of such datasets, or None for "
            f"no scores by language, got {type(dataset).__name__}"
        )
    candidates = _language_columns(language_column)
    columns = _columns(dataset, ("labels", source_column, *candidates))
    prompt_languages, sources = _without_prompts(columns.get(source_column))
    present = [name for name in candidates if name in columns]
    if language_column not in (None, "auto") and not present:
        raise ValueError(f"language_column must be in eval_dataset, got {language_column!r}")
    languages = [_language(each) for each in columns[present[0]]] if present else prompt_languages
    if language_column is None:
        languages = None
    depends_on_order = languages is not None or sources is not None
    labels = columns.get("labels") if depends_on_order else None
    return EvaluatedDataset(len(dataset), labels, languages, sources)


def _language_columns(language_column: str | None) -> tuple[str, ...]:
    if language_column is None:
        return ()
    return LANGUAGE_COLUMNS if language_column == "auto" else (language_column,)


def _columns(dataset: Any, names: Iterable[str]) -> dict[str, Sequence[Any]]:
    """Those of the columns that every row of the dataset has.

    Columns of a `datasets.Dataset` that a transform leaves out still describe its rows.
    """
    if hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):  # from `datasets`
        plain = dataset.with_format(None)
        columns = {name: _column(plain, name) for name in names if name in plain.column_names}
        has_transform = (getattr(dataset, "format", None) or {}).get("type") == "custom"
        return columns | (_columns_by_row(dataset, names) if has_transform else {})
    return _columns_by_row(dataset, names)


def _columns_by_row(dataset: Any, names: Iterable[str]) -> dict[str, Sequence[Any]]:
    """The columns, of which each row is read once: reading a row may tokenize it."""
    if not len(dataset) or not isinstance(dataset[0], Mapping):
        return {}
    each_row = (dataset[i] for i in range(len(dataset)))
    rows = [{name: row[name] for name in names if name in row} for row in each_row]
    return {name: [row[name] for row in rows] for name in names if all(name in row for row in rows)}


def _column(dataset: Any, name: str) -> Sequence[Any]:
    """A column, with the names of a `ClassLabel` instead of its numbers."""
    name_of = getattr(dataset.features[name], "int2str", None)
    values = dataset[name]
    return values if name_of is None else [None if i is None else name_of(i) for i in values]


def _without_prompts(
    sources: Sequence[Any] | None,
) -> tuple[list[str | None] | None, list[str] | None]:
    """The languages in T5's prompts, if all rows have a prompt, and the texts after the prompts."""
    if sources is None:
        return None, None
    texts = list(sources)
    if not all(isinstance(text, str) for text in texts):
        return None, None  # ids, or an unrelated column of this name
    prompts = [prompt for prompt in map(_PROMPT.match, texts) if prompt]
    if not texts or len(prompts) < len(texts):
        return None, texts
    return [_language(each[1]) for each in prompts], [
        text[prompt.end() :] for text, prompt in zip(texts, prompts)
    ]


def _language(value: Any) -> str | None:
    """The language as a suffix of a metric's name."""
    name = "" if value is None else "_".join(str(value).split())
    return name or None


def _check_distinct(datasets: Mapping[str, EvaluatedDataset]) -> None:
    """Raise before training if the evaluated dataset could not be identified after it."""
    names = list(datasets)
    for i, name in enumerate(names):
        for other in names[:i]:
            if _are_ambiguous(datasets[name], datasets[other]):
                raise ValueError(
                    "eval_dataset must have datasets that differ in their number of rows or in "
                    f"labels, got {other!r} and {name!r} with {datasets[name].num_rows} rows and "
                    "no labels that differ: pass None for no scores by language"
                )


def _are_ambiguous(one: EvaluatedDataset, two: EvaluatedDataset) -> bool:
    if one.num_rows != two.num_rows or one.has_columns_of(two):
        return False
    return two.labels is None or one.may_have_labels(two.labels)


def _may_be_equal(expected: Sequence[int], found: Sequence[int]) -> bool:
    """Whether the labels may be of one row, truncated or not.

    A collator keeps the special tokens at the end when it truncates, so the shorter labels are the
    front and the end of the longer ones. Or the last label is an end-of-text token of its own.
    """
    ours = [label for label in expected if label >= 0]
    theirs = [label for label in found if label >= 0]
    if len(ours) == len(theirs):
        return ours == theirs
    count = min(len(ours), len(theirs))
    front = _num_equal(ours, theirs)
    return front >= count - 1 or front + _num_equal(ours[::-1], theirs[::-1]) >= count


def _num_equal(one: Sequence[int], two: Sequence[int]) -> int:
    """The number of equal labels before the first that differs."""
    pairs = enumerate(zip(one, two))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(two)))
