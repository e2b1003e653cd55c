"""Few-shot: against normal equations and refits without each image; the draws."""

import numpy as np
import pytest
import torch

from data.base import DataError
from eval.common import run_joined
from eval.features import Features
from eval.few_shot import (
    check_shots,
    choose_shots,
    evaluate,
    main,
    mean_and_spread,
    ridge_accuracies,
)
from tests import eval_by_hand as by_hand
from tests.backbones import digits_checkpoint
from tests.evaluations import assert_bad_input, config, few_digits, results
from tests.test_distributed import spawn

STRENGTHS = [1e-4, 0.1, 1.0, 30.0]


def problem(images: int, dim: int) -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 4
    noise = torch.randn(images, dim, generator=generator)
    return Features(noise + 0.5 + 2 * torch.eye(4, dim)[labels], labels)


def fit(features: torch.Tensor, targets: torch.Tensor, strength: float):
    """The normal equations of a ridge regression with an intercept. -> what predicts"""
    centre, offset = features.mean(dim=0), targets.mean(dim=0)
    centred = features - centre
    products = centred.T @ centred + strength * torch.eye(features.shape[1])
    weights = torch.linalg.solve(products, centred.T @ (targets - offset))
    return lambda queries: (queries - centre) @ weights + offset


@pytest.mark.parametrize(("images", "dim", "best"), [(12, 30, 0.1), (60, 20, 1.0)])
def test_equals_the_normal_equations_and_fits_without_each_image(images, dim, best):
    support, evaluation = problem(images, dim), problem(200, dim)
    features = support.features.double()
    targets = torch.nn.functional.one_hot(support.labels).double()
    unit = (features - features.mean(dim=0)).square().sum() / images
    expected, errors = [], []
    for strength in STRENGTHS:
        predicted = fit(features, targets, strength * unit)(evaluation.features.double())
        hits = predicted.argmax(dim=1) == evaluation.labels
        expected.append(100 * hits.double().mean().item())
        error = 0
        for image in range(images):
            others = torch.arange(images) != image
            refit = fit(features[others], targets[others], strength * unit)
            error += (refit(features[image]) - targets[image]).square().sum().item()
        errors.append(error)
    found = ridge_accuracies(support, evaluation, 4, STRENGTHS)
    assert found["all"] == pytest.approx(expected)
    assert found["chosen"] == STRENGTHS[errors.index(min(errors))] == best
    assert found["top1"] == found["all"][STRENGTHS.index(best)]


def test_shots_are_of_each_class_nested_and_a_function_of_the_seed():
    labels = torch.tensor([2, 0, 0, 5, 2, 5, 0, 2, 5, 0, 2, 5, 5])
    few, more = choose_shots(labels, 2, 3, 1), choose_shots(labels, 4, 3, 1)
    assert labels[few].tolist() == [0, 0, 2, 2, 5, 5]
    assert labels[more].bincount().tolist() == [4, 0, 4, 0, 0, 4]
    assert len(set(more.tolist())) == 12 and set(few.tolist()) <= set(more.tolist())
    assert torch.equal(few, choose_shots(labels, 2, 3, 1))
    assert not torch.equal(more, choose_shots(labels, 4, 3, 2))
    assert not torch.equal(more, choose_shots(labels, 4, 4, 1))


def test_separable_classes_are_told_apart():
    labels = torch.arange(3).repeat(5)
    centres = torch.eye(3, 8)
    found = ridge_accuracies(
        Features(centres[labels], labels), Features(centres, torch.arange(3)), 3, [0.01, 1.0]
    )
    assert found == {"top1": 100.0, "chosen": 0.01, "all": [100.0, 100.0]}


def test_one_shot_takes_the_middle_regulariser():
    support = Features(torch.eye(3), torch.arange(3))
    assert ridge_accuracies(support, support, 3, [10, 0.1, 1])["chosen"] == 1


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "spread": 1.0}
    assert mean_and_spread([4.0]) == {"mean": 4.0, "spread": 0.0}


def test_a_class_with_fewer_images_is_named():
    check_shots(torch.tensor([0, 0, 0, 1, 1]).numpy(), 2)
    with pytest.raises(DataError, match="shots=3: class 1 has only 2 training images"):
        check_shots(torch.tensor([0, 0, 0, 1, 1]).numpy(), 3)


REGULARISERS = [0.02, 4, 0.3, 1, 0.1]


def test_a_whole_run_by_hand(tmp_path, monkeypatch, capsys):
    """Every key is away from its default, but for random_init. Some images have no label."""
    by_hand.lose_labels(monkeypatch)
    path = by_hand.write_checkpoint(tmp_path)
    root = by_hand.write_images(tmp_path / "images")
    own = "shots=[1,3] draws=6 seed=4 pooling=cls+mean final_norm=False".split()
    own += [f"regularisers={REGULARISERS}", f"data_path={root}"]
    main(config("few_shot", path, tmp_path, *by_hand.MOVED, *own))

    weights, found = by_hand.stored_weights(path, "target"), []
    for split in ("train", "val"):
        files, labels = by_hand.list_images(root, split)
        features = by_hand.features(files, weights, norm=False, pooling="cls+mean")
        features, labels = by_hand.only_labelled(features, labels)
        found.append((torch.from_numpy(by_hand.unit_length(features)), torch.from_numpy(labels)))
    train, evaluation = found
    results, details = {}, {}
    for shots in (1, 3):
        draws = [of_draw(train, evaluation, shots, draw) for draw in range(6)]
        top1 = [percent[chosen] for percent, chosen in draws]
        assert len(set(top1)) > 1
        results[f"top1/{shots}-shot"] = np.mean(top1)
        results[f"spread/{shots}-shot"] = np.std(top1, ddof=1)
        details[f"{shots}-shot"] = {
            "draws": pytest.approx(top1),
            "chosen": [chosen for _, chosen in draws],
            "by_regulariser": {
                str(strength): summary([percent[strength] for percent, _ in draws])
                for strength in REGULARISERS
            },
        }
    assert len(set(details["3-shot"]["chosen"])) > 1
    assert f"few_shot: top1/1-shot {results['top1/1-shot']:.4g}  spread" in capsys.readouterr().out
    report = by_hand.report_of(tmp_path / "few_shot")
    assert report["results"] == pytest.approx(results)
    assert list(report["results"]) == list(results)
    assert report["few_shot"] == details
    assert (report["images"], report["seed"]) == (27, 4)
    assert "over 6 draws" in report["protocol"] and str(REGULARISERS) in report["protocol"]


def summary(values: list[float]):
    return pytest.approx({"mean": np.mean(values), "spread": np.std(values, ddof=1)})


def of_draw(train: tuple, evaluation: tuple, shots: int, draw: int) -> tuple[dict, float]:
    """-> percent of the evaluation images by strength; the strength that is chosen"""
    order = np.random.default_rng([8, 4, draw]).permutation(len(train[1])).tolist()
    chosen = [
        row
        for label in range(7)
        for row in [row for row in order if train[1][row] == label][:shots]
    ]
    features, targets = train[0][chosen], torch.eye(7).double()[train[1][chosen]]
    unit = (features - features.mean(dim=0)).square().sum() / len(features)
    percent, errors = {}, {}
    for strength in REGULARISERS:
        predicted = fit(features, targets, strength * unit)(evaluation[0])
        hits = predicted.argmax(dim=1) == evaluation[1]
        percent[strength], errors[strength] = 100 * hits.double().mean().item(), 0.0
        for image in range(len(chosen) if shots > 1 else 0):
            others = torch.arange(len(chosen)) != image
            refit = fit(features[others], targets[others], strength * unit)
            errors[strength] += (refit(features[image]) - targets[image]).square().sum().item()
    return percent, 0.3 if shots == 1 else min(errors, key=errors.get)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return digits_checkpoint(tmp_path_factory.mktemp("pretrained"))


SMALL = ["shots=[1,5]", "draws=3"]


def run_main(ranks, checkpoint, folder) -> None:
    with few_digits():
        run_joined(config("few_shot", checkpoint, folder, *SMALL), ranks, evaluate)


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(checkpoint, tmp_path):
    with few_digits():
        main(config("few_shot", checkpoint, tmp_path / "one", *SMALL))
    spawn(run_main, 2, tmp_path, checkpoint, tmp_path / "two")
    one, two = (results(tmp_path / name, "few_shot") for name in ("one", "two"))
    assert two["processes"] == 2
    assert one["results"] == two["results"] and one["few_shot"] == two["few_shot"]


def test_too_many_shots_are_refused(checkpoint, tmp_path):
    cfg = config("few_shot", checkpoint, tmp_path, "shots=[1,500]")
    assert_bad_input(main, cfg, DataError, "shots=500: class . has only")
