"""Scores from sacrebleu (BLEU, chrF++, TER) and NLTK (METEOR)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

logger = logging.get_logger(__name__)

_FROM_SACREBLEU = ("bleu", "chrf", "ter")


def sacrebleu_scorers(metrics: Sequence[str], bleu_tokenizer: str) -> dict[str, Any]:
    """The scorers of those ``metrics`` that sacrebleu computes, by name."""
    names = [name for name in _FROM_SACREBLEU if name in metrics]
    if not names:
        return {}
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
        from sacrebleu.metrics.ter import TER
    except ImportError as error:
        raise ImportError(
            f'metrics: {", ".join(names)} need sacrebleu: pip install "tokenpack[metrics]"'
        ) from error
    if bleu_tokenizer not in BLEU.TOKENIZERS:
        raise ValueError(
            f"bleu_tokenizer must be one of {list(BLEU.TOKENIZERS)}, got {bleu_tokenizer!r}"
        )
    constructors: dict[str, Callable[[], Any]] = {
        "bleu": lambda: BLEU(tokenize=bleu_tokenizer),
        "chrf": lambda: CHRF(word_order=2),
        "ter": TER,
    }
    return {name: constructors[name]() for name in names}


def signature(scorer: Any) -> str:
    """sacrebleu's description of a scorer's settings and version."""
    scorer.corpus_score(["a"], [["a"]])  # sets the number of references in the signature
    return str(scorer.get_signature())


def count_edits(ter: Any, prediction: str, reference: str) -> tuple[float, float]:
    """Number of edits and of reference words in one row."""
    score = ter.sentence_score(prediction, [reference])
    return score.num_edits, score.ref_length


def edit_rate(counts: NDArray[np.float64]) -> float:
    """Edits per 100 reference words, from ``(rows, 2)``. Without words, as sacrebleu defines it."""
    num_edits, num_words = counts.sum(0)
    if num_words:
        return 100 * num_edits / num_words
    return 100.0 if num_edits else 0.0


@dataclass(frozen=True)
class Meteor:
    """NLTK's METEOR with the parameters of 2005, on words of the Penn Treebank tokenizer."""

    score_words: Callable[[list[list[str]], list[str]], float]
    tokenize: Callable[..., list[str]]
    signature: str

    @classmethod
    def load(cls) -> Meteor | None:
        """None, with a warning, if NLTK or its WordNet is missing."""
        try:
            import nltk
            from nltk.tokenize import word_tokenize
            from nltk.translate.meteor_score import meteor_score

            meteor_score([["cat"]], ["dog"])  # looks up WordNet, because the words differ
        except ImportError:
            logger.warning("meteor is left out: it needs NLTK (pip install nltk).")
        except LookupError:
            logger.warning(
                "meteor is left out: NLTK lacks its WordNet (python -m nltk.downloader wordnet)."
            )
        else:
            return cls(meteor_score, word_tokenize, f"nltk:{nltk.__version__}|tok:treebank")
        return None

    def score(self, prediction: str, reference: str) -> float:
        # With preserve_line, NLTK needs no download of a sentence tokenizer.
        hypothesis, expected = (
            self.tokenize(text, preserve_line=True) for text in (prediction, reference)
        )
        return self.score_words([expected], hypothesis)
