"""The numbers of a collapse against their definitions, alone and in a whole run, and a position
code that is found out."""

import math

import numpy as np
import pytest
import torch

from eval import collapse
from eval.collapse import measure_pooled
from eval.common import run_joined
from tests import eval_by_hand as by_hand
from tests.backbones import digits_checkpoint
from tests.evaluations import config
from util.distributed import Ranks


@pytest.mark.parametrize("rows", [7, 65536])
def test_numbers_equal_their_definitions(monkeypatch, rows):
    assert collapse.ROWS == 65536
    monkeypatch.setattr("eval.collapse.ROWS", rows)
    given = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) + 0.5
    found, array = measure_pooled(given), given.double().numpy()
    singular = np.linalg.svd(array, compute_uv=False)
    share = singular / singular.sum()
    assert found["rankme"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(50) for j in range(50) if i != j]
    assert found["mean_cosine"] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found["channel_std"] == pytest.approx(unit.std(0).mean() * math.sqrt(12), rel=1e-9)


def test_the_extremes():
    same, apart = measure_pooled(torch.ones(20, 8)), measure_pooled(torch.eye(8))
    assert list(same.values()) == pytest.approx([1, 1, 0], abs=1e-5)
    assert apart["rankme"] == pytest.approx(8) and apart["mean_cosine"] == pytest.approx(0)


def results(tmp_path, *overrides: str) -> dict[str, float]:
    cfg = config("collapse", None, tmp_path, *overrides)
    alone = Ranks(0, 1, torch.device("cpu"))
    return run_joined(cfg, alone, collapse.evaluate).report["results"]


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of all rows of the one to all of the other."""
    first, second = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (first, second))
    return first @ second.T


def tokens_by_definition(tokens: np.ndarray, seed: int, probed: int) -> dict[str, float]:
    """tokens: of all images, [N, L, D]"""
    from sklearn.linear_model import Ridge

    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:probed]
    tokens, places = tokens[chosen.numpy()], np.arange(tokens.shape[1])
    found = {"token_similarity": np.mean([cosines(own, own).mean() for own in tokens])}
    pairs = [cosines(a, b) for i, a in enumerate(tokens) for j, b in enumerate(tokens) if i != j]
    is_same = np.eye(len(places), dtype=bool)
    found["same_place"] = np.mean([pair[is_same] for pair in pairs])
    found["other_places"] = np.mean([pair[~is_same] for pair in pairs])
    fitted, tested = (part.reshape(-1, tokens.shape[2]) for part in np.split(tokens, 2))
    truth = np.tile(places, probed // 2)
    penalty = 1e-4 * fitted.var(axis=0).mean() * len(fitted)
    ridge = Ridge(penalty, solver="cholesky").fit(fitted, np.eye(len(places))[truth])
    hits = ridge.predict(tested).argmax(axis=1) == truth
    return found | {"position_probe": 100 * hits.mean(), "position_chance": 100 / len(places)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is written by hand runs on the CPU")
def test_a_run_equals_one_by_hand(tmp_path):
    """Every key is away from its default, but for those that only timm's models or loader processes
    read, random_init, which needs no checkpoint, and precision: another one has no exact numbers.
    """
    path = by_hand.write_checkpoint(tmp_path, colours=by_hand.TRAINED)
    data = by_hand.write_images(tmp_path / "data")
    choice = "pooling=cls+mean split=train probe_images=10 final_norm=True seed=5 job_name=other"
    place = [f"data_path={data}", f"cache_dir={tmp_path / 'kept'}"]
    cfg = config("collapse", path, tmp_path, *by_hand.MOVED, *choice.split(), *place)
    run = run_joined(cfg, Ranks(0, 1, torch.device("cpu")), collapse.evaluate)

    files, _ = by_hand.list_images(data, "train")
    images = by_hand.normalised(files, 20, 0.8, by_hand.TRAINED)
    tokens = by_hand.encode(by_hand.stored_weights(path, "target"), images, blocks=2, norm=True)
    pooled, tokens = by_hand.pool(tokens, "cls+mean").astype(float), tokens[:, 1:].double().numpy()
    share = np.linalg.svd(pooled, compute_uv=False)
    share = share / share.sum()
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    expected = {
        "rankme": np.exp(-(share * np.log(share)).sum()),
        "mean_cosine": cosines(pooled, pooled)[~np.eye(len(files), dtype=bool)].mean(),
        "channel_std": unit.std(axis=0).mean() * math.sqrt(32),
    }
    expected |= tokens_by_definition(tokens, seed=5, probed=10)
    assert run.report["results"] == pytest.approx(expected, rel=1e-4)
    assert run.report["images"] == len(files) and len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.parametrize("is_code", [True, False])
def test_a_position_code_is_found_out(tmp_path, is_code):
    """Without blocks and patches, all that is left in a token is its place; without places and
    patches all tokens are alike."""
    path = digits_checkpoint(tmp_path)
    contents = torch.load(path, weights_only=True)
    for key, value in contents["state_dict"].items():
        if "embed.proj.weight" in key or ("blocks" if is_code else "pos_embeds") in key:
            value.zero_()
    torch.save(contents, path)
    data = ["dataset=digits", "probe_images=40", "batch_size=16"]
    found = results(tmp_path, f"pretrained={path}", *data)
    assert found["position_chance"] == pytest.approx(100 / 36)
    assert found["mean_cosine"] == pytest.approx(1, abs=1e-6)
    assert found["channel_std"] == pytest.approx(0, abs=1e-5)
    if is_code:
        assert found["position_probe"] == 100
    else:
        assert found["position_probe"] == pytest.approx(100 / 36)  # always one place
        assert found["token_similarity"] == pytest.approx(1, abs=1e-5)
