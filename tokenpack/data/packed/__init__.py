"""Packed sequences as tensors: one batch, a pair of streams, rows, datasets of rows, streams."""
