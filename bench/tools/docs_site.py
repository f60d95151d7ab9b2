"""What the documentation site has beside docs/: pages of the root, and files that pages link to.

Knows mkdocs' hooks and where links lead, never what a page says. A link out of docs/, as
`../examples/embed.py`, leads to the same file on GitHub and, because it is copied, on the site.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT: Final = Path(__file__).parent.parent.parent
ROOT_PAGES: Final = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LINK: Final = re.compile(r'(\]\(|\b(?:src|srcset|href)=")([^)\s"#]+)')
PICTURE: Final = re.compile(r"<picture>.*?</picture>", re.DOTALL)
FIRST_PAGE: Final = "index.md"  # the README's place on the site
# What a browser fetches by itself when it shows a page.
FETCHED: Final = re.compile(
    r'<(?:script|img|source|iframe)[^>]+src(?:set)?="https?:'
    r'|<link[^>]+rel="(?:stylesheet|preload|icon)"[^>]+href="https?:'
)
SOURCES: Final = TemporaryDirectory(prefix="paged_kv-sources-")


@event_priority(100)  # before mkdocstrings looks at it
def on_config(config: Any) -> Any:
    """Let the reference be read from a copy of the package whose folders all have an __init__.py.

    Ours have none, and who reads sources without importing them passes over such folders.
    """
    copy = Path(SOURCES.name) / "paged_kv"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "paged_kv", copy, ignore=ignored, dirs_exist_ok=True)
    for folder in (path for path in copy.rglob("*") if path.is_dir()):
        (folder / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [SOURCES.name]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add pages of the root, and whatever pages link to beside docs/."""
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for page in list(files.documentation_pages()):
        links = (place_of(page.src_uri, link) for _, link in LINK.findall(page.content_string))
        for place in links:
            if place is not None and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    return files


def place_of(page: str, link: str) -> str | None:
    """Where the site has the file of the checkout that a page links to; None for other links."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    home = "" if page in ROOT_PAGES else "docs"
    path = posixpath.normpath(posixpath.join(home, posixpath.dirname(page), link))
    if not (ROOT / path).is_file():
        return None
    return FIRST_PAGE if path == "README.md" else path.removeprefix("docs/")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links lead to where the site has their files."""
    uri = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        place = place_of(uri, match[2])
        return (
            match[0]
            if place is None
            else match[1] + posixpath.relpath(place, posixpath.dirname(uri) or ".")
        )

    return PICTURE.sub(both_pictures, LINK.sub(moved, markdown))


def both_pictures(match: re.Match[str]) -> str:
    """A picture for dark and one for light colours, as the theme's own switch chooses them."""
    image = re.search(r'<img src="([^"]+)"([^>]*)>', match[0])
    dark = re.search(r'srcset="([^"]+)"', match[0])
    if image is None or dark is None:
        raise PluginError(f"a picture needs a source for dark colours and an img: {match[0]}")
    return "\n".join(
        f'<img src="{source}#only-{scheme}"{image[2]}>'
        for source, scheme in ((image[1], "light"), (dark[1], "dark"))
    )


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that asks other hosts for anything when it is shown."""
    fetched = FETCHED.search(output)
    if fetched is not None:
        raise PluginError(f"{page.file.src_uri} fetches from another host: {fetched[0]}")
    return output
