"""The rendered book: it builds without a warning, its links hold, a browser has no complaint."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(root, out):
    """Jupyter Book, warnings as errors."""
    run = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    environment = {**os.environ, "NO_COLOR": "1"}
    run += ["-W", "--keep-going", "--path-output", str(out), str(root)]
    return subprocess.run(run, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    done = build(ROOT, out)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "WARNING" in line]
    assert done.returncode == 0, "\n".join(said) or done.stdout + done.stderr
    return out / "_build/html"


# ---- links -------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            if key in ("href", "src") and value:
                self.links.append((tag, value))
            if key in ("id", "name"):
                self.names.add(value)


def broken_links(html):
    """Links to files or anchors that are not there, and parts of pages that come from elsewhere."""
    html = html.resolve()
    files = [file for file in html.rglob("*.html") if "_static" not in file.parts]
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in files}
    found = set()
    for file, page in pages.items():
        for tag, link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                if tag != "a" and url.scheme != "data":
                    found.add(f"{file.name}: <{tag}> is fetched from {link}")
                continue
            target = (file.parent / urllib.parse.unquote(url.path)).resolve() if url.path else file
            target = target / "index.html" if target.is_dir() else target
            anchor = urllib.parse.unquote(url.fragment)
            if not target.exists():
                found.add(f"{file.name}: no file for {link}")
            elif anchor and target in pages and anchor not in pages[target].names:
                found.add(f"{file.name}: no place for {link}")
    return sorted(found)


def test_no_link_is_broken(html):
    assert broken_links(html) == []


def test_every_exported_cell_names_its_file(html):
    for path in sorted((ROOT / "book").glob("[0-9]*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        tags = [tag for cell in notebook["cells"] for tag in cell["metadata"].get("tags", [])]
        module = notebook["metadata"]["nanolm"].get("module")
        page = (html / "book" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert page.count('<div class="cell-label') == len(
            [t for t in tags if t in ("export", "nbval-ignore-output", "approx-figure")]
        )
        assert page.count(f"nanolm/{module}.py</span></code>, cell") == tags.count("export")


def plant(folder, body, head=""):
    (folder / "index.html").write_text(
        f"<!doctype html><html><head><title>t</title><link rel=icon href='data:,'>{head}</head>"
        f"<body>{body}</body></html>"
    )


def test_broken_links_are_seen(tmp_path):
    links = ["nowhere.html", "#nowhere", "https://example.org/"]
    plant(tmp_path, "".join(f"<a href='{link}'>x</a>" for link in links) + "<img src='//a.org/x'>")
    assert len(broken_links(tmp_path)) == 3


def test_a_warning_stops_the_build(tmp_path):
    shutil.copytree(ROOT / "book/_ext", tmp_path / "book/_ext")
    shutil.copytree(ROOT / "book/_static", tmp_path / "book/_static")
    shutil.copy(ROOT / "_config.yml", tmp_path)
    shutil.copy(ROOT / "book/references.bib", tmp_path / "book")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
    (tmp_path / "book/index.md").write_text("# A book\n\nAll is well.\n")
    assert build(tmp_path, tmp_path).returncode == 0
    (tmp_path / "book/index.md").write_text("# A book\n\nSee {ref}`ch-nowhere`.\n")
    assert build(tmp_path, tmp_path).returncode != 0


# ---- the browser -------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="NO BROWSER: install chromium and chromium-driver to see the pages rendered",
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
READY = """return document.readyState == 'complete' && (!document.querySelector('.math') ||
  (window.MathJax && MathJax.startup && document.querySelectorAll('mjx-container').length > 0))"""
RAW = """
return [...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container'))
  .map(e => e.textContent.slice(0, 40))
  .concat([...document.querySelectorAll('mjx-merror')].map(e => e.dataset.mjxError))"""
FAINT = """
const light = c => {
  const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  return .2126 * r + .7152 * g + .0722 * b }
const back = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor
    if (!/, 0\\)$|transparent/.test(c)) return c }
  return 'rgb(255, 255, 255)' }
const found = []
const parts = 'p|h1|h2|.cell-label|div.cell_input pre|div.output pre|td|p a:not(.headerlink)'
for (const q of parts.split('|')) {
  const e = document.querySelector('.bd-article ' + q)
  if (!e || !e.textContent.trim()) continue
  const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x)
  const contrast = (a + .05) / (b + .05)
  if (contrast < 3.5) found.push(q + ': ' + contrast.toFixed(1)) }
return found"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


class Browser:
    """A headless browser for which no host exists but the folder it is given."""

    def __init__(self, html, profile):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        handler = functools.partial(Quiet, directory=str(html))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.base = f"http://127.0.0.1:{self.server.server_port}/"
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        hosts = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        for flag in [*FLAGS, hosts, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def close(self):
        self.driver.quit()
        self.server.shutdown()

    def run(self, script):
        return self.driver.execute_script(script)

    def size(self, width):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def visit(self, page, ready=READY):
        """Open a page; what it asked of the network, and what the console complained of."""
        self.driver.get(self.base + page)
        end = time.monotonic() + 15
        while not self.run(ready) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.2)
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        urls = [e["params"].get("request", {}).get("url", "") for e in events]
        asked = [url for url in urls if url.startswith("http") and not url.startswith(self.base)]
        said = [
            e["message"][:200] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"
        ]
        return [f"asks for {url}" for url in asked] + [f"console: {text}" for text in said]

    def complaints(self, page, width):
        """Everything on a page that a reader would stumble over."""
        self.size(width)
        found = self.visit(page) + [f"math left as source: {text}" for text in self.run(RAW)]
        wide = self.run("return document.documentElement.scrollWidth")
        if wide > width:
            found.append(f"{wide} px wide")
        for mode in ("light", "dark"):
            self.run(f"document.documentElement.dataset.theme = '{mode}'")
            time.sleep(0.05)
            found += [f"faint in the {mode}: {text}" for text in self.run(FAINT)]
        return [f"{page} at {width} px: {text}" for text in found]


@needs_browser
def test_no_page_makes_a_browser_complain(html, tmp_path):
    browser = Browser(html, tmp_path)
    try:
        pages = sorted(file.relative_to(html).as_posix() for file in html.rglob("book/*.html"))
        assert len(pages) > 3
        found = [
            c for width in (1400, 390) for page in pages for c in browser.complaints(page, width)
        ]
        found += browser.visit(
            "search.html?q=marker", "return !!document.querySelector('#search-results li')"
        )
        assert not found, "\n".join(found)
        assert browser.run("return document.querySelectorAll('#search-results li').length")
        if shots := os.environ.get("NANOLM_SHOTS"):
            for page in pages:
                for width in (1400, 390):
                    browser.size(width)
                    browser.visit(page)
                    browser.driver.save_screenshot(f"{shots}/{Path(page).stem}-{width}.png")
    finally:
        browser.close()


@needs_browser
def test_the_browser_would_complain(tmp_path):
    body = """<div class='bd-article'><p style='color: #ccc; background: #fff'>faint</p></div>
        <span class='math'>x^2</span><div style='width: 2000px'>wide</div>
        <img src='https://example.org/x.png'><script>undefined.x</script>"""
    plant(tmp_path, body, "<script>var MathJax = {}</script>")
    browser = Browser(tmp_path, tmp_path / "profile")
    try:
        found = "\n".join(browser.complaints("index.html", 390))
    finally:
        browser.close()
    for word in ("asks for https://example.org", "console: ", "math left", "px wide", "faint"):
        assert word in found
