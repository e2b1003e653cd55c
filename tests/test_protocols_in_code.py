"""Every number that a protocol fixes and that only the code has, once more and by hand. Whoever
changes one of them changes results, and has to say so here as well."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx
from timm.layers import DropPath, Mlp
from torch import nn, tensor

from data import datasets, files, masks, transforms
from eval import collapse, evaluate, finetune, linear_probe, segmentation
from eval.backbone import FAMILIES, HEADS, OwnBackbone, Tokens
from eval.common import EvalRun, count_hits
from eval.features import Features
from eval.few_shot import ridge_accuracies
from eval.linear_probe import ProbeHead
from eval.nn import knn
from eval.video import boundary_accuracy, score_object
from models.losses import Objective
from tests.published import prediction_loss
from tests.test_probe_by_hand import optimiser_steps
from tests.test_protocols import GROUPS, composed
from util.build import Training, build_model
from util.distributed import Ranks
from util.optim import LARS, build_adamw

# ---- Pre-training and images. --------------------------------------------------------------------

ALONE = Ranks(0, 1, torch.device("cpu"))


def small_recipe(decoder: str = "cross"):
    """The published one in everything but the size of the networks and the split of the batch."""
    size = "encoder=vit_nano proj.mlp_dim=40 decoder_embed_dim=64 decoder_num_heads=2"
    config = composed("lmim", *size.split(), "accum_iter=16").copy()
    config.decoder.name = decoder
    torch.manual_seed(0)
    return config, build_model(config)


def test_optimiser_schedules_and_objective():
    cfg, model = small_recipe()
    training = Training(cfg, model, ALONE, "fp32", cfg.batch_size)
    assert type(training.optimizer) is torch.optim.AdamW
    for group, decay in zip(training.optimizer.param_groups, (0.05, 0), strict=True):
        found = [group[key] for key in ("betas", "eps", "amsgrad", "weight_decay")]
        assert found == [(0.9, 0.95), 1e-8, False, decay]
    for schedule, values in {
        training.schedule.learning_rate: {0: 6e-4, 20: 1.5e-3, 40: 2.4e-3, 420: 1.5e-3, 800: 6e-4},
        training.schedule.target_momentum: {0: 0.99, 400: 0.995, 800: 1},
        training.schedule.similarity_goal: {0: 0.75, 400: 0.5, 800: 0.25},
    }.items():
        assert {epoch: schedule(epoch) for epoch in values} == approx(values)
    found = (training.objective, training.accum_iter, training.clip_grad)
    assert found == (Objective("infonce_patches", 0.2, 0.1, "image", "image", None, 1), 16, None)
    names = "weight cls_token proj a_bias a_norm2 an_embed head qkv kv position".split()
    model = nn.ParameterDict({name: torch.zeros(2, 2) for name in names} | {"b": torch.zeros(2)})
    others = {id(p) for p in build_adamw(model, 0.05).param_groups[1]["params"]}
    found = {name for name, parameter in model.named_parameters() if id(parameter) in others}
    assert found == {"a_bias", "a_norm2", "an_embed", "b"}


@pytest.mark.parametrize("decoder", GROUPS["decoder"])
def test_layers(decoder):
    model = small_recipe(decoder)[1]
    for name, module in model.named_modules():
        is_head = "encoder.head." in name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if is_head else 1e-6), name
        elif isinstance(module, nn.Linear):
            assert (module.bias is None) == is_head and (is_head or not module.bias.any()), name
            bound = math.sqrt(6 / sum(module.weight.shape))  # xavier, uniform
            assert module.weight.abs().max().item() == approx(bound, rel=0.02), name
        elif isinstance(module, Mlp):
            assert module.fc1.out_features == 4 * module.fc1.in_features, name
            assert type(module.act) is nn.GELU and module.act.approximate == "none", name
        assert not isinstance(module, DropPath) and getattr(module, "p", 0) == 0, name
    for name, parameter in model.named_parameters():
        assert not name.endswith("cls_token") or parameter.std().item() == approx(0.02, rel=0.25)
        assert not name.endswith("mask_token") or not parameter.any()


def test_losses():
    """A deviation of 1e-4, and a variance of 1e-6, are as large as what is added to them."""
    small, deviation = 1e-4 / 2**0.5, 1e-3 / 2**0.5
    tokens, axes = tensor([[[small, 1], [-small, -1]]]), tensor([[[1.0, 0], [0, 1]]])
    found = [prediction_loss("infonce_patches", tokens, axes, tau).item() for tau in (0.2, 0.1)]
    assert found == approx([0.93498, 0.89669], rel=1e-4)
    targets = tensor([[[deviation, -deviation]]])
    assert prediction_loss("norm_l2", torch.zeros(1, 1, 2), targets, 0.2).item() == approx(0.25)


def test_crops_and_mirror_images():
    rng = np.random.default_rng(0)
    draws = [transforms.random_resized_crop_box(4000, 4000, 0.2, rng) for _ in range(4000)]
    left, top, right, bottom = np.array(draws).T
    ratio, area = (right - left) / (bottom - top), (right - left) * (bottom - top) / 4000**2
    assert [ratio.min(), ratio.max(), area.min()] == approx([3 / 4, 4 / 3, 0.2], rel=1e-3)
    assert area.max() > 0.98
    # None fits: after ten attempts of two random numbers each, the largest central one.
    rng = np.random.default_rng(0)
    assert transforms.random_resized_crop_box(1000, 20, 1.0, rng) == (486, 0, 513, 20)
    assert rng.random() == np.random.default_rng(0).random(21)[20]
    assert transforms.random_resized_crop_box(20, 1000, 1.0, rng) == (0, 486, 20, 513)
    dark_left = tensor([0, 200], dtype=torch.uint8).expand(3, 2, 2)
    transform = transforms.TrainTransform(2, 1.0, flip=True, seed=0)
    mirrored = [transform(dark_left, 0, index)[0, 0, 0] > 100 for index in range(2000)]
    assert sum(mirrored) / 2000 == approx(0.5, abs=0.02)
    assert transforms.EvalTransform(224).resized(500, 375) == (341, 256)


def test_data_of_the_code():
    names = files.SUBSET_FILE.read_text().split()
    assert len(set(names)) == 100 and masks.IGNORE == 255
    assert hashlib.sha256(" ".join(names).encode()).hexdigest().startswith("fa2b1926ad6f96fb")
    for name, begin in {"textures": "092fab7d2c4b97d9", "photographs": "175edaebf10b237b"}.items():
        digest = hashlib.sha256()
        for split in ("train", "eval"):
            dataset = datasets.build_dataset(name, split)
            for index in range(20):
                digest.update(dataset.load(index).tobytes())
                digest.update(dataset.mask(index).tobytes() if name == "textures" else b"")
        assert digest.hexdigest().startswith(begin), name


# ---- Evaluations. --------------------------------------------------------------------------------


def backbone() -> OwnBackbone:
    return OwnBackbone(small_recipe()[1].encoder, name="x", layer=-1, final_norm=False)


def test_linear_probe():
    config = composed("linear_probe", "dataset=digits")
    task = linear_probe.Probe(EvalRun(config, ALONE, backbone()))
    groups = task.optimizer.param_groups
    for epoch, share in {0: 0, 5: 0.5, 10: 1, 50: 0.5, 90: 0}.items():
        task.set_learning_rates(epoch)
        rates = [group["lr"] for group in groups if group["weight_decay"] == 0]
        assert rates == approx([0.1 * share, 0.2 * share, 0.4 * share] * 2)
    head = ProbeHead("mean", 500, 40, 1, seed=0)
    assert head.linear.weight.std().item() == approx(0.01, rel=0.02)
    assert not head.linear.bias.any() and not list(head.norm.parameters())
    # A variance of 1e-6, as large as what is added to it; then a tenth of the mean of 1e-3.
    features = tensor([0, 2e-3])[:, None].expand(-1, 500)
    assert head.norm(features)[:, 0].tolist() == approx([-(0.5**0.5), 0.5**0.5])
    assert head.norm.eval()(features)[0, 0].item() == approx(-1e-4 / 0.9**0.5, rel=1e-4)
    query = ProbeHead("attentive", 768, 2, 1, seed=0).pool.query
    assert query.shape == (12, 768) and query.std().item() == approx(0.02, rel=0.03)
    matrix, vector = nn.Parameter(tensor([[3.0, 4]])), nn.Parameter(tensor([3.0, 4]))
    optimizer = LARS([matrix, vector], lr=1.0)
    for _ in range(2):
        matrix.grad, vector.grad = tensor([[0.0, 2]]), tensor([0.0, 2])
        optimizer.step()
    # Steps of 0.001 * 5, then of 0.9 * 0.005 + 0.001 * 4.996; of 2, then of 0.9 * 2 + 2.
    assert [*matrix[0].tolist(), *vector.tolist()] == approx([3, 3.985504, 3, -1.8])


def test_finetuning():
    config = composed("finetune", "dataset=textures")
    model = finetune.Classifier(backbone(), config.pooling, 1000, 0)
    assert model.head.weight.std().item() == approx(2e-5, rel=0.02)
    assert not model.head.bias.any() and model.norm.eps == 1e-6
    task = finetune.Finetuning(EvalRun(config, ALONE, backbone()))
    groups = task.optimizer.param_groups
    assert type(task.optimizer) is torch.optim.AdamW
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.9, 0.999), 1e-8)}
    for decay in (0.05, 0):
        found = sorted(group["lr_scale"] for group in groups if group["weight_decay"] == decay)
        assert found == approx([0.65**5, 0.65**4, 0.65**3, 0.65**2, 0.65, 1])
    for epoch, rate in {0: 0, 5: 2.5e-4, 52.5: 1.255e-4, 100: 1e-6}.items():
        task.set_learning_rates(epoch)
        assert max(group["lr"] for group in groups) == approx(rate)
    names = "mixup_alpha cutmix_alpha label_smoothing mix_prob switch_prob mode correct_lam"
    found = [getattr(task.mixup, name) for name in names.split()]
    assert found == [0.8, 1.0, 0.1, 1.0, 0.5, "batch", True]


@pytest.mark.parametrize("operations", [15, 0])
def test_augmentation_of_finetuning(operations):
    config = composed("finetune", "dataset=textures").copy()
    config.auto_augment = config.auto_augment if operations else None
    run = EvalRun(config, ALONE, backbone())
    augment = finetune.build_transform(run).augment
    steps = [" ".join(repr(step).split()) for step in augment.transforms]
    if operations:
        assert steps.pop(2).count("p=0.5, m=9, mstd=0.5") == operations  # RandAugment
    assert steps == [
        "RandomResizedCropAndInterpolation(size=(24, 24), scale=(0.08, 1.0), ratio=(0.75, 1.3333), "
        "interpolation=bicubic)",
        "RandomHorizontalFlip(p=0.5)",
        "MaybeToTensor()",
        "Normalize(mean=tensor([0.4970, 0.4970, 0.4970]), std=tensor([0.1560, 0.1560, 0.1560]))",
        "RandomErasing(p=0.25, mode=pixel, count=(1, 1))",
    ]


def test_patch_head():
    labels = tensor([[[0, 1]]], dtype=torch.uint8)
    tokens = Tokens(None, tensor([[[1.0], [3.0]]]), (1, 2))
    assert not any(p.any() for p in segmentation.PatchHead(tokens.patches, 2).parameters())
    run = SimpleNamespace(cfg=composed("segmentation"), ranks=ALONE, tracked=lambda own, _: own)
    with optimiser_steps() as taken:
        segmentation.train_patch_head(run, [(tokens, labels)])
    assert (taken[0][0]["betas"], taken[0][0]["weight_decay"]) == ((0.9, 0.999), 1e-4)
    rates = [taken[epoch][0]["lr"] for epoch in (0, 10, 19)]
    assert rates == approx([1e-3, 5e-4, 6.155830e-6]) and len(taken) == 20


def test_scores():
    # The first five classes count.
    logits, labels = torch.arange(10.0, 0, -1).expand(3, -1), tensor([0, 4, 5])
    assert count_hits(logits, labels).tolist() == [1, 2]
    bank = nn.functional.normalize(tensor([[1.0, n] for n in range(10)]), dim=1)
    queries = Features(bank[:1].expand(3, -1), labels)
    temperature = composed("nn").temperature
    found = knn(Features(bank, torch.arange(10)), queries, [10], temperature, ALONE)
    assert found == approx({"k10_top1": 100 / 3, "k10_top5": 200 / 3})
    # Singular values of 3/4 and 1/4.
    found = collapse.measure_pooled(tensor([[3.0, 0], [0, 1]]))
    assert found["rankme"] == approx(4 / 3**0.75)
    assert collapse.RIDGE == 1e-4
    images = Features(tensor([[-1.0], [1]]), tensor([0, 1]))
    strengths = list(composed("few_shot").regularisers)
    assert ridge_accuracies(images, images, 2, strengths)["chosen"] == 1e-2
    # Boundaries match within 0.008 diagonals: 799.92 pixels, rounded up.
    edges = [np.arange(99990)[None] < place for place in (5000, 5800, 5801)]
    assert [boundary_accuracy(edges[0], edge) for edge in edges] == [1, 1, 0]
    # So many of 61 pixels where they should be: F of 0.49, 0.51 and more, J of 0.49, 0.51 at last.
    numbers = np.arange(61)
    places = [200 * numbers + 100 * (numbers >= count) + 10 for count in (61, 30, 31, 40, 41)]
    truth, *predicted = (np.isin(np.arange(12200), place)[None] for place in places)
    found = score_object(np.stack([truth] * 4), np.stack(predicted), np.zeros((4, 1, 12200), bool))
    assert (found["J_recall"], found["F_recall"]) == (0.25, 0.75)


def test_other_methods():
    heads = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
    assert (heads, 224) == (HEADS, FAMILIES["dinov2"].image_side)
    nearest = evaluate.compose(composed("evaluate"), "knn", False)
    assert (nearest.protocol, nearest.final_norm, nearest.precision) == ("knn", True, "fp32")
    probe = evaluate.compose(composed("evaluate"), "linear_probe", False)
    assert (probe.precision, probe.batch_size) == ("auto", 512)
    assert "".join(evaluate.PUBLISHED.split()).endswith(
        "|LatentMIM,800epochs|50.1|-|72.0|83.0||MAE,1600epochs|-|-|68.0|83.6|"
        "|I-JEPA,600epochs|-|-|72.9|-||DINO|-|76.1|78.2|82.8||iBOT|-|77.3|79.8|84.1|"
    )
