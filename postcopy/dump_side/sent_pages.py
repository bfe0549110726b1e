"""Read the pages that travel with the state; those that processes share copy-on-write since a fork are read once."""

from array import array
from collections.abc import Mapping, Sequence
from itertools import islice

from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.pagemap import Pagemap
from postcopy.sent_pages import PageSource, SentPages
from postcopy.spaces import Space

_Frames = dict[int, list[int]]


def sent_pages(
    spaces: Sequence[Space], sources: Mapping[int, PageSource], pagemaps: Mapping[int, Pagemap]
) -> SentPages:
    """The pages that are sent of the spaces of a frozen tree; ``pagemaps``: of those that are of one process.

    Raises DumpError where a source cannot be read.
    """
    frames = _frames(spaces, pagemaps)
    # Where the kernel moves a page meanwhile, its frame may become that of another one.
    return _read(spaces, sources, frames if _frames(spaces, pagemaps) == frames else {})


def _frames(spaces: Sequence[Space], pagemaps: Mapping[int, Pagemap]) -> _Frames:
    """By space, the page frames of its pages that are sent; nothing where nobody can share any."""
    found: _Frames = {}
    if len(pagemaps) > 1:
        for space in spaces:
            if pagemap := pagemaps.get(space.number):
                found[space.number] = pagemap.frames_of(space.sent)
    return found


def _read(spaces: Sequence[Space], sources: Mapping[int, PageSource], frames_of: _Frames) -> SentPages:
    places = array("I")
    runs: list[tuple[int, int, int]] = []  # space, address, how many pages
    total = 0
    known: dict[int, int] = {}
    for space in spaces:
        of_space = iter(frames_of[space.number]) if space.number in frames_of else None
        for each in space.sent:
            frames = [] if of_space is None else list(islice(of_space, each.pages))
            if _are_new(frames, known):
                runs.append((space.number, each.start, each.pages))
                places.extend(range(total, total + each.pages))
                known.update(zip(frames, range(total, total + each.pages)))  # noqa: B905 (no frames, or as many)
                total += each.pages
                continue
            for address, frame in zip(range(each.start, each.end, PAGE_SIZE), frames, strict=True):
                place = known.get(frame, total) if frame else total
                places.append(place)
                if place < total:
                    continue
                known[frame] = total
                total += 1
                if runs and runs[-1][0] == space.number and runs[-1][1] + runs[-1][2] * PAGE_SIZE == address:
                    runs[-1] = (space.number, runs[-1][1], runs[-1][2] + 1)
                else:
                    runs.append((space.number, address, 1))
    return SentPages.read(runs, sources, places)


def _are_new(frames: list[int], known: Mapping[int, int]) -> bool:
    """Whether nothing is in more than one of the frames, and in none that is known."""
    fresh = set(frames)
    return len(fresh) == len(frames) and 0 not in fresh and known.keys().isdisjoint(fresh)
