"""An error is one line, whatever it quotes."""

from diffmorpher.errors import ImageError, LoraError


def test_what_is_quoted_breaks_no_line() -> None:
    assert str(LoraError("x is damaged (unknown variant `a\n  b`\r\n); get it again.")) == (
        "x is damaged (unknown variant `a b` ); get it again."
    )
    assert str(ImageError("two  blanks")) == "two  blanks" and ImageError(3).args == (3,)
