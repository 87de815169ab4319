"""What planning and a finished table import: each second of it is paid at every call."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

from ivcp_eval.benchmarks import expand, load
from ivcp_eval.files import PACKAGE, SWEEPS

HEAVY = ("transformers", "vlmeval", "torchvision", "pandas", "scipy.stats", "matplotlib", "openai", "datasets")
CODE = f"""
import sys
asked = []
sys.addaudithook(lambda event, args: asked.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
from ivcp_eval.cli import main
code = main(sys.argv[1:])
import resource
used = resource.getrusage(resource.RUSAGE_SELF)
print("imported", [name for name in {HEAVY} if name in sys.modules], "asked", asked)
print("torch", "torch" in sys.modules, "CPU", round(used.ru_utime + used.ru_stime))
raise SystemExit(code)
"""


def called(*arguments: str, **environment: str) -> str:
    """What ``ivcp`` prints in a process of its own, and what it imported."""
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(
        command, cwd=PACKAGE.parent, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_planning_the_papers_sweep_loads_nothing_heavy_and_asks_nobody(tmp_path: Path) -> None:
    """With weights and data of a thousand cells here, so that they are hashed and looked for."""
    text = (SWEEPS / "paper.yaml").read_text(encoding="utf-8")
    models = re.findall(r"\w+", re.findall(r"^models: \[(.*)\]$", text, re.M)[0])
    for name in models:
        folder = tmp_path / "weights" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    here = ", ".join(f"{name}: {tmp_path / 'weights' / name}" for name in models)
    spec = tmp_path / "paper.yaml"
    spec.write_text(re.sub(r"^models: .*$", f"models: {{{here}}}", text, flags=re.M), encoding="utf-8")
    for benchmark in map(load, expand(["matrix"])):
        if not benchmark.md5:
            (tmp_path / f"{benchmark.vlmeval}.tsv").write_text("index\tquestion\tanswer\timage\n1\tq\ta\tx\n")
    out = called("sweep", "plan", str(spec), "--runs", str(tmp_path / "runs"), LMUData=str(tmp_path))
    possible = re.findall(r"(\d+) of them possible here", out)
    assert int(possible[0]) > 1000
    assert "imported [] asked []" in out
    assert int(out.rsplit("CPU", 1)[1]) < 8, "2.4 s on an idle machine"


def test_the_shipped_sweep_asks_nobody(tmp_path: Path) -> None:
    """Weights of the hub that are not here are looked for on this machine alone."""
    assert "imported [] asked []" in called("sweep", "plan", "paper", HF_HOME=str(tmp_path), LMUData=str(tmp_path))
