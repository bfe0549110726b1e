"""Root, working directory and umask."""

import errno
import os

from postcopy.kernel import procfs
from postcopy.kernel.libc import refused
from postcopy.state import Filesystem


def collect(pid: int, problems: list[str]) -> Filesystem:
    """As ``/proc`` shows them; what cannot be found again is added to ``problems``.

    Raises OSError, also where the process is just ending.
    """
    root, cwd = procfs.link(pid, "root"), procfs.link(pid, "cwd")
    for name, path in (("root", root), ("cwd", cwd)):
        try:
            named, held = os.stat(path), os.stat(f"/proc/{pid}/{name}")
        except OSError:
            problems.append(f"its {name} directory {path} cannot be found under this name any more")
            continue
        if (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino) and path != "/":
            problems.append(f"its {name} directory {path} is another directory now")
    umask = procfs.status(pid).get("Umask")
    if umask is None:
        # It has given up its directories, as the next look at them would show.
        raise refused(f"looking at the directories of process {pid}", errno.ESRCH)
    return Filesystem(root, cwd, int(umask, 8))
