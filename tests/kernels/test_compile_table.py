"""The committed table of `make compile` belongs to the kernels of this checkout."""

import shutil

from . import compile_table


def test_the_committed_table_is_of_this_code():
    _, made_from, lines = compile_table.read()
    assert len(lines) > 200
    assert made_from == compile_table.fingerprint(), (
        "kernels/ or the cases of the gate have changed: run make compile and commit its table"
    )


def test_a_changed_kernel_is_seen_and_a_changed_comment_is_not(tmp_path, monkeypatch):
    before = compile_table.fingerprint()
    shutil.copytree(compile_table.ROOT / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(compile_table, "ROOT", tmp_path)
    assert compile_table.fingerprint() == before
    path = tmp_path / "kernels/padding.py"
    text = path.read_text(encoding="utf-8")
    path.write_text("# A comment.\n" + text.replace('"""', '"""Another docstring. ', 1))
    assert compile_table.fingerprint() == before
    path.write_text(text + "\n_NEW = 1\n")
    assert compile_table.fingerprint() != before
