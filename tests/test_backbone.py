"""Every backbone gives the tokens that an independent forward gives, and a wrong file one sentence.
Files of other methods: test_families.py."""

import hashlib

import pytest
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from eval.backbone import BackboneError, TimmBackbone
from eval.common import load_for_all
from eval.features import pool
from launch.config import compose_config
from launch.job import checkpoint_name
from models.vit import sine_cosine_positions
from tests.backbones import digits_checkpoint, images, load_backbone, prefixed
from tests.published import published_model
from util.build import build_model
from util.checkpoint import CheckpointError, load_file
from util.distributed import Ranks


@torch.no_grad()
def tokens_of(pretrained, pixels, **options):
    return load_backbone(pretrained, **options)(pixels)


# ---- timm. ---------------------------------------------------------------------------------------


def test_a_local_file_of_timm_gives_timms_features(tmp_path):
    torch.manual_seed(3)
    model = timm.create_model("test_vit", num_classes=10).eval()
    torch.save(model.state_dict(), tmp_path / "small.pth")
    weights = str(tmp_path / "small.pth")
    found = tokens_of("timm:test_vit", images(160), pretrained_weights=weights)
    with torch.no_grad():
        expected = model.forward_features(images(160))
        layers = model.forward_intermediates(
            images(160), indices=[3], output_fmt="NLC", intermediates_only=True
        )
    torch.testing.assert_close(found.cls, expected[:, 0])
    torch.testing.assert_close(found.patches, expected[:, 1:])
    backbone = load_backbone("timm:test_vit", pretrained_weights=weights, layer=3, final_norm=False)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images(160)).patches, layers[0])
        assert backbone(images(64, 96)).grid == (4, 6)
    assert backbone.depth == 4 and backbone.mean == (0.5, 0.5, 0.5)


def test_the_only_norm_of_a_vit_may_stand_behind_its_pooling():
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}
    tokens = {}
    for final_norm in (True, False):
        torch.manual_seed(0)
        model = timm.create_model("eva02_tiny_patch14_224", num_classes=0, **sizes)
        cut = {"layer": -1, "final_norm": final_norm}
        with torch.no_grad():
            found = TimmBackbone(model, family="timm", name="small", **cut).eval()(images(28))
        tokens[final_norm] = found.patches
    expected = F.layer_norm(tokens[False], tokens[False].shape[-1:], eps=1e-6)
    torch.testing.assert_close(tokens[True], expected)


@pytest.mark.parametrize(
    ("name", "side"),
    [("vit_tiny_r_s16_p8_224", None), ("xcit_nano_12_p16_224", None), ("mixer_s32_224", 64)],
)
def test_models_that_give_no_grid_are_refused(name, side):
    with pytest.raises(BackboneError, match=f"timm:{name}.*(not a grid|no image|expected ViTs)"):
        load_backbone(f"timm:{name}", random_init=True, image_side=side)


def test_a_network_without_blocks_gives_its_last_feature_map():
    backbone = load_backbone("timm:test_resnet", random_init=True)
    with torch.no_grad():
        found = backbone(images(64, 96))
        expected = backbone.model.forward_features(images(64, 96))
    assert found.cls is None and found.grid == (2, 3) and backbone.patch_size == 32
    torch.testing.assert_close(found.patches[:, 4], expected[:, :, 1, 1])
    with pytest.raises(BackboneError, match="test_resnet: only plain ViTs can be fine-tuned"):
        backbone.set_drop_path(0.1)


# ---- This project's. -----------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["encoder", "target"])
def test_own_tokens_are_those_of_the_model_that_was_saved(tmp_path, which):
    path = digits_checkpoint(tmp_path)
    contents = load_file(path)
    backbone = load_backbone(path, which=which, final_norm=False)
    prefix = {"encoder": "encoder.", "target": "target_encoder."}[which]
    model = build_model(OmegaConf.create(contents["config"]))
    model.load_state_dict(contents["state_dict"])
    encoder = model.get_submodule(prefix[:-1])
    colours = contents["config"]["dataset"]
    assert backbone.mean == tuple(colours["mean"]) and backbone.std == tuple(colours["std"])
    pixels = images(24)
    with torch.no_grad():
        whole = encoder.encode_images(pixels)[:, 1:]
        assert torch.equal(backbone(pixels).patches, whole)
        full = load_backbone(path, which=which)(pixels)
        torch.testing.assert_close(full.patches, encoder.norm(whole))
        first = load_backbone(path, which=which, layer=0, final_norm=False)(pixels)
    ids = torch.arange(36).expand(2, -1)
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 36, 48)
    with torch.no_grad():
        expected = encoder.forward_features(patches, ids, depth=1)
    torch.testing.assert_close(first.cls, expected[:, 0])
    assert {n.split(".")[1] for n, _ in backbone.named_parameters()} == {
        "blocks",
        "cls_token",
        "embed",
    }


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_checkpoint_is_read_once(tmp_path, monkeypatch, is_folder):
    path = digits_checkpoint(tmp_path).rename(tmp_path / checkpoint_name(10))
    cfg = compose_config("nn", [f"pretrained={tmp_path if is_folder else path}"])
    reads, read = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *file, **how: reads.append(file) or read(*file, **how)
    )
    backbone = load_for_all(cfg, Ranks(0, 1, torch.device("cpu")))
    assert reads == [(path,)] and cfg.pretrained == str(path)
    assert backbone.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def published(path, **changes):
    """The layout of the published file: module., no config."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 192, "depth": 2, "num_heads": 3, "grid_size": 4, "patch_size": 8}
    model = published_model(
        **sizes, mlp_dim=16, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
    )
    state = prefixed(model.state_dict(), "module.") | changes
    torch.save({"state_dict": state, "optimizer": {}, "loss_scaler": {}, "epoch": 800}, path)
    return model


def test_the_published_layout_loads(tmp_path):
    model = published(tmp_path / "published.pth").eval()
    backbone = load_backbone(tmp_path / "published.pth", final_norm=False)
    assert (backbone.image_side, backbone.depth, backbone.patch_size) == (32, 2, 8)
    # Fine-tuning leaves the positions as they are.
    assert not any("pos_embed" in name for name, _ in backbone.named_parameters())
    with torch.no_grad():
        found = backbone(images(32))
        assert torch.equal(found.patches, model.encoder.encode_images(images(32))[:, 1:])


def test_other_sizes_resample_the_positions(tmp_path):
    path = digits_checkpoint(tmp_path)
    backbone = load_backbone(path, image_side=48)
    assert backbone.image_side == 48
    assert backbone(images(48)).grid == (12, 12) and backbone(images(12, 36)).grid == (3, 9)
    # A table that is linear in the place is found again in between.
    table = backbone.encoder.pos_embed.pos_embeds
    assert torch.equal(table, sine_cosine_positions(24, 6))
    table[1:] = torch.arange(6.0).repeat_interleave(6)[:, None]
    rows = backbone.encoder.pos_embed.grid_rows((12, 6)).view(12, 6, 24)
    torch.testing.assert_close(rows[3:9, 2, 0], (torch.arange(3.0, 9) + 0.5) / 2 - 0.5)
    with pytest.raises(BackboneError, match="images of 25 x 24: expected multiples of 4"):
        backbone(images(25, 24))


def test_random_init_follows_from_the_seed(tmp_path):
    path = str(digits_checkpoint(tmp_path))
    state = torch.get_rng_state()
    first, again, other = (load_backbone(path, random_init=True, seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.fingerprint != load_backbone(path).fingerprint


def test_layers_and_stochastic_depth(tmp_path):
    backbone = load_backbone(digits_checkpoint(tmp_path))
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert layers["encoder.cls_token"] == layers["encoder.embed.proj.weight"] == 0
    assert layers["encoder.blocks.0.norm1.bias"] == 1
    assert layers["encoder.blocks.2.mlp.fc2.weight"] == 3 and layers["encoder.norm.weight"] == 4
    backbone.set_drop_path(0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.blocks()]
    assert rates == pytest.approx([0, 0.1, 0.2])


def test_pooling(tmp_path):
    tokens = load_backbone(digits_checkpoint(tmp_path))(images(24))
    both = pool(tokens, "cls+mean")
    assert torch.equal(both, torch.cat([pool(tokens, "cls"), pool(tokens, "mean")], dim=1))
    with pytest.raises(BackboneError, match="pooling=cls: this backbone has no class token"):
        pool(tokens._replace(cls=None), "cls")


# ---- Mistakes. -----------------------------------------------------------------------------------


def test_mistakes_are_one_sentence(tmp_path):
    path = digits_checkpoint(tmp_path)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(path.read_bytes()[:5000])
    joint = digits_checkpoint(tmp_path / "..", "target=joint")
    published(tmp_path / "short.pth", **{"module.encoder.norm.bias": torch.zeros(7)})
    for pretrained, options, expected in [
        (None, {}, "pretrained=null: expected a file or folder with a checkpoint, timm:NAME"),
        (tmp_path / "none.pth", {}, "none.pth: expected a file or folder with a checkpoint"),
        ("mae:/no/file.pth", {}, "pretrained=mae:/no/file.pth: expected a file or folder"),
        (truncated, {}, "cannot be read"),
        (f"mae:{path}", {}, "digits.pth holds no weights where they are expected; it"),
        (joint, {"which": "target"}, "expected a Latent MIM checkpoint with which=target"),
        (tmp_path / "short.pth", {}, r"size mismatch for norm.bias: .*\[7\]"),
        (path, {"layer": 3}, "layer=3: expected -1 .the last block. or 0 to 2"),
        (path, {"image_side": 30}, "image_side=30: expected a multiple of the patch size 4"),
        (path, {"pretrained_weights": "x"}, "pretrained_weights=x: expected with pretrained=timm"),
        ("moco:x.pth", {}, "pretrained=moco:x.pth: expected a file .*, mae:FILE, ijepa:FILE"),
        ("timm:vit_tinny_patch16_224", {}, "expected a name of timm.list_models()"),
    ]:
        with pytest.raises((BackboneError, CheckpointError), match=expected) as caught:
            load_backbone(pretrained, **options)
        assert "\n" not in str(caught.value)


def test_a_folder_without_checkpoints_is_named(tmp_path):
    cfg = compose_config("nn", [f"pretrained={tmp_path}"])
    with pytest.raises(BackboneError, match=f"pretrained={tmp_path}: expected a file or"):
        load_for_all(cfg, Ranks(0, 1, torch.device("cpu")))
