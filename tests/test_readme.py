"""The README's table of families matches the equivalence test, and its Python blocks run.

`python -m tests.test_readme` prints the table.
"""

import math
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .adapters.models import CASES

README = Path(__file__).parents[1] / "README.md"
HEADS = {
    "ForConditionalGeneration": "language model",
    "MTModel": "language model",
    "ForCausalLM": "language model",
    "LMHeadModel": "language model",
    "ForMaskedLM": "masked language model",
    "ForTokenClassification": "token classifier",
    "ForSequenceClassification": "sequence classifier",
    "EncoderModel": "encoder only",
    "Model": "base model",
}


def families_table() -> str:
    heads = defaultdict(list)
    notes = {}
    for case in CASES:
        family = case.family.split(" (")[0]
        head = next(words for ending, words in HEADS.items() if case.model.endswith(ending))
        if head not in heads[case.kind, family]:
            heads[case.kind, family].append(head)
        if case.since != "5.15":
            notes[family] = f" (transformers >= {case.since})"
    lines = ["| kind | family | tested with |", "|---|---|---|"]
    for kind, family in sorted(heads, key=lambda key: ["encoder-decoder", "decoder-only",
                                                       "encoder-only"].index(key[0])):  # fmt: skip
        lines.append(
            f"| {kind} | {family}{notes.get(family, '')} | {', '.join(heads[kind, family])} |"
        )
    return "\n".join(lines)


def test_table_of_families_is_the_list_of_tested_models():
    text = README.read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- families -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert table == families_table()


def block(name: str) -> str:
    """The Python block behind the comment ``<!-- name -->``."""
    text = README.read_text(encoding="utf-8")
    (example,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", text, re.DOTALL)
    return example


def test_every_python_block_of_the_readme_has_a_name():
    text = README.read_text(encoding="utf-8")
    named = re.findall(r"<!-- (\w+) -->\n```python\n", text)
    assert named == ["patch", "example", "kernels", "losses", "packing", "trainer", "decoder"]
    assert text.count("```python") == len(named)


def test_patching_in_the_readme_runs():
    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    ids = torch.randint(3, 50, (2, 8))
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    labels = ids.masked_fill(~mask, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    expected = model(**batch).loss.item()
    scope = {"model": model, "padded_batch": batch}
    exec(block("patch"), scope)
    assert scope["loss"].item() == pytest.approx(expected, abs=1e-5)


def test_kernels_and_losses_in_the_readme_run():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    q, k, v = torch.randn(3, 5, 2, 16)
    hidden = torch.randn(2, 4, 8)
    labels = torch.randint(0, 9, (2, 4))
    scope = {"attention_mask": mask, "hidden": hidden, "labels": labels, "q": q, "k": k, "v": v}
    exec(block("kernels"), scope)
    assert scope["padded"].shape == (2, 4, 2, 16)
    head = torch.nn.Linear(8, 9)
    scope |= {"head": head, "logits": head(scope["hidden"])}
    exec(block("losses"), scope)
    mean = torch.nn.functional.cross_entropy(scope["logits"][[0, 1, 3]], scope["labels"][[1, 2, 4]])
    assert torch.allclose(scope["loss"], mean)
    assert 0 <= scope["accuracy"] <= 1


def test_example_in_the_readme_runs():
    scope = {}
    exec(block("example"), scope)
    assert scope["stats"].packed_calls == 1
    assert abs(scope["packed"] - scope["padded"]) < 1e-5


def test_the_decoder_in_the_readme_runs():
    scope = {}
    exec(block("decoder"), scope)
    ids = torch.randint(1000, (1, 9))
    loss = scope["decoder"](ids, labels=ids).loss
    assert abs(loss.item() - math.log(1000)) < 0.3
    assert scope["config"].attention_type == "gqa"


def test_packing_in_the_readme_runs():
    pytest.importorskip("datasets")
    scope = {}
    exec(block("packing"), scope)
    assert scope["plan"].metrics.efficiency == 12 / 16
    assert scope["batch"].input_ids.shape == (2, 8)


def test_trainer_in_the_readme_runs(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "word": 2}, unk_token="word"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="word"
    )
    scope = {"tokenizer": tokenizer}
    exec(block("trainer"), scope)
    assert scope["trainer"].state.global_step == 3


def test_decoder_in_the_readme_runs():
    scope = {}
    exec(block("decoder"), scope)
    ids = torch.randint(3, 1000, (1, 9))
    cu_seqlens = torch.tensor([0, 4, 9]).int()
    loss = scope["decoder"](input_ids=ids, labels=ids, cu_seqlens=cu_seqlens).loss
    assert loss.item() == pytest.approx(math.log(1000), abs=0.2)


if __name__ == "__main__":
    print(families_table())
