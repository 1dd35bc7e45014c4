"""Tables of plain text."""

from sparse_model.io.tables import paragraph, table


def test_columns_stand_below_each_other_and_long_cells_go_on_below() -> None:
    rows = [["name", "p", "why"], ["a", "1.25", "one two three"], ["bcd", "10", ""]]
    assert table(rows, wrap={2: 8}).splitlines() == [
        "name     p  why",
        "a     1.25  one two",
        "            three",
        "bcd     10",
    ]
    assert table(rows, left=3).splitlines()[2] == "bcd   10"


def test_a_paragraph_fits_a_terminal() -> None:
    text = "a word and --an-option-of-some-length " * 20
    lines = paragraph(text).splitlines()
    assert " ".join(lines) == text.strip()
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if line.endswith("-")]
