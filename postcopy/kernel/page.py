"""The page, the unit in which the kernel hands out memory."""

PAGE_SIZE = 4096
PAGE_SHIFT = PAGE_SIZE.bit_length() - 1

# The end of user addresses with 47-bit virtual addresses; 5-level page tables give more only to who asks for it.
ADDRESS_LIMIT = 1 << 47


def page_down(address: int) -> int:
    """The start of the page that ``address`` is in."""
    return address & -PAGE_SIZE


def page_up(address: int) -> int:
    """The first page boundary at or after ``address``."""
    return (address + PAGE_SIZE - 1) & -PAGE_SIZE
