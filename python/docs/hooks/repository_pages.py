"""Makes pages of the READMEs and other documents that stand beside the code.

They stay where whoever changes the code sees them. All links lead to files of the repository, so
that they also work where these files are read; here they become links between pages, and a link to
a file that the site does not hold becomes its path. A link to nothing fails the build.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "python" / "docs" / "pages"
PAGES = {
    "README.md": "index.md",
    "python/README.md": "package.md",
    "cpp/README.md": "cpp/inside.md",
    "cpp/include/moesaic": "cpp/headers.md",
    "cpp/src/model/README.md": "cpp/architectures.md",
    "cpp/src/offload/README.md": "cpp/offload.md",
    "cuda/README.md": "cpp/cuda.md",
    "metal/README.md": "cpp/metal.md",
    "tests/README.md": "tests.md",
    "tests/bench/README.md": "bench.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}

# The mkdocs logger counts warnings, and `strict` makes them errors.
log = logging.getLogger("mkdocs.hooks.repository_pages")

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        if (DOCS / page).exists() or not (ROOT / source).is_file():
            continue  # pages that something else makes: the first one, and that of the headers
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_links(text, source, page)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    name = page.file.src_uri
    if not (DOCS / name).exists():
        return markdown
    return with_links(markdown, f"python/docs/pages/{name}", name)


def with_links(text: str, source: str, page: str) -> str:
    """Return the text of `source` with links as they must be on `page`; code stays as it is."""
    fenced = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(
        part if i % 2 else LINK.sub(lambda m: link(m, source, page), part)
        for i, part in enumerate(fenced)
    )


def link(match: re.Match[str], source: str, page: str) -> str:
    text, target = match["text"], match["target"]
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    name, _, anchor = target.partition("#")
    path = os.path.normpath(Path(source).parent / name)
    if not (ROOT / path).exists():
        log.warning("%s: a link leads to %s, which does not exist", source, path)
    if (ROOT / path).is_dir() and (ROOT / path / "README.md").exists():
        path = f"{path}/README.md"
    own = Path(path).relative_to("python/docs/pages") if "python/docs/pages/" in path else None
    leads_to = str(own) if own else PAGES.get(path)
    if leads_to:
        here = os.path.relpath(leads_to, Path(page).parent)
        return f"[{text}]({here}{'#' + anchor if anchor else ''})"
    return f"`{path}`" if path.endswith(text.strip("`/")) else f"{text} (`{path}`)"
