"""What the pages say holds: links, files, commands, options, variables, the recipe and the plug-ins they show."""

import importlib.util
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from smi_fast import InversionConfig
from smi_fast.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
RECIPES = ROOT / "docs" / "recipes-and-plugins.md"
VARIABLES = ROOT / "docs" / "environment-variables.md"
CODE = ("kernels", "smi_fast", "benchmarks", "examples", "tests")
MOST_WORDS = 1000


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language; a line that ends in a backslash is joined with the next."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [re.sub(r"\\\n\s*", "", body) for tag, body in found if tag == language]


def lines_of_commands(path: Path) -> list[str]:
    return [line for block in blocks(path.read_text()) for line in block.splitlines()]


def anchors(path: Path) -> set[str]:
    """What the headings of a page can be linked as."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.S | re.M)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(
        r"`((?:smi_fast|examples|benchmarks|kernels|tests|docs|constraints)/[\w/.-]*)`", path.read_text()
    ):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short_and_keeps_what_is_called_from_outside() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= MOST_WORDS
    lines = lines_of_commands(ROOT / "README.md")
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in lines}


def test_the_site_shows_every_page() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    shown = set(re.findall(r"[\w./-]+\.md", json.dumps(nav)))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert shown == pages | {"CONTRIBUTING.md", "benchmarks/README.md"}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_reference_is_of_modules_that_exist(path: Path) -> None:
    for module in re.findall(r"^::: ([\w.]+)$", path.read_text(), re.M):
        assert importlib.util.find_spec(module) is not None, module


@cache
def options() -> dict[str, set[str]]:
    """By command, all its options."""
    group: Any = typer.main.get_command(app)
    return {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()
    }


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_exist_with_their_options(path: Path) -> None:
    for line in lines_of_commands(path):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words[:1] == ["smi-fast"]:
            assert words[1] in options(), line
            assert {word for word in words if word.startswith("--")} <= options()[words[1]] | {"--help"}, line
        elif words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
        elif words[:2] == ["python", "-m"] and words[2] == "benchmarks":
            assert importlib.util.find_spec("benchmarks.__main__"), line
            assert words[3] in ("list", "run", "render"), line
        elif words[:1] == ["python"]:
            assert (ROOT / words[1]).is_file(), line


def test_options_that_the_text_names_exist() -> None:
    known = set().union(*options().values()) | {"--help", "--version"}
    for path in PAGES:
        for name in re.findall(r"`(--[a-z][a-z0-9-]*)", path.read_text()):
            assert name in known | {"--check", "--write"}, f"{name_of(path)}: {name}"


def test_every_command_is_shown() -> None:
    shown = {
        shlex.split(line, comments=True)[1]
        for line in lines_of_commands(ROOT / "docs" / "command-line.md")
        if line.startswith("smi-fast ")
    }
    assert shown == set(options())


def sources() -> list[Path]:
    files = [path for folder in CODE for suffix in ("py", "sh") for path in (ROOT / folder).rglob(f"*.{suffix}")]
    return [path for path in files if path != Path(__file__)]


def test_the_page_of_variables_has_those_of_the_code_and_no_others() -> None:
    pattern = r"SMI_FAST_[A-Z]+(?:_[A-Z]+)*"
    used = {name for path in sources() for name in re.findall(pattern, path.read_text())}
    described = set(re.findall(rf"^\| `({pattern})` \|", VARIABLES.read_text(), re.M))
    assert described == used


def test_variables_of_others_that_are_read_are_on_the_page() -> None:
    pattern = r'(?:environ(?:\.get)?[\[(]|getenv\(|_VARIABLE = )\s*"([A-Z][A-Z_]+)"'
    described = set(re.findall(r"`([A-Z][A-Z_]+)`", VARIABLES.read_text()))
    for path in sources():
        assert set(re.findall(pattern, path.read_text())) <= described, path


def test_the_recipe_that_is_shown_is_the_one_that_is_saved() -> None:
    (shown,) = (json.loads(block) for block in blocks(RECIPES.read_text(), "json"))
    config = InversionConfig.from_dict(shown)
    assert json.loads(json.dumps(config.to_dict())) == shown
    assert config == InversionConfig(iterations=400, stops=((50, 0.3), (100, 0.3)), seed=0)


def test_the_prior_and_the_strategy_that_are_shown_run() -> None:
    code = "\n".join(blocks(RECIPES.read_text(), "python"))
    exec(code, {"__name__": "documented_plugins"})
