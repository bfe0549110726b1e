"""Text that others wrote, on its way to a terminal."""


def printable(text: str) -> str:
    """``text`` with escapes in place of everything that is no visible character: controls, escape sequences, marks
    that turn the direction of writing round, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
