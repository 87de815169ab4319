"""Which pruning systems can be run now, and what the others would need (`ivcp list --methods`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from ivcp_eval import plugins
from ivcp_eval.docs import WRAPPERS, method_cards
from ivcp_eval.registry import PLUS_IVC

FILE = Path(__file__).with_suffix(".yaml")
STATES = ("planned", "gaps", "weights", "frames", "depth", "calibration", "model", "tool")


@cache
def systems() -> tuple[dict[str, str], ...]:
    """The entries of ``catalogue.yaml``.

    Raises:
        ValueError: an entry that is neither runnable nor says what it needs.
    """
    import yaml

    loaded: list[dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    for entry in loaded:
        allowed = (
            {"system", "paper", "method", "note"} if "method" in entry else {"system", "paper", "state", "why", "needs"}
        )
        if set(entry) - allowed or not allowed - {"note"} <= set(entry):
            raise ValueError(
                f"{FILE.name}: entry {entry.get('system')!r} has {sorted(entry)}, expected {sorted(allowed)}"
            )
        if entry.get("state", STATES[0]) not in STATES:
            raise ValueError(
                f"{FILE.name}: state {entry['state']!r} of {entry['system']!r} is none of {', '.join(STATES)}"
            )
    return tuple({key: str(value) for key, value in entry.items()} for entry in loaded)


def rows() -> list[dict[str, str]]:
    """One row per system: ``method or system``, ``use``, ``note``; what runs now first, by the name users type.

    ``use`` is the faithfulness label of a method that runs, "plug-in" or "refused" for an installed package's, else the
    state.
    """
    titles = {entry["method"]: entry for entry in systems() if "method" in entry}
    cards = {card.name: card for card in method_cards()}
    made = []
    for name, card in cards.items():
        entry = titles.get("fastv" + PLUS_IVC if name in WRAPPERS.values() else name, {})
        made.append(_row(name, card.faithfulness, " ".join(filter(None, (card.keeps, entry.get("note", ""))))))
    for plugin in plugins.found():
        made.append(_row(plugin.name, "refused" if plugin.problem else "plug-in", _plugin_note(plugin)))
    for entry in systems():
        if "state" in entry:
            paper = f" (arXiv {entry['paper']})" if entry["paper"] else ""
            made.append(_row(entry["system"] + paper, entry["state"], f"{entry['why']}. Needs: {entry['needs']}."))
    return made


def _plugin_note(plugin: plugins.Plugin) -> str:
    return f"from {plugin.package}" + (f"; cannot be used: {plugin.problem}" if plugin.problem else "")


def _row(name: str, use: str, note: str) -> dict[str, str]:
    return {"method or system": name, "use": use, "note": note}
