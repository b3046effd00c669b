"""The page in a real browser, headless: no console error, every figure visible."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from browsers import probe

# Appended to a copy of the page: what the browser made of it, as text that --dump-dom prints.
PROBE = """
<script>
(() => {
  const seen = (element) => {
    const box = element.getBoundingClientRect();
    return box.width > 20 && box.height > 20 && getComputedStyle(element).visibility === "visible";
  };
  const found = {
    errors: window.__errors,
    figures: [...document.querySelectorAll("figure")].map((f) => [f.id, seen(f)]),
    images: [...document.querySelectorAll("figure img")].map((i) => seen(i) && i.naturalWidth > 20),
    overflow: document.documentElement.scrollWidth - innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType("resource").map((r) => r.name),
  };
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.replaceChildren(out);
})();
</script>
"""
CATCH = """
<script>
window.__errors = [];
addEventListener("error", (e) => window.__errors.push(String(e.message)));
addEventListener("unhandledrejection", (e) => window.__errors.push(String(e.reason)));
for (const name of ["error", "warn"]) {
  const original = console[name].bind(console);
  console[name] = (...args) => { window.__errors.push(args.join(" ")); original(...args); };
}
</script>
"""


def _open(browser: str, page: Path, folder: Path, *, width: int, dark: bool) -> dict:
    # The page's policy lets no script run, and so not what looks at it here.
    text, policies = re.subn(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8")
    )
    assert policies == 1
    text = text.replace("<head>", f"<head>{CATCH}").replace("</body>", f"{PROBE}</body>")
    probed = folder / "probed.html"
    probed.write_text(text, encoding="utf-8")
    found: dict = probe(browser, probed, folder / "profile", width=width, dark=dark)
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 500], ids=["desktop", "phone"])
def test_page_in_a_browser(
    browser: str, page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    found = _open(browser, page, tmp_path, width=width, dark=dark)
    assert found["errors"] == []
    assert found["requests"] == []
    assert all(visible for _, visible in found["figures"]), found["figures"]
    assert len(found["figures"]) == 5
    assert found["images"] == [True] * 5
    assert found["overflow"] <= 0
    red = int(re.findall(r"\d+", found["background"])[0])
    assert red < 60 if dark else red > 200
