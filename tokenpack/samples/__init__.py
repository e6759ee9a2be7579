"""The demo's corpus, its tokenizer, and the training examples made from them."""
