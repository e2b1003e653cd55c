"""The front page says what is there, shortly."""

import re

import pytest

from tests.forked import ROOT
from tests.test_config import shipped_keys

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
NO_KEYS = set("gpus images photos plain rounds threads".split())  # of measurements in bench/
NOT_THERE = {"configs/local/default.yaml", "bench/neighbours.py"}  # the user's; of an old commit
FOLDERS = dict.fromkeys(("models", "data", "eval", "launch", "util", "bench"), "*.py")


def named_in_file_map(folder: str) -> set[str]:
    """Lines that start with the folder, and those below that are indented."""
    file_map = README.split("## File map")[1].split("```")[1]
    part = re.search(rf"(?m)^{folder}/.*\n(?: .*\n)*", file_map).group()
    return set(re.findall(r"[\w.]+\.(?:py|md)", part))


@pytest.mark.parametrize("folder", [*FOLDERS, "docs"])
def test_the_file_map_is_true(folder):
    there = {path.name for path in (ROOT / folder).glob(FOLDERS.get(folder, "*.md"))}
    assert named_in_file_map(folder) == there - {"__init__.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_keys_and_files_that_are_named_exist(page):
    """Keys in commands and in `code`; files and folders of the project, but not NAME.py."""
    text, keys = page.read_text(), shipped_keys().keys() | NO_KEYS
    sections = {key.rsplit(".", place)[0] for key in keys for place in range(1, 3)}
    groups = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    commands = re.findall(r"(?m)^(?:python launcher|torchrun|python -m bench).*", text)
    for code in [*commands, *re.findall(r"`([^`\n]+)`", text)]:
        for key in re.findall(r"(?:^|[ '\"])[+~]{0,2}([a-z]\w*(?:\.\w+)*)=", code):
            section = key.rpartition(".")[0]
            is_free = section in ("env.slurm_extra", "env.nccl", "dataset.options")
            assert is_free or key in keys | sections | groups, key
        folders = "models|data|eval|launch|util|bench|tests|configs|figs|docs"
        for path in re.findall(rf"(?:^| )((?:{folders})/[a-z_/]+(?:\.\w+)?)(?![\w*])", code):
            assert path in NOT_THERE or (ROOT / path).exists(), path


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.split()) <= 700
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
