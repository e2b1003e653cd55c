"""Nearest neighbours against brute force, with ties, in one process and in two."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from eval import nn
from eval.features import Features
from eval.nn import Neighbours, leave_one_out, nearest, vote
from tests import eval_by_hand as by_hand
from tests.backbones import digits_checkpoint, run_command
from tests.evaluations import arguments, config, few_digits
from tests.runs import run_together
from util.distributed import Ranks

CPU = torch.device("cpu")


def random_features(count: int, seed: int, dim: int = 24, classes: int = 7) -> Features:
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(count, dim, generator=generator), dim=1)
    return Features(features, torch.randint(classes, (count,), generator=generator))


def brute_force(bank: np.ndarray, queries: np.ndarray, k: int, own: bool = False):
    """numpy, float64, pair by pair; of equal similarities the lower index."""
    similarity = np.array([[np.dot(q, b) for b in bank] for q in queries])
    if own:
        np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, axis=1), order


@pytest.mark.parametrize("bank_rows", [7, 64, 65536])
@pytest.mark.parametrize("k", [1, 20, 150])
def test_search_equals_brute_force(monkeypatch, bank_rows, k):
    monkeypatch.setattr(nn, "BANK_ROWS", bank_rows)
    bank, queries = random_features(300, 0), random_features(40, 1)
    found = nearest(bank.features, queries.features, k, CPU)
    values, order = brute_force(
        bank.features.double().numpy(), queries.features.double().numpy(), k
    )
    assert np.array_equal(found.indices.numpy(), order)
    assert np.allclose(found.similarities.numpy(), values, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pair_values", [1, 2000, 2**24])
@pytest.mark.parametrize("copies", [2, 30, 200])  # more than there are spare candidates
def test_of_equal_similarities_the_lower_index_comes_first(monkeypatch, copies, pair_values):
    monkeypatch.setattr(nn, "BANK_ROWS", 100)
    monkeypatch.setattr(nn, "PAIR_VALUES", pair_values)
    unique = random_features(5, 2).features
    bank = unique.repeat(copies, 1)  # row i and row i + 5, i + 10, ... are the same
    found = nearest(bank, unique, copies, CPU)
    assert torch.equal(found.indices, torch.arange(5)[:, None] + 5 * torch.arange(copies))
    first = nearest(bank, unique, 1, CPU, leave_out=torch.arange(5))
    assert torch.equal(first.indices[:, 0], torch.arange(5) + 5)


def test_nearly_equal_features_are_told_apart():
    """What float32 products cannot: the features of a collapsed network."""
    generator = torch.Generator().manual_seed(0)
    features = torch.ones(400, 16) + 1e-4 * torch.randn(400, 16, generator=generator)
    features = normalize(features, dim=1)
    found = nearest(features, features[:30], 10, CPU)
    _, order = brute_force(features.double().numpy(), features[:30].double().numpy(), 10)
    assert np.array_equal(found.indices.numpy(), order)


def test_no_row_of_any_part_is_its_own_neighbour(monkeypatch):
    monkeypatch.setattr(nn, "BANK_ROWS", 7)
    features = random_features(30, 5).features
    found = nearest(features, features, 3, CPU, leave_out=torch.arange(30))
    _, order = brute_force(features.double().numpy(), features.double().numpy(), 3, own=True)
    assert np.array_equal(found.indices.numpy(), order)


def test_images_without_label_are_of_a_class_of_their_own():
    """While pre-training, where a data set may have some."""
    features = normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.3]]), dim=1)
    images = Features(features, torch.tensor([-1, -1, 3, 700, 3]))
    assert leave_one_out(images, Ranks(0, 1, CPU)) == 40


def test_one_certain_neighbour_says_nothing_of_the_others():
    """Of a query in the bank, and far from the rest, which is nearly equal."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.ones(400, 16) + 1e-7 * torch.randn(400, 16, generator=generator)
    bank[200] = torch.linspace(-0.2, 1, 16)
    bank = normalize(bank, dim=1)
    found = nearest(bank, bank[200:201], 10, CPU)
    _, order = brute_force(bank.double().numpy(), bank[200:201].double().numpy(), 10)
    assert order[0, 0] == 200 and np.array_equal(found.indices.numpy(), order)


def test_equal_votes_and_votes_of_nothing():
    """Of equal votes the lower class comes first; a vote too small for a number is one."""
    found = Neighbours(torch.ones(1, 60).double(), torch.arange(60)[None])
    assert vote(found, torch.arange(60).flip(0), 60, 1.0, 62).tolist() == [[*range(60), -1, -1]]
    found = Neighbours(torch.tensor([[1.0, 0]]).double(), torch.arange(2)[None])
    assert vote(found, torch.tensor([3, 1]), 2, 1e-4, 4).tolist() == [[3, 1, -1, -1]]


# ---- Whole runs. ---------------------------------------------------------------------------------


def test_votes_of_a_bank_by_hand(tmp_path, monkeypatch):
    """Every key is away from its default, but for random_init and its seed. Some images have no
    label. The checkpoint has colours of its own."""
    by_hand.lose_labels(monkeypatch)
    path = by_hand.write_checkpoint(tmp_path, by_hand.TRAINED)
    root = by_hand.write_images(tmp_path / "images")
    own = "protocol=knn neighbours=[6,38,25] temperature=0.5 final_norm=True".split()
    own += ["pooling=cls+mean", f"data_path={root}", f"cache_dir={tmp_path / 'cache'}"]
    cfg = config("nn", path, tmp_path, *by_hand.MOVED, *own)
    nn.main(cfg)

    weights = by_hand.stored_weights(path, "target")
    of_rows = {len(np.load(path)): path for path in (tmp_path / "cache").iterdir()}
    assert of_rows.keys() == {50, 36}
    found = []
    for split, count in (("train", 50), ("val", 36)):
        files, labels = by_hand.list_images(root, split)
        features = by_hand.features(
            files, weights, norm=True, pooling="cls+mean", colours=by_hand.TRAINED
        )
        np.testing.assert_allclose(np.load(of_rows[count]), features, rtol=0, atol=1e-5)
        found.append(by_hand.only_labelled(features, labels))
    (bank, queries), expected = found, {}
    for k in (6, 38, 25):
        shares = by_hand.nearest_neighbours(bank, queries, k, 0.5)
        expected |= {f"k{k}_top1": shares[0], f"k{k}_top5": shares[1]}
    for count, temperature in ((24, 0.5), (25, 0.07), (25, 2)):  # the default, the inverse
        assert shares != by_hand.nearest_neighbours(bank, queries, count, temperature)
    report = by_hand.report_of(tmp_path / "nn")
    assert report["results"] == pytest.approx(expected, abs=1e-9)
    assert (report["images"], report["bank"]) == (27, 38)
    assert report["protocol"] == (
        "k-NN, bank of 38 training images, votes of exp(cosine / 0.5), pooling cls+mean, "
        "with final norm, percent"
    )

    # The second time features are read, not computed.
    np.save(of_rows[36], features[::-1])
    nn.main(cfg)
    queries = by_hand.only_labelled(features[::-1], labels)
    shares = by_hand.nearest_neighbours(bank, queries, 6, 0.5)
    found = by_hand.report_of(tmp_path / "nn")["results"]
    assert [found["k6_top1"], found["k6_top5"]] == pytest.approx(shares, abs=1e-9)
    assert found["k6_top1"] != expected["k6_top1"]


def test_leave_one_out_of_fresh_weights_by_hand(tmp_path):
    path = by_hand.write_checkpoint(tmp_path)
    root = by_hand.write_images(tmp_path / "images")
    fresh = "random_init=True seed=5 pooling=cls".split()
    nn.main(config("nn", path, tmp_path, *by_hand.MOVED, *fresh, f"data_path={root}"))
    files, labels = by_hand.list_images(root, "val")
    expected = [
        by_hand.leave_one_out(by_hand.features(files, weights, norm=False, pooling="cls"), labels)
        for weights in (by_hand.fresh_weights(5), by_hand.fresh_weights(0))
    ]
    assert expected[0] != expected[1]
    report = by_hand.report_of(tmp_path / "nn")
    assert report["results"] == pytest.approx({"top1": expected[0]}, abs=1e-9)
    assert report["protocol"] == (
        "nearest neighbour, leave-one-out inside the evaluation images, pooling cls, "
        "without final norm, percent"
    )
    facts = {"evaluation": "nn", "pretrained": str(path), "random_init": True, "seed": 5}
    facts |= {"dataset": "imagefolder", "images": 36, "processes": 1, "device": "cpu"}
    assert {name: report[name] for name in facts} == facts
    assert report["backbone"]["name"] == "vit_pico-target" and report["backbone"]["layer"] == 1
    assert by_hand.scalars(tmp_path / "nn") == {"nn/top1": pytest.approx(expected[0], rel=1e-6)}


# ---- The command. --------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_same_number(tmp_path):
    """Of several batches, also from the cache; and only one of them says it."""
    root = by_hand.write_images(tmp_path / "images")
    settings = ["dataset=imagefolder", f"data_path={root}", "batch_size=7", "neighbours=[5,10]"]
    path = by_hand.write_checkpoint(tmp_path)
    for protocol in ("paper", "knn"):
        own = [*settings, f"protocol={protocol}"]
        alone, together = tmp_path / f"{protocol}-1", tmp_path / f"{protocol}-2"
        nn.main(config("nn", path, alone, *own))
        expected = by_hand.report_of(alone / "nn")["results"]
        own.append(f"cache_dir={tmp_path / 'cache'}")
        for _ in range(2 if protocol == "knn" else 1):
            output = run_together(2, *arguments("nn", path, together, *own), program="eval/nn.py")
            assert by_hand.report_of(together / "nn")["results"] == expected
            numbers = "  ".join(f"{metric} {value:.4g}" for metric, value in expected.items())
            facts, result = (line for line in output.splitlines() if line.startswith("nn: "))
            assert result.startswith(f"nn: {numbers}  (")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["protocol=knn", "neighbours=[1,161]"], "neighbours=161: expected 1 to 160, as many"),
        (
            ["dataset=folder", "data_path={images}"],
            "dataset=folder: no image of its eval split has a label, and nn needs them",
        ),
        (["dataset=folder", "data_path={empty}"], "{empty}"),
        (["protocol=loo"], "protocol=loo: expected one of paper, knn"),
        (["neighbours=[]"], "neighbours=[]: expected a list of whole numbers"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capfd, overrides, expected):
    folders = {name: tmp_path / name for name in ("images", "empty")}
    for folder in folders.values():
        folder.mkdir()
    Image.new("RGB", (8, 8)).save(folders["images"] / "a.png")
    pretrained = f"pretrained={digits_checkpoint(tmp_path)}"
    overrides = [text.format(**folders) for text in overrides]
    with few_digits():
        assert run_command("nn", f"output_dir={tmp_path}", pretrained, *overrides) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: ") and expected.format(**folders) in message
    assert message.count("\n") == 1
