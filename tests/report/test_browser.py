"""The page in a real browser: no error, no request, no text over another, and keys that read the charts."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
from event_files import write_run

from merge_callback.report.page import page, read_runs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

QUIET = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--hide-scrollbars",
    "--dump-dom",
    *(f"--disable-{what}" for what in ("gpu", "quic", "background-networking", "component-update", "sync")),
]

LISTEN = "<script>window.errors = []; window.onerror = (text) => errors.push(text);</script>"

CHECK = """<script>
const found = { errors, requests: performance.getEntriesByType("resource").map((entry) => entry.name) };
found.width = window.innerWidth;
found.wide = document.documentElement.scrollWidth - window.innerWidth;

const figure = document.querySelector("figure.chart");
figure.focus();
const press = (key) => figure.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const tip = figure.querySelector(".tip");
const read = () => [getComputedStyle(tip).display, tip.innerText];
found.focused = document.activeElement === figure;
press("End"); found.last = read();
press("ArrowLeft"); found.before = read();
press("Escape"); found.hidden = read()[0];

const clip = (box, element) => {
  for (let e = element; e; e = e.parentElement) {
    const style = getComputedStyle(e);
    if (style.overflowX === "visible") continue;
    const outer = e.getBoundingClientRect();
    box = { left: Math.max(box.left, outer.left), right: Math.min(box.right, outer.right),
            top: Math.max(box.top, outer.top), bottom: Math.min(box.bottom, outer.bottom) };
  }
  return box;
};
function boxes() {
  const result = [];
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (!node.data.trim() || node.parentElement.closest("svg, script")) continue;
    if (!node.parentElement.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      const box = clip(rect, node.parentElement);
      if (box.right - box.left > 1 && box.bottom - box.top > 1) result.push([node.data.trim(), box]);
    }
  }
  return result;
}
const texts = () => {
  const all = boxes();
  const overlaps = [];
  all.forEach(([a, p], i) => all.slice(i + 1).forEach(([b, q]) => {
    const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (across > 1 && down > 2) overlaps.push([a, b]);
  }));
  return { count: all.length, overlaps };
};
found.closed = texts();
document.querySelectorAll("details").forEach((details) => { details.open = true; });
found.open = texts();
const color = getComputedStyle(document.body);
found.colors = [color.color, color.backgroundColor];
parent.document.body.dataset.found = JSON.stringify(found);
</script>"""


def seen(folder, html, width, *flags):
    """What a browser finds in a page."""
    inside = html.replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{CHECK}</body>")
    path = folder / "page.html"  # a window may not be as narrow as a phone, but a frame may
    path.write_text(f'<body><iframe srcdoc="{escape(inside)}" style="width:{width}px;height:900px;border:0">')
    command = [BROWSER, *QUIET, f"--user-data-dir={folder / 'browser'}", "--window-size=1400,1000", *flags]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is there")
@pytest.mark.parametrize(
    ("width", "count", "flags"), [(390, 1, ["--blink-settings=preferredColorScheme=0"]), (1280, 2, [])]
)
def test_a_browser_shows_the_page(tmp_path, width, count, flags):
    name = "validation/a_metric_with_a_rather_long_name/dataloader_idx_0"
    folders = [write_run(tmp_path / f"run-{i}", metric=name, restores=(150, 200)) for i in range(count)]

    found = seen(tmp_path, page(read_runs(folders), Path("/")), width, *flags)

    assert found["errors"] == []
    assert found["requests"] == []
    assert found["width"] == width
    assert found["wide"] <= 0
    assert found["closed"]["count"] > 100
    assert found["open"]["count"] > found["closed"]["count"]
    assert found["closed"]["overlaps"] == []
    assert found["open"]["overlaps"] == []
    assert found["focused"]
    assert found["last"][0] == "block"
    assert found["last"][1].startswith("step 400")
    assert found["before"][1].startswith("step 390")
    assert found["hidden"] == "none"
    ink, paper = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in found["colors"])
    assert (ink > paper) == bool(flags)  # light on dark, if the system is set to dark
