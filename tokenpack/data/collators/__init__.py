"""Collators for encoder-decoder models: pairs of sequences, and T5's span corruption."""
