"""Collators for encoder-decoder models: pairs of texts, and T5's span corruption."""
