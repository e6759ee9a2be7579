"""Token shards: corpora that are token ids on disk, memory-mapped.

columns.py     a memory-mapped column of integers; the ends of documents
file.py        one file of tokens, whatever its format
megatron.py    Megatron's .bin and .idx
datatrove.py   datatrove's .ds, .ds.index, .ds.loss and .ds.metadata
plain.py       llm.c's .bin, true .npy, OLMo's headerless .npy, raw ids
formats.py     which format a file has, by its content
shards.py      several files as one sequence of documents
order.py       a permutation that is computed, not stored
samples.py     numbered samples, and the rows of tokens
windows.py     windows of the stream; whole documents in rows
blend.py       several sources by weight
loader.py      batches for ranks and workers, with one number as state
writer.py      files that are whole or not there, and go on after a kill
parts.py       names and rows of the parts that several machines write
encode.py      texts and conversations to tokens
write.py       corpora to shards
pipeline.py    the same as a step of a datatrove pipeline
merge.py       join, convert and verify shards
"""
