"""The documentation site: complete, self-contained, and readable in a browser at two widths."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from filelock import FileLock
from playwright.sync_api import Page, sync_playwright

from questlib.errors import QuestError
from reproduce.reporting import site
from reproduce.tables.registry import all_tables

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (1280, 390)  # pixels: a desk and a phone

# ---- the whole site, built once ----


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The folder of this repository's site. All processes of a run share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "questlib-site"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
            done = subprocess.run(
                [*words, "--site-dir", str(folder)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "done").touch()
    return folder


def pages_of(folder: Path) -> list[str]:
    """Every page, seen from the folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))


@pytest.fixture(scope="session")
def parsed(built) -> dict[str, BeautifulSoup]:
    """Every page by name."""
    names = pages_of(built)
    return {name: BeautifulSoup((built / name).read_text(), "html.parser") for name in names}


def test_every_page_notebook_and_table_is_there(parsed):
    docs = ROOT / "docs"
    wanted = {p.relative_to(docs).with_suffix(".html").as_posix() for p in docs.rglob("*.md")}
    wanted |= {f"notebooks/{p.stem}.html" for p in (ROOT / "notebooks").glob("*.ipynb")}
    wanted |= {f"results/{name}.html" for name in all_tables()} | {"contributing.html"}
    assert wanted == set(parsed) - {"404.html"}
    linked = {a["href"] for a in parsed["index.html"].find_all("a", href=True)}
    assert wanted - linked <= {"index.html"}  # the sidebar leads everywhere


def test_links_hold_and_nothing_comes_from_the_network(built, parsed):
    for name, page in parsed.items():
        if name == "404.html":  # its links begin at the server's root
            continue
        for tag in page.find_all(["a", "link", "script", "img", "iframe", "source"]):
            url = urlsplit(tag.get("href") or tag.get("src") or "")
            if url.scheme:
                assert tag.name == "a" or url.scheme == "data", f"{name}: {tag}"
                continue
            path = (built / name).parent / unquote(url.path) if url.path else built / name
            assert path.exists(), f"{name}: {tag}"
            target = parsed.get(path.resolve().relative_to(built.resolve()).as_posix())
            if url.fragment and target is not None:
                assert target.find(id=unquote(url.fragment)), f"{name}: {tag}"
        styles = " ".join(map(str, page.find_all("style")))
        assert not re.search(r"@import|url\(\s*['\"]?http", styles), name


def test_formulas_are_mathml(parsed):
    assert len(parsed["method.html"].find_all("math", display="block")) >= 5
    for name, page in parsed.items():
        for code in page.find_all(["pre", "code", "script", "style", "textarea"]):
            code.extract()
        text = "" if page.article is None else page.article.get_text()
        assert not re.search(r"\$\$|\\[a-z]+\{", text), name


def test_the_search_index_has_the_words(built):
    words = json.loads((built / "search" / "search_index.json").read_text())["docs"]
    assert any("TLA" in entry["text"] for entry in words)


# ---- the parts ----


def test_links_between_pages_and_out_of_the_site():
    text = "[a](x.md) [b](../setup.py) `[c](x.md)` [d](https://example.org) ![e](p.png)"
    known = {"x.md": "y.html", "p.png": "q.png"}
    shown = "[a](y.html) b `[c](x.md)` [d](https://example.org) ![e](q.png)"
    assert site.with_links(text, known.get) == shown


def test_formulas_but_no_prices_and_no_code():
    html = site.with_mathml("Of $2^b$ for $5 or `$HOME`:\n\n$$\\tilde O$$\n")
    assert html.count("<math") == 2
    assert html.count('display="block"') == 1
    assert "for $5 or `$HOME`" in html
    with pytest.raises(QuestError, match="nosuch"):
        site.with_mathml("$\\nosuch{x}$")


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_file_that_is_no_notebook(text, tmp_path):
    (tmp_path / "a.ipynb").write_text(text)
    with pytest.raises(QuestError, match="a.ipynb: expected a Jupyter notebook"):
        site.read_notebook(tmp_path / "a.ipynb")


def test_notebooks_in_reading_order():
    names = [path.stem for path in site.notebook_paths()]
    assert names[0] == "00_tour"
    assert names[-4:] == ["30_ablation", "31_budget", "40_dit", "41_after_the_paper"]
    assert names.index("table11_cifar10") < names.index("figure02_activations")


# ---- in a browser ----


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def address(built) -> Iterator[str]:
    """The site on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=built))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    """A tab of Debian's chromium."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


def test_pages_in_a_browser(built, address, browser_page):
    """No error on the console, nothing missing, nothing from elsewhere, no page too wide."""
    faults: list[str] = []
    page = browser_page
    page.on("console", lambda m: m.type == "error" and faults.append(f"{page.url}: {m.text}"))
    page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
    page.on("requestfailed", lambda request: faults.append(f"{page.url}: lost {request.url}"))
    page.on("response", lambda r: r.status >= 400 and faults.append(f"{r.status}: {r.url}"))

    def note(url: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            faults.append(f"{page.url}: asks for {url}")

    page.on("request", lambda request: note(request.url))
    names = [name for name in pages_of(built) if name != "404.html"]
    for name in names:
        page.goto(f"{address}/{name}", wait_until="load")
        # The search field slides to its new width; what counts is where it ends.
        page.add_style_tag(content="* {transition: none !important}")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            found = page.evaluate("document.documentElement.scrollWidth")
            if found > width:
                faults.append(f"{name}: {found} pixels wide at {width}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("width", WIDTHS)
def test_search_finds_a_word(address, browser_page, width):
    page = browser_page
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{address}/index.html")
    if width < 1000:
        page.click("label[for=__search][class*=header]")
    page.locator("input[name=query]").press_sequentially("TLA")
    page.wait_for_selector(".md-search-result__item")
    assert "TLA" in page.inner_text(".md-search-result__list")
