"""What pre-training leaves behind: its log lines, checkpoints, and the summary at its end."""

import json
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

from data.loader import TrainLoader
from engine_pretrain import Training
from util.distributed import Ranks, all_reduce, gather_objects
from util.job import list_checkpoints
from util.metrics import memory_in_use, readable_time
from util.preemption import StopFlag
from util.record import TrainingRecord, TrainingStopped


class RunRecord(TrainingRecord):
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
        super().__init__(cfg, ranks, job, loader, stop_flag, first_step)
        self.training = training

    def introduce(self) -> None:
        parameters = list(self.training.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        everything = sum(p.numel() for p in parameters)
        self.log.say(
            f"{self.cfg.job_name}: {self.cfg.encoder.name} on {self.cfg.dataset.name}, "
            f"{len(self.loader.dataset)} images, {trained / 1e6:.1f} M trainable parameters "
            f"({everything / 1e6:.1f} M in all), {self.training.precision} on "
            f"{self.ranks.world_size} x {self.ranks.device.type}, "
            f"{self.images_per_step} images per step, {self.total_steps} steps, {self.where()}"
        )

    def say_finished(self) -> None:
        """Slurm may start a job once more than it was asked to."""
        self.log.say("already finished: nothing to do")
        self.log.close()

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
        values = {
            "epoch": done / self.loader.windows_per_epoch,
            **means,
            "lr": self.training.schedule.learning_rate(epoch),
            "momentum": self.training.schedule.target_momentum(epoch),
            "sim_goal": self.training.schedule.similarity_goal(epoch),
            **self.read_speed(done),
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

    def check_faults(self) -> None:
        """Steps with a loss or gradient that is not finite were left out: max_bad_steps of them."""
        reports = gather_objects(self.training.meters.faults(), self.ranks)
        found = [(*fault, rank) for rank, faults in enumerate(reports) for fault in faults]
        step, what, count, rank = min(found)
        left_out = max(count for _, _, count, _ in found)
        if left_out <= self.cfg.max_bad_steps:
            return
        epoch = step / self.loader.windows_per_epoch
        raise TrainingStopped(
            f"the {what} is not finite at step {step} (epoch {epoch:.2f}) on rank {rank}, "
            f"lr {self.training.schedule.learning_rate(epoch):.3e}; {left_out} steps were left "
            f"out and max_bad_steps={self.cfg.max_bad_steps}; {self.last_good_checkpoint()}"
        )

    def contents(self) -> dict:
        return {
            "state_dict": self.training.model.state_dict(),
            "optimizer": self.training.optimizer.state_dict(),
            "loss_scaler": self.training.scaler.state_dict(),
        }

    def record_accuracy(self, accuracy: float, images: int, epoch: int) -> None:
        summary = (
            f"epoch {epoch}: nearest neighbour {accuracy:.2f} % "
            f"(leave-one-out inside the {images} evaluation images)"
        )
        step = epoch * self.loader.windows_per_epoch
        self.log.record({"epoch": epoch, "nn_accuracy": accuracy}, step, summary)

    def finish(self) -> None:
        super().finish()
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
