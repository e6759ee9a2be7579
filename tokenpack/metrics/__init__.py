"""Metrics of translations during training, for ``Seq2SeqTrainer(compute_metrics=...)``.

    bleu            BLEU (Papineni et al., 2002) of the corpus, 0 to 100
    chrf            chrF++ (Popović, 2017): character 6-grams and word bigrams, 0 to 100
    ter             translation edit rate (Snover et al., 2006): edits per 100 reference words
    meteor          METEOR (Banerjee and Lavie, 2005), mean of the rows, 0 to 1, English only
    exact_match     fraction of rows equal to the reference
    gen_len         mean number of generated tokens
    copied_source   fraction of rows equal to the source but not to the reference

sacrebleu computes the first three, so scores are comparable with published ones. `signatures`
states the settings. These scores are ratios of sums over all rows, not means over rows or batches.
So the texts of all batches are collected, also with ``batch_eval_metrics=True``.
"""

from .datasets import LANGUAGE_COLUMNS
from .seq2seq import METRICS, Seq2SeqMetrics, make_seq2seq_compute_metrics

__all__ = ["LANGUAGE_COLUMNS", "METRICS", "Seq2SeqMetrics", "make_seq2seq_compute_metrics"]
