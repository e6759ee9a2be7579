"""Conversations as token ids and labels for supervised fine-tuning. From the lowest file up:

schemas.py     a row of a dataset -> a conversation: messages, tools, weights
templates.py   chat templates with {% generation %} markers, by name
rendering.py   a conversation -> its text, and the character spans of its messages
encoding.py    texts and spans -> ids and labels, by character offsets
fitting.py     conversations that are too long: shortened, cut, dropped
checks.py      problems by name, counted
pipeline.py    rows -> samples
dataset.py     chat_dataset: lists, files, datasets and hub names -> a dataset
marked.py      texts with their targets in color, marked, or as HTML
preview.py     preview: conversations, rows and batches as marked texts
split.py       functions that return training and validation data
    marked.py      texts with their targets in color, marked, or as HTML
    preview.py     preview: conversations, rows and batches as marked texts
    split.py       functions that return training and validation data
"""
