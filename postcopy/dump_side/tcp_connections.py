"""TCP connections: both queues, sequence numbers, windows and agreed options, read by TCP_REPAIR.

The connection must be locked (see `network_lock`): what arrived between two reads would be acknowledged and lost.
"""

import select
import socket
from socket import SocketType

from postcopy.kernel import tcp_repair
from postcopy.kernel.socket_options import SOL_TCP
from postcopy.kernel.tcp_repair import RECEIVE_QUEUE, SEND_QUEUE, Info
from postcopy.socket_kinds import TcpConnection

_SEQUENCES = 1 << 32


def collect(own: SocketType, info: Info) -> TcpConnection:
    """The connection; ``own`` is a duplicate of the program's socket, whose process is frozen."""
    with tcp_repair.repairing(own):
        outstanding, unsent = tcp_repair.unacknowledged(own), tcp_repair.unsent(own)
        # A FIN has a number, too, behind all that is written: while it is outstanding it is counted.
        acknowledged = info.state == tcp_repair.FIN_WAIT2
        fin = info.state in tcp_repair.CLOSED_HERE and not acknowledged
        fin_unsent = fin and unsent > 0
        finished = info.state in tcp_repair.CLOSED_THERE
        next_read, received = tcp_repair.queue(own, RECEIVE_QUEUE, tcp_repair.unread(own))
        next_written, written = tcp_repair.queue(own, SEND_QUEUE, outstanding - fin)
        sent = outstanding - fin - (unsent - fin_unsent)
        return TcpConnection(
            sent=written[:sent],
            unsent=written[sent:],
            received=received,
            send_sequence=(next_written - outstanding - acknowledged) % _SEQUENCES,
            receive_sequence=(next_read - len(received) - finished) % _SEQUENCES,
            mss=own.getsockopt(SOL_TCP, socket.TCP_MAXSEG),
            scales=info.scales,
            sack=info.sack,
            timestamp=tcp_repair.timestamp(own) if info.timestamps else None,
            window=tcp_repair.window(own),
            state=info.state,
            fin_unsent=fin_unsent,
            deaf=not finished and _reads_no_more(own),
        )


def _reads_no_more(own: SocketType) -> bool:
    poll = select.poll()
    poll.register(own.fileno(), select.POLLRDHUP)
    return any(event & select.POLLRDHUP for _, event in poll.poll(0))
