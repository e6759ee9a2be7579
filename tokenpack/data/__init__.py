"""Texts, and the batches made of them."""
