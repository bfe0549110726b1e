"""The program as a job of the shell that started ``restore``: its terminal is ours, and comes and goes with it."""

import contextlib
import os
import signal

from postcopy.kernel import pty
from postcopy.restore_side.build import Built

_BY_TERMINAL = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


def terminal() -> int:
    """The first of our standard streams that is a terminal; -1 where there is none."""
    return next((fd for fd in (0, 1, 2) if os.isatty(fd)), -1)


class ShellJob:
    """What happens to our terminal. Nothing does where we are not in its foreground, or the program was not."""

    def __init__(self, root: Built, settings: bytes) -> None:
        """``settings``: of the terminal that the program had; empty where it had none."""
        lineage = root.state.lineage
        self._pid = root.pid
        self._terminal = terminal()
        self._is_lent = False
        self._wants = self._terminal >= 0 and lineage.foreground
        # Its own, or the one in which we are.
        has_own_group = lineage.process_group == root.state.pid and not lineage.session
        self._group = root.pid if has_own_group else 0
        self._its_settings, self._our_settings = settings, b""

    def lend(self) -> None:
        """Put the program's process group in the foreground, and have its settings."""
        if not self._wants or not self._is_ours():
            return
        # A background process that sets the foreground group is stopped, unless it ignores this.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            if self._its_settings:
                self._our_settings = pty.settings(self._terminal)
                pty.adopt(self._terminal, self._its_settings)
            if self._group:
                os.tcsetpgrp(self._terminal, self._group)
            self._is_lent = True

    def show(self) -> None:
        """Let the program see the size of the terminal, and draw."""
        if self._is_lent and self._its_settings:
            with contextlib.suppress(OSError):
                os.killpg(os.tcgetpgrp(self._terminal), signal.SIGWINCH)

    def take_back(self) -> None:
        """The terminal is as it was before it was lent."""
        if not self._is_lent:
            return
        self._is_lent = False
        with contextlib.suppress(OSError):
            if self._its_settings:
                self._its_settings = pty.settings(self._terminal)
                pty.adopt(self._terminal, self._our_settings)
            if self._group:
                os.tcsetpgrp(self._terminal, os.getpgrp())

    def follow(self) -> None:
        """Stop where the terminal has stopped the program, and let it go on where we do: the shell knows only us."""
        if not self._wants or not self._group:
            return  # in our own group, what stops it stops us
        stop = os.waitid(os.P_PID, self._pid, os.WSTOPPED | os.WNOHANG)
        # Who sends SIGSTOP means the program, and not the shell's job.
        if stop is None or stop.si_status not in _BY_TERMINAL:
            return
        if stop.si_status == signal.SIGTSTP:
            self.take_back()
            os.kill(os.getpid(), signal.SIGTSTP)
        else:
            self._is_lent = False
            if not self._come_to_front():
                return  # it would be stopped again, and again
        self.lend()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGCONT)

    def _come_to_front(self) -> bool:
        """Be stopped from behind, as the program has been, until the shell puts us in front.

        False where that cannot be, since no shell is there to continue us (setpgid(2)). The kernel looks and stops in
        one step: between two steps of ours the shell could put us in front, and find us stopped all the same.
        """
        previous = signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        try:
            os.tcsetpgrp(self._terminal, os.getpgrp())
        except OSError:
            return False
        finally:
            signal.signal(signal.SIGTTOU, previous)
        return True

    def _is_ours(self) -> bool:
        with contextlib.suppress(OSError):
            return os.tcgetpgrp(self._terminal) == os.getpgrp()
        return False
