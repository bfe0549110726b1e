"""TCP connections: both queues, sequence numbers, windows and agreed options, read by TCP_REPAIR.

The connection must be locked (see `network_lock`): what arrived between two reads would be acknowledged and lost.
"""

import errno

from postcopy.kernel import tcp_repair
from postcopy.kernel.tcp_repair import Apart, Info
from postcopy.socket_kinds import TcpConnection

_SEQUENCES = 1 << 32


def connection(found: Apart, info: Info) -> TcpConnection:
    """What has been found."""
    # A FIN has a number, too, behind all that is written: while it is outstanding it is counted.
    acknowledged = info.state == tcp_repair.FIN_WAIT2
    fin = info.state in tcp_repair.CLOSED_HERE and not acknowledged
    finished = info.state in tcp_repair.CLOSED_THERE
    received, written, unsent = found.received, found.written, found.unsent
    outstanding = found.unacknowledged - fin
    if (len(received), len(written)) != (found.unread, outstanding):
        raise OSError(
            errno.EIO, f"of {found.unread} and {outstanding} bytes {len(received)} and {len(written)} are there"
        )
    fin_unsent = fin and unsent > 0
    sent = outstanding - (unsent - fin_unsent)
    return TcpConnection(
        sent=written[:sent],
        unsent=written[sent:],
        received=received,
        send_sequence=(found.next_written - found.unacknowledged - acknowledged) % _SEQUENCES,
        receive_sequence=(found.next_read - len(received) - finished) % _SEQUENCES,
        mss=found.mss,
        scales=info.scales,
        sack=info.sack,
        timestamp=found.timestamp if info.timestamps else None,
        window=found.window,
        state=info.state,
        fin_unsent=fin_unsent,
        deaf=not finished and found.reads_no_more,
    )
