"""`patch_model`: run a transformers model on real tokens only.

Each file imports only from files above it:

    swap             replaces the forward of a module
    traced_once, hooks     what torch.compile reads from modules; hooks and other changes to them
    family           the properties of a family of models
    call             the state of one packed forward and of a patched model
    graph_ops, graph under torch.compile: what depends on values, and what is decided while tracing
    interface        tokenpack's function in transformers' attention interface
    t5, umt5, roberta, pooler, encoder_decoder     forwards of single families
    families         the allow-list of families
    embedding, head, packed_rows     word embeddings, LM head, batches of packed rows
    dead_tokens      fills a stream of tokens up to a constant number
    inputs           from a model's arguments to packed arguments
    forward          the forward of a patched model
    patching         patch_model, unpatch_model, is_patched, packing_stats
    suspend          takes a patch off for a while; calls a function before the first batch
"""

from .call import PackingStats
from .patching import is_patched, packing_stats, packs_itself, patch_model, unpatch_model

__all__ = [
    "PackingStats",
    "is_patched",
    "packing_stats",
    "packs_itself",
    "patch_model",
    "unpatch_model",
]
