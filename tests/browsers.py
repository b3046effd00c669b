"""A real browser, headless: what it makes of a page, read back from the page itself."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

__all__ = ["REQUIRED", "find_browser", "probe"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Set where a browser must be there, as in CI: without one the tests fail instead of being skipped.
REQUIRED = "SMT_EXT_REQUIRE_BROWSER"
# No call home, no question at a first start.
_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=3000",
)  # fmt: skip


def find_browser() -> str:
    """The browser on PATH; without one, fails if one is required, else skips."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        say = pytest.fail if os.environ.get(REQUIRED, "0") not in ("", "0") else pytest.skip
        say(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    return found


def probe(
    browser: str, page: Path, profile: Path, *, width: int, dark: bool = False, flags: Any = ()
) -> Any:
    """What a page has put into its element ``probe`` as JSON, once it is loaded.

    Raises:
        AssertionError: the browser wrote to its console, or the page has no such element.
    """
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [browser, *_QUIET, *scheme, *flags, f"--user-data-dir={profile}"]
    command += [f"--window-size={width},900", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, (done.returncode, done.stderr[-2000:])
    return json.loads(html.unescape(found[1]))
