"""The front page says what is there, shortly."""

import re

import pytest

from tests.forked import ROOT

README = (ROOT / "README.md").read_text()
FOLDERS = {"models": "*.py", "data": "*.py", "eval": "*.py", "util": "*.py", "bench": "*.py"}


def named_in_file_map(folder: str) -> set[str]:
    """Lines that start with the folder, and those below that are indented."""
    file_map = README.split("## File map")[1].split("```")[1]
    part = re.search(rf"(?m)^{folder}/.*\n(?: .*\n)*", file_map).group()
    return set(re.findall(r"[\w.]+\.(?:py|md)", part))


@pytest.mark.parametrize("folder", [*FOLDERS, "docs"])
def test_the_file_map_is_true(folder):
    there = {path.name for path in (ROOT / folder).glob(FOLDERS.get(folder, "*.md"))}
    assert named_in_file_map(folder) == there - {"__init__.py"}


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.split()) <= 700
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
