"""getrlimit(2): what this process may use."""

import resource


def allow_descriptors() -> None:
    """Raise the soft limit of open files to the hard one: a tree takes some for each of its processes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
