"""The commands of ``tokenpack``, one module each with a ``run(arguments) -> exit code``.

    check.py           compares a model padded and packed, on one batch
    condense.py        trains, evaluates and runs a condenser of long contexts
    demo.py            trains padded and patched models side by side
    doctor.py          prints what is installed and which attention backends run
    generate.py        prints what a model generates, and chats
    inspect.py         prints lengths and padding of a file, and how full each strategy packs it
    inspect_model.py   prints what a model computes on one batch
    merge_packed.py    joins the parts that several machines packed
    pack.py            packs files into rows
    preview.py         shows what is learned of conversations
    shards.py          writes, inspects, merges and converts token shards

Shared modules:

    help_texts.py       the texts of ``--help``
    arguments.py        options that several commands have
    model_options.py    the options of commands that run a model of the user's
    shard_options.py    the options of ``tokenpack shards``
    one_batch.py        the user's model and one batch of the user's data
    condense_options.py the options of ``tokenpack condense``
    condense_figures.py its PNG file
    models.py           the models to train, and the published shapes to count
    side_by_side.py     trains a model padded and packed
    epochs.py           counts the tokens of an epoch's batches
    strategies.py       plans the same lengths with every strategy
    prediction.py       predicts step time and memory
    tokenizer.py        loads the user's tokenizer
    machine.py          facts about this machine
    table.py            text tables
    figures.py          PNG files
    output.py           output folders and JSON files
"""

import os

# Keeps torch's profiler, which measures the demo's memory, from printing its starts and stops on
# stderr. torch reads the variable when it is imported, so it is set here.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
