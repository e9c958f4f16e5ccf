"""The documentation as a site: built as `make docs` builds it, then every page is looked at in a real browser, at the
widths of a desktop and of a phone."""

from __future__ import annotations

import functools
import http.server
import json
import queue
import re
import shutil
import subprocess
import sys
import threading
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from patience import PATIENCE

pytest.importorskip("mkdocs", reason="the dev extra installs mkdocs")
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
REFERENCE = {
    "command-line.md",
    "parameters.md",
    "python.md",
    "operations.md",
    "files.md",
}  # their length is that of the thing
OUTSIDE = {"changelog.md", "contributing.md"}  # pages made from files of the repository's root
# Loads every page in a frame of both widths, and writes down what a reader would complain about.
DRIVER = r"""<!doctype html><body><script>
const raw = /```|~~~|\]\(|\*\*|!\[|\$\$|\\\(|<!--|\|---|^#{1,6} |^\|/m;
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  const loaded = new Promise(done => frame.onload = done);
  frame.src = page; document.body.append(frame); await loaded;
  const doc = frame.contentDocument, root = doc.documentElement, main = doc.querySelector("article");
  const walk = doc.createTreeWalker(main, NodeFilter.SHOW_TEXT), text = [];
  for (let node; node = walk.nextNode();) if (!node.parentElement.closest("code, script, style")) text.push(node.data);
  const seen = [...doc.images].filter(i => i.offsetParent !== null);
  await Promise.all(seen.map(i => { i.loading = "eager"; return i.decode().catch(() => 0); }));
  const found = {
    page, width, title: doc.title, scroll: root.scrollWidth - root.clientWidth,
    raw: text.filter(t => raw.test(t)), pictures: seen.filter(i => !i.naturalWidth).map(i => i.src),
    links: [...doc.querySelectorAll("a[href]")].map(a => a.href), ids: [...doc.querySelectorAll("[id]")].map(e => e.id),
    blocks: main.querySelectorAll("pre > code").length,
    copy: main.querySelectorAll("pre .md-code__button, .md-clipboard").length,
    formulas: main.querySelectorAll("math").length, bad: main.querySelectorAll("merror, .arithmatex").length,
    foreign: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name)
        .filter(n => !n.startsWith(location.origin)),
  };
  frame.remove();
  return found;
}
(async () => {
  const all = [];
  for (const page of PAGES) for (const width of [390, 1280])
    all.push(await look(page, width).catch(error => ({page, width, error: String(error)})));
  await fetch("/found", {method: "POST", body: JSON.stringify(all)});
})();
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Strict: a warning ends it (with -q mkdocs would not count them)."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    return folder


def pages(nav: object) -> list[str]:
    """The files that the navigation names, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def navigation() -> tuple[dict[str, list[str]], list[str]]:
    """Section -> its pages, and all titles."""
    text = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text())
    nav = yaml.safe_load(text)["nav"]
    titles = re.findall(r"^ *- ([^:\n]+):", text.partition("\nnav:")[2], re.M)
    return {section: pages(content) for part in nav for section, content in part.items()}, titles


def test_the_structure() -> None:
    """The sections, at most 27 pages of 30 to 200 lines besides the reference and the course, whose
    chapters have 150 to 350, and short titles."""
    sections, titles = navigation()
    assert list(sections) == ["Start", "Guides", "Learn", "Troubleshooting", "Reference", "Project"]
    assert set(sections["Reference"]) == REFERENCE
    named = [page for part in sections.values() for page in part]
    assert sorted(named) == sorted({str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} | OUTSIDE)
    counted = [page for page in named if page not in REFERENCE | OUTSIDE]
    chapters = [page for page in counted if page.startswith("learn/") and page != "learn/index.md"]
    assert len(counted) - len(chapters) <= 27
    lines = {page: len((DOCS / page).read_text().splitlines()) for page in counted}
    assert {page: n for page, n in lines.items() if page not in chapters and not 30 <= n <= 200} == {}
    assert {page: lines[page] for page in chapters if not 150 <= lines[page] <= 350} == {}
    assert [title for title in titles if len(title) > 22] == []


def test_the_site_s_files(site: Path) -> None:
    """The reference lists every verb and flag, and the public API."""
    from daybreak.cli.main import VERBS

    text = unescape((site / "command-line/index.html").read_text())
    for verb in VERBS:
        assert f'id="{verb.name}"' in text, verb.name
        for flag in (flag for p in verb.params for flag in p.opts if flag.startswith("--") and "." not in flag):
            assert flag in text, (verb.name, flag)
    text = (site / "python/index.html").read_text()
    for name in ("Config.from_target", "Config.override", "train", "plan", "load", "Run.metrics", "Error"):
        assert f">{name}<" in text, name
    assert "Unreleased" not in (site / "contributing/index.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_every_page_in_a_browser(site: Path) -> None:
    names = sorted(f"/{p.parent.relative_to(site).as_posix()}/".replace("/./", "/") for p in site.rglob("index.html"))
    assert len(names) > 25
    (site / "look.html").write_text(DRIVER.replace("PAGES", json.dumps(names)))
    found, url = look(site, "look.html")
    assert len(found) == 2 * len(names)
    assert [view for view in found if "error" in view] == []
    ids = {view["page"]: set(view["ids"]) for view in found}
    for view in found:
        where = (view["page"], view["width"])
        assert view["scroll"] <= 0, f"{where} scrolls sideways by {view['scroll']} pixels"
        assert view["raw"] == [], f"{where} shows Markdown"
        assert view["pictures"] == [], f"{where} lacks pictures"
        assert view["foreign"] == [], f"{where} loads from elsewhere"
        assert view["bad"] == 0, f"{where} has formulas that are not drawn"
        assert view["copy"] == view["blocks"], f"{where}: code without a copy button"
        for link in view["links"]:
            parts = urlsplit(urljoin(url + view["page"], link))
            if parts.netloc == urlsplit(url).netloc:
                path = unquote(parts.path)
                assert (site / path.lstrip("/")).exists(), f"{where}: {link}"
                assert not parts.fragment or path not in ids or unquote(parts.fragment) in ids[path], f"{where}: {link}"
    assert {view["page"] for view in found if view["formulas"]} >= {"/tuning/"}


def look(site: Path, page: str) -> tuple[list[dict[str, Any]], str]:
    """Open a page of the site in a browser, until its script has posted what it found. Also the server's address."""
    posted: queue.Queue[bytes] = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={site.parent / 'browser'}"]
        browser = subprocess.Popen([str(BROWSER), *flags, f"{url}/{page}"], stderr=subprocess.DEVNULL)
        try:
            return json.loads(posted.get(timeout=PATIENCE)), url
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
