"""The loop of everything that is trained: resume, steps, evaluations, log lines, checkpoints, stop.

Pre-training (main_lmim.py), the linear probe and fine-tuning (eval/) are tasks of it: they say what
a step is, and this file keeps them alive.
"""

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
from util import checkpoint
from util.checkpoint import first_words
from util.config import TrainingStopped
from util.distributed import Ranks, all_reduce, barrier, broadcast_tensors, gather_objects, on_main
from util.job import checkpoint_name, list_checkpoints, prepare_job_directory, record_start
from util.lock import unlock
from util.metrics import Speed, bar_text, describe_speed, warn_of_supply
from util.preemption import Interrupted, StopFlag
from util.record import RunLog
from util.resuming import FORMAT, CheckpointError, accept, describe

FIRST_STEPS = (1, 2, 5, 10)  # of a start that get a line on the console
QUIET_SECONDS = 60  # without a line, at most
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
    loop = Loop(task, cfg, ranks, job, stop_flag, resume(task, cfg, ranks, job))
    start = f"from step {loop.first_step}" if loop.first_step else "from the beginning"
    steps = f"{loop.images_per_step} images per step, {loop.total_steps} steps, {start}"
    loop.log.say(f"{task.introduction()}, {steps}")
    with closing(loop.log), logging_redirect_tqdm():
        if loop.first_step < loop.total_steps:
            run_steps(task, cfg, loop)
        else:
            loop.log.say("already finished: nothing is left to train")
        task.finish(loop)


def run_steps(task: Task, cfg: DictConfig, loop: "Loop") -> None:
    step, per_epoch = loop.first_step, loop.steps_per_epoch
    task.prepare()
    loop.speed.images_at_peak = task.images_at_peak
    if step == 0:
        loop.watch(0)
        if "eval_at_start" in cfg and cfg.eval_at_start:
            loop.record(0, task.evaluate)
    batches = loop.first_steps.timed(task.batches(step, loop.total_steps))
    batches = loop.speed.timed(batches)
    while step < loop.total_steps:
        with loop.rescue(step):
            task.step(step, batches)
        step += 1
        at_end = step == loop.total_steps
        if step % per_epoch and not at_end:
            with loop.rescue(step):
                loop.after_step(step)
                loop.watch(step)
            loop.between_steps(step)
            continue
        loop.after_step(step)  # what is saved before the evaluation would leave it out
        at_end = at_end and (task.evaluates_at_end or cfg.eval_freq)
        evaluates = at_end or (cfg.eval_freq and step % (cfg.eval_freq * per_epoch) == 0)
        if evaluates:
            loop.record(step, task.evaluate)
        loop.watch(step, at_evaluation=evaluates)
        loop.after_epoch(step)
    loop.finish()


def resume(task: Task, cfg: DictConfig, ranks: Ranks, job: Path) -> int:
    """-> the number of finished steps"""
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
    return newest[1]["step"] if newest else 0


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
        self, task: Task, cfg: DictConfig, ranks: Ranks, job: Path, stop: StopFlag, first_step: int
    ):
        self.task, self.cfg, self.ranks, self.job = task, cfg, ranks, job
        self.stop_flag, self.first_step = stop, first_step
        self.steps_per_epoch = task.loader.steps_per_epoch
        self.total_steps = self.planned_steps = cfg.epochs * self.steps_per_epoch
        self.watched = watched_steps(self.planned_steps)
        if task.max_steps is not None:
            self.total_steps = min(self.total_steps, task.max_steps)
        self.images_per_step = task.loader.images_per_step
        self.last_logged = self.last_saved_step = first_step
        self.last_saved = time.monotonic()
        self.start = time.perf_counter()
        self.speed, self.first_steps = Speed(), Speed()
        self.last_speed: dict[str, float] = {}  # of the last log line
        self.log = RunLog(job, ranks.is_main, self.total_steps, first_step)
        self.folder = job / "checkpoints"
        writer = partial(checkpoint.CheckpointWriter, self.folder, self.log.say)
        self.writer = writer() if ranks.is_main else None

    def after_step(self, done: int) -> None:
        silent = time.monotonic() - self.log.last_said
        is_due = done - self.first_step in FIRST_STEPS or silent > QUIET_SECONDS
        if done % self.cfg.print_freq == 0 or done == self.total_steps:
            self.write_log(done)
        elif self.ranks.is_main and is_due:
            speed, summary = self.read_speed(done, keep=True), self.task.glimpse()
            self.log.say(self.describe(done, summary, speed))
            self.log.progress(done, bar_text(summary, speed))
        self.say_supply(done - self.first_step)
        self.log.progress(done)

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
            self.save(done)
            self.finish_writing()
            raise TrainingStopped(f"{self.task.gives_up}; step {done} is saved")

    def record(self, done: int, look: Callable[[], Line | None]) -> None:
        with self.speed.pause(), self.first_steps.pause():
            found = look()
        if found is not None:
            numbers, summary = found
            epoch = done / self.steps_per_epoch
            self.log.record({"epoch": epoch, **numbers}, done, f"epoch {epoch:.4g}: {summary}")

    def after_epoch(self, done: int) -> None:
        """Or at the end, where max_steps is inside one."""
        if done == self.total_steps or done % (self.cfg.save_freq * self.steps_per_epoch) == 0:
            self.save(done, self.whole_epoch(done))
        if done < self.total_steps:
            self.between_steps(done)

    def whole_epoch(self, done: int) -> int | None:
        epoch, steps = divmod(done, self.steps_per_epoch)
        return None if steps else epoch

    @contextmanager
    def rescue(self, done: int) -> Iterator[None]:
        """An error inside: the last whole step is saved by each process that meets one, since all
        hold the same and the first may not be among them."""
        try:
            yield
        except TrainingStopped:  # names the last good checkpoint itself
            raise
        except Exception as error:
            if not self.task.half_done:
                self.writer = self.writer or checkpoint.CheckpointWriter(self.folder, print_error)
                self.save(done)
                self.writer.wait()
                for newest in list_checkpoints(self.folder)[:1]:
                    print_error(f"step {done + 1} has failed; the newest checkpoint is {newest}")
            if number := self.stop_flag.own():  # it was not waited for any longer
                raise Interrupted(number) from error
            # On a CPU torch has no type of its own for it.
            kinds = (torch.OutOfMemoryError, MemoryError)
            if isinstance(error, kinds) or "not enough memory" in str(error):
                raise TrainingStopped(self.how_to_need_less(error)) from error
            raise

    def how_to_need_less(self, error: Exception) -> str:
        cfg = self.cfg
        batch_size = self.task.loader.batch_size
        ways = [f"batch_size below {batch_size}, with accum_iter above {cfg.accum_iter}"]
        if "recompute" in cfg:
            ways += ["recompute=True", f"a smaller encoder than {cfg.encoder.name}"]
        return f"out of memory ({first_words(error)}): expected {', or '.join(ways)}"

    def between_steps(self, done: int) -> None:
        """Save now and then; stop if asked to. Not between an epoch's last step and its evaluation:
        a run that resumes there would leave the evaluation out."""
        number = self.stop_flag.agreed()
        if number:
            self.save(done)
            self.finish_writing()
            raise Interrupted(number)
        if (time.monotonic() - self.last_saved) / 60 > self.cfg.save_minutes:
            self.save(done)

    def save(self, done: int, epoch: int | None = None) -> None:
        """epoch: given at the end of one whose checkpoint is kept for good."""
        self.last_saved = time.monotonic()
        if done == self.last_saved_step:
            return
        self.last_saved_step = done
        if self.writer is None:
            return
        contents = {
            **self.task.state(),
            "epoch": done // self.steps_per_epoch,
            "step": done,
            "steps_per_epoch": self.steps_per_epoch,
            "config": OmegaConf.to_container(self.cfg),
            "format": FORMAT,
        }
        self.writer.save(contents, done, epoch)

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
        if self.ranks.is_main and not last.exists():
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
