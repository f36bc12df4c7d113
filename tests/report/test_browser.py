"""Strategy: show the page of a large run in headless Chromium, in a frame of a given width, from a server on the
loopback address that is its proxy too; a script around the frame measures what the browser made of it. That the
measures can fail is seen on a page that is wrong in every way.

Needs Chromium (Debian's package `chromium`). Without it these tests are skipped, unless CPIFT_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from peft_cpift.report.compare import compare_page
from peft_cpift.report.page import html_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Opaque colours over which a text lies, from the outermost inwards; contrast as WCAG 2 defines it.
MEASURE = """<!doctype html><title>measure</title><body>
<iframe src="page.html" style="border:0;width:WIDTHpx;height:900px"></iframe><script>
function rgba(text) {
  const numbers = text.match(/-?[\\d.]+(e-?\\d+)?/g).map(Number), srgb = text.startsWith("color(");
  const [r, g, b, a = 1] = numbers;
  return [...(srgb ? [r, g, b] : [r / 255, g / 255, b / 255]), a];
}
function luminance(c) {
  const [r, g, b] = c.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(element, view) {
  const chain = [];
  for (let e = element; e; e = e.parentElement) chain.unshift(rgba(view.getComputedStyle(e).backgroundColor));
  let under = [1, 1, 1];
  for (const c of chain) under = under.map((v, i) => v * (1 - c[3]) + c[i] * c[3]);
  const style = view.getComputedStyle(element);
  const over = rgba(element.namespaceURI.endsWith("svg") ? style.fill : style.color);
  const [a, b] = [luminance(over), luminance(under)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}
window.onload = () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll("details").forEach(d => d.open = true);
  const walker = page.createTreeWalker(page.body, 4), texts = new Set();
  while (walker.nextNode()) if (walker.currentNode.data.trim()) texts.add(walker.currentNode.parentElement);
  const found = [...texts].map(e => [contrast(e, view), e.outerHTML.slice(0, 80)]).sort((a, b) => a[0] - b[0]);
  const shown = {
    title: page.title, width: page.documentElement.clientWidth, content: page.documentElement.scrollWidth,
    paper: view.getComputedStyle(page.body).backgroundColor, contrast: found[0], text: page.body.innerText,
    svgs: [...page.querySelectorAll(".chart svg")].map(s => s.getBoundingClientRect().width),
    clipped: [...page.querySelectorAll("th, td")].filter(c => c.scrollWidth > c.clientWidth + 1).map(c => c.innerText),
    asked: view.performance.getEntriesByType("resource").map(entry => entry.name),
  };
  const out = document.createElement("pre");
  out.id = "out";
  out.textContent = JSON.stringify(shown);
  document.body.append(out);
};
</script>"""


class Server(ThreadingHTTPServer):
    """Serves one page and what measures it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, str] = {}

    def handle_error(self, request, client_address) -> None:
        """A browser may hang up on a file that it does not want."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = self.server.files.get(urlsplit(self.path).path.lstrip("/"), "").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_CONNECT(self) -> None:
        self.send_error(502)

    def log_message(self, *_) -> None:
        pass


Show = Callable[..., dict[str, Any]]


@pytest.fixture
def show(tmp_path) -> Iterator[Show]:
    """A function that shows a page and returns the measures, with what stood in the `console`."""
    if CHROMIUM is None:
        if os.environ.get("CPIFT_REQUIRE_BROWSER") == "1":
            pytest.fail("there is no Chromium: install the package chromium, or unset CPIFT_REQUIRE_BROWSER")
        pytest.skip("there is no Chromium")
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"127.0.0.1:{server.server_port}"

    def show(page: str, *, width: int = 1280, dark: bool = False) -> dict[str, Any]:
        server.files = {"page.html": page, "measure.html": MEASURE.replace("WIDTH", str(width))}
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        flags += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--enable-logging=stderr"]
        flags += [
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        ]
        # Nothing leaves this machine, whatever the page or the browser itself asks for.
        flags += [f"--proxy-server={here}", "--proxy-bypass-list=<-loopback>", "--virtual-time-budget=5000"]
        command = [CHROMIUM, *flags, "--window-size=1400,1000", "--dump-dom", f"http://{here}/measure.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        out = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
        assert out, done.stderr[-2000:]
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return json.loads(html.unescape(out[1])) | {"console": console}

    yield show
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [380, 1280])
def test_report_is_shown_whole(show, large_report, width, dark):
    shown = show(html_page(large_report), width=width, dark=dark)
    assert shown["title"] == "CPI-FT on google/gemma-3-270m"
    assert shown["console"] == []
    assert shown["asked"] == []
    assert shown["content"] <= shown["width"]
    assert shown["clipped"] == []
    assert shown["paper"] == ("rgb(18, 21, 27)" if dark else "rgb(255, 255, 255)")
    assert shown["contrast"][0] >= 4.5, shown["contrast"]  # what WCAG 2 asks of small text
    assert len(shown["svgs"]) > 20
    assert min(shown["svgs"]) > 200
    for text in ("heuristic stage 4/4", "ultrachat_200k", "Framed: the groups.", "taken from frozen coordinates"):
        assert text in shown["text"]
    assert "target_modules: all-linear" in shown["text"]  # of the folded recipe


def test_comparison_and_endless_names_fit_a_phone(show, large_report):
    endless = "x" * 200
    report = json.loads(json.dumps(large_report).replace("logiqa", endless).replace("google/gemma-3-270m", endless))
    report["warnings"] = [endless]
    for page in (html_page(report), compare_page([report, report])):
        shown = show(page, width=380)
        assert shown["content"] <= shown["width"]
        assert shown["console"] == []


def test_a_page_that_is_wrong_is_noticed(show):
    page = """<!doctype html><title>wrong</title><body style="background:#fff;margin:0">
    <p style="color:#bbb;width:900px">Pale</p><table><td style="max-width:20px;overflow:hidden">Unbreakable</table>
    <img src="http://elsewhere.example/a.png"><img src="https://secret.example/b.png">
    <script>console.error("oops")</script>"""
    shown = show(page, width=380)
    assert shown["content"] == 900
    assert shown["contrast"][0] < 2
    assert shown["clipped"] == ["Unbreakable"]
    assert any("oops" in line for line in shown["console"])
    assert shown["asked"] == ["http://elsewhere.example/a.png", "https://secret.example/b.png"]
