"""The process that receives the bulk stream, straight into the ring."""

import gc
import socket

from postcopy.errors import PostcopyError
from postcopy.kernel.sched import scheduling
from postcopy.restore_side.ring import SLOT_SIZE, Ring
from postcopy.wire import pages as wire


def receive_bulk(sock: socket.socket, ring: Ring) -> None:
    """Pass frames on until END or FAILED; the body of a process of its own.

    Whatever goes wrong is passed on through the ring too, as a FAILED frame, for the fault handler to judge.
    """
    gc.disable()
    scheduling(nice=10)
    try:
        _receive_frames(sock, ring)
    except OSError as error:
        _pass_on_failure(ring, f"bulk channel: {error.strerror}")
    except PostcopyError as error:
        _pass_on_failure(ring, f"bulk channel: {error}")
    except EOFError:
        _pass_on_failure(ring, "the source has closed the bulk channel before everything was sent")


def _receive_frames(sock: socket.socket, ring: Ring) -> None:
    """Several small frames share a slot when they are there already, so that a fragmented plan costs no more."""
    held = bytearray(wire.HEADER_SIZE)
    have_header = False
    while True:
        slot = ring.slot(ring.next_free())
        at = 0
        while True:
            if not have_header:
                if at and not _header_is_there(sock):
                    break
                _receive_exactly(sock, memoryview(held))
            header = wire.parse_answer(held)
            have_header = at + wire.HEADER_SIZE + header.length > SLOT_SIZE
            if have_header:
                break
            slot[at : at + wire.HEADER_SIZE] = held
            at += wire.HEADER_SIZE
            _receive_exactly(sock, slot[at : at + header.length])
            at += header.length
            if header.kind not in (wire.PAGES, wire.ALSO):
                ring.publish(at)
                return
            if SLOT_SIZE - at < wire.HEADER_SIZE:
                break
        ring.publish(at)


def _header_is_there(sock: socket.socket) -> bool:
    try:
        peeked = sock.recv(wire.HEADER_SIZE, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return len(peeked) == wire.HEADER_SIZE


def _receive_exactly(sock: socket.socket, buffer: memoryview) -> None:
    at = 0
    while at < len(buffer):
        received = sock.recv_into(buffer[at:])
        if not received:
            raise EOFError
        at += received


def _pass_on_failure(ring: Ring, reason: str) -> None:
    frame = wire.failed(reason)
    ring.slot(ring.next_free())[: len(frame)] = frame
    ring.publish(len(frame))
