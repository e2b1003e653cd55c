"""Latent MIM pre-training: one process of it. Run by launcher.py, or by hand:

torchrun --nproc_per_node=2 main_lmim.py --config-name=demo
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from data.base import count_images
from data.loader import TrainBatch, TrainLoader
from data.transforms import EvalTransform, TrainTransform, normalise
from engine_pretrain import train_step
from eval.collapse import COLLAPSED, CollapseWatch, judge
from eval.nn import leave_one_out_accuracy
from eval.pictures import picture
from launch.command import run_worker
from launch.config import TrainingStopped
from launch.job import list_checkpoints
from models.lmim import LatentMIM
from models.views import Geometry, Views, sample_views
from util.build import Training, build_model, eval_loader, open_split, read_geometry, train_loader
from util.checkpoint import first_words
from util.distributed import Ranks, gather_objects, join_processes, leave_processes, on_main
from util.files import read_json, write_json
from util.loop import Line, Loop, Task, job_folder, print_error, sum_over_processes, train
from util.metrics import dense_peak, describe_nodes, memory_in_use
from util.precision import choose_precision, tune_for_cpu
from util.preemption import StopFlag, stoppable
from util.streams import Stream, seed_of

SHOWN = 6  # images in TensorBoard


def main(cfg: DictConfig) -> None:
    ranks = join_processes()
    with stoppable(ranks) as stop_flag:
        pretrain(cfg, ranks, stop_flag)
    leave_processes()


def pretrain(cfg: DictConfig, ranks: Ranks, stop_flag: StopFlag) -> None:
    task = Pretraining(cfg, ranks)
    with job_folder(cfg, ranks) as job:
        train(task, cfg, ranks, job, stop_flag)


class Pretraining(Task):
    loader: TrainLoader
    model: LatentMIM
    evaluates_at_end = False

    def __init__(self, cfg: DictConfig, ranks: Ranks):
        self.cfg, self.ranks = cfg, ranks
        self.geometry = read_geometry(cfg)
        crops = TrainTransform(self.geometry.side, cfg.min_crop, cfg.dataset.flip, cfg.seed)
        self.dataset = open_split(cfg, "train", ranks)
        self.loader = train_loader(cfg, ranks, self.dataset, crops)
        centre = EvalTransform(self.geometry.side_without_gaps, cfg.dataset.crop_ratio)
        checked = open_split(cfg, "eval", ranks)
        self.evaluation = eval_loader(cfg, ranks, checked, centre)
        self.collapse_watch = CollapseWatch(cfg, ranks, self.evaluation)
        torch.manual_seed(cfg.seed)
        self.model = build_model(cfg).to(ranks.device)
        precision = choose_precision(cfg.precision, ranks.device)
        if ranks.device.type == "cpu":
            tune_for_cpu(self.model, precision)
        self.training = Training(cfg, self.model, ranks, precision, self.loader.batch_size)
        masked = self.geometry.grid_size**2 - self.geometry.num_vis
        sizes = (self.loader.batch_size, masked, self.model.decoder.head.out_features)
        self.chance: float | None = self.training.objective.chance(*sizes)
        self.optimizer, self.scaler = self.training.optimizer, self.training.scaler
        self.draw_views = view_source(cfg, ranks, self.geometry)

    def introduction(self) -> str:
        everything = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        checked, images = self.evaluation.dataset, len(self.loader.dataset)
        check = "" if checked.labels is None else f" and {len(checked)} for the check"
        if checked.others not in ("", self.dataset.others):  # of a folder of its own
            check += f" (left out: {checked.others})"
        left_over = images - self.loader.steps_per_epoch * self.loader.images_per_step
        notes = f"steps are whole: each epoch leaves out {left_over} images\n" if left_over else ""
        if checked.labels is None:
            notes += "there are no labels: no nearest-neighbour check\n"
        return notes + (
            f"{self.cfg.job_name}: {self.cfg.encoder.name} on {self.cfg.dataset.name}, "
            f"{count_images(self.dataset)}{check}, {trained / 1e6:.1f} M trainable parameters "
            f"({everything / 1e6:.1f} M in all), {self.training.precision} on "
            f"{self.ranks.world_size} x {self.ranks.device.type}"
        )

    def state(self) -> dict:
        ahead = {"target_is_ahead": True} if self.training.target_is_ahead else {}
        return super().state() | ahead

    def restore(self, contents: dict, source: Path) -> None:
        super().restore(contents, source)
        self.training.target_is_ahead = "target_is_ahead" in contents

    def prepare(self) -> None:
        if peak := dense_peak(self.ranks.device, self.training.precision):
            with FlopCounterMode(display=False) as counter:
                self.pass_blank_images(1)
            self.images_at_peak = self.ranks.world_size * peak / counter.get_total_flops()
        if self.cfg.compile:
            self.compile()
        if isinstance(self.training.network, DistributedDataParallel):
            # It regroups gradients after the first backward pass, which changes the order of
            # summation over more than two processes. Once this is settled, a new and a resumed run
            # sum in the same order.
            self.pass_blank_images(self.loader.batch_size, keep_local=False)
        self.training.network.train()

    def compile(self) -> None:
        """Where that fails, in any process, all go on without."""
        self.training.compile()
        reason = ""
        try:  # for the shapes of training, and only once
            self.pass_blank_images(self.loader.batch_size)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_words(error)}"
        if reasons := list(filter(None, gather_objects(reason, self.ranks))):
            torch.compiler.set_stance("force_eager")
            if self.ranks.is_main:
                print_error(f"compile=True: training goes on uncompiled ({reasons[0]})")

    def pass_blank_images(self, images: int, keep_local: bool = True) -> None:
        """Forward and backward, of which nothing stays."""
        training, side = self.training, self.geometry.side
        is_alone = not isinstance(training.network, DistributedDataParallel)
        blank = torch.zeros(images, 3, side, side, dtype=torch.uint8, device=training.device)
        try:
            with nullcontext() if is_alone or not keep_local else training.network.no_sync():
                with training.autocast():
                    latents = training.network(blank, self.draw_views(0, 0, images))
                training.objective(latents, training.similarity_goal)[0].backward()
        finally:
            training.optimizer.zero_grad(set_to_none=is_alone)

    def normalised(self, images: Tensor) -> Tensor:
        return normalise(images, self.cfg.dataset.mean, self.cfg.dataset.std)

    def step(self, step: int, batches: Iterator[TrainBatch]) -> None:
        images = (batch.images for batch in batches)
        epoch = step / self.loader.steps_per_epoch
        try:
            train_step(self.training, images, self.draw_views, step, epoch)
        finally:
            self.half_done = self.training.half_done

    def log_line(self, done: int, steps: int) -> Line:
        meters, schedule = self.training.meters, self.training.schedule
        mine = meters.read()
        numbers = torch.tensor([*mine.values(), meters.bad_steps], dtype=torch.float64)
        *sums, faults = sum_over_processes(numbers.to(self.ranks.device), self.loader, self.ranks)
        if faults:
            self.check_faults()
        means = {name: sum / self.ranks.world_size for name, sum in zip(mine, sums, strict=True)}
        # The schedules as they stood at the start of this step.
        epoch = (done - 1) / self.loader.steps_per_epoch
        levels = {} if self.chance is None else {"chance": self.chance}
        if self.training.sigreg is not None:
            levels["sigreg_collapsed"] = self.training.sigreg.collapsed(self.loader.batch_size)
        values = {
            **means,
            **levels,
            "lr": schedule.learning_rate(epoch),
            "momentum": schedule.target_momentum(epoch),
            "sim_goal": schedule.similarity_goal(epoch),
            "memory_gb": memory_in_use(self.ranks.device),
        }
        text = f"{describe_loss(values)}  lr {values['lr']:.2e}  momentum {values['momentum']:.4f}"
        return values, f"{text}  {values['memory_gb']:.1f} GB"

    def glimpse(self) -> str:
        return describe_loss(self.training.meters.read(keep=True))

    def check_faults(self) -> None:
        """Steps with a loss or gradient that is not finite were left out: max_bad_steps of them."""
        meters = self.training.meters
        found = gather_objects((int(meters.first_bad_step), int(meters.bad_steps)), self.ranks)
        step = min(first for first, count in found if count)
        left_out = max(count for _, count in found)
        if left_out <= self.cfg.max_bad_steps:
            return
        epoch = step / self.loader.steps_per_epoch
        raise TrainingStopped(
            f"the loss or gradient is not finite at step {step} (epoch {epoch:.2f}), "
            f"lr {self.training.schedule.learning_rate(epoch):.3e}; {left_out} steps were left "
            f"out and max_bad_steps={self.cfg.max_bad_steps}"
        )

    def evaluate(self) -> Line | None:
        """Nearest neighbours, if the evaluation images have labels."""
        checked = self.evaluation.dataset
        if checked.labels is None:
            return None
        # Not compiled: an evaluation has other shapes, and runs too rarely to pay for that.
        with torch.compiler.set_stance("force_eager"):
            how = (self.evaluation, self.normalised, self.ranks)
            accuracy, images = leave_one_out_accuracy(self.model.encoder, *how)
        self.loader.bad_images |= self.evaluation.bad_images
        protocol = f"leave-one-out inside the {images} evaluation images"
        return {"nn_accuracy": accuracy}, f"nearest neighbour {accuracy:.2f} % ({protocol})"

    def watch(self, loop: Loop, done: int) -> Line | None:
        """Are the features alive? By what was measured since the start, which log.txt has."""
        if self.cfg.watch_images == 0:
            return None
        with torch.compiler.set_stance("force_eager"):
            numbers = self.collapse_watch.measure(self.model.encoder, self.normalised)
        history = on_main(lambda: loop.log.records_with("rankme"), self.ranks) | {done: numbers}
        judged = judge(history, loop.planned_steps)
        if judged.verdict == COLLAPSED and self.cfg.on_collapse == "stop":
            self.gives_up = f"on_collapse=stop: {judged}"
        return {**numbers, **judged._asdict()}, f"features {judged}"

    @torch.inference_mode()
    def picture(self) -> bytes | None:
        if not self.collapse_watch.batches:
            return None
        images, encoder = self.collapse_watch.batches[0][:SHOWN], self.model.encoder
        with torch.compiler.set_stance("force_eager"):
            tokens = encoder.encode_images(self.normalised(images))[:, 1:]
        return picture(images, self.draw_views(0, 0, len(images)), self.geometry, tokens)

    def finish(self, loop: Loop) -> None:
        """What the run has come to and what it took, by its log: results/JOB.json, and where the
        rest is."""
        nodes = describe_nodes(self.ranks)
        path = loop.job / "results" / f"{self.cfg.job_name}.json"
        if not self.ranks.is_main:
            return
        if loop.nothing_is_left and read_json(path).get("steps") == loop.done:
            return  # an earlier start has done it all
        found, seconds = loop.log.records_with("nn_accuracy"), loop.log.seconds()
        before, after = (found.get(at, {}).get("nn_accuracy") for at in (0, loop.done))
        judged = judge(loop.log.records_with("rankme"), loop.planned_steps)
        result = {
            "before": before,
            "after": after,
            "seconds": seconds,
            "seed": self.cfg.seed,
            "protocol": "nearest neighbour, leave-one-out inside the evaluation images, percent",
            "steps": loop.done,
            **(judged._asdict() if judged else {}),
            **({"made_on_resume": True} if loop.nothing_is_left else {}),
        }
        write_json(path, result)
        if before is not None and after is not None:
            loop.log.say(f"\nnearest neighbour {before:.2f} % -> {after:.2f} % in {seconds:.0f} s")
        last = list_checkpoints(loop.job / "checkpoints")[0]
        rate = loop.log.last_with("images_per_second")
        speed = "unknown"
        if rate:
            speed = f"{rate['images_per_second']:.0f} images/s, waiting for data "
            speed += f"{rate['data_wait']:.0%}, at the end"
        loop.log.say(
            f"nodes        {nodes}\n"
            f"features     {judged or 'not watched'}\n"
            f"speed        {speed}\n"
            f"checkpoint   {last} ({last.stat().st_size / 1e9:.3g} GB; "
            f"{shutil.disk_usage(loop.job).free / 1e9:.3g} GB are free)\n"
            f"log          {loop.job / 'log.txt'}\n"
            f"tensorboard  tensorboard --logdir_spec {loop.job.name}:{loop.job / 'tensorboard'}\n"
            f"result       {path}"
        )


def describe_loss(values: dict[str, float]) -> str:
    chance = f" (chance {values['chance']:.4f})" if "chance" in values else ""
    similarity = f"pred {values['sim_pred']:.3f} vis {values['sim_vis']:.3f}"
    similarity += f" target {values['sim_trg']:.3f}"
    return f"loss {values['loss']:.4f}{chance}  similarity {similarity}"


def view_source(
    cfg: DictConfig, ranks: Ranks, geometry: Geometry
) -> Callable[[int, int, int], Views]:
    """Views as a function of (seed, step, place of the image in the step), drawn on the device.
    The split into processes and micro-steps changes them as little as it changes the images."""
    generator = torch.Generator(ranks.device)

    def draw_views(step: int, micro_step: int, batch_size: int) -> Views:
        generator.manual_seed(seed_of(Stream.VIEWS, cfg.seed, step))
        images = batch_size * ranks.world_size * cfg.accum_iter
        first = (micro_step * ranks.world_size + ranks.rank) * batch_size  # as data/loader.py
        own = slice(first, first + batch_size)
        sizes = (geometry.grid_size, geometry.num_vis, geometry.patch_gap)
        return sample_views(images, *sizes, generator, own, cfg.masks)

    return draw_views


if __name__ == "__main__":
    run_worker(main, description=__doc__)
