"""The lock files are complete: each installed distribution and each declared dependency, pinned and hashed."""

from __future__ import annotations

import re
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FILES = ("requirements.lock", "requirements-cuda.lock")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def blocks(file: str) -> list[list[str]]:
    """Each entry of a lock file: the requirement, then its options."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / file).read_text())
    return [re.split(r" +\\\n +", block) for block in re.split(r"\n(?! )", text.strip())]


def locked() -> dict[str, str]:
    """The pinned version of each distribution, by normalised name."""
    pins = [Requirement(block[0]) for file in FILES for block in blocks(file)]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


@pytest.mark.parametrize("file", FILES)
def test_every_entry_is_one_version_with_hashes(file: str) -> None:
    names = []
    for requirement, *options in blocks(file):
        assert re.match(r"[\w.-]+==[\w.]+( ;|$)", requirement), requirement
        assert options, f"{requirement} has no hash"
        assert all(map(HASH.fullmatch, options)), f"{requirement}: {options}"
        names.append(canonicalize_name(Requirement(requirement).name))
    assert names
    assert len(names) == len({*names})


def test_every_installed_distribution_is_locked() -> None:
    installed = {
        canonicalize_name(found.name): found.version.partition("+")[0]  # "+cpu" names a build, not a version
        for found in metadata.distributions(path=[sysconfig.get_path("purelib")])
    }
    pins = locked()
    assert len(installed) > 100
    assert {name: version for name, version in installed.items() if pins.get(name) != version} == {
        name: installed[name] for name in ("ivcp-eval", "pip") if name in installed
    }


def test_every_declared_dependency_is_locked_at_a_version_it_allows() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = declared["project"]["optional-dependencies"]
    wanted = [*declared["project"]["dependencies"], *declared["dependency-groups"]["lock"]]
    # flash-attn is built by hand; torchao and bitsandbytes have a lane of their own (make test-quantised)
    own = ("gpu", "quantised", "quantised-gpu")
    wanted += [line for name, lines in extras.items() if name not in own for line in lines]
    pins = locked()
    assert len(wanted) > 40
    for requirement in map(Requirement, wanted):
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned, prereleases=True), f"{requirement}: {pinned}"
