"""timm gives our features from what is exported."""

import json

import pytest
import timm
import torch
from safetensors.torch import save

from eval.export import describe, main
from models.vit import Encoder
from tests import eval_by_hand as by_hand
from tests.backbones import digits_checkpoint, load_backbone, run_command
from tests.evaluations import config
from tests.published import published_model


@pytest.mark.slow
def test_the_published_layout_loads_into_timm_by_name_alone(tmp_path, monkeypatch):
    # Which the next test asks of a smaller network.
    monkeypatch.setattr("eval.export.largest_difference", lambda *_: 0.0)
    torch.manual_seed(0)
    sizes = {"embed_dim": 192, "num_heads": 3, "mlp_dim": 8}
    model = published_model(**sizes, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    with torch.no_grad():  # not zeros, which would hide what is left out
        for parameter in model.encoder.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    path = tmp_path / "published.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    assert run_command("export", f"output_dir={tmp_path}", f"pretrained={path}") == 0
    file = tmp_path / "export" / "vit_tiny.safetensors"
    theirs = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(file)).eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = load_backbone(path)(images)
        expected = theirs.forward_features(images)
    assert (expected[:, 1:] - ours.patches).abs().max() < 1e-5
    assert (expected[:, 0] - ours.cls).abs().max() < 1e-5
    assert ours.patches.std() > 0.1


@pytest.mark.parametrize("random_init", [False, True])
def test_a_whole_run_by_hand(tmp_path, monkeypatch, random_init):
    """Every key is away from its default, but for final_norm, which has to be True. precision and
    batch_size change nothing: it is float32, and no image is read."""
    colours = None if random_init else by_hand.TRAINED
    path = by_hand.write_checkpoint(tmp_path, colours)
    own = [f"random_init={random_init}", "seed=5"]
    main(config("export", path, tmp_path, *by_hand.MOVED, *own))

    weights = by_hand.fresh_weights(5) if random_init else by_hand.stored_weights(path, "target")
    images = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    expected = by_hand.encode(weights, images, 2, norm=True)
    folder = tmp_path / "export" / "vit_pico-target"
    description = json.loads((folder / "config.json").read_text())
    mean, std = colours or by_hand.OF_DATASET
    assert description == {
        "architecture": "vit_base_patch16_224",
        **{"num_classes": 0, "num_features": 16, "global_pool": "token"},
        "model_args": {
            **{"img_size": 20, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
            "num_classes": 0,
        },
        "pretrained_cfg": {
            **{"architecture": "vit_base_patch16_224", "input_size": [3, 20, 20]},
            **{"interpolation": "bicubic", "num_classes": 0, "pool_size": None},
            **{"first_conv": "patch_embed.proj", "classifier": "head"},
            **{"mean": list(mean), "std": list(std)},
        },
    }
    with_head = folder.parent / "vit_pico-target.safetensors"
    for file, classes in ((folder / "model.safetensors", 0), (with_head, 1000)):
        arguments = description["model_args"] | {"num_classes": classes}
        name = description["architecture"]
        model = timm.create_model(name, checkpoint_path=str(file), **arguments).eval()
        with torch.no_grad():
            found = model.forward_features(images)
            assert not classes or (model(images) == torch.zeros(3, 1000)).all()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    # What the README of the folder says.
    lines = (folder / "README.md").read_text()
    assert lines.startswith("# vit_pico-target\n") and "20 x 20 pixels" in lines
    snippet = lines.split("```")[1].removeprefix("python\n")
    assert len(snippet.strip().splitlines()) == 5
    monkeypatch.chdir(folder)
    found = {}
    exec(snippet.replace("torch.zeros(", "torch.ones("), found)
    expected = by_hand.encode(weights, torch.ones(1, 3, 20, 20), 2, norm=True)
    torch.testing.assert_close(found["features"], expected[:, 1:].mean(dim=1), rtol=0, atol=1e-5)
    assert f"[1, {found['features'].shape[1]}], mean" in snippet


@pytest.mark.parametrize("has_head", [False, True])
def test_a_file_that_gives_other_tokens_is_an_error(tmp_path, monkeypatch, has_head):
    """Either of the two."""

    def shifted(weights: dict[str, torch.Tensor], **metadata) -> bytes:
        if ("head.bias" in weights) == has_head:
            weights = weights | {"norm.bias": weights["norm.bias"] + 1e-4}
        return save(weights, **metadata)

    monkeypatch.setattr("eval.export.save", shifted)
    cfg = config("export", by_hand.write_checkpoint(tmp_path), tmp_path)
    with pytest.raises(AssertionError, match="timm's features differ from ours by 0.00010"):
        main(cfg)


@pytest.mark.parametrize(
    ("width", "patch_size", "name"),
    [
        (192, 16, "vit_tiny_patch16_224"),
        (384, 32, "vit_small_patch32_224"),
        (768, 8, "vit_base_patch8_224"),
        (384, 4, "vit_base_patch16_224"),
        (1280, 14, "vit_base_patch16_224"),
        (1280, 16, "vit_base_patch16_224"),
        (1024, 16, "vit_large_patch16_224"),
    ],
)
def test_the_nearest_of_timms_models(width, patch_size, name):
    """Sizes that it lacks are those of its ViT-B/16, changed by the arguments."""
    sizes = {"grid_size": 2, "patch_size": patch_size, "embed_dim": width, "depth": 1}
    options = {"num_heads": 1, "freeze_pe": True, "mlp_dim": 0, "mlp_depth": 0, "recompute": False}
    with torch.device("meta"):
        encoder = Encoder(**sizes, **options)
    found = describe(encoder, 2 * patch_size, by_hand.TRAINED)
    assert found["architecture"] == found["pretrained_cfg"]["architecture"] == name


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("final_norm=False", "final_norm=False: expected True for an export"),
        ("pretrained=timm:test_resnet", "expected a checkpoint of Latent MIM"),
    ],
)
def test_what_cannot_be_exported(tmp_path, capfd, override, expected):
    path = digits_checkpoint(tmp_path)
    overrides = [f"output_dir={tmp_path}", f"pretrained={path}", "random_init=True", override]
    assert run_command("export", *overrides) == 2
    assert expected in capfd.readouterr().err
