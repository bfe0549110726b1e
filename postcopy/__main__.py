"""``python -m postcopy``."""

from postcopy.cli import main

main()
