"""examples/chat_sft.py trains on packed conversations, and its loss on answers falls."""

import importlib.util
import re
from pathlib import Path

import pytest

FLAGS = ["--chats", "40", "--capacity", "512", "--eval-share", "0.2"]


@pytest.fixture
def example():
    pytest.importorskip("accelerate")
    path = Path(__file__).parents[3] / "examples" / "chat_sft.py"
    spec = importlib.util.spec_from_file_location("chat_sft", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(capsys):
    """What the example prints, and the losses before and after training."""
    printed = capsys.readouterr().out
    found = re.findall(r"loss on the answers of held-out chats: (\S+) -> (\S+)", printed)
    ((before, after),) = found
    return printed, float(before), float(after)


def test_the_example_runs(example, tmp_path, capsys):
    trainer = example.main([*FLAGS, "--steps", "6", "--out", str(tmp_path / "model")])
    assert trainer.state.global_step == 6
    printed, before, after = losses(capsys)
    assert after < before - 0.5
    assert "<|im_start|>assistant\n⟦" in printed
    assert "checks found nothing" in printed

    # What it saved is a model by itself, that goes on with adapters.
    pytest.importorskip("peft")
    flags = ["--model", str(tmp_path / "model"), "--lora", "--learning-rate", "3e-3"]
    trainer = example.main([*FLAGS, *flags, "--steps", "6", "--out", str(tmp_path / "adapters")])
    _, begun, done = losses(capsys)
    assert begun == pytest.approx(after, abs=2e-3)
    assert done < begun  # by little: embedding and head have learned nothing yet, and are frozen
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
    trained = [name for name, each in trainer.model.named_parameters() if each.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_adapters_need_a_model(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--lora"])
    assert "--lora needs --model: the small model has random weights" in capsys.readouterr().err
