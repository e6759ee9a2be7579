"""examples/chat_sft.py trains on packed conversations, and its loss on answers falls."""

import importlib.util
import re
from pathlib import Path

import pytest


def test_the_example_runs(tmp_path, capsys):
    pytest.importorskip("accelerate")
    path = Path(__file__).parents[3] / "examples" / "chat_sft.py"
    spec = importlib.util.spec_from_file_location("chat_sft", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    flags = ["--chats", "40", "--capacity", "512", "--steps", "6", "--out", str(tmp_path)]
    trainer = example.main([*flags, "--eval-share", "0.2"])
    assert trainer.state.global_step == 6
    printed = capsys.readouterr().out
    (losses,) = re.findall(r"loss on the answers of held-out chats: (\S+) -> (\S+)", printed)
    assert float(losses[1]) < float(losses[0]) - 0.5
    assert "<|im_start|>assistant\n⟦" in printed
    assert "checks found nothing" in printed
