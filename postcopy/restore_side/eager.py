"""Filling all of a built tree's memory from a checkpoint directory, before it runs."""

import os
import select
from collections.abc import Sequence

import msgpack

from postcopy import roles
from postcopy.checkpoint.reader import Checkpoint
from postcopy.errors import CheckpointError, PostcopyError, RestoreError
from postcopy.kernel import userfaultfd
from postcopy.restore_side.fault_handler import HandedSpace

_MOST_WORKERS = 4
_MESSAGE_LIMIT = 4096  # PIPE_BUF: written whole or not at all


def fill(checkpoint: Checkpoint, spaces: Sequence[HandedSpace]) -> None:
    """Put every lazy page of the checkpoint where it belongs; each is verified before.

    Raises CheckpointError for the first that is not what it was, RestoreError where the kernel refuses it.
    """
    shares = min(os.cpu_count() or 1, _MOST_WORKERS)
    trouble, trouble_write = os.pipe()
    workers = []
    try:
        for share in range(1, shares):

            def body(share: int = share) -> None:
                try:
                    _fill_share(checkpoint, spaces, share, shares)
                except PostcopyError as error:
                    text = [error.message[:500], error.hint[:250], isinstance(error, CheckpointError)]
                    os.write(trouble_write, msgpack.packb(text, unicode_errors="surrogateescape"))
                    os._exit(1)

            workers.append(roles.start("postcopy-fill", body, dies_with_parent=True))
        _fill_share(checkpoint, spaces, 0, shares)
        while workers:
            if code := workers.pop().wait():
                raise _failure(trouble, code)
    finally:
        for worker in workers:
            worker.kill()
        os.close(trouble)
        os.close(trouble_write)


def _failure(trouble: int, code: int) -> PostcopyError:
    if select.select([trouble], [], [], 0)[0]:
        message, hint, of_checkpoint = msgpack.unpackb(os.read(trouble, _MESSAGE_LIMIT))
        return CheckpointError(message, hint) if of_checkpoint else RestoreError(message, hint)
    return RestoreError(f"a process that fills the program's memory ended with {code}")


def _fill_share(checkpoint: Checkpoint, spaces: Sequence[HandedSpace], share: int, shares: int) -> None:
    for each in spaces:
        for address, data, length in checkpoint.verified_runs(each.space, share, shares):
            _copy(each.uffd, address, data, length)


def _copy(uffd: int, address: int, data: int, length: int) -> None:
    done = 0
    while done < length:
        try:
            # Fewer bytes at the border of two mappings, which may lie within a run.
            done += userfaultfd.copy(uffd, address + done, data + done, length - done)
        except OSError as error:
            raise RestoreError(f"filling memory at {address + done:#x}: UFFDIO_COPY: {error.strerror}") from None
