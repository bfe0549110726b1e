"""A tree arrives: process by process, each with its pages, and then all that is not of one process alone."""

from array import array
from collections.abc import Iterator

from postcopy import soundness
from postcopy.drafts import ProcessState, State, complete, complete_process, known_parts
from postcopy.errors import ProtocolError
from postcopy.sent_pages import NUMBERS, Content, SentPages
from postcopy.spaces import Space, space_of, spaces_shared
from postcopy.state import Draft, Manifest, Process, Tree
from postcopy.transport import Channel
from postcopy.wire.control import Kind


class Arrival:
    """``tree`` and ``pages``, those that came with it, are there when `processes` has come to its end."""

    tree: Tree

    def __init__(self, control: Channel, draft: Draft, manifest: Manifest) -> None:
        self._control = control
        self._draft = draft
        self._manifest = manifest
        self._content = Content()
        self._places = array(NUMBERS)
        self._known = frozenset(map(id, known_parts(draft)))

    @property
    def pages(self) -> SentPages:
        """Of all spaces, in the order of `spaces_of`."""
        return SentPages(self._places, self._content)

    def processes(self) -> Iterator[tuple[Process, SentPages]]:
        """Each as soon as it is there, with its pages; by itself it makes sense. Raises PostcopyError."""
        sketches = {sketch.pid: sketch for sketch in self._draft.processes}
        found: dict[int, Process] = {}
        while True:
            _, body = self._control.receive({Kind.PROCESS: ProcessState, Kind.STATE: State})
            if isinstance(body, State):
                break
            assert isinstance(body, ProcessState)
            process = complete_process(body, sketches.get(body.process.pid))
            soundness.check_message("process", process, self._known)
            if process.pid in found:
                raise ProtocolError(f"process.pid: {process.pid} has come already")
            found[process.pid] = process
            yield process, self._receive_pages(space_of(process))
        self.tree = complete(body, list(found.values()), self._draft, self._manifest.files)
        soundness.check(self.tree, self._manifest, [*known_parts(self._draft), *found.values()])
        for space in spaces_shared(self.tree):
            self._receive_pages(space)

    def _receive_pages(self, space: Space) -> SentPages:
        pages = self._control.receive_pages(space.sent.total_pages, self._content)
        self._places += pages.places
        return pages
