"""``tokenpack generate``: the same text as ``model.generate``, chats, and what it refuses."""

import argparse
import io
import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenpack import packing_stats, patch_model
from tokenpack.cli import main
from tokenpack.commands import generate
from tokenpack.commands.interrupts import Interrupted
from tokenpack.data import byte_tokenizer
from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(chat_template="chatml")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=len(tokenizer), max_seq=64, initializer_range=0.5, **SIZES)
    model = DecoderForCausalLM(config).eval()
    model.lm_head.weight.data[128:] = 0.0  # ASCII only
    return model


@pytest.fixture(scope="module")
def folder(tokenizer, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def run(folder, capsys, *options):
    code = main(["generate", "--model", folder, "--max-new-tokens", "12", *options])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def expected(model, tokenizer, prompt, **options):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, pad_token_id=1, **options)
    return tokenizer.decode(out[0], skip_special_tokens=True) + "\n"


def test_it_prints_what_generate_returns(folder, model, tokenizer, capsys):
    code, text, error = run(folder, capsys, "--prompt", "To be é", "--temperature", "0")
    assert (code, error) == (0, "")
    assert text == expected(model, tokenizer, "To be é", do_sample=False)
    sampled = ["--temperature", "0.9", "--top-k", "30", "--top-p", "0.8", "--seed", "3"]
    torch.manual_seed(3)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.8}
    want = expected(model, tokenizer, "To be", **options)
    assert run(folder, capsys, "--prompt", "To be", *sampled)[1] == want
    sampled[-1] = "4"
    assert run(folder, capsys, "--prompt", "To be", *sampled)[1] != want
    # A text that begins, with the BOS of the tokenizer.
    assert run(folder, capsys, "--prompt", "", "--temperature", "0")[0] == 0


def options_of(**given):
    names = ("temperature", "top_k", "top_p", "context", "max_new_tokens")
    return argparse.Namespace(**{**dict.fromkeys(names), "max_new_tokens": 12, **given})


def test_a_patched_llama(tokenizer, capsys):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), intermediate_size=24, **SIZES)
    llama = LlamaForCausalLM(config).eval()
    ids = tokenizer("a b")["input_ids"]
    want = llama.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=1)
    writer = generate.Writer(patch_model(llama), tokenizer, options_of(temperature=0.0))
    text = writer.write(ids, answers=True)
    assert text == tokenizer.decode(want[0, 3:], skip_special_tokens=True)
    assert capsys.readouterr().out == text + "\n"
    assert sum(packing_stats(llama).fallbacks.values()) > 0  # with a cache, it runs padded


def chat_prompts(monkeypatch, answers=("one", "two", "three")):
    """Record what the model gets in place of generating, and return the answers."""
    seen, left = [], list(answers)

    def fake(self, ids, *, answers=False):
        assert answers
        seen.append(self.tokenizer.decode(ids))
        return left.pop(0)

    monkeypatch.setattr(generate.Writer, "write", fake)
    return seen


def test_a_chat_has_all_messages_until_the_end_of_the_input(folder, tokenizer, capsys, monkeypatch):
    seen = chat_prompts(monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\n  there \n"))
    code, text, _ = run(folder, capsys, "--chat", "--system", "S", "--context", "500")
    assert (code, text) == (0, "")
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    more = [{"role": "assistant", "content": "one"}, {"role": "user", "content": "there"}]
    assert seen == [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in (messages, messages + more)
    ]


def test_the_oldest_messages_leave_a_full_context(folder, capsys, monkeypatch):
    seen = chat_prompts(monkeypatch, ["a", "b", "c"])
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\nthird\n"))
    code, _, error = run(folder, capsys, "--chat", "--system", "S", "--context", "80")
    assert code == 0
    assert "first" in seen[1]
    assert "first" not in seen[2]
    assert "second" in seen[2]
    assert all("system\nS" in each for each in seen)
    assert "the oldest 2 messages are forgotten" in error
    long = ["--chat", "--prompt", "x" * 70, "--context", "80"]
    assert "a message must have at most 68 tokens" in run(folder, capsys, *long)[2]


def test_an_answer_stops_where_the_template_ends_it(folder, model, tokenizer, capsys):
    end = tokenizer.convert_tokens_to_ids(END)
    assert generate._end_of_turn(tokenizer) == end
    assert end != model.generation_config.eos_token_id
    weights = model.lm_head.weight.data.clone()
    model.lm_head.weight.data.zero_()
    torch.nn.init.ones_(model.lm_head.weight[end : end + 1].data)
    writer = generate.Writer(model, tokenizer, options_of(temperature=0.0))
    calls = []

    def positive(module, arguments, output):
        calls.append(output.shape)
        return output.abs()

    hook = model.lm_head.register_forward_hook(positive)
    try:
        chat = argparse.Namespace(system=None, prompt="Hi")
        generate._chat(writer, chat)
    finally:
        hook.remove()
        model.lm_head.weight.data.copy_(weights)
    assert len(calls) == 1
    assert capsys.readouterr().out == "\n"  # the token is not shown


def test_ctrl_c_ends_an_answer_and_then_the_chat(model, tokenizer, capsys, monkeypatch):
    writer = generate.Writer(model, tokenizer, options_of(temperature=0.0))
    calls, kind = [], signal.SIGINT

    def interrupt(module, arguments, output):
        calls.append(output)
        if len(calls) == 3:
            raise Interrupted(kind)

    hook = model.register_forward_hook(interrupt)
    ids = tokenizer("a b c")["input_ids"]
    try:
        text = writer.write(ids, answers=True)
        assert len(text) == 2
        calls.clear()
        with pytest.raises(Interrupted):
            writer.write(ids)  # not in a chat
        calls.clear()
        kind = signal.SIGTERM
        with pytest.raises(Interrupted):
            writer.write(ids, answers=True)
    finally:
        hook.remove()

    def typed(prompt):
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr("builtins.input", typed)
    assert list(generate._lines()) == []


def test_long_prompts_are_cut_on_the_left(folder, model, tokenizer, capsys):
    prompt = "".join(chr(97 + at % 26) for at in range(80))
    code, text, error = run(folder, capsys, "--prompt", prompt, "--temperature", "0")
    assert code == 0
    assert text == expected(model, tokenizer, prompt[-52:], do_sample=False)
    assert "the prompt has 80 tokens, of which the last 52 are used" in error


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--prompt must be given without --chat"),
        (["--prompt", "a", "--system", "b"], "--system must be given with --chat"),
        (["--prompt", "a", "--context", "12"], "--max-new-tokens must be below the context"),
        (["--prompt", "a", "--temperature", "0", "--top-k", "3"], "--temperature must be above 0"),
        (["--prompt", "a", "--model", "/nowhere"], "--model must have a tokenizer, or --tok"),
    ],
)
def test_bad_input(folder, capsys, options, message):
    code, _, error = run(folder, capsys, *options)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("option", [["--temperature", "-1"], ["--top-p", "1.5"], ["--top-k", "0"]])
def test_numbers_out_of_range(folder, capsys, option):
    with pytest.raises(SystemExit):
        run(folder, capsys, "--prompt", "a", *option)
    assert "must be" in capsys.readouterr().err
