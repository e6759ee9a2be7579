"""Aligned columns."""

from tokenpack.table import format_table


def test_columns_are_aligned_and_long_headers_take_lines():
    assert format_table(["name", "tokens/s\npadded"], [["a", "1,000"], ["longer", "2"]]) == (
        "        tokens/s\nname      padded\n------  --------\na          1,000\nlonger         2"
    )
