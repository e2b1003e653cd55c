"""From the config to the images of a split, and to the loaders of this process."""

from collections.abc import Callable, Sequence

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.base import DataError, ImageDataset
from data.datasets import DECODING, build_dataset
from data.loader import Augmentation, EvalLoader, TrainLoader
from launch.results import training_batch_size
from util.distributed import Ranks, default_workers, on_main


def open_split(cfg: DictConfig, split: str, ranks: Ranks | None = None) -> ImageDataset:
    """train or eval; an empty one is an error. ranks: who open it together; files are listed by one
    of them."""

    def open_it() -> ImageDataset:
        options = OmegaConf.to_container(cfg.dataset.options)
        dataset = build_dataset(cfg.dataset.name, split, cfg.data_path, options)
        if len(dataset) == 0:
            raise DataError(f"dataset={cfg.dataset.name}: its {split} split holds no image")
        return dataset

    return on_main(open_it, ranks) if ranks and cfg.dataset.name in DECODING else open_it()


def train_loader(
    cfg: DictConfig, ranks: Ranks, dataset: ImageDataset, transform: Augmentation
) -> TrainLoader:
    return TrainLoader(
        dataset,
        transform,
        batch_size=training_batch_size(cfg, len(dataset), ranks.world_size),
        accum_iter=cfg.accum_iter,
        seed=cfg.seed,
        max_bad_images=cfg.max_bad_images,
        **for_both(cfg, ranks),
    )


def eval_loader(
    cfg: DictConfig,
    ranks: Ranks,
    dataset: ImageDataset,
    transform: Callable[..., Tensor],
    indices: Sequence[int] | None = None,
    max_bad_images: float = 1,
) -> EvalLoader:
    return EvalLoader(
        dataset,
        transform,
        batch_size=cfg.batch_size,
        indices=indices,
        max_bad_images=max_bad_images,
        **for_both(cfg, ranks),
    )


def for_both(cfg: DictConfig, ranks: Ranks) -> dict:
    return {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "num_workers": default_workers() if cfg.num_workers is None else cfg.num_workers,
        "device": ranks.device,
        "data_timeout": cfg.data_timeout,
    }
