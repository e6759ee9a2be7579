"""Packed sequences as tensors: batches, pairs, plain rows, datasets and streams."""
