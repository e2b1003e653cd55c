"""The numbers of a collapse against their definitions, and a position code that is found out."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.datasets import build_digits
from eval import features
from eval.collapse import cosine_and_std, rank_me
from tests.backbones import digits_checkpoint, run_command
from tests.test_save_features import tokens_by_hand


@pytest.fixture(params=[7, 65536])
def rows(request, monkeypatch):
    monkeypatch.setattr("eval.collapse.ROWS", request.param)
    assert features.ROWS == 65536


def test_numbers_equal_their_definitions(rows):
    found = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) + 0.5
    array = found.double().numpy()
    singular = np.linalg.svd(array, compute_uv=False)
    share = singular / singular.sum()
    assert rank_me(found) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(50) for j in range(50) if i != j]
    cosine, std = cosine_and_std(found).values()
    assert cosine == pytest.approx(np.mean(pairs), abs=1e-12)
    assert std == pytest.approx(unit.std(0).mean() * math.sqrt(12), rel=1e-9)


def test_the_extremes():
    same = torch.ones(20, 8)
    assert rank_me(same) == pytest.approx(1, abs=1e-5)
    cosine, std = cosine_and_std(same).values()
    assert cosine == pytest.approx(1) and std == pytest.approx(0, abs=1e-6)
    apart = torch.eye(8)
    assert rank_me(apart) == pytest.approx(8)
    assert cosine_and_std(apart)["mean_cosine"] == pytest.approx(0)


def results(tmp_path, *overrides: str) -> dict[str, float]:
    assert run_command("collapse", f"output_dir={tmp_path}", *overrides) == 0
    return json.loads((tmp_path / "collapse" / "results" / "collapse.json").read_text())["results"]


def test_numbers_are_of_pooled_features_as_they_are(tmp_path):
    """Brought to length 1 only where cosines are computed."""
    path, digits = digits_checkpoint(tmp_path), build_digits("eval", None)
    pictures = [digits.load(index) for index in range(len(digits))]
    pooled = tokens_by_hand(path, pictures, 0.306, 0.375, final_norm=False).patches.mean(dim=1)
    found = results(tmp_path, f"pretrained={path}", "probe_images=40")
    for name, value in {"rankme": rank_me(pooled), **cosine_and_std(pooled)}.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert rank_me(F.normalize(pooled)) != pytest.approx(rank_me(pooled), rel=1e-3)


def test_a_position_code_is_found_out(tmp_path):
    """Without blocks and patches, all that is left in a token is its place."""
    path = digits_checkpoint(tmp_path)
    contents = torch.load(path, weights_only=True)
    for key, value in contents["state_dict"].items():
        if key.startswith("encoder.") and ("blocks" in key or "embed.proj" in key):
            value.zero_()
    torch.save(contents, path)
    found = results(tmp_path, f"pretrained={path}", "probe_images=40", "batch_size=16")
    assert found["position_probe"] == 100 and found["mean_cosine"] == pytest.approx(1, abs=1e-6)
    assert found["position_chance"] == pytest.approx(100 / 36)
    assert found["channel_std"] == pytest.approx(0, abs=1e-5)


def test_tokens_without_places_give_chance(tmp_path):
    path = digits_checkpoint(tmp_path)
    contents = torch.load(path, weights_only=True)
    for key in ("encoder.pos_embed.pos_embeds", "encoder.embed.proj.weight"):
        contents["state_dict"][key].zero_()
    torch.save(contents, path)
    found = results(tmp_path, f"pretrained={path}", "probe_images=40")
    assert found["position_probe"] == pytest.approx(100 / 36)  # all tokens alike: always one place
    assert found["token_similarity"] == pytest.approx(1, abs=1e-5)
