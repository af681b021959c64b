"""The pages: what they link to exists, and their code blocks are fenced, with a language."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """What the page links to inside the repository: a path, an anchor, or both."""
    found = re.findall(r"\]\(([^()\s]+)\)", prose(page))
    return [link for link in found if "://" not in link]


def test_the_anchor_of_a_heading() -> None:
    assert {"what-is-computed", "above-4096-features-one-scale-a-row"} <= anchors(ROOT / "docs" / "numerics.md")
    assert "min_features" in anchors(ROOT / "docs" / "options.md")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=[*NAMES, "CONTRIBUTING.md"])
def test_files_that_a_page_names_are_there(page: Path) -> None:
    files = re.findall(r"\b(?:fp8fx|passes|tests|benchmarks|examples)/[\w/]+\.(?:py|json|txt)\b", page.read_text())
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_page_is_linked() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    assert set(PAGES[1:]) <= linked


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "coverage.md"])  # which is generated
def test_code_is_fenced(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)
    assert all(fences[::2]), "a block without a language"
    assert not any(fences[1::2])
    assert not re.search(r"^\n {4}", prose(page), flags=re.MULTILINE), "an indented block"
