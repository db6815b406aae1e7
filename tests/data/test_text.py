"""Text from data reaches terminals and tables without steering them."""

from data.text import markdown_table, printable


def test_hostile_text_cannot_steer_a_terminal() -> None:
    hostile = "\x1b[31mred\x9b0m\x00\u202eright to left\u2066\n\u2028\udc80"
    assert printable(hostile).isprintable() and "red" in printable(hostile)
    assert printable("plain título 日本 🎬") == "plain título 日本 🎬"


def test_a_pipe_in_a_cell_does_not_add_a_column() -> None:
    assert markdown_table([["name", "n"], ["a|b", "1"], ["c", "20"]]) == "\n".join([
        "| name | n  |", "|------|----|", "| a\\|b | 1  |", "| c    | 20 |"])
    assert markdown_table([["n", "text"], ["1", "long"]], pad_last=False).splitlines()[1] == "|---|--|"
