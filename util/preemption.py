"""Being told to stop: by Ctrl-C, a closed terminal, Slurm's time limit, a job of higher priority.

The handler only sets a flag. At the end of each step the processes agree whether any of them was
told; then all save and leave together, so that no step is lost and none is done twice.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from util.distributed import Ranks
from util.signals import NOT_DONE, STOP_SIGNALS, Signals


class Interrupted(Exception):
    """All processes have agreed to stop after this step, and everything is saved. lost: or what is
    not, in words."""

    def __init__(self, number: int, lost: str = ""):
        super().__init__(signal.Signals(number).name)
        self.number, self.lost = number, lost


class StopFlag(Signals):
    """Set by a signal; all processes agree on it once per step.

    The agreement is one step late: the answer of the last step's question is read when this
    step's is asked, so that neither the host waits for the GPU nor the GPU for the host."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks
        self.question: Question | None = None

    def own(self) -> int:
        """What this process was told. -> signal number, or 0"""
        return max(self.received, default=0, key=urgency)

    def agreed(self) -> int:
        """To be asked once per step by every process. -> signal number, or 0: go on"""
        own = self.own()
        if self.ranks.world_size == 1:
            return own
        last, self.question = self.question, Question(own, self.ranks)
        return SIGNALS_BY_URGENCY[last.answer()] if last else 0

    def leave(self, number: int, lost: str = "") -> int:
        """After everything is saved, or what could be: lost says what is not. -> exit code"""
        name = signal.Signals(number).name
        if self.ranks.is_main:
            saved = ", everything is saved; the same command with resume=True goes on from here"
            text = f"stopped by {name}{': ' + lost if lost else saved}"
            with suppress(OSError):  # the terminal is gone
                print(text, file=sys.stderr, flush=True)
        requeue = self.previous.get(signal.SIGUSR2)
        if number == signal.SIGUSR2 and callable(requeue):
            if self.ranks.is_main:
                requeue(number, None)  # launch/slurm.py: asks to be started again, and exits
            # Leaving before the first process has asked would end the job for good.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(60)
            return NOT_DONE
        return 128 + number


# A requeue must not be forgotten because a TERM came as well.
SIGNALS_BY_URGENCY = (0, *reversed(STOP_SIGNALS))
urgency = SIGNALS_BY_URGENCY.index


class Question:
    """The most urgent signal of all processes: asked now, read a step later."""

    def __init__(self, own: int, ranks: Ranks):
        self.value = torch.full((1,), urgency(own), dtype=torch.int32, device=ranks.device)
        self.work = dist.all_reduce(self.value, dist.ReduceOp.MAX, async_op=True)
        if ranks.device.type == "cuda":
            self.work.wait()  # the stream waits, the host does not
            pinned = torch.empty(1, dtype=torch.int32, pin_memory=True)
            self.value = pinned.copy_(self.value, non_blocking=True)
            self.copied = torch.cuda.Event(blocking=True)  # waiting for it takes no core
            self.copied.record()

    def answer(self) -> int:
        if hasattr(self, "copied"):
            self.copied.synchronize()
        else:
            self.work.wait()
        return int(self.value)


@contextmanager
def stoppable(ranks: Ranks) -> Iterator[StopFlag]:
    """Inside, signals are answered by saving and leaving; afterwards as before."""
    flag = StopFlag(ranks)
    try:
        yield flag
    except Interrupted as interruption:
        sys.exit(flag.leave(interruption.number, interruption.lost))
    finally:
        flag.close()
