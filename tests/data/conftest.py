"""Fixtures of the tests of readers."""

import pytest


@pytest.fixture
def write(tmp_path):
    """Write a file by name, from text or bytes. Returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
