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
from launch.resuming import FORMAT, CheckpointError, accept, describe
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
    max_steps: int | None = None  # at which a run ends as if that were all
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

    def sums(self) -> list[Tensor]:
        """What log_line is made from and starts again: filled in place by a run that resumes."""
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
    start = f"from step {loop.first_step}" if loop.first_step else "from the beginning"
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
    loop.speed.images_at_peak = task.images_at_peak
    if loop.done == 0:
        with loop.rescue("the first evaluation"):
            loop.watch(0)
            if "eval_at_start" in cfg and cfg.eval_at_start:
                loop.record(0, task.evaluate)
    if loop.unfinished:
        loop.take_up(loop.unfinished)
        loop.follow_step()
    batches = loop.first_steps.timed(task.batches(loop.done, loop.total_steps))
    batches = loop.speed.timed(batches)
    while loop.done < loop.total_steps:
        with loop.rescue(f"step {loop.done + 1}"):
            task.step(loop.done, batches)
        loop.done += 1
        loop.follow_step()
    loop.finish()


def resume(task: Task, cfg: DictConfig, ranks: Ranks, job: Path) -> tuple[int, dict | None]:
    """-> the number of finished steps; and, if what follows the last of them is not done yet, what
    that needs"""
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
    return (newest[1]["step"], newest[1].get("unfinished")) if newest else (0, None)


def newest_for_all(
    folder: Path, ranks: Ranks, report: Callable[[str], None], accept: Callable | None = None
) -> tuple[Path, dict] | None:
    """The newest readable checkpoint and what it holds. Rank 0 chooses it, says what accept has to
    say about it, and gives the others what it holds."""
    chosen: list[tuple[Path, dict]] = []  # gigabytes, which are not for on_main to send

    def choose() -> Path | None:
        newest = checkpoint.newest_readable(folder, report)
        for text in accept(*newest) if newest and accept else []:
            report(text)
        chosen.extend([newest] if newest else [])
        return newest and newest[0]

    path = on_main(choose, ranks)
    return path and (path, broadcast_tensors(chosen[0][1] if chosen else None, ranks))


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
        unfinished: dict | None,
    ):
        self.task, self.cfg, self.ranks, self.job = task, cfg, ranks, job
        self.stop_flag, self.first_step = stop, first_step
        self.done = first_step  # steps
        # While there is work to do between two steps, what that needs: see keep_sums.
        self.unfinished = unfinished
        self.steps_per_epoch = task.loader.steps_per_epoch
        self.total_steps = self.planned_steps = cfg.epochs * self.steps_per_epoch
        self.watched = watched_steps(self.planned_steps)
        if task.max_steps is not None:
            self.total_steps = min(self.total_steps, task.max_steps)
        if unfinished:  # what follows a step beyond max_steps is due all the same
            self.total_steps = max(self.total_steps, first_step)
        self.nothing_is_left = first_step >= self.total_steps and not unfinished
        self.images_per_step = task.loader.images_per_step
        self.last_logged = first_step
        self.last_saved_step = None if unfinished else first_step
        self.last_saved = time.monotonic()
        self.start = time.perf_counter()
        self.speed, self.first_steps = Speed(), Speed()
        self.last_speed: dict[str, float] = {}  # of the last log line
        last_line = first_step - 1 if unfinished else first_step
        self.log = RunLog(job, ranks.is_main, self.total_steps, first_step, last_line)
        self.folder = job / "checkpoints"
        writer = partial(checkpoint.CheckpointWriter, self.folder, self.log.say, self.log.sync)
        self.writer = writer() if ranks.is_main else None

    def follow_step(self) -> None:
        """All that comes between two steps. If it fails, a run that resumes does it again."""
        done = self.done
        at_end = done == self.total_steps
        evaluates = at_end and (self.task.evaluates_at_end or bool(self.cfg.eval_freq))
        evaluates = evaluates or self.ends_epochs(self.cfg.eval_freq)
        keeps = at_end or self.ends_epochs(self.cfg.save_freq)
        with self.rescue(f"what follows step {done}"):
            if evaluates or keeps or self.logs(done) or done in self.watched:
                self.keep_sums()
            self.after_step(done)
            if evaluates:
                self.record(done, self.task.evaluate)
            self.watch(done, at_evaluation=evaluates)
            if keeps:
                self.save(done, self.whole_epoch(done))
            self.unfinished = None
            if not at_end:
                self.between_steps(done)

    def after_step(self, done: int) -> None:
        silent = time.monotonic() - self.log.last_said
        is_due = done - self.first_step in FIRST_STEPS or silent > QUIET_SECONDS
        if self.logs(done):
            self.write_log(done)
        elif self.ranks.is_main and is_due:
            speed, summary = self.read_speed(done, keep=True), self.task.glimpse()
            self.log.say(self.describe(done, summary, speed))
            self.log.progress(done, bar_text(summary, speed))
        self.say_supply(done - self.first_step)
        self.log.progress(done)

    def ends_epochs(self, epochs: int) -> bool:
        """Has this step ended an epoch whose number is a multiple of this?"""
        return epochs > 0 and self.done % (epochs * self.steps_per_epoch) == 0

    def logs(self, done: int) -> bool:
        return done % self.cfg.print_freq == 0 or done == self.total_steps

    def keep_sums(self) -> None:
        """Of all processes, what the log line is about to read, for a checkpoint of this step."""
        own = [tensor.to("cpu", copy=True) for tensor in self.task.sums()]
        kept = {"last_logged": self.last_logged, **self.speed.state()}
        self.unfinished = {**kept, "sums": [own]}  # if another process is gone
        self.unfinished["sums"] = gather_objects(own, self.ranks)

    def take_up(self, kept: dict) -> None:
        """The sums since the last log line. Other processes than those before share them."""
        sums, ranks = kept["sums"], self.ranks
        of_all = [torch.stack(parts).double().mean(0) for parts in zip(*sums, strict=True)]
        mine = sums[ranks.rank] if len(sums) == ranks.world_size else of_all
        for tensor, value in zip(self.task.sums(), mine, strict=True):
            if tensor.shape == value.shape:
                tensor.copy_(value)
            else:  # resume=changed: there are other numbers, of which these steps have none
                tensor.fill_(torch.nan)
        self.last_logged = kept["last_logged"]
        self.speed.take_up(kept)

    def say_supply(self, steps: int) -> None:
        """Warn once where loaders give less than steps take. Without the first step, in which both
        start."""
        first, last = FIRST_STEPS[0], FIRST_STEPS[-1]
        if steps in (first, last):
            speed = self.first_steps.read(last - first, self.images_per_step, 0)
            loader = self.task.loader
            if steps == last and isinstance(loader, TrainLoader) and loader.workers[0]:
                workers = loader.workers[0]
                if warning := warn_of_supply(speed, self.ranks.world_size, workers):
                    self.log.say(warning)

    def write_log(self, done: int) -> None:
        steps = done - self.last_logged
        try:
            numbers, summary = self.task.log_line(done, steps)
        except TrainingStopped as stopped:
            if self.writer is not None:
                self.writer.wait()
            saved = [*list_checkpoints(self.folder), "none was written yet"]
            raise TrainingStopped(f"{stopped}; last good checkpoint: {saved[0]}") from stopped
        self.last_speed = speed = self.read_speed(done)
        self.last_logged = done
        epoch = done / self.steps_per_epoch
        bar = bar_text(summary, speed)
        if steps < min(self.cfg.print_freq, done):  # at the end, or since a resume
            summary = f"(mean of {steps} steps)  {summary}"
        values = {"epoch": epoch, **numbers, **speed}
        self.log.record(values, done, self.describe(done, summary, speed))
        self.log.progress(done, bar)

    def read_speed(self, done: int, keep: bool = False) -> dict[str, float]:
        steps, left = done - self.last_logged, self.total_steps - done
        return self.speed.read(steps, self.images_per_step, left, keep)

    def describe(self, done: int, summary: str, speed: dict[str, float]) -> str:
        epoch = f"epoch {done / self.steps_per_epoch:.2f}/{self.cfg.epochs}"
        parts = (epoch, f"step {done}/{self.total_steps}", summary, describe_speed(speed))
        return "  ".join(filter(None, parts))

    def watch(self, done: int, at_evaluation: bool = False) -> None:
        if at_evaluation or done in self.watched:
            self.record(done, partial(self.task.watch, self, done))
        if at_evaluation and self.ranks.is_main and (picture := self.task.picture()):
            self.log.show(picture, done)
        if self.task.gives_up:
            self.save(done, unfinished=self.unfinished)
            self.finish_writing()
            saved = self.lost_steps() or f"step {done} is saved"
            raise TrainingStopped(f"{self.task.gives_up}; {saved}")

    def record(self, done: int, look: Callable[[], Line | None]) -> None:
        with self.speed.pause(), self.first_steps.pause():
            found = look()
        if found is not None:
            numbers, summary = found
            epoch = done / self.steps_per_epoch
            self.log.record({"epoch": epoch, **numbers}, done, f"epoch {epoch:.4g}: {summary}")

    def whole_epoch(self, done: int) -> int | None:
        epoch, steps = divmod(done, self.steps_per_epoch)
        return None if steps else epoch

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
                self.save(self.done, unfinished=self.unfinished)
            self.writer.wait()
            lost = self.lost_steps()
            for newest in [] if lost else list_checkpoints(self.folder)[:1]:
                print_error(f"{what} has failed; the newest checkpoint is {newest}")
            if lost:
                print_error(f"{what} has failed; {lost}")
            if number := self.stop_flag.own():  # it was not waited for any longer
                raise Interrupted(number, lost) from error
            # On a CPU torch has no type of its own for it.
            kinds = (torch.OutOfMemoryError, MemoryError)
            if isinstance(error, kinds) or "not enough memory" in str(error):
                raise TrainingStopped(self.how_to_need_less(error)) from error
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

    def how_to_need_less(self, error: Exception) -> str:
        cfg = self.cfg
        batch_size = self.task.loader.batch_size
        ways = [f"batch_size below {batch_size}, with accum_iter above {cfg.accum_iter}"]
        if "recompute" in cfg:
            ways += ["recompute=True", f"a smaller encoder than {cfg.encoder.name}"]
        return f"out of memory ({first_words(error)}): expected {', or '.join(ways)}"

    def between_steps(self, done: int) -> None:
        """Save now and then; stop if asked to."""
        number = self.stop_flag.agreed()
        if number:
            self.save(done)
            self.finish_writing()
            raise Interrupted(number, self.lost_steps())
        if (time.monotonic() - self.last_saved) / 60 > self.cfg.save_minutes:
            self.save(done)

    def save(self, done: int, epoch: int | None = None, unfinished: dict | None = None) -> None:
        """epoch: given at the end of one whose checkpoint is kept for good. unfinished: where a run
        that resumes first has to do what follows this step."""
        self.last_saved = time.monotonic()
        if done == self.last_saved_step:
            return
        if self.writer is None:
            self.last_saved_step = done
            return
        contents = {
            **self.task.state(),
            "epoch": done // self.steps_per_epoch,
            "step": done,
            "steps_per_epoch": self.steps_per_epoch,
            "config": OmegaConf.to_container(self.cfg),
            "format": FORMAT,
            **({"unfinished": unfinished} if unfinished else {}),
        }
        self.writer.save(contents, done, epoch)
        self.last_saved_step = done

    def finish_writing(self) -> None:
        """Until the last checkpoint is on the disk; all processes wait for it."""
        if self.writer is not None:
            self.writer.wait()
        barrier()

    def finish(self) -> None:
        """Without its last checkpoint a job is not finished, however far training has come."""
        self.finish_writing()
        name = checkpoint_name(self.total_steps, self.whole_epoch(self.total_steps))
        last = self.folder / name
        if self.ranks.is_main and not os.path.exists(last):  # or its disk does not answer
            problem = f"its last checkpoint {last} could not be written"
            hint = "make room, and start it again with resume=True"
            raise TrainingStopped(f"training has ended, but {problem}: {hint}")


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
