"""Bad input ends with exit code 2 and one sentence: the key, its value, and what is expected."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import launcher
import main_lmim
from data.datasets import DATASETS
from launch.command import run_command_line
from launch.config import ConfigError
from launch.validate import check_processes, check_writable
from models.decoder import DECODERS
from models.lmim import TARGETS
from models.losses import LOSSES
from tests.runs import ROOT, fill
from util.files import write_json

TINY = (
    "--config-name=demo epochs=1 warmup_epochs=0 encoder.depth=1 encoder.embed_dim=24 "
    "decoder_depth=1 decoder_embed_dim=24 proj.mlp_depth=0 batch_size=280 eval_freq=0 "
    "eval_at_start=False"
).split()
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="valid on a GPU")


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """The launcher's whole command in this process. -> (exit code, stdout, lines of stderr)"""

    def run(*overrides: str) -> tuple[int, str, list[str]]:
        arguments = ["launcher.py", *TINY, f"output_dir={tmp_path}", *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        capsys.readouterr()
        exit_code = run_command_line(launcher.launch, launcher.__doc__)
        printed = capsys.readouterr()
        return exit_code, printed.out, printed.err.splitlines()

    return run


@pytest.fixture
def error_of(run_here):
    def run(*overrides: str) -> str:
        exit_code, _, errors = run_here(*overrides)
        assert exit_code == 2
        assert len(errors) == 1 and errors[0].startswith("error: ")
        return errors[0].removeprefix("error: ")

    return run


# ---- Values. -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "valid"),
    [
        ("num_vis=0", "a whole number from 1 to 10**9"),
        (
            "num_vis=15",
            "1 to 14, because grid_size=4 makes 16 patches and 2 or more must be masked",
        ),
        ("patch_gap=-1", "a whole number from 0 to 1000"),
        ("patch_gap=1.5", "a whole number from 0 to 1000"),
        ("grid_size=100000", "a whole number from 2 to 1000"),
        ("grid_size=1", "a whole number from 2 to 1000"),
        ("encoder.num_heads=5", "encoder.embed_dim=24: expected a multiple of encoder.num_heads=5"),
        ("encoder.embed_dim=30", "expected a multiple of 4 (position table)"),
        ("decoder_num_heads=7", "decoder_embed_dim=24: expected a multiple of decoder_num_heads=7"),
        ("decoder_embed_dim=18", "a multiple of 4"),
        ("target_depth=2", "1 to 1 (encoder.depth), or null for all of them"),
        ("epochs=0", "a whole number from 1 to 10**9"),
        ("epochs=abc", "a whole number from 1 to 10**9"),
        ("epochs=1.5", "a whole number from 1 to 10**9"),
        ("epochs=True", "a whole number from 1 to 10**9"),
        ("epochs=null", "a whole number from 1 to 10**9"),
        ("warmup_epochs=2", "0 to 1 (epochs)"),
        ("resume=maybe", "True, False or changed"),
        ("resume=1", "True, False or changed"),
        ("precision=fp8", "one of auto, bf16, fp16, fp32"),
        ("seed=-1", "a whole number from 0 to 9223372036854775807"),
        ("blr=0", "a number above 0"),
        ("blr=inf", "a number above 0"),
        ("blr=nan", "a number above 0"),
        ("tau=cold", "a number above 0"),
        ("target_mom=1.5", "a number from 0 to 1"),
        ("masks=nope", "one of random, block, block_roll, inverse, inverse_roll"),
        ("sigreg=-1", "a number from 0 to 10**9"),
        ("sigreg_slices=0", "a whole number from 1 to 10**9"),
        ("sigreg_on=batch", "one of image, token"),
        ("pred_unit=token", "one of image, batch, or null"),
        ("negatives=null", "one of image, batch"),
        ("same_target=2", "a number from -1 to 1, or null"),
        ("loss_beta=0", "a number above 0"),
        ("target_norm=x", "one of layer, instance, batch, or null"),
        ("target_tap=x", "one of block, mlp"),
        ("min_crop=0", "a number above 0 and at most 1"),
        ("clip_grad=-1", "a number above 0, or null"),
        ("num_workers=-1", "a whole number from 0 to 1024, or null"),
        ("job_name=a/b", "the name of a folder inside output_dir, without '/'"),
        ("job_name=..", "the name of a folder inside output_dir, without '/'"),
        (f"job_name={'x' * 300}", "the name of a folder inside output_dir, without '/'"),
        (f"job_name={'語' * 199}", "the name of a folder inside output_dir, without '/'"),
        ("job_name=", "the name of a folder inside output_dir, without '/'"),
        ("output_dir=", "a text that is not empty"),
        ("worker=nope", "a Python module with main(cfg), such as main_lmim"),
        ("worker=nope.nope", "a Python module with main(cfg), such as main_lmim"),
        ("worker=os", "a Python module with main(cfg), such as main_lmim"),
        ("decoder.name=nope", f"one of {', '.join(sorted(DECODERS))}"),
        ("target.name=nope", f"one of {', '.join(sorted(TARGETS))}"),
        ("loss.name=nope", f"one of {', '.join(sorted(LOSSES))}"),
        ("dataset.name=nope", f"one of {', '.join(sorted(DATASETS))}"),
        ("dataset.mean=3", "a list of three numbers (red, green, blue)"),
        ("dataset.mean=[1,2]", "a list of three numbers (red, green, blue)"),
        ("dataset.std=[1,1,0]", "a list of three numbers above 0 (red, green, blue)"),
        ("dataset.options=3", "a section of keys"),
        ("+dataset.options.decoder=gpu", "one of fast, pil"),
        ("+dataset.options.image_size=4", "a whole number from 8 to 100000"),
        ("+dataset.options.eval_images=0", "a whole number from 1 to 10**9"),
        ("env.ngpu=-1", "a whole number from 0 to 1024"),
        ("env.signal_delay=259200", "fewer seconds than the env.timeout=4320 minutes have"),
        ("env.account=[1]", "a text that is not empty, or a whole number, or null"),
        ("env.world_size=2", "1 without Slurm (this machine); on more nodes start torchrun"),
        pytest.param("env.ngpu=1000", f"1 to {os.cpu_count()}, the cores", marks=WITHOUT_GPU),
        pytest.param("precision=fp16", "on cpu", marks=WITHOUT_GPU),
    ],
)
def test_a_bad_value_is_one_sentence(error_of, override, valid):
    message = error_of(override)
    assert override.lstrip("+") in message.replace(", ", ",")
    assert valid in message and ": expected " in message


def test_the_longest_job_name_leaves_room_for_what_is_added(error_of, monkeypatch, tmp_path):
    """A host with the longest name that Linux allows, and the largest process number."""
    monkeypatch.setattr("socket.gethostname", lambda: "h" * 64)
    monkeypatch.setattr("os.getpid", lambda: 2**22)
    write_json(tmp_path / f"{'é' * 99}j.json", {})
    assert "of at most 199 bytes" in error_of(f"job_name={'é' * 100}")


def test_more_processes_than_env_distributed_allows(error_of):
    message = error_of("env.distributed=False", "env.ngpu=2")
    assert message.startswith("env.distributed=False: expected one process, but env.ngpu=2 and")


def on_gpus(count: int):
    return OmegaConf.create({"env": {"ngpu": count, "tasks_per_node": 9}})


@pytest.mark.parametrize(("wanted", "gpus"), [(1, 0), (4, 0), (1, 1), (3, 8), (8, 8)])
def test_enough_gpus_or_cores(wanted, gpus):
    check_processes(on_gpus(wanted), gpus, cores=4)


@pytest.mark.parametrize(("wanted", "gpus"), [(2, 1), (9, 8)])
def test_too_few_gpus(wanted, gpus):
    with pytest.raises(ConfigError, match=f"env.ngpu={wanted}: expected 1 to {gpus}, the GPUs"):
        check_processes(on_gpus(wanted), gpus, cores=100)


def test_too_few_cores():
    with pytest.raises(ConfigError, match="env.tasks_per_node=9: expected 1 to 8, the cores"):
        check_processes(on_gpus(0), 0, cores=8)


# ---- Where the job lives. ------------------------------------------------------------------------


def test_a_file_in_the_way_of_the_job(error_of, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (f"{tmp_path}/file", f"{tmp_path}/file/below"):
        message = error_of(f"output_dir={place}")
        assert message == (
            f"output_dir={place}: expected a folder that can be written to, but "
            f"{tmp_path}/file is not a folder"
        )
    assert f"but {tmp_path}/file is not a folder" in error_of("job_name=file")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc on this system")
def test_a_place_that_takes_no_files(error_of):
    message = error_of("output_dir=/proc/x")
    assert message.startswith("output_dir=/proc/x: expected a folder that can be written to, but")
    assert "/proc refuses new files" in message


def test_trying_whether_a_folder_takes_files_leaves_nothing(tmp_path):
    cfg = OmegaConf.create({"output_dir": "x"})
    check_writable(cfg, tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=f"output_dir=x: .* but {tmp_path}/lost is not a folder"):
        check_writable(cfg, tmp_path / "lost")


def test_what_a_run_writes_is_tried_before_it_starts(error_of, tmp_path):
    job = tmp_path / "demo"
    for name, make in (
        ("results", Path.touch),
        ("log.txt", Path.mkdir),
        ("config.yaml", Path.mkdir),
        ("environment.json", Path.mkdir),
    ):
        job.mkdir()
        make(job / name)
        assert f"{job / name} cannot be written or read (" in error_of()
        shutil.rmtree(job)


def test_a_folder_that_takes_no_files_is_found_before_the_start(error_of, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    results = tmp_path / "demo" / "results"
    results.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", results], check=True)
    try:
        assert f"{results} refuses new files (Read-only file system)" in error_of()
    finally:
        subprocess.run(["umount", results], check=True)


def test_a_disk_that_is_full_at_the_start(error_of, small_disk):
    """There is room for names, not for contents."""
    for name in ("checkpoints", "logs", "tensorboard", "results"):
        (small_disk / "demo" / name).mkdir(parents=True)
    fill(small_disk)
    message = error_of(f"output_dir={small_disk}")
    assert str(small_disk / "demo") in message and "(No space left on device)" in message


@pytest.mark.parametrize("name", ["results", "log.txt"])
def test_what_is_gone_at_the_very_end(run_here, monkeypatch, tmp_path, name):
    def finish(task, loop, finish=main_lmim.Pretraining.finish):
        subprocess.run(["rm", "-r", loop.job / name], check=True)
        finish(task, loop)

    monkeypatch.setattr(main_lmim.Pretraining, "finish", finish)
    exit_code, _, errors = run_here()
    (gone,) = errors
    assert exit_code == 1 and gone.startswith(f"error: {tmp_path}/demo/{name}")
    assert gone.endswith(" cannot be written or read (No such file or directory)")
    assert len(list((tmp_path / "demo/checkpoints").iterdir())) == 1


def test_a_file_server_that_is_gone_may_come_back(run_here, monkeypatch, tmp_path):
    """A crash, after which Slurm starts the job again."""

    def fail(cfg):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "demo" / "log.txt"))

    monkeypatch.setattr(main_lmim, "main", fail)
    exit_code, _, errors = run_here()
    assert exit_code == 1 and errors[0].startswith("Traceback")


# ---- Data. ---------------------------------------------------------------------------------------


def test_data_that_is_not_there(error_of, tmp_path):
    message = error_of("dataset=imagefolder")
    assert message.startswith("dataset imagefolder needs data_path: a folder with train/CLASS/")
    message = error_of("dataset=folder", f"data_path={tmp_path}/nope")
    assert message.startswith(
        f"data_path={tmp_path}/nope: {tmp_path}/nope is not a folder; dataset folder"
    )
    assert error_of("dataset=folder", "data_path=").startswith("data_path=: expected a text that")
    (tmp_path / "file").write_text("")
    message = error_of("dataset=folder", f"data_path={tmp_path}/file")
    assert message.startswith(
        f"data_path={tmp_path}/file: {tmp_path}/file is not a folder; dataset folder"
    )


def test_data_without_images(error_of, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    assert error_of("dataset=folder", f"data_path={data}").startswith(
        f"{data} contains no images; expected files ending in .jpg"
    )
    (data / "notes.txt").write_text("nothing to see")
    assert "contains no images" in error_of("dataset=folder", f"data_path={data}")
    message = error_of("dataset=imagefolder", f"data_path={data}")
    assert message.startswith(
        f"data_path={data}: {data}/train is not a folder; dataset imagefolder needs"
    )


def test_a_dataset_smaller_than_one_step(error_of, tmp_path):
    assert error_of("batch_size=2000") == (
        "the dataset has 1400 images, but one step needs 2000: "
        "batch_size=2000 x accum_iter=1 x 1 processes"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "only.png")
    message = error_of("dataset=folder", f"data_path={tmp_path}", "accum_iter=2")
    assert message.startswith("the dataset has 1 images, but one step needs 560")


def test_an_option_that_a_dataset_does_not_have(error_of):
    message = error_of("dataset=textures", "+dataset.options.colour=red")
    assert message.startswith(
        "dataset.options.colour: textures has no such option; expected one of image_size"
    )


# ---- Checkpoints. --------------------------------------------------------------------------------


@pytest.mark.slow
def test_checkpoints_of_an_earlier_run(run_here, error_of, tmp_path):
    exit_code, output, _ = run_here()
    checkpoint = tmp_path / "demo" / "checkpoints" / "epoch-0001-step-00000005.pth"
    assert exit_code == 0 and str(checkpoint) in output

    exit_code, output, _ = run_here()
    assert (exit_code, output) == (0, f"demo: already finished ({checkpoint})\n")
    message = error_of("epochs=2")
    assert message.startswith(f"{tmp_path}/demo already holds {checkpoint.name}: choose resume=T")

    assert not list((tmp_path / "demo" / "logs").glob("running-*")), "refused, and given back"

    assert "encoder.depth 1 -> 2" in error_of("resume=True", "encoder.depth=2")
    exit_code, _, errors = run_here("resume=changed", "encoder.depth=2")
    message = errors[1].removeprefix("error: ")
    assert exit_code == 2 and message.startswith(
        f"{tmp_path}/demo/checkpoints holds another architecture: "
        f"Error(s) in loading state_dict for LatentMIM: Missing key(s) in state_dict: "
        f'"encoder.blocks.1.norm1.weight"'
    )

    exit_code, output, _ = run_here("overwrite=True")
    assert exit_code == 0 and output.startswith(
        f"replacing 1 checkpoints of demo, the newest is {checkpoint.name}\n"
    )

    _, _, errors = run_here("resume=changed", "encoder.embed_dim=48")
    assert "size mismatch for encoder.cls_token: " in errors[1]

    message = error_of("resume=True", "batch_size=140")
    assert "images_per_step 280 -> 140, steps_per_epoch 5 -> 10" in message

    checkpoint.write_bytes(b"damaged")
    exit_code, _, errors = run_here("resume=True")
    assert exit_code == 2 and len(errors) == 2
    assert f"{checkpoint} cannot be read" in errors[0]
    assert errors[1].startswith("error: none of the 1 checkpoints in")


# ---- The same from a shell. ----------------------------------------------------------------------


def test_a_mistake_in_a_shell():
    run = subprocess.run(
        [sys.executable, "launcher.py", "--config-name=demo", "num_vis=16"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: num_vis=16: expected 1 to 14, because")
