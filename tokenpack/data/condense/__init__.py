"""Data for the condenser: documents, a split by content, and packed batches."""

from .batch import CondenseBatch, CondenseCollator
from .documents import split_by_content, tokenize_documents

__all__ = ["CondenseBatch", "CondenseCollator", "split_by_content", "tokenize_documents"]
