"""timm gives our features from what is exported."""

import subprocess
import sys

import pytest
import timm
import torch

from tests.backbones import digits_checkpoint, load_backbone, run_command
from tests.published import published_model
from tests.runs import environment


@pytest.mark.slow
def test_the_published_size_loads_into_timm_by_name_alone(tmp_path):
    torch.manual_seed(0)
    model = published_model(mlp_dim=8, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    with torch.no_grad():  # not zeros, which would hide what is left out
        for parameter in model.encoder.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    path = tmp_path / "published.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    assert run_command("export", f"output_dir={tmp_path}", f"pretrained={path}") == 0
    file = tmp_path / "export" / "vit_base.safetensors"
    theirs = timm.create_model("vit_base_patch16_224", checkpoint_path=str(file)).eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = load_backbone(path)(images)
        expected = theirs.forward_features(images)
    assert (expected[:, 1:] - ours.patches).abs().max() < 1e-5
    assert (expected[:, 0] - ours.cls).abs().max() < 1e-5
    assert ours.patches.std() > 0.1


def test_a_trained_position_of_the_class_token_carries_over(tmp_path):
    path = digits_checkpoint(tmp_path, "freeze_pe=False")  # its weights are not zero
    contents = torch.load(path, weights_only=True)
    assert contents["state_dict"]["encoder.pos_embed.pos_embeds"][0].abs().min() > 0
    assert run_command("export", f"output_dir={tmp_path}", f"pretrained={path}") == 0


@pytest.mark.slow
def test_the_readme_of_the_folder_runs(tmp_path):
    path = digits_checkpoint(tmp_path)
    assert run_command("export", f"output_dir={tmp_path}", f"pretrained={path}") == 0
    folder = tmp_path / "export" / "vit_nano"
    snippet = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
    assert len(snippet.strip().splitlines()) == 5
    snippet = snippet.replace("torch.zeros(", "torch.ones(") + "torch.save(features, 'out.pth')"
    command = [sys.executable, "-c", snippet]
    subprocess.run(command, cwd=folder, env=environment(), check=True, timeout=120)
    with torch.no_grad():
        ours = load_backbone(path)(torch.ones(1, 3, 24, 24)).patches.mean(1)
    assert (torch.load(folder / "out.pth") - ours).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("final_norm=False", "final_norm=False: expected True for an export"),
        ("pretrained=timm:resnet10t", "expected a checkpoint of Latent MIM"),
    ],
)
def test_what_cannot_be_exported(tmp_path, capfd, override, expected):
    path = digits_checkpoint(tmp_path)
    overrides = [f"output_dir={tmp_path}", f"pretrained={path}", "random_init=True", override]
    assert run_command("export", *overrides) == 2
    assert expected in capfd.readouterr().err
