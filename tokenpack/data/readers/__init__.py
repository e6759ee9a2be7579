"""Readers of dataset files, one module per kind of format. `tokenpack.data.reader` calls them.

compression.py  compressed files: their first bytes and their decompressed bytes
files.py        which files a path names, their formats, and a check of their first bytes
schema.py       the state of one reading: rows to skip, and a schema that grows
arrow.py        Parquet, Arrow IPC files and streams
blocks.py       textual files in blocks of whole lines
lines.py        lines of text and of JSON
csv.py          CSV and TSV
"""
