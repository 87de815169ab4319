"""Split what uv compiled into requirements.lock and requirements-cuda.lock, and add the hash of the torch at hand."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from pathlib import Path

CUDA = re.compile(r"nvidia-|cuda-|triton==")
HEADER = """\
# {what}
# `make setup` installs it with --require-hashes; `make lock` writes it (CONTRIBUTING.md, "Pins").
"""


def main(compiled: Path, torch: Path) -> None:
    """Write both files; ``torch`` is the file that pip chooses on this machine."""
    text = compiled.read_text().strip()
    markers = Counter(re.findall(r" ; .*(?= \\$)", text, re.MULTILINE))
    common = markers.most_common(1)[0][0]  # "wherever this lock is for", said of nearly every entry
    blocks = [block.replace(f"{common} \\\n", " \\\n") for block in re.split(r"\n(?=[a-z])", text)]
    with torch.open("rb") as file:
        option = f"--hash=sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    blocks = [
        f"{block} \\\n    {option}" if block.startswith("torch==") and option not in block else block
        for block in blocks
    ]
    everything = "Every distribution of the tested environment, with the hash of each of its files on the index."
    for name, what, cuda in (
        ("requirements.lock", everything, False),
        ("requirements-cuda.lock", "What the CUDA build of torch needs besides, on Linux.", True),
    ):
        chosen = [block for block in blocks if bool(CUDA.match(block)) == cuda]
        Path(name).write_text(HEADER.format(what=what) + "\n".join(chosen) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
