"""Token shards: corpora that are token ids on disk, memory-mapped.

columns.py     a memory-mapped column of integers; the ends of documents
file.py        one file of tokens, whatever its format
megatron.py    Megatron's .bin and .idx
datatrove.py   datatrove's .ds, .ds.index, .ds.loss and .ds.metadata
plain.py       llm.c's .bin, true .npy, OLMo's headerless .npy, raw ids
formats.py     which format a file has, by its content
shards.py      several files as one sequence of documents
"""
