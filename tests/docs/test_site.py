"""The site builds without a warning, its links lead somewhere, and it needs no network."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}


class Page(HTMLParser):
    """What a page is made of: links, anchors, and what a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        is_canonical = values.get("rel") in ("canonical", "next", "prev")
        self.loaded += [
            value for name, value in values.items() if (tag, name) in LOADED and not is_canonical
        ]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", "docs/mkdocs.yml"]
    run = subprocess.run(
        [sys.executable, *command, "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_links_and_anchors_lead_somewhere(pages: dict[Path, Page]):
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                anchors = pages[target].anchors
                assert unquote(parts.fragment) in anchors, f"{path.name}: {link}"
            checked += 1
    assert checked > 500


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]):
    for path, page in pages.items():
        assert page.loaded
        for address in page.loaded:
            assert not urlsplit(address).scheme or address.startswith("data:"), address
            assert (path.parent / unquote(urlsplit(address).path)).exists(), address
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text("utf-8"), style


def test_every_page_has_a_title_and_stands_in_the_navigation(site: Path, pages: dict[Path, Page]):
    sources = ROOT / "docs" / "pages"
    written = {
        str(path.relative_to(sources).with_suffix(".html")) for path in sources.rglob("*.md")
    }
    assert {str(path.relative_to(site)) for path in pages} == written
    linked = {urlsplit(link).path for link in pages[site / "index.html"].links}
    assert written <= linked | {"index.html"}


def test_search_needs_no_server(site: Path, pages: dict[Path, Page]):
    """The index is a script, and the site brings what runs the search without a worker."""
    assert (site / "search" / "search_index.js").read_text("utf-8").startswith("var __index = ")
    shim = "javascripts/iframe-worker.js"
    assert (site / shim).is_file()
    for path, page in pages.items():
        assert any(address.endswith(shim) for address in page.loaded), path


def test_a_reader_can_choose_light_or_dark_and_go_on(site: Path):
    text = (site / "quickstart.html").read_text("utf-8")
    for needed in (
        'data-md-color-scheme="slate"',
        "md-footer__link--next",
        "md-footer__link--prev",
    ):
        assert needed in text
    assert 'href="https://github.com/mor-layers/mor_layers"' in text
    assert 'data-md-component="source"' not in text  # it would ask GitHub for stars
