"""Hooks of `make docs`: what the pages link to outside docs/ becomes part of the site."""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md"}  # files of the root that are pages of the site
PLACES = {**PAGES, "README.md": "index.md"}  # where the site has what the root's files say
LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the pages of the root, and every file that a page links to outside docs/."""
    texts = {page.src_uri: page.content_string for page in files.documentation_pages()}
    for name, page in PAGES.items():
        # links of the root's files are seen from the root
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    outside = {(source, path) for source, text in texts.items() for path in LINK.findall(text)}
    for source, path in sorted(outside):
        if not (ROOT / path).is_file():
            log.warning(f"{source} links to ../{path}, which is no file")
        elif path not in PLACES and not files.get_file_from_path(target := f"repo/{path}"):
            files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's text, with links to where those files are in the site."""
    folder = posixpath.dirname(page.file.src_uri)
    if folder:  # a page of the repository, such as a table of test results
        return markdown
    return LINK.sub(lambda found: PLACES.get(found[1], f"repo/{found[1]}"), markdown)
