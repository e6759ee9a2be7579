"""The demo's corpus and tokenizer, and training examples made from them."""
