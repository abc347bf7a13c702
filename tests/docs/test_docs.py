"""What the pages say exists: links, commands with their options, variables, and the Python of the guide to plug-ins."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from smi_fast.cli import app

ROOT = Path(__file__).parent.parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *GUIDES]
MOST_WORDS = 1000


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(#[^)\s]*)?\)", path.read_text()):
        target = path.parent / link if link else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, anchor


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_files_that_are_named_exist(path: Path) -> None:
    for file in re.findall(r"`((?:smi_fast|examples|benchmarks|kernels|tests|docs)/[\w/]+\.\w+)`", path.read_text()):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_exist_with_their_options(path: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.S | re.M)).replace("\\\n", " ")
    for line in blocks.splitlines():
        if line.startswith("smi-fast ") and not line.startswith("smi-fast --"):
            words = shlex.split(line, comments=True)
            known = {option for each in commands[words[1]].params for option in [*each.opts, *each.secondary_opts]}
            given = {word for word in words if word.startswith("--")} - {"--help"}
            assert given <= known, line


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


def test_every_variable_is_explained_and_none_is_invented() -> None:
    sources = [
        path for folder in ("smi_fast", "kernels", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    pattern = re.compile(r"\bSMI_FAST_[A-Z_]+\b")
    used = {found for path in sources if path != Path(__file__) for found in pattern.findall(path.read_text())}
    explained = set(pattern.findall((ROOT / "docs" / "environment-variables.md").read_text()))
    assert used == explained


def test_the_guide_to_plugins_runs() -> None:
    text = (ROOT / "docs" / "recipes-and-plugins.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M))
    # dataclasses and plug-ins ask for the module that a class is from
    exec(code, {"__name__": "tests.docs.guide"})
