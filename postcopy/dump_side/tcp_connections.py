"""Established TCP connections: both queues, sequence numbers, windows and agreed options, read by TCP_REPAIR.

The connection must be locked (see `network_lock`): what arrived between two reads would be acknowledged and lost.
"""

import socket

from postcopy.kernel import tcp_repair
from postcopy.kernel.socket_options import SOL_TCP
from postcopy.kernel.tcp_repair import RECEIVE_QUEUE, SEND_QUEUE, Info
from postcopy.socket_kinds import TcpConnection

_SEQUENCES = 1 << 32


def collect(own: socket.socket, info: Info) -> TcpConnection:
    """The connection; ``own`` is a duplicate of the program's socket, whose process is frozen."""
    with tcp_repair.repairing(own):
        outstanding, unsent = tcp_repair.unacknowledged(own), tcp_repair.unsent(own)
        next_read, received = tcp_repair.queue(own, RECEIVE_QUEUE, tcp_repair.unread(own))
        next_written, written = tcp_repair.queue(own, SEND_QUEUE, outstanding)
        sent = outstanding - unsent
        finished = info.state == tcp_repair.CLOSE_WAIT
        return TcpConnection(
            sent=written[:sent],
            unsent=written[sent:],
            received=received,
            send_sequence=(next_written - outstanding) % _SEQUENCES,
            # A FIN has a number, too.
            receive_sequence=(next_read - len(received) - finished) % _SEQUENCES,
            mss=own.getsockopt(SOL_TCP, socket.TCP_MAXSEG),
            scales=info.scales,
            sack=info.sack,
            timestamp=tcp_repair.timestamp(own) if info.timestamps else None,
            window=tcp_repair.window(own),
            finished=finished,
        )
