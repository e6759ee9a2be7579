"""``tokenpack inspect-model``: tables of a model of a folder, and its exit code."""

import torch

from tokenpack.cli import main
from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM
from tokenpack.samples.tokenizer import train_tokenizer

TEXTS = ["One.", "A text of several words.", "Two words", "The longest text of all, by far."]


def run(folder, capsys, *options):
    (folder / "data.txt").write_text("\n".join(TEXTS))
    train_tokenizer(TEXTS, 400).save(str(folder / "tokenizer.json"))
    tokenizer = ["--tokenizer", str(folder / "tokenizer.json")]
    data = ["--data", str(folder / "data.txt"), *tokenizer]
    code = main(["inspect-model", "--model", str(folder), *data, *options])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_tables_and_exit_codes(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = DecoderConfig(vocab_size=400, ffn_type="moe", num_local_experts=4, **sizes)
    config.save_pretrained(tmp_path)
    code, text, _ = run(tmp_path, capsys, "--random", "--batch-size", "3")
    assert code == 0, text
    assert text.startswith("DecoderForCausalLM, 3 rows, ")
    assert text.endswith("all lines are ok\n")
    for part in ("█" * 20, "model.layers.1", "close to uniform", "loss 5.9", "norm of"):
        assert part in text
    code, _, error = run(tmp_path, capsys)
    assert code == 2
    assert "--random needs no weights" in error

    model = DecoderForCausalLM(config)
    model.model.layers[1].self_attn.v_proj.weight.data.zero_()
    model.save_pretrained(tmp_path)
    code, text, _ = run(tmp_path, capsys, "--dtype", "float64")
    assert code == 1, text
    assert "float64" in text
    problem = "model.layers.1.self_attn.q_proj: gradient is zero"
    assert problem in text.splitlines()[-8:]
