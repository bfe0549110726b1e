"""Makes process state of every kind, waits to be moved, then verifies all of it by itself.

Run as ``python -m tests.programs.states --directory D``. It writes ``D/ready`` when all is set up, waits for ``D/go``
(a CLOCK_MONOTONIC time in seconds at which the last move was over, or nothing), then writes ``D/report.json``: for
each case null, or what is wrong, or "unsupported: …". Ends with 1 if anything is wrong.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.programs.cases import (
    Case,
    Unsupported,
    blocked,
    descriptors,
    events,
    files,
    identity,
    inet_sockets,
    memory,
    open_in_trees,
    other_sockets,
    registers,
    seccomp,
    shared_in_trees,
    shared_memory,
    signals,
    terminals,
    threads,
    timers,
    trees,
    unix_in_trees,
    unix_sockets,
)

UNSUPPORTED = "unsupported: "

#: In the order of setup. What belongs to a thread by inheritance comes before there are any; what lists the whole
#: process, after all else.
CASES: tuple[type[Case], ...] = (
    unix_sockets.UnixPeerOfAnotherUser,
    identity.Credentials,
    identity.Dumpable,
    identity.NoNewPrivileges,
    identity.Attributes,
    identity.NoHugePages,
    identity.Personality,
    identity.Limits,
    identity.Niceness,
    identity.Directories,
    identity.ProcessIds,
    identity.CommandLine,
    identity.Comm,
    identity.Executable,
    identity.ParentDeathSignal,
    identity.Clocks,
    blocked.Nanosleep,
    blocked.AbsoluteSleep,
    blocked.FutexWait,
    blocked.FutexTimeout,
    blocked.FutexDeadline,
    blocked.PollTimeout,
    blocked.PollForever,
    blocked.EpollWait,
    blocked.PipeRead,
    blocked.PipeWrite,
    registers.SpinningRegisters,
    registers.FloatComputation,
    registers.RoundingMode,
    threads.Threads,
    threads.NewThreads,
    threads.TidAddress,
    threads.RobustList,
    threads.RestartableSequences,
    threads.Scheduling,
    threads.RealTimeScheduling,
    threads.ThreadCapabilities,
    identity.ThreadCredentials,
    signals.HandlerRuns,
    signals.ThreadMasks,
    signals.PendingSignals,
    signals.PendingThreadSignals,
    signals.AlternateStack,
    signals.IntervalTimers,
    signals.TimerFires,
    timers.PosixTimers,
    timers.RaisedTimers,
    timers.ThreadTimer,
    seccomp.SeccompFilters,
    memory.Protections,
    memory.AnonymousMemory,
    memory.Advice,
    memory.GuardPages,
    memory.NamedMemory,
    memory.HugeReserve,
    memory.PrivateFile,
    memory.ReadOnlyFile,
    memory.SharedFile,
    shared_memory.SharedAnonymous,
    shared_memory.SharedReserve,
    shared_memory.Memfd,
    shared_memory.SealedMemfds,
    shared_memory.MemfdWithoutDescriptor,
    shared_memory.SysvSegments,
    shared_memory.DeletedFiles,
    memory.AddressSpace,
    memory.ProgramBreak,
    memory.MainStack,
    descriptors.RegularFile,
    descriptors.AppendFile,
    descriptors.PathDescriptor,
    descriptors.CloseOnExec,
    descriptors.Directory,
    descriptors.CharacterDevices,
    descriptors.StandardStreams,
    descriptors.SharedDescription,
    descriptors.Pipe,
    descriptors.NonblockingPipe,
    descriptors.BrokenPipe,
    events.EventCounters,
    events.TimerDescriptors,
    events.SignalDescriptor,
    events.EpollTargets,
    events.EpollEdges,
    events.EpollOfClosedNumbers,
    events.InotifyWatches,
    events.InotifyOfDeleted,
    events.FanotifyGroups,
    events.PidDescriptors,
    events.EndedPidDescriptors,
    files.DeletedFile,
    files.ReplacedFile,
    files.TemporaryFile,
    files.RemovedDirectory,
    files.OtherName,
    files.MemoryFiles,
    files.PacketPipe,
    files.SignalDrivenPipe,
    files.ProcFiles,
    files.SilentReader,
    unix_sockets.UnixStreamPair,
    unix_sockets.UnixMessages,
    unix_sockets.UnixHalfClosed,
    unix_sockets.UnixRights,
    unix_sockets.UnixServer,
    unix_sockets.UnixDatagrams,
    unix_sockets.UnixCredentials,
    unix_sockets.UnixOptions,
    unix_sockets.UnixFilter,
    inet_sockets.TcpListeners,
    inet_sockets.TcpOptions,
    inet_sockets.TcpOwnConnections,
    inet_sockets.TcpFullQueues,
    inet_sockets.TcpClosing,
    inet_sockets.TcpEnded,
    inet_sockets.Udp,
    inet_sockets.CorkedUdp,
    inet_sockets.Multicast,
    other_sockets.NetlinkSockets,
    other_sockets.RawSockets,
    other_sockets.PingSockets,
    other_sockets.PacketSockets,
    signals.SignalActions,
    memory.FileMappings,
    descriptors.DescriptorTable,
    identity.Subprocess,
    memory.FutureLocks,
)

#: What needs an option, a filesystem of its own or hugetlb pages, which the machine has once; only with ``--only``.
ON_REQUEST: tuple[type[Case], ...] = (
    shared_memory.HugePages,
    shared_memory.HugeFiles,
    memory.ScatteredFile,
    files.NamedFifos,
    files.FileLocks,
    open_in_trees.TerminalOfChild,
    *terminals.CASES,
)

#: What is tried with ``--tree``.
TREE_CASES: tuple[type[Case], ...] = (
    *trees.CASES,
    *shared_in_trees.CASES,
    *open_in_trees.CASES,
    *unix_in_trees.CASES,
)

#: What is tried with ``--user``: what a program without privileges can still set up.
UNPRIVILEGED: tuple[type[Case], ...] = (
    identity.Unprivileged,
    identity.Limits,
    identity.Niceness,
    identity.Directories,
    identity.CommandLine,
    blocked.Nanosleep,
    blocked.PipeRead,
    threads.Threads,
    threads.ThreadCapabilities,
    signals.PendingSignals,
    memory.AnonymousMemory,
    memory.SharedFile,
    descriptors.RegularFile,
    events.EventCounters,
    events.EpollEdges,
    files.DeletedFile,
    files.MemoryFiles,
)


def set_up(case: Case) -> str | None:
    """Set a case up; what hinders it, if anything."""
    try:
        case.setup()
    except Unsupported as reason:
        return f"{UNSUPPORTED}{reason}"
    except Exception:
        return f"setup failed: {traceback.format_exc()}"
    return None


def verify(case: Case) -> str | None:
    """Verify a case; an exception is a problem."""
    try:
        return case.verify()
    except Exception:
        return traceback.format_exc()


def main() -> int:
    """Set up, wait, verify, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--hold", type=float, default=5.0, help="seconds that the timed waits last")
    parser.add_argument("--user", type=int, help="become this user first, for good")
    parser.add_argument("--tree", action="store_true", help="try what belongs to a process tree instead")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="try these cases alone")
    parser.add_argument("--files", type=Path, help="where the cases' own files lie, if not there")
    options = parser.parse_args()
    Case.directory = options.files or options.directory
    Case.hold = options.hold

    signal.pthread_sigmask(signal.SIG_BLOCK, signals.ALWAYS_BLOCKED)
    if options.user is not None:
        identity.Unprivileged.user = options.user
    kinds = CASES if options.user is None else UNPRIVILEGED
    kinds = (*kinds, *ON_REQUEST) if options.only else kinds
    if options.tree:
        kinds = TREE_CASES
    cases = [kind() for kind in kinds if not options.only or kind.name() in options.only]
    report = {case.name(): set_up(case) for case in cases}
    (options.directory / "ready").touch()

    go = options.directory / "go"
    while not go.exists():
        time.sleep(0.01)
    moved_at = go.read_text()
    Case.moved_at = float(moved_at) if moved_at else None

    # What lists the whole process goes first: other cases change it on purpose.
    whole = (memory.FileMappings, descriptors.DescriptorTable, signals.SignalActions, identity.ParentDeathSignal)
    for case in sorted(cases, key=lambda case: not isinstance(case, whole)):
        if report[case.name()] is None:
            report[case.name()] = verify(case)
    unfinished = options.directory / "report.json.new"
    unfinished.write_text(json.dumps(report, indent=1))
    os.replace(unfinished, options.directory / "report.json")
    return int(any(problem and not problem.startswith(UNSUPPORTED) for problem in report.values()))


if __name__ == "__main__":
    sys.exit(main())
