"""Signals that ask a run to stop. Imports neither torch nor anything of the project."""

import os
import signal
import time
from types import FrameType

# The most urgent first. USR2 comes from Slurm: save, then ask for a requeue. After the others a run
# saves and leaves: TERM from Slurm, torchrun or a person, HUP from a terminal that was closed, USR1
# from schedulers that were asked for it.
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
WAIT_SECONDS = 10.0  # for which a step that is told to stop still waits for its data
# One Ctrl-C comes twice where torchrun passes on what the terminal has sent to all.
SAME_SIGNAL_SECONDS = 1.0
NOT_DONE = 75  # exit code of a process that leaves for a requeue: no success, and no crash


class Signals:
    """Records signals in order. The same one sent again ends the process at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.received_at = 0.0
        heard = set(STOP_SIGNALS)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
            heard.remove(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self.handle) for number in heard}

    def close(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        again = number in self.received and number != signal.SIGUSR2
        if again and time.monotonic() - self.received_at > SAME_SIGNAL_SECONDS:
            self.leave_at_once(number)
        self.received.append(number)
        self.received_at = time.monotonic()
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        if left:  # a batch is being waited for (data/loader.py)
            signal.setitimer(signal.ITIMER_REAL, min(left, WAIT_SECONDS))

    def leave_at_once(self, number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
