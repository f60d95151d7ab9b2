"""The page at `/`: files of a folder, each at its name. Knows files, never what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse

FOLDER: Final = Path(__file__).with_name("page")
INDEX: Final = "index.html"
# It loads nothing from elsewhere, and is in nobody's frame.
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def files_by_path() -> dict[str, Path]:
    """Files by their paths."""
    if not FOLDER.is_dir():
        return {}
    found = {f"/{path.name}": path for path in sorted(FOLDER.iterdir()) if path.is_file()}
    return {"/": FOLDER / INDEX, **found} if f"/{INDEX}" in found else found


def add_page(app: FastAPI) -> None:
    files = files_by_path()

    async def send_file(request: Request) -> FileResponse:
        return FileResponse(files[request.url.path], headers=HEADERS)

    for path in files:
        app.add_route(path, send_file, methods=["GET"])
