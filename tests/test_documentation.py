"""What README and guides say: links lead somewhere, and commands are ones that there are."""

import re
import shlex
from pathlib import Path

import pytest

import bench.__main__
import transact.__main__

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"transact": transact.__main__.build_parser, "python -m bench": bench.__main__.build_parser}


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list[tuple[str, str]]:
    """Each documented command line that one of our parsers reads, with its page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = [line.split("  #")[0].strip() for line in block.splitlines()]
            ours = [line for line in lines if line.startswith(tuple(PARSERS)) and not line.endswith("--help")]
            found += [(page.name, line) for line in ours]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text(encoding="utf-8"))
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, which is no heading there"


@pytest.mark.parametrize(("page", "line"), commands())
def test_documented_commands_are_understood(page, line):
    program = next(name for name in PARSERS if line.startswith(name))
    PARSERS[program]().parse_args(shlex.split(line.removeprefix(program)))


def test_there_are_documented_commands_of_every_kind():
    said = {line.removeprefix(program).split()[0] for program in PARSERS for _, line in commands() if program in line}
    assert {"prune", "recover", "export", "inspect", "speed", "scale", "zero-shot"} <= said
