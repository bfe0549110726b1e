"""postcopy: post-copy live migration of ordinary Linux processes, one command a side."""

__version__ = "0.1.0"
