"""What every training leaves behind, whatever it trains: log lines, checkpoints, and an answer to
signals. Pre-training adds its own numbers (util/run_record.py), and so do the evaluations that
train."""

import sys
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from util import checkpoint
from util.distributed import Ranks, barrier, gather_objects, on_main
from util.job import checkpoint_name, list_checkpoints
from util.metrics import RunLog, Speed
from util.preemption import Interrupted, StopFlag


class TrainingStopped(Exception):
    """The run cannot go on; the message says why and from where it can be taken up."""


class TrainingRecord:
    """loader: a TrainLoader, or what has its windows_per_epoch, batch_size, accum_iter and bad
    images."""

    def __init__(
        self,
        cfg: DictConfig,
        ranks: Ranks,
        job: Path,
        loader,
        stop_flag: StopFlag,
        first_step: int,
    ):
        self.cfg, self.ranks, self.job, self.loader = cfg, ranks, job, loader
        self.stop_flag, self.first_step = stop_flag, first_step
        self.total_steps = cfg.epochs * loader.windows_per_epoch
        self.images_per_step = loader.batch_size * loader.accum_iter * ranks.world_size
        self.last_logged = self.last_saved_step = first_step
        self.last_saved = time.monotonic()
        self.start = time.perf_counter()
        self.speed = Speed()
        self.log = RunLog(job, ranks.is_main, self.total_steps, first_step)
        self.writer = None
        if ranks.is_main:
            self.writer = checkpoint.CheckpointWriter(job / "checkpoints", report=self.log.say)

    def write_log(self, done: int) -> None:
        """The numbers since the last log point. All processes come here together."""
        raise NotImplementedError

    def contents(self) -> dict:
        """What a checkpoint holds besides what all checkpoints do: state_dict, optimizer, ..."""
        raise NotImplementedError

    def where(self) -> str:
        return "from the beginning" if self.first_step == 0 else f"from step {self.first_step}"

    def after_window(self, step: int) -> None:
        """step: the one just finished, counted from 0."""
        done = step + 1
        if done % self.cfg.print_freq == 0 or done == self.total_steps:
            self.write_log(done)
        self.log.progress(done)
        if done % self.loader.windows_per_epoch:
            self.between_windows(done)

    def after_epoch(self, epoch: int) -> None:
        done = epoch * self.loader.windows_per_epoch
        if epoch % self.cfg.save_freq == 0 or done == self.total_steps:
            self.save(done, epoch)
        if done < self.total_steps:
            self.between_windows(done)

    def between_windows(self, done: int) -> None:
        """Save now and then; stop if asked to. Not between an epoch's last window and its
        evaluation: a run that resumes there would leave the evaluation out."""
        number = self.stop_flag.agreed()
        if number:
            self.save(done)
            self.finish_writing()
            raise Interrupted(number)
        if (time.monotonic() - self.last_saved) / 60 > self.cfg.save_minutes:
            self.save(done)

    def read_speed(self, done: int) -> dict[str, float]:
        """Since the last log point."""
        windows, self.last_logged = done - self.last_logged, done
        return self.speed.read(windows, self.images_per_step, self.total_steps - done)

    def check_bad_images(self) -> None:
        """Stop if there are too many unreadable images, counting those that any rank met."""
        self.loader.bad_images = set().union(*gather_objects(self.loader.bad_images, self.ranks))
        self.loader.check_bad_images()

    def last_good_checkpoint(self) -> str:
        """For the message of a training that stops. On the first process."""
        if self.writer is not None:
            self.writer.wait()
        newest = next(iter(list_checkpoints(self.job / "checkpoints")), None)
        return f"last good checkpoint: {newest or 'none was written yet'}"

    def save(self, done: int, epoch: int | None = None) -> None:
        """epoch: given at the end of one whose checkpoint is kept for good."""
        self.last_saved = time.monotonic()
        if self.writer is None or done == self.last_saved_step:
            return
        self.last_saved_step = done
        contents = {
            **self.contents(),
            "epoch": done // self.loader.windows_per_epoch,
            "step": done,
            "windows_per_epoch": self.loader.windows_per_epoch,
            "config": OmegaConf.to_container(self.cfg),
            "format": checkpoint.FORMAT,
        }
        self.writer.save(contents, done, epoch)

    def finish_writing(self) -> None:
        """Until the last checkpoint is on the disk; all processes wait for it."""
        if self.writer is not None:
            self.writer.wait()
        barrier()

    def finish(self) -> None:
        """At the end of training. Without its last checkpoint a job is not finished, however far
        training has come."""
        self.finish_writing()
        last = self.job / "checkpoints" / checkpoint_name(self.total_steps, self.cfg.epochs)
        if self.ranks.is_main and not last.exists():
            raise TrainingStopped(
                f"training has ended, but its last checkpoint {last} could not be written: make "
                f"room, and the same command with resume=True trains again what is missing"
            )


# --- going on from a checkpoint -----------------------------------------------------------------


def find_checkpoint(cfg: DictConfig, job: Path, ranks: Ranks) -> dict | None:
    """Rank 0 chooses the newest readable file, all ranks read that one. None: a new run."""
    if not cfg.resume:
        return None
    chosen: dict[Path, dict] = {}  # gigabytes, which only their path leaves this process for

    def choose() -> Path | None:
        newest = checkpoint.newest_readable(job / "checkpoints", print_error)
        chosen.update([newest] if newest else [])
        return next(iter(chosen), None)

    path = on_main(choose, ranks)
    return chosen.get(path) if ranks.is_main or path is None else checkpoint.load_file(path)


def check_same_steps(resumed: dict, windows_per_epoch: int) -> None:
    """A step of the checkpoint must be a step of this run."""
    if resumed["windows_per_epoch"] != windows_per_epoch:
        raise checkpoint.CheckpointError(
            f"the checkpoint's epochs have {resumed['windows_per_epoch']} steps and this run's "
            f"{windows_per_epoch}: use the same dataset and the same "
            f"batch_size * accum_iter * processes"
        )


def print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
