"""The loop of everything that is trained: resume, steps, evaluations, log lines, checkpoints, stop.

Pre-training (main_lmim.py), the linear probe and fine-tuning (eval/) are tasks of it: they say what
a step is, and this file keeps them alive.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data.base import ImageDataset
from data.loader import StepOrder, TrainLoader
from launch.config import TrainingStopped
from launch.job import (
    checkpoint_name,
    list_checkpoints,
    prepare_job_directory,
    record_start,
    step_of,
)
from launch.lock import unlock
from launch.results import FORMAT, CheckpointError, accept, describe
from util import checkpoint
from util.checkpoint import first_words
from util.distributed import Ranks, all_reduce, barrier, broadcast_tensors, gather_objects, on_main
from util.metrics import Speed, bar_text, describe_speed, warn_of_supply
from util.preemption import Interrupted, StopFlag
from util.record import RunLog

FIRST_STEPS = (1, 2, 5, 10)  # of a start that get a line on the console
QUIET_SECONDS = 60  # without a line, at most
MAY_SUCCEED_LATER = 1  # the exit code of the same command, as after a crash
Line = tuple[Mapping[str, float | str], str]  # numbers for the log, and how the console puts them


class Task:
    """What is trained. All processes call each of these together."""

    loader: StepOrder
    dataset: ImageDataset  # what it is trained on
    made_from: dict  # what a checkpoint is compared with besides the config
    evaluates_at_end = True  # also where eval_freq is 0
    images_at_peak: float | None = None  # per second, if GPUs did nothing but matrix products
    gives_up = ""
    half_done = False  # while networks and optimiser are between two steps
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None

    def introduction(self) -> str:
        """One line about what is trained on what."""
        raise NotImplementedError

    def prepare(self) -> None:
        """When everything is built and restored, before the first step."""

    def batches(self, first: int, last: int) -> Iterator:
        """What the steps first .. last - 1 are made from."""
        return self.loader.stream(first, last)

    def step(self, step: int, batches: Iterator) -> None:
        """One step of the optimiser. Does not wait for the device."""
        raise NotImplementedError

    def log_line(self, done: int, steps: int) -> Line:
        """The last `steps` steps, of which `done` are done in all; may raise TrainingStopped. The
        only place that waits for the device."""
        raise NotImplementedError

    def glimpse(self) -> str:
        """What this process has seen since the last log line: for the console."""
        return ""

    def evaluate(self) -> Line | None:
        raise NotImplementedError

    def picture(self) -> bytes | None:
        """A PNG for TensorBoard, at each evaluation. For the first process."""
        return None

    def watch(self, loop: "Loop", done: int) -> Line | None:
        """Now and then: is the run alive? May set gives_up to the reason for which it ends."""
        return None

    def finish(self, loop: "Loop") -> None:
        """At the end of the last step, or where a resumed run had nothing left to do."""
        raise NotImplementedError

    def state(self) -> dict:
        """What a checkpoint holds."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "made_from": self.made_from,
        }

    def restore(self, contents: dict, source: Path) -> None:
        """In place, from what state() has given. source: for messages."""
        checkpoint.load_weights(self.model, contents["state_dict"], source)
        # Learning rates, weight decay and the like are the config's.
        settings = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(contents["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own | {"params": group["params"]})
        if self.scaler is not None and contents["loss_scaler"]:  # that run was in fp16, too
            self.scaler.load_state_dict(contents["loss_scaler"])


@contextmanager
def job_folder(cfg: DictConfig, ranks: Ranks) -> Iterator[Path]:
    """The job's folder, in which nobody else writes for as long as this lasts."""
    job = on_main(lambda: prepare_job_directory(cfg), ranks)
    try:
        yield job
    finally:
        unlock(job)


def train(task: Task, cfg: DictConfig, ranks: Ranks, job: Path, stop_flag: StopFlag) -> None:
    """From the newest checkpoint, or from the beginning, to the end."""
    loop = Loop(task, cfg, ranks, job, stop_flag, *resume(task, cfg, ranks, job))
    start = f"from step {loop.done}" if loop.done else "from the beginning"
    steps = f"{loop.images_per_step} images per step, {loop.total_steps} steps, {start}"
    loop.log.say(f"{task.introduction()}, {steps}")
    try:
        with closing(loop.log), logging_redirect_tqdm():
            if loop.nothing_is_left:
                loop.log.say("already finished: nothing is left to train")
            else:
                run_steps(task, cfg, loop)
            task.finish(loop)
    except Exception as error:
        # What has been there for some steps may be there again, as files of a server that is away.
        if loop.done > 0 and not hasattr(error, "exit_code"):
            error.exit_code = MAY_SUCCEED_LATER  # type: ignore[attr-defined]
        raise


def run_steps(task: Task, cfg: DictConfig, loop: "Loop") -> None:
    task.prepare()
    if loop.done == 0:
        with loop.rescue("the first evaluation"):
            loop.watch()
            if "eval_at_start" in cfg and cfg.eval_at_start:
                loop.record(task.evaluate)
    if loop.unfinished:
        loop.follow_step(has_a_line=True)
    batches = loop.speed.timed(task.batches(loop.done, loop.total_steps))
    while loop.done < loop.total_steps:
        with loop.rescue(f"step {loop.done + 1}"):
            task.step(loop.done, batches)
        loop.done += 1
        loop.follow_step()
    loop.finish()


def resume(task: Task, cfg: DictConfig, ranks: Ranks, job: Path) -> tuple[int, bool]:
    """Return how many steps are done, and whether what follows the last of them is still due."""
    sizes = (task.loader.batch_size, task.loader.images_per_step)
    task.made_from = on_main(partial(describe, task.dataset, *sizes), ranks)
    folder = job / "checkpoints"
    try:
        accepted = partial(accept, cfg=cfg, facts=task.made_from)
        newest = newest_for_all(folder, ranks, print_error, accepted) if cfg.resume else None
        if newest is not None:
            task.restore(newest[1], folder)
    except (KeyError, ValueError) as error:
        valid = f"checkpoints of these networks and this optimiser in {folder}"
        reason = f"{type(error).__name__}: {first_words(error)}"
        raise CheckpointError(f"resume: expected {valid} ({reason})") from error
    on_main(lambda: record_start(cfg, job), ranks)
    return (newest[1]["step"], "unfinished" in newest[1]) if newest else (0, False)


def newest_for_all(
    folder: Path, ranks: Ranks, report: Callable[[str], None], accept: Callable | None = None
) -> tuple[Path, dict] | None:
    """The newest readable checkpoint and what it holds. Rank 0 chooses it, says what accept has to
    say about it, and gives the others what it holds."""
    found: list = []  # also what it holds: gigabytes, which are not for on_main to send

    def choose() -> Path | None:
        found.extend(checkpoint.newest_readable(folder, report) or (None, None))
        for text in accept(*found) if accept and found[0] else []:
            report(text)
        return found[0]

    path = on_main(choose, ranks)
    return path and (path, broadcast_tensors(found and found[1], ranks))


class Loop:
    """What a training leaves behind: its log, its checkpoints, its answer to signals."""

    def __init__(
        self,
        task: Task,
        cfg: DictConfig,
        ranks: Ranks,
        job: Path,
        stop: StopFlag,
        first_step: int,
        unfinished: bool,
    ):
        self.task, self.cfg, self.ranks, self.job = task, cfg, ranks, job
        self.stop_flag = stop
        self.first_step = self.done = first_step
        self.unfinished = unfinished  # what follows the last step is still to be done
        self.steps_per_epoch = task.loader.steps_per_epoch
        self.images_per_step = task.loader.images_per_step
        self.planned_steps = cfg.epochs * self.steps_per_epoch
        most = cfg.max_steps if "max_steps" in cfg else None
        self.total_steps = min(self.planned_steps, most or self.planned_steps)
        if unfinished:  # what follows a step beyond max_steps is due all the same
            self.total_steps = max(self.total_steps, first_step)
        self.nothing_is_left = first_step >= self.total_steps and not unfinished
        self.watched = watched_steps(self.planned_steps)
        self.last_saved_step = None if unfinished else first_step
        self.last_saved = time.monotonic()
        self.speed = Speed()
        self.last_logged, self.clock_of_last_line = first_step, self.speed.clock()
        self.clock_of_first_step = self.clock_of_last_line
        self.log = RunLog(job, ranks.is_main, self.total_steps, first_step, unfinished)
        self.folder = job / "checkpoints"
        writer = partial(checkpoint.CheckpointWriter, self.folder, self.log.say, self.log.sync)
        self.writer = writer() if ranks.is_main else None

    # --- what follows a step

    def follow_step(self, has_a_line: bool = False) -> None:
        """Say how it goes, look at it and save it where it is time. If that fails, a run that
        resumes looks and saves again. has_a_line: in the log of the run that has failed."""
        at_end = self.done == self.total_steps
        evaluates = self.ends_epochs(self.cfg.eval_freq) or (
            at_end and (self.task.evaluates_at_end or self.cfg.eval_freq > 0)
        )
        watches = evaluates or self.done in self.watched
        keeps = at_end or self.ends_epochs(self.cfg.save_freq)
        self.unfinished = watches or keeps
        with self.rescue(f"what follows step {self.done}"):
            if not has_a_line:
                self.tell_of_step()
            if evaluates:
                self.record(self.task.evaluate)
            if watches:
                self.watch()
            if evaluates and self.ranks.is_main and (picture := self.task.picture()):
                self.log.show(picture, self.done)
            if self.task.gives_up:
                self.save()
                self.finish_writing()
                raise TrainingStopped(f"{self.task.gives_up}; {self.what_is_saved()}")
            self.unfinished = False
            if keeps:
                self.save(self.whole_epoch())
            if not at_end:
                self.save_or_stop()

    def ends_epochs(self, epochs: int) -> bool:
        """Has this step ended an epoch whose number is a multiple of this?"""
        return epochs > 0 and self.done % (epochs * self.steps_per_epoch) == 0

    def save_or_stop(self) -> None:
        """Save now and then; stop if asked to."""
        if number := self.stop_flag.agreed():
            self.save()
            self.finish_writing()
            raise Interrupted(number, self.lost_steps())
        if (time.monotonic() - self.last_saved) / 60 > self.cfg.save_minutes:
            self.save()

    def finish(self) -> None:
        """Without its last checkpoint a job is not finished, however far training has come."""
        self.finish_writing()
        last = self.folder / checkpoint_name(self.done, self.whole_epoch())
        if self.ranks.is_main and not os.path.exists(last):  # or its disk does not answer
            problem = f"training has ended, but its last checkpoint {last} could not be written"
            raise TrainingStopped(f"{problem}: make room, and start it again with resume=True")

    # --- the log

    def tell_of_step(self) -> None:
        steps, silent = self.done - self.first_step, time.monotonic() - self.log.last_said
        if self.done % self.cfg.print_freq == 0 or self.done == self.total_steps:
            self.write_log()
        elif self.ranks.is_main and (steps in FIRST_STEPS or silent > QUIET_SECONDS):
            summary, speed = self.task.glimpse(), self.speed_now()
            self.log.say(self.describe(summary, speed))
            self.log.progress(self.done, bar_text(summary, speed))
        self.check_supply(steps)
        self.log.progress(self.done)

    def write_log(self) -> None:
        steps = self.done - self.last_logged
        try:
            numbers, summary = self.task.log_line(self.done, steps)
        except TrainingStopped as stopped:
            if self.writer is not None:
                self.writer.wait()
            saved = [*list_checkpoints(self.folder), "none was written yet"]
            raise TrainingStopped(f"{stopped}; last good checkpoint: {saved[0]}") from stopped
        speed = self.speed_now()
        self.last_logged, self.clock_of_last_line = self.done, self.speed.clock()
        bar = bar_text(summary, speed)
        if steps < min(self.cfg.print_freq, self.done):  # at the end, or since a resume
            summary = f"(mean of {steps} steps)  {summary}"
        values = {"epoch": self.done / self.steps_per_epoch, **numbers, **speed}
        self.log.record(values, self.done, self.describe(summary, speed))
        self.log.progress(self.done, bar)

    def speed_now(self) -> dict[str, float]:
        """Return the speed since the last log line."""
        steps, left = self.done - self.last_logged, self.total_steps - self.done
        speed = self.speed.since(self.clock_of_last_line, steps, self.images_per_step, left)
        if self.task.images_at_peak is not None:
            speed["share_of_peak"] = speed["images_per_second"] / self.task.images_at_peak
        return speed

    def describe(self, summary: str, speed: dict[str, float]) -> str:
        epoch = f"epoch {self.done / self.steps_per_epoch:.2f}/{self.cfg.epochs}"
        step = f"step {self.done}/{self.total_steps}"
        return "  ".join(filter(None, (epoch, step, summary, describe_speed(speed))))

    def check_supply(self, steps: int) -> None:
        """Warn once where loaders give less than steps take. Without the first step, in which both
        start."""
        loader = self.task.loader
        if steps == 1:
            self.clock_of_first_step = self.speed.clock()
        if steps == 10 and isinstance(loader, TrainLoader) and (workers := loader.num_workers):
            speed = self.speed.since(self.clock_of_first_step, 9, self.images_per_step, 0)
            if warning := warn_of_supply(speed, self.ranks.world_size, workers):
                self.log.say(warning)

    def watch(self) -> None:
        self.record(partial(self.task.watch, self, self.done))

    def record(self, look: Callable[[], Line | None]) -> None:
        with self.speed.pause():
            found = look()
        if found is not None:
            numbers, summary = found
            epoch = self.done / self.steps_per_epoch
            self.log.record({"epoch": epoch, **numbers}, self.done, f"epoch {epoch:.4g}: {summary}")

    # --- checkpoints

    def whole_epoch(self) -> int | None:
        """The epoch that this step ends, if it ends one."""
        epoch, steps = divmod(self.done, self.steps_per_epoch)
        return None if steps else epoch

    def save(self, epoch: int | None = None) -> None:
        """epoch: given at the end of one whose checkpoint is kept for good."""
        self.last_saved = time.monotonic()
        if self.done == self.last_saved_step:
            return
        if self.writer is not None:
            contents = {
                **self.task.state(),
                "epoch": self.done // self.steps_per_epoch,
                "step": self.done,
                "steps_per_epoch": self.steps_per_epoch,
                "config": OmegaConf.to_container(self.cfg),
                "format": FORMAT,
            }
            if self.unfinished:
                contents["unfinished"] = True
            self.writer.save(contents, self.done, epoch)
        self.last_saved_step = self.done

    def finish_writing(self) -> None:
        """Until the last checkpoint is on the disk; all processes wait for it."""
        if self.writer is not None:
            self.writer.wait()
        barrier()

    @contextmanager
    def rescue(self, what: str) -> Iterator[None]:
        """An error inside: the last whole step is saved by each process that meets one, since all
        hold the same and the first may not be among them."""
        try:
            yield
        except (TrainingStopped, Interrupted):  # what can be saved is saved
            raise
        except Exception as error:
            self.writer = self.writer or checkpoint.CheckpointWriter(self.folder, print_error)
            if not self.task.half_done:
                self.save()
            self.writer.wait()
            if self.done > 0:
                print_error(f"{what} has failed; {self.what_is_saved()}")
            if number := self.stop_flag.own():  # it was not waited for any longer
                raise Interrupted(number, self.lost_steps()) from error
            # On a CPU torch has no type of its own for it.
            kinds = (torch.OutOfMemoryError, MemoryError)
            if isinstance(error, kinds) or "not enough memory" in str(error):
                batch_size, accum_iter = self.task.loader.batch_size, self.cfg.accum_iter
                less = f"batch_size below {batch_size}, with accum_iter above {accum_iter}"
                if "recompute" in self.cfg:
                    less += f", recompute=True, or an encoder below {self.cfg.encoder.name}"
                reason = f"out of memory ({first_words(error)}): expected {less}"
                raise TrainingStopped(reason) from error
            raise

    def lost_steps(self) -> str:
        """How many finished steps are not on the disk, as after a write that has failed, and what
        is; empty if all are. After writer.wait(), in a process that writes."""
        try:
            older = [p for p in list_checkpoints(self.folder) if step_of(p) <= self.done]
        except OSError as error:
            return f"{self.folder} cannot be read ({error.strerror})"
        lost = self.done - (step_of(older[0]) if older else 0)
        newest = f"the newest checkpoint is {older[0]}" if older else "there is no checkpoint"
        return f"{lost} steps are lost: {newest}" if lost else ""

    def what_is_saved(self) -> str:
        return self.lost_steps() or f"step {self.done} is saved in {self.folder}"


def watched_steps(planned: int) -> set[int]:
    """Often at first, when most is decided; and when a collapse should have shown."""
    powers = {first * 10**power for first in (1, 3) for power in range(1, len(str(planned)))}
    return {0, *powers, round(0.15 * planned), round(0.25 * planned)}


def sum_over_processes(numbers: Tensor, loader, ranks: Ranks) -> list[float]:
    """Of each number, over all processes. Stops the training if too many images were unreadable,
    counting those that any process met."""
    bad = torch.tensor([len(loader.bad_images)]).to(numbers)
    *sums, bad_images = all_reduce(torch.cat([numbers, bad])).tolist()
    if bad_images:
        loader.bad_images = set().union(*gather_objects(loader.bad_images, ranks))
        loader.check_bad_images()
    return sums


def print_error(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # above the bar, where there is one
