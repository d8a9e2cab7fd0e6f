"""The files of the site: the pages of the navigation, and the files that they link to.

A page has the same path on the site as in the repository, so relative links work on both. A linked
Python file becomes a page that shows it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
STYLE = "docs/site/extra.css"
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")  # to a file of the repository
SOURCE = re.compile(r"(\]\([^)#:\s]+\.py)(?=\))")


def in_navigation(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    entries = entry.values() if isinstance(entry, dict) else entry
    return [path for part in entries for path in in_navigation(part)]  # type: ignore[union-attr]


def linked(page: str) -> list[str]:
    """The repository's files to which a page links."""
    targets = LINK.findall((ROOT / page).read_text())
    paths = [posixpath.normpath(posixpath.join(posixpath.dirname(page), t)) for t in targets]
    return [path for path in dict.fromkeys(paths) if (ROOT / path).is_file()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    paths = in_navigation(config.nav)
    for path in paths:  # the loop appends to it
        if path.endswith(".md"):
            paths += [other for other in linked(path) if other not in paths]
    for path in [*paths, STYLE]:
        if path.endswith(".py"):
            text = f"# {Path(path).name}\n\n`{path}`\n\n```python\n{(ROOT / path).read_text()}```\n"
            files.append(File.generated(config, f"{path}.md", content=text))
        else:
            files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return SOURCE.sub(r"\1.md", markdown)
