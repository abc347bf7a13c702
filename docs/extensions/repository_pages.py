"""Pages of the site that live outside ``docs/``, and links between them.

``benchmarks/README.md``, its plots and ``CONTRIBUTING.md`` are read where they lie, so that one text serves the
repository and the site. A link is written as it works in the repository; here it is turned into the link that works on
the site. A link to a file that is no page of the site stays as it is, and the strict build refuses it.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = ("benchmarks/README.md", "CONTRIBUTING.md")
PICTURES = "benchmarks/results/*.png"
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures from outside ``docs/``, under their path in the repository."""
    for path in (*PAGES, *sorted(str(found.relative_to(ROOT)) for found in ROOT.glob(PICTURES))):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that hold in the repository into links that hold on the site."""
    outside = page.file.src_uri in PAGES
    home = page.file.src_uri if outside else f"docs/{page.file.src_uri}"

    def on_site(link: re.Match[str]) -> str:
        begin, target, anchor, end = link.groups()
        path = os.path.normpath(os.path.join(os.path.dirname(home), target))
        path = path.removeprefix("docs/")
        if files.get_file_from_path(path) is None:
            return link.group()
        relative = os.path.relpath(path, os.path.dirname(page.file.src_uri) or ".")
        return f"{begin}{relative}{anchor or ''}{end}"

    return LINK.sub(on_site, markdown)
