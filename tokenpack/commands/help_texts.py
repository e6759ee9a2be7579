"""Help texts of the ``tokenpack`` command. Imports nothing, so that ``--help`` starts fast."""

DESCRIPTION = """\
Padding-free training of Hugging Face models: the same results, computed from the real tokens only.

  tokenpack check          run your data through your model padded and packed, and compare
  tokenpack condense       train, evaluate and run a condenser of long contexts
  tokenpack demo           train T5, NLLB and Llama padded and patched, side by side, and compare
  tokenpack doctor         what is installed here, and which attention backends can run
  tokenpack generate       let your model continue a prompt, or chat with it
  tokenpack inspect        how much of your data's batches is padding, and what removing it saves
  tokenpack inspect-model  what your model computes on your data: values, updates, gradients
  tokenpack merge-packed   join the parts that several machines packed, after checking them
  tokenpack pack           pack your sequences into full rows, and write them as a dataset
  tokenpack preview        show what is learned of your conversations, and check them
  tokenpack shards         write, inspect, merge and convert token shards of any tool
"""

CHECK = """\
Run one batch of your data through a model as it is and patched. Print a table: loss, outputs at
real positions, the gradients of each layer, time, memory, what was packed, and what ran padded and
why. Where the two differ by more than rounding, the table says which one is nearer to a float64
copy of the model that runs each sequence by itself. Dropout is set to 0 for the comparison.
"""

CHECK_EPILOG = """\
FILE is .txt or .jsonl as for `tokenpack demo --data`. With --column it is any file that `tokenpack
pack` reads, and the column holds texts or lists of ids; --target-column makes pairs. The batch has
the first --batch-size rows, padded on the right.

The labels depend on the model that the config names: an encoder-decoder learns the target, or the
source if there is none; other language models learn the ids, or only those of the target; a
classifier has label 0 everywhere; a model without a head has no labels, and the gradients are those
of a weighted sum of its outputs.

examples:
  tokenpack check --model checkpoints/run1 --data my.jsonl
  tokenpack check --model google-t5/t5-base --data my.parquet --column question
  tokenpack check --model my/config --random --tokenizer my.json --data my.txt --dtype float64

exit code: 0 if the packed run is right; 1 if it differs or nothing was packed; 2 for bad input.
"""

CONDENSE = """\
Condense long contexts into a few vectors that a frozen decoder reads in place of the tokens. The
condenser model gets LoRA and learned slots, or pools its hidden states; a projection maps them to
the decoder's width. Needs tokenpack[condense].
"""

_CONDENSE_DATA = """\
FILES are what `tokenpack pack` reads: Parquet, Arrow, JSON lines, CSV, text; a folder or a glob.
  context, prompt, completion   the completion is learned. The prompt may be missing or empty
  text                          each text is cut into windows of context, prompt and continuation
Rows with the same context, or the same text, are on one side of the split.
"""

CONDENSE_EPILOG = """\
examples:
  tokenpack condense train --decoder HuggingFaceTB/SmolLM2-135M --data texts.jsonl --out run
  tokenpack condense eval --model run --data held_out.jsonl
  tokenpack condense run --model run --context report.txt --prompt "In short:"

`tokenpack condense ACTION --help` has more.
"""

CONDENSE_TRAIN = """\
Train a condenser. Both models run packed, so nothing is padded on either side, and the token budget
counts both streams. The folder gets checkpoints, and at the end the condenser with the smallest
evaluation loss: the learned parts and the adapter, without the weights of the two models. At each
evaluation, the greedy texts of a few documents go to generated-STEP.jsonl.
"""

CONDENSE_TRAIN_EPILOG = f"""\
data:
{_CONDENSE_DATA}
examples:
  tokenpack condense train --decoder my/decoder --data texts.jsonl --out run --context-tokens 512
  tokenpack condense train --decoder my/large --condenser my/small --data qa.parquet --out run \\
      --ratios 4 8 16 --segment-length 512 --reconstruction-weight 0.5
  torchrun --nproc-per-node 8 -m tokenpack condense train --decoder my/decoder --data d --out run

exit code: 0 on success; 2 for bad input.
"""

CONDENSE_EVAL = """\
Compare the likelihood of held-out completions given the condensed vectors with that given nothing,
the last k raw tokens (k: the number of vectors), vectors of an untrained condenser, vectors of
another document, and the full context. Print tables, and write a PNG and a JSON file.
"""

CONDENSE_EVAL_EPILOG = f"""\
data:
{_CONDENSE_DATA}
columns:
  recovered        (none - condensed) / (none - full)
  reconstructed    share of the context's tokens, if the condenser has learned to reconstruct
  prefill, cache   of the longest context: median time, size of the decoder's cache after it

exit code: 0 if the vectors are better than each control by two standard errors, at each ratio; 1 if
not; 2 for bad input.
"""

CONDENSE_RUN = """\
Condense one or more contexts, and let the decoder answer greedily.
"""

CONDENSE_RUN_EPILOG = """\
examples:
  tokenpack condense run --model run --context report.txt --prompt "In short:"
  tokenpack condense run --model run --context a.txt --context b.txt --prompt "Who wrote this?"
"""

DEMO = """\
Train each model twice on the same batches from the same weights: padded, with transformers' own
SDPA attention, and patched by tokenpack. Print the measurements of both runs, and write a PNG and a
JSON file.

The models are built from configs, with random weights. Their size depends on the device: small and
in fp32 on a CPU, larger and under bf16 autocast on a CUDA device. Nothing is downloaded. Dropout
and layer drop are 0, because the two runs would draw different random numbers and their losses
would not be comparable.
"""

DEMO_EPILOG = """\
data:
  The default is the docstrings of Python's standard library that have more than one line. Their
  lengths vary widely. The models learn:
    t5     span corruption: predict the masked spans of a docstring
    nllb   the rest of the docstring -> its summary
    llama  the docstring, each token from those before it
  With --data FILE, the data is a UTF-8 file instead:
    FILE.txt    texts separated by blank lines; without blank lines, one text per line
    FILE.jsonl  one object per line, with "text", or with "source" and "target"
  With "source" and "target", t5 and nllb learn source -> target, and llama learns the two joined.
  Texts that are longer than a model allows are cut. The output shows how many were cut.

columns of the table:
  padding           share of the batches' slots that hold no token
  tokens/s          real tokens per second of forward and backward
  step-time ratio   padded / packed time of forward and backward: the median over the steps
  ideal ratio       padded / packed floating-point operations, counted: the median over the steps
  ratio / ideal     step-time ratio / ideal ratio of each step: the median over the steps
  largest loss diff |padded - patched| / padded: the largest of all steps
  peak MiB          memory that one forward and backward needs in addition to the weights

examples:
  tokenpack demo                                 three models, under 4 minutes on two CPU cores
  tokenpack demo --model t5 --steps 50
  tokenpack demo --data my.jsonl --out runs/my
  tokenpack demo --size tiny --steps 2           a check of the installation, in seconds; too small
                                                 for meaningful times

exit code: 0 on success; 1 if the losses differ or a step was not packed; 2 for bad input.
"""

DOCTOR = """\
Print the versions of tokenpack's dependencies, the devices, and for each device the attention
backends that can run on it and why the others cannot. Paste the output into a bug report.
"""

DOCTOR_EPILOG = """\
example:
  tokenpack doctor
"""

GENERATE = """\
Generate text with a causal language model, and print it word by word. Without --chat, the model
continues --prompt. With --chat, it answers --prompt, or without --prompt each line that you type,
in the form of the chat template and with all messages before. An empty line is skipped. The end of
the input (Ctrl-D) or Ctrl-C ends the chat; Ctrl-C during an answer ends the answer.
"""

GENERATE_EPILOG = """\
Any model that AutoModelForCausalLM loads is accepted, and tokenpack's decoder. Generation stops at
the EOS of the model's generation config, in a chat also at the token with which the template ends
an answer.

The prompt and --max-new-tokens must fit into --context. Of a longer prompt, the last tokens are
used. Of a longer chat, the oldest messages are left out. A note on stderr says so.

examples:
  tokenpack generate --model runs/decoder --prompt "ROMEO:" --temperature 0.8 --top-k 40
  tokenpack generate --model runs/decoder --prompt "ROMEO:" --temperature 0
  tokenpack generate --model Qwen/Qwen3-0.6B --chat --system "Answer in one sentence."
  tokenpack generate --model my --chat --prompt "What is Python?" --template chatml --seed 1

exit code: 0 on success; 2 for bad input; 130 if Ctrl-C ended it outside of a chat.
"""

INSPECT = """\
Tokenize a file. Show the lengths of its texts, the share of padding in their batches, and how much
faster a model of a named shape would train without padding, by counted floating-point operations.
Then plan packed rows of the same texts, and show how full each strategy fills them.
"""

INSPECT_EPILOG = """\
FILE has the formats of `tokenpack demo --data`: .txt (texts separated by blank lines, or one per
line), or .jsonl ("text", or "source" and "target"). Random batches come from the shuffled data.
Sorted batches come from the data in order of length: they have little padding, but each batch is
all short or all long.

the first table:
  padding     share of the batches' slots that hold no token
  linear      padded / packed operations of the linear layers only: 1 / (1 - padding) if all tokens
              cost the same
  speed-up    the same with attention, whose cost grows with the square of the length

the second table, for rows as `tokenpack pack` makes them:
  rows        rows of --capacity tokens that hold all texts; longer texts are cut, and counted
  efficiency  share of their slots that hold a token; the rest is padding
  seconds     time to plan once. All strategies run, which takes 5 to 20 s for a million texts:
              less than tokenizing them
For an encoder-decoder, the rows hold pairs and have a capacity on each side (pack_pairs).

the third table, with --gpus: what `tokenpack.cost` predicts for training with AdamW on that many
devices, from counted operations and bytes and from the peak rates of a device. By default these
rates are measured on this machine, in a few seconds. --ceilings reads those of another device from
a file: ceilings.json of a benchmark's results, or from tokenpack.cost.write_ceilings. The predicted
times assume that the device runs at its peak, so trust the ratios rather than the times.
  rows        rows of a random batch
  seconds     time of its training step, padded and packed
  GiB         weights, optimizer and all that the step keeps, for the largest such batch
For many ranks, the prediction covers DDP and FSDP over links of --link GB/s, without overlap of
communication and backward. Balance is the mean rank's work over the busiest rank's, for the
trainer's own batches: a token budget for each rank.

shapes: for "text" data, llama-1b (default), llama-8b
        for "source" and "target", t5-base (default), t5-small, t5-large, nllb-600m, and the llamas

examples:
  tokenpack inspect --data my.jsonl --tokenizer google-t5/t5-base
  tokenpack inspect --data my.txt --tokenizer checkpoints/run1 --shape llama-8b --max-length 2048
  tokenpack inspect --data my.txt --tokenizer tokenizer.json --capacity 4096 --out inspected
  tokenpack inspect --data my.jsonl --tokenizer my --model-config my/config.json --gpus 8
"""

INSPECT_MODEL = """\
Run one batch of your data through a model, forward and backward, and print what it computes: the
parameters of each part, the shape and the range of what each part returns, how much each block
changes the residual stream, how far the predictions are from uniform, and the weights and gradients
of each module. Each line has a verdict.
"""

INSPECT_MODEL_EPILOG = """\
FILE and its options are those of `tokenpack check`, as is what the model learns. The model is in
evaluation mode, so there is no dropout. With --random, a config.json is enough: a new model
predicts almost uniformly, its loss is close to ln(vocabulary), and no block does much more or much
less than the others.

verdicts other than "ok":
  not finite              an output, a weight or a gradient is infinite or NaN
  constant                all values of an output are equal
  update below 0.01       the block does little
  update above 2.0        the block replaces its input instead of adding to it
  gradient is zero        the module does not learn
  gradient is far above   gradient over weight is more than 1,000 times the median of all modules
  gradient is far below   it is less than a thousandth of the median
  the loss does not depend on it

examples:
  tokenpack inspect-model --model checkpoints/run1 --data my.jsonl
  tokenpack inspect-model --model my/config --random --tokenizer my.json --data my.txt

exit code: 0 if all verdicts are "ok"; 1 if some are not; 2 for bad input.
"""

MERGE_PACKED = """\
Join the parts OUT-RANK-of-N that N machines wrote with `tokenpack pack ... OUT --rank RANK
--world-size N`. All parts must be there, complete and of the same input and options. The rows, or
for lengths the plan, go to OUT in the order of the input, with the metrics of all of them.
"""

MERGE_PACKED_EPILOG = """\
example:
  tokenpack pack corpus.parquet packed --capacity 4096 --rank 3 --world-size 8   # on machine 3
  tokenpack merge-packed packed

exit code: 0 on success; 2 for bad input, such as a missing part. The parts stay as they are.
"""

PACK = """\
Pack the sequences of IN into rows of --capacity tokens with little padding. Write the rows as a
dataset, and print how full they are.
"""

PACK_EPILOG = """\
IN is a file, a folder or a glob (in quotes) of
  .parquet .arrow .feather .jsonl .csv .tsv .txt    text formats also as .gz .bz2 .xz .zst
with a column of token lists, or with --tokenizer a column of text (.txt: one text per line); or
  .npy                                              only lengths: integers, one per sequence

OUT is a new or an empty folder. The command writes
  dataset.arrow   one row per bin; datasets.Dataset.from_file("OUT/dataset.arrow") opens it without
                  a copy
  metrics.json    the metrics, the options, and the versions of the dependencies
  plan.png        lengths and fills, if matplotlib is installed
With --world-size N, each of N machines packs its range of the rows into OUT-RANK-of-N, and
`tokenpack merge-packed OUT` checks and joins them.
Lengths without tokens make no rows. They are planned in shards, in bounded memory, and OUT holds
  plan            tokenpack.packing.PackResult.load("OUT/plan"): which sequences share a bin

the columns of a row:
  input_ids       --capacity ids
  attention_mask  1 at tokens, 0 at padding; it does not separate sequences
  labels          unshifted, for a loss that shifts; -100 at padding and at each sequence's first
                  token
  position_ids    from 0 in every sequence
  seq_lengths     tokens of each sequence in the row
tokenpack.data.collate_packed_rows makes batches of these rows that keep sequences apart.

strategies:
  auto   obfdp or obfd, depending on how often lengths repeat and how full rows become (default)
  nf     next fit: one open bin; keeps the order
  ff     first fit: in input order, into the first bin with room
  bf     best fit: in input order, into the fullest bin with room
  wf     worst fit: in input order, into the emptiest open bin
  ffd    first-fit decreasing: ff, longest sequences first
  bfd    best-fit decreasing: bf, longest sequences first
  ffs    first-fit shuffle: ff in random order, by --seed
  mffd   modified first-fit decreasing: ffd that first pairs those over half the capacity
  obfd   optimized best-fit decreasing: bfd over a histogram of lengths
  obfdp  parallel best-fit decreasing: bfd for all bins at once, in rounds
  hk     harmonic: in input order, similar lengths together
`tokenpack inspect` compares them on your texts.

examples:
  tokenpack pack tokenized.parquet packed --capacity 4096
  tokenpack pack 'shards/*.jsonl.zst' packed --capacity 2048 --labels labels --overlong truncate
  tokenpack pack my.jsonl packed --capacity 2048 --tokenizer google-t5/t5-base --overlong split
  tokenpack pack my.parquet packed --capacity 2048 --columns input_ids labels position_ids
  tokenpack pack lengths.npy planned --capacity 8192 --window 100000

exit code: 0 on success; 2 for bad input, which leaves OUT empty.
"""

PREVIEW = """\
Render and tokenize conversations as tokenpack.data.chat_dataset does, and show which tokens are
learned: the exact text with its targets marked, the token ids where context and targets meet, their
shares, and what the checks found. The checks cover the first 100 rows.
"""

PREVIEW_EPILOG = """\
FILE is .json, .jsonl (also .gz and .zst) or .parquet, or a name on the hub. Its rows have
  messages                      lists of role and content
  conversations                 lists of from and value
  prompt, response              texts or lists of messages; also prompt, completion
  instruction, input, output    texts
Rows of several kinds may be mixed.

If the folder of the tokenizer has a generation_config.json, the checks compare its EOS with the
tokens that end an answer.

examples:
  tokenpack preview --data my.jsonl --tokenizer checkpoints/run1
  tokenpack preview --data my.jsonl --tokenizer tokenizer.json --template chatml --html preview.html
  tokenpack preview --data my.parquet --tokenizer Qwen/Qwen3-0.6B --max-length 2048 --keep last
  tokenpack preview --data my.jsonl --tokenizer my --n 1 --style plain > text.txt

exit code: 0 on success; 1 if a check found a problem; 2 for bad input.
"""

SHARDS = """\
Token shards: corpora that are token ids on disk, in the formats of Megatron, datatrove, llm.c, OLMo
and NumPy. A file's format is recognized by its content. `tokenpack shards ACTION --help` has more.
"""

SHARDS_EPILOG = """\
examples:
  tokenpack shards write corpus.jsonl.zst corpus --tokenizer openai-community/gpt2 --num-proc 8
  tokenpack shards info corpus.idx other.ds
  tokenpack shards convert fineweb_train_000001.bin fineweb --format megatron --bos-token-id 50256
"""

SHARDS_WRITE = """\
Tokenize the rows of IN and write them as token shards. A row is a document. Everything is written
to OUT.unfinished first. If the run is killed, run the same command again: it goes on, and the files
are the same bytes.
"""

SHARDS_WRITE_EPILOG = """\
IN is files, a folder or a glob (in quotes) of one format, as for `tokenpack pack`:
  .parquet .arrow .feather .jsonl .csv .tsv .txt    text formats also as .gz .bz2 .xz .zst
A line of .txt is a document. Without --tokenizer, the rows hold token ids, and --dtype is needed.
With --chat, IN is conversations as for `tokenpack preview`; they need --format datatrove, which
stores the tokens that are targets.

OUT names the files:
  megatron     OUT.bin, OUT.idx
  datatrove    OUT.ds, OUT.ds.index, OUT.ds.metadata, with --chat OUT.ds.loss
  both         OUT.tokenpack.json: options, counts, a checksum
With --world-size N, each of N machines writes OUT-RANK-of-N, and `tokenpack shards merge` joins
them.

examples:
  tokenpack shards write 'data/*.parquet' corpus --tokenizer my/tokenizer --num-proc 8
  tokenpack shards write c4.jsonl c4 --tokenizer my --format datatrove --bos --no-eos
  tokenpack shards write chats.jsonl chats --tokenizer my --chat --format datatrove
  tokenpack shards write c4.jsonl c4 --tokenizer my --rank 3 --world-size 8

exit code: 0 on success; 2 for bad input, or if the files cannot be written.
"""

SHARDS_INFO = """\
Print format, dtype, tokens and documents of token shards, from what the files say themselves. A
file that is damaged or cut short is an error that names it.
"""

SHARDS_MERGE = """\
Join token shards of one dtype. Parts of `shards write --world-size` are put in order, and must all
be there, of one run, and undamaged.
"""

SHARDS_CONVERT = """\
Write token shards of any format as Megatron's or datatrove's.
"""
