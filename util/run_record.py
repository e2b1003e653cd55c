"""What a run leaves behind while it trains: log lines, checkpoints, and the summary at its end."""

import json
import time
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from data.loader import TrainLoader
from engine_pretrain import Training
from util import checkpoint
from util.distributed import Ranks, all_reduce, barrier, gather_objects
from util.job import list_checkpoints
from util.metrics import RunLog, Speed, memory_in_use, readable_time
from util.preemption import Interrupted, StopFlag


class TrainingStopped(Exception):
    """The run cannot go on; the message says why and from where it can be taken up."""


class RunRecord:
    def __init__(
        self,
        cfg: DictConfig,
        ranks: Ranks,
        job: Path,
        training: Training,
        loader: TrainLoader,
        stop_flag: StopFlag,
        first_step: int,
    ):
        self.cfg, self.ranks, self.job = cfg, ranks, job
        self.training, self.loader = training, loader
        self.stop_flag, self.first_step = stop_flag, first_step
        self.total_steps = cfg.epochs * loader.windows_per_epoch
        self.images_per_step = cfg.batch_size * cfg.accum_iter * ranks.world_size
        self.last_logged = self.last_saved_step = first_step
        self.last_saved = time.monotonic()
        self.start = time.perf_counter()
        self.speed = Speed()
        self.log = RunLog(job, ranks.is_main, self.total_steps, first_step)
        self.writer = None
        if ranks.is_main:
            self.writer = checkpoint.CheckpointWriter(job / "checkpoints", report=self.log.say)

    def introduce(self) -> None:
        parameters = list(self.training.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        everything = sum(p.numel() for p in parameters)
        where = "from the beginning" if self.first_step == 0 else f"from step {self.first_step}"
        self.log.say(
            f"{self.cfg.job_name}: {self.cfg.encoder.name} on {self.cfg.dataset.name}, "
            f"{len(self.loader.dataset)} images, {trained / 1e6:.1f} M trainable parameters "
            f"({everything / 1e6:.1f} M in all), {self.training.precision} on "
            f"{self.ranks.world_size} x {self.ranks.device.type}, "
            f"{self.images_per_step} images per step, {self.total_steps} steps, {where}"
        )

    def say_finished(self) -> None:
        """Slurm may start a job once more than it was asked to."""
        self.log.say("already finished: nothing to do")
        self.log.close()

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
        """Save now and then; stop if asked to. Never between an epoch's last window and its
        evaluation, because a run that resumes there would leave the evaluation out.
        """
        number = self.stop_flag.agreed()
        if number:
            self.save(done)
            self.finish_writing()
            raise Interrupted(number)
        if (time.monotonic() - self.last_saved) / 60 > self.cfg.save_minutes:
            self.save(done)

    def write_log(self, done: int) -> None:
        """The only place in training that waits for the device."""
        meters = self.training.meters
        means = meters.read()
        mine = [*means.values(), meters.count_faults(), len(self.loader.bad_images)]
        totals = torch.tensor(mine, dtype=torch.float64).to(self.ranks.device)
        *sums, faults, bad_images = all_reduce(totals).tolist()
        if bad_images:
            self.check_bad_images()
        if faults:
            self.check_faults()
        means = {name: sum / self.ranks.world_size for name, sum in zip(means, sums, strict=True)}
        # The schedules as they stood at the start of this window.
        epoch = (done - 1) / self.loader.windows_per_epoch
        windows, self.last_logged = done - self.last_logged, done
        values = {
            "epoch": done / self.loader.windows_per_epoch,
            **means,
            "lr": self.training.schedule.learning_rate(epoch),
            "momentum": self.training.schedule.target_momentum(epoch),
            **self.speed.read(windows, self.images_per_step, self.total_steps - done),
            "memory_gb": memory_in_use(self.ranks.device),
        }
        self.log.record(values, done, self.one_line(values, done))

    def one_line(self, values: dict[str, float], done: int) -> str:
        return (
            f"epoch {values['epoch']:.2f}/{self.cfg.epochs}  step {done}/{self.total_steps}  "
            f"loss {values['loss']:.4f}  similarity pred {values['sim_pred']:.3f} "
            f"vis {values['sim_vis']:.3f} target {values['sim_trg']:.3f}  lr {values['lr']:.2e}  "
            f"momentum {values['momentum']:.4f}  {values['images_per_second']:.0f} images/s  "
            f"waiting {values['data_wait']:.0%}  {values['memory_gb']:.1f} GB  "
            f"eta {readable_time(values['eta_seconds'])}"
        )

    def check_bad_images(self) -> None:
        """Stop if there are too many unreadable images, counting those that any rank met."""
        self.loader.bad_images = set().union(*gather_objects(self.loader.bad_images, self.ranks))
        self.loader.check_bad_images()

    def check_faults(self) -> None:
        """Steps with a loss or gradient that is not finite were left out: max_bad_steps of them."""
        reports = gather_objects(self.training.meters.faults(), self.ranks)
        found = [(*fault, rank) for rank, faults in enumerate(reports) for fault in faults]
        step, what, count, rank = min(found)
        left_out = max(count for _, _, count, _ in found)
        if left_out <= self.cfg.max_bad_steps:
            return
        epoch = step / self.loader.windows_per_epoch
        newest = None
        if self.writer is not None:
            self.writer.wait()
            newest = next(iter(list_checkpoints(self.job / "checkpoints")), None)
        raise TrainingStopped(
            f"the {what} is not finite at step {step} (epoch {epoch:.2f}) on rank {rank}, "
            f"lr {self.training.schedule.learning_rate(epoch):.3e}; {left_out} steps were left "
            f"out and max_bad_steps={self.cfg.max_bad_steps}; last good checkpoint: "
            f"{newest or 'none was written yet'}"
        )

    def save(self, done: int, epoch: int | None = None) -> None:
        """epoch: given at the end of one whose checkpoint is kept for good."""
        self.last_saved = time.monotonic()
        if self.writer is None or done == self.last_saved_step:
            return
        self.last_saved_step = done
        contents = {
            "state_dict": self.training.model.state_dict(),
            "optimizer": self.training.optimizer.state_dict(),
            "loss_scaler": self.training.scaler.state_dict(),
            "epoch": done // self.loader.windows_per_epoch,
            "step": done,
            "windows_per_epoch": self.loader.windows_per_epoch,
            "config": OmegaConf.to_container(self.cfg),
            "format": checkpoint.FORMAT,
        }
        self.writer.save(contents, done, epoch)

    def record_accuracy(self, accuracy: float, images: int, epoch: int) -> None:
        summary = (
            f"epoch {epoch}: nearest neighbour {accuracy:.2f} % "
            f"(leave-one-out inside the {images} evaluation images)"
        )
        step = epoch * self.loader.windows_per_epoch
        self.log.record({"epoch": epoch, "nn_accuracy": accuracy}, step, summary)

    def finish_writing(self) -> None:
        """Until the last checkpoint is on the disk; all processes wait for it."""
        if self.writer is not None:
            self.writer.wait()
        barrier()

    def finish(self) -> None:
        self.finish_writing()
        if self.ranks.is_main:
            self.summarise()
        self.log.close()

    def summarise(self) -> None:
        seconds = time.perf_counter() - self.start
        accuracies = self.log.values_of("nn_accuracy")
        result = {
            "before": accuracies.get(0),
            "after": accuracies.get(self.total_steps),
            "seconds": round(seconds, 1),
            "seed": self.cfg.seed,
            "protocol": "nearest neighbour, leave-one-out inside the evaluation images, percent",
            "steps": self.total_steps,
        }
        path = self.job / "results" / f"{self.cfg.job_name}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        if result["before"] is not None and result["after"] is not None:
            change = f"{result['before']:.2f} % -> {result['after']:.2f} %"
            self.log.say(f"\nnearest neighbour {change} in {seconds:.0f} s (seed {self.cfg.seed})")
        newest = list_checkpoints(self.job / "checkpoints")
        self.log.say(
            f"checkpoint   {newest[0] if newest else 'none could be written'}\n"
            f"log          {self.job / 'log.txt'}\n"
            f"tensorboard  tensorboard --logdir {self.job / 'tensorboard'}\n"
            f"result       {path}\n"
            f"time spent on checkpoints: {self.writer.seconds_waited:.1f} s"
        )
