"""A real headless Chromium, where there is one, with no host to be reached."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def dumped(page: Path, scratch: Path) -> tuple[str, str]:
    """The document after its scripts have run, and what the browser logged of errors in it."""
    assert CHROMIUM
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={scratch / 'profile'}", "--window-size=1280,900", "--virtual-time-budget=60000"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def asked(page: Path, scratch: Path, script: str, *libraries: str, width: int = 1280) -> Any:
    """What an expression (it may be a promise) gives in the page once its plots are drawn.

    The page's policy, which would not let it run, is taken out of a copy. That stands in a frame, since no window is as
    narrow as a telephone.
    """
    scripts = [library.replace("</script", "<\\/script") for library in libraries]
    scripts.append(
        """const wait = setInterval(async () => {
          if (document.querySelector(".chart[data-drawn=yes]") || !document.documentElement.dataset.ready) return;
          clearInterval(wait);
          let found; try { found = await (SCRIPT); } catch (error) { found = String(error.stack); }
          const told = top.document.createElement("pre"); told.id = "told";
          told.textContent = JSON.stringify(found); top.document.body.append(told);
        }, 100);""".replace("SCRIPT", script)
    )
    # The last one: a library may hold the words, too.
    head, _, tail = _POLICY.sub("", page.read_text(encoding="utf-8"), count=1).rpartition("</body>")
    text = head + "".join(f"<script>{one}</script>\n" for one in scripts) + "</body>" + tail
    frame = f'<iframe style="border:0" width="{width}" height="900" srcdoc="{html.escape(text)}"></iframe>'
    copy = scratch / "asked.html"
    copy.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">{frame}</body>', encoding="utf-8")
    document, log = dumped(copy, scratch)
    found = re.search(r'<pre id="told">(.*)</pre></body></html>\s*$', document, re.DOTALL)
    assert found, f"the page did not answer: {log[-2000:]}"
    return json.loads(html.unescape(found[1]))
