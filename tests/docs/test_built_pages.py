"""The pages as `make docs` builds them: they fetch nothing, and fit a phone."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browsers import find_browser, probe

DOCS = Path(__file__).parents[2] / "docs"
# Attributes that make a browser fetch what they name; a link to follow is none of them.
FETCHED = {
    ("link", "href"), ("script", "src"), ("img", "src"), ("img", "srcset"), ("source", "src"),
    ("source", "srcset"), ("iframe", "src"), ("object", "data"), ("embed", "src"), ("use", "href"),
    ("video", "src"), ("audio", "src"), ("image", "href"), ("input", "src"),
}  # fmt: skip
# Shows a page in a frame as wide as a phone, and asks it for its sizes and its formulas.
PHONE = """
<!doctype html><meta charset="utf-8"><body>
<iframe src="%s" style="width: 390px; height: 844px; border: 0"></iframe>
<script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const boxes = [...page.querySelectorAll("article table, article .formula math")];
  const found = {
    wide: page.documentElement.scrollWidth,
    formulas: [...page.querySelectorAll("article math")].map((m) => m.getBoundingClientRect().width),
    // Whether what is wider than the page can be scrolled to.
    hidden: boxes.filter((e) => {
      const box = e.parentElement;
      const scrolls = ["auto", "scroll"].includes(page.defaultView.getComputedStyle(box).overflowX);
      return e.getBoundingClientRect().right > 390 && !(scrolls && box.clientWidth <= 390);
    }).length,
    scrolling: boxes.filter((e) => e.parentElement.scrollWidth > e.parentElement.clientWidth).length,
  };
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.replaceChildren(out);
});
</script>
"""


class Page(HTMLParser):
    """What a browser would fetch for a page, and its elements by name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if value is not None and (tag, name) in FETCHED:
                self.fetched.append(value)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--quiet", "-b", "html"]
    subprocess.run([*command, str(DOCS), str(output)], check=True)
    return output


def formulas_of(page: Path) -> int:
    """How many formulas a page's Markdown has."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]*`", "", text)
    return len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, flags=re.DOTALL))


def test_no_page_fetches_anything_from_elsewhere(built: Path) -> None:
    pages = sorted(built.rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        found = Page(page.read_text("utf-8")).fetched
        assert len(found) >= 4, page  # the theme's own styles and scripts
        for target in found:
            assert not re.match(r"(\w+:)?//", target), f"{page.name} fetches {target}"
            path = target.partition("?")[0].partition("#")[0]
            assert (page.parent / path).exists(), f"{page.name} fetches {target}"
    for style in built.rglob("*.css"):
        for target in re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+([^;]+)", style.read_text()):
            assert not re.match(r"(https?:)?//", "".join(target)), f"{style.name}: {target}"


def test_formulas_are_mathml(built: Path) -> None:
    counts = {page.stem: formulas_of(page) for page in DOCS.glob("*.md")}
    assert counts["how_it_works"] > 20
    for name, count in counts.items():
        text = (built / f"{name}.html").read_text("utf-8")
        assert Page(text).tags.count("math") == count, name
        assert "mathjax" not in "".join(Page(text).fetched)
        # TeX is where those look who read or copy a formula as such, and nowhere else.
        shown = re.sub(r"<annotation.*?</annotation>", "", text, flags=re.DOTALL)
        assert not re.search(r"\\(frac|text|sum|lvert|partial)\b", shown), name


@pytest.mark.parametrize("name", ["index", "how_it_works", "memory"])
def test_pages_fit_a_phone(built: Path, tmp_path: Path, name: str) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(PHONE % (built / f"{name}.html").as_uri(), encoding="utf-8")
    flags = ["--allow-file-access-from-files"]  # to look into the frame
    found = probe(find_browser(), frame, tmp_path / "profile", width=800, flags=flags)
    assert found["wide"] <= 390
    assert found["hidden"] == 0
    assert found["scrolling"] >= 1
    assert len(found["formulas"]) == formulas_of(DOCS / f"{name}.md")
    assert all(width > 4 for width in found["formulas"])
