"""Train the second embedded model: ``ivcp lab train tiny2 --config cpu.yaml|gpu.yaml --out DIR [--minutes N]``.

Stops and resumes at any time: the state is written every ``save_every`` seconds, and a run that was killed and
resumed sees the same pictures in the same order as one that was not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ivcp_eval.lab.tiny.training.average import averaged
from ivcp_eval.lab.tiny.training.fast import EAGER, compiled_kernels, merge, tower_features
from ivcp_eval.lab.tiny2.processor import build_config, coordinate_ids
from ivcp_eval.lab.tiny2.training.batches import (
    IGNORED,
    TextBatch,
    TowerBatch,
    make_text_batch,
    make_tower_batch,
)
from ivcp_eval.lab.tiny2.training.clips import make_clip_batch
from ivcp_eval.lab.tiny2.training.decoder import decode
from ivcp_eval.lab.tiny2.training.export import export, silence
from ivcp_eval.lab.tiny2.training.state import State, build_optimizers
from ivcp_eval.lab.tiny2.training.tower import WhatHeads
from ivcp_eval.lab.tiny2.training.validation import means, predictions, score
from ivcp_eval.lab.training_log import Curve, say
from ivcp_eval.runs.planning.numbers import POSITIVE

CONFIGS = Path(__file__).parent
#: Share of a coordinate's target that each of its neighbours gets.
NEIGHBOUR_SHARE = 0.15
FOLDER_HELP = "folder of the state, the curves and the exported model"


class Run:
    """One training run: its configuration, device, precision and state."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        torch.manual_seed(config["seed"])
        self.config, self.folder = config, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = choose_dtype(self.device)
        self.kernels = compiled_kernels() if config["compile"] else EAGER
        model = Qwen2_5_VLForConditionalGeneration(build_config(**config["model"])).to(self.device)
        check_phases(config, model.config.text_config.num_hidden_layers)
        heads = WhatHeads(model.config.text_config.hidden_size).to(self.device)
        self.state = State(model, heads, config, folder)

    def losses(self, batch: TowerBatch | TextBatch, phase: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss of one batch and its parts."""
        visual = self.state.model.model.visual
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if isinstance(batch, TowerBatch):
                tokens = merge(visual, tower_features(visual, batch.images, self.dtype, self.kernels), self.kernels)
                parts = self.state.heads.losses(tokens, batch.targets)
                return torch.stack(list(parts.values())).sum(), parts
            logits = self.answer_logits(batch, phase)
        chosen = batch.labels != IGNORED
        weight = batch.weights[chosen]
        total = (answer_losses(logits, batch.labels[chosen]) * weight).sum() / weight.sum()
        return total, {}

    def answer_logits(self, batch: TextBatch, phase: dict[str, Any]) -> Tensor:
        """Logits (labels, vocabulary) at the labelled slot tokens; only the phase's decoder layers take part."""
        model = self.state.model
        visual, text = model.model.visual, model.model.language_model
        with torch.set_grad_enabled(torch.is_grad_enabled() and phase.get("tower_rate", 0) > 0):
            features = tower_features(visual, batch.images.flatten(0, 1), self.dtype, self.kernels)
        tokens = merge(visual, features, self.kernels).unflatten(0, batch.images.shape[:2]).flatten(1, 2)
        embeddings = model.get_input_embeddings()(batch.ids).to(tokens.dtype)
        embeddings = embeddings.index_copy(1, batch.layout.visual, tokens)
        layers = active_layers(len(text.layers), phase.get("layers"))
        hidden = decode(text, embeddings, batch.layout, self.kernels, layers)
        return model.lm_head(hidden[batch.labels != IGNORED]).float()

    def step(self, batch: TowerBatch | TextBatch, phase: dict[str, Any]) -> dict[str, Tensor]:
        """One optimizer step."""
        progress = self.state.progress
        loss, parts = self.losses(batch, phase)
        loss.backward()
        done = progress["phase_images"] / phase["images"]
        start, end = phase["rate"]
        warm = min(1.0, (progress["phase_images"] / phase["batch"] + 1) / phase.get("warmup_steps", 20))
        self.state.set_rates(warm * (start + (end - start) * done), phase.get("tower_rate", 1.0))
        self.state.update()
        progress["steps"] += 1
        progress["images"] += phase["batch"]
        progress["phase_images"] += phase["batch"]
        return {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is the faster one: on GPUs, and on CPUs with matrix units (timed, about a second)."""
    if device.type != "cpu":
        return torch.bfloat16
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
        torch.matmul(left, right)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < 0.4:
            torch.matmul(left, right)
            count += 1
        rates[dtype] = count
    return max(rates, key=lambda dtype: rates[dtype])


def answer_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(labels,) cross-entropies; a coordinate shares its target with its two neighbours, so that near is better."""
    scores = torch.log_softmax(logits, dim=-1)
    ids = torch.tensor(coordinate_ids(), device=labels.device)
    below = torch.arange(logits.shape[-1], device=labels.device)
    above = below.clone()
    below[ids[1:]], above[ids[:-1]] = ids[:-1], ids[1:]
    own, low, high = (scores.gather(1, t[:, None])[:, 0] for t in (labels, below[labels], above[labels]))
    return -(1 - 2 * NEIGHBOUR_SHARE) * own - NEIGHBOUR_SHARE * (low + high)


def active_layers(depth: int, count: int | None) -> list[int]:
    """Indices of ``count`` evenly spread decoder layers of ``depth`` (all for None), first and last among them."""
    if count is None or count >= depth:
        return list(range(depth))
    return [round(i * (depth - 1) / (count - 1)) for i in range(count)]


def begin_text(run: Run, phase: dict[str, Any]) -> None:
    """Go over from the pre-trained tower to the decoder: average, gain, silent layers, fresh optimizers.

    The visual tokens are scaled by ``visual_gain``, because the tower's heads leave them far larger than what the
    decoder's first layers can add to them. Layers that do not take part yet pass their input on unchanged, so that
    they can join later without a jolt.
    """
    state = run.state
    model = state.model
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), state.average)
        for parameter in model.model.visual.merger.mlp[2].parameters():
            parameter.mul_(run.config["visual_gain"])
    join_later(run, phase)
    state.optimizers = build_optimizers(model, state.heads, run.config)


def join_later(run: Run, phase: dict[str, Any]) -> None:
    """Silence, in weights and average, the layers that ``phase`` leaves out, so that they join without a jolt."""
    model = run.state.model
    silence(model, active_layers(len(model.model.language_model.layers), phase.get("layers")))
    torch._foreach_copy_(run.state.average, [p.detach() for p in model.parameters()])


class Batches(Dataset[Any]):
    """The batches of one phase by number: a pure function of configuration, phase and number."""

    def __init__(self, phase: dict[str, Any], first_image: int) -> None:
        self.phase, self.first_image = phase, first_image

    def __len__(self) -> int:
        return -(-self.phase["images"] // self.phase["batch"])

    def __getitem__(self, number: int) -> TowerBatch | TextBatch:
        parts = parts_of(self.phase)
        part, own = parts[number % len(parts)], number // len(parts)
        first = self.first_image + number * self.phase["batch"]
        return make_batch("train", first, self.phase["batch"], own, part)


def parts_of(phase: dict[str, Any]) -> list[dict[str, Any]]:
    """The kinds of batches of ``phase``, which take turns: what each of its ``parts`` adds, or the phase alone."""
    return [{**phase, **part} for part in phase.get("parts", [{}])]


def make_batch(split: str, first: int, count: int, number: int, part: dict[str, Any]) -> TowerBatch | TextBatch:
    """The batch ``number`` of its part, of the scenes from ``first`` on."""
    if part.get("clips"):
        return make_clip_batch(split, first, count, part)
    make: Callable[..., Any] = make_tower_batch if part["kind"] == "tower" else make_text_batch
    return make(split, first, count, tuple(part["sizes"][number % len(part["sizes"])]), part)


def stream(config: dict[str, Any], phase: dict[str, Any], progress: dict[str, Any]) -> Iterator[TowerBatch | TextBatch]:
    """The batches of ``phase`` that are still to come, made by ``workers`` processes (0: by this one)."""
    done = progress["phase_images"] // phase["batch"]
    batches = Batches(phase, progress["images"] - progress["phase_images"])
    workers = config["workers"]
    yield from DataLoader(
        batches,
        batch_size=None,
        sampler=range(done, len(batches)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )


def train(run: Run, seconds: float) -> bool:
    """Train for at most ``seconds``; True if every phase is done."""
    config, state = run.config, run.state
    resumed = state.load()
    # What is faster is timed anew by every process; a run that is resumed keeps what it began with.
    run.dtype = getattr(torch, state.progress.setdefault("precision", str(run.dtype).removeprefix("torch.")))
    if not resumed and config.get("tower"):
        state.load_tower(Path(config["tower"]))
        state.progress["phase"] = sum(phase["kind"] == "tower" for phase in config["phases"])
    if not resumed and config.get("start"):
        state.load_weights(Path(config["start"]))
        join_later(run, next(phase for phase in config["phases"] if phase["kind"] == "text"))
    say(f"{'resumed at' if resumed else 'started'} {state.progress}, {run.device}, {run.dtype}")
    began = saved = time.monotonic()
    while state.progress["phase"] < len(config["phases"]):
        phase = config["phases"][state.progress["phase"]]
        curve = Curve(run.folder / f"{phase['kind']}_loss.csv", state.progress["steps"])
        smooth: dict[str, Tensor] = {}
        if is_first_text(config, state.progress) and not config.get("start"):
            begin_text(run, phase)
        freeze(run, phase)
        for batch in stream(config, phase, state.progress):
            tick = time.monotonic()
            parts = run.step(batch.to(run.device), phase)
            state.progress["seconds"] += time.monotonic() - tick
            smooth = {k: v if k not in smooth else smooth[k].lerp(v, 0.1) for k, v in parts.items()}
            if state.progress["steps"] % config["log_every"] == 0:
                report(run, curve, smooth, began)
            if state.progress["steps"] % config["validate_every"] == 0:
                validate(run, phase)
            if time.monotonic() - saved > config["save_every"]:
                state.save()
                saved = time.monotonic()
            if time.monotonic() - began > seconds:
                state.save()
                return False
        state.progress |= {"phase": state.progress["phase"] + 1, "phase_images": 0}
        finish_phase(run, phase)
        state.save()
    return True


def check_phases(config: dict[str, Any], depth: int) -> None:
    """Refuse a configuration that would fail or jolt only after hours.

    Raises:
        ValueError: unknown kind of phase; or decoder layers that drop out again, whose share of the work would be lost.
    """
    known: set[int] = set()
    for number, phase in enumerate(config["phases"]):
        if phase["kind"] not in ("tower", "text"):
            raise ValueError(f"phase {number} is of kind {phase['kind']!r}; use tower or text")
        for part in phase.get("parts", []):
            if wrong := sorted(part.keys() & {"kind", "images", "batch", "layers", "rate", "tower_rate"}):
                raise ValueError(
                    f"phase {number}: one of its parts sets {', '.join(wrong)}; set that for the whole phase"
                )
        if phase["kind"] == "text":
            active = set(active_layers(depth, phase.get("layers")))
            if lost := sorted(known - active):
                raise ValueError(
                    f"phase {number} leaves out decoder layers {lost} that an earlier phase trains; "
                    "choose `layers` so that each phase's evenly spread layers hold those before (4, 6, 12 of 12)"
                )
            known = active


def is_first_text(config: dict[str, Any], progress: dict[str, Any]) -> bool:
    """Tell whether the next step is the decoder's first."""
    kinds = [phase["kind"] for phase in config["phases"][: progress["phase"] + 1]]
    return kinds[-1] == "text" and "text" not in kinds[:-1] and progress["phase_images"] == 0


def freeze(run: Run, phase: dict[str, Any]) -> None:
    """Freeze what the phase does not train."""
    visual = run.state.model.model.visual
    for parameter in visual.parameters():
        parameter.requires_grad_(phase["kind"] == "tower" or phase.get("tower_rate", 0) > 0)
    if phase["kind"] == "text":
        visual.merger.requires_grad_(True)


def finish_phase(run: Run, phase: dict[str, Any]) -> None:
    """Keep the tower for other runs when its last phase ends."""
    following = run.config["phases"][run.state.progress["phase"] :]
    if phase["kind"] == "tower" and not any(p["kind"] == "tower" for p in following):
        run.state.save_tower()


def report(run: Run, curve: Curve, smooth: dict[str, Tensor], began: float) -> None:
    """Write the smoothed losses to the curve and a progress line."""
    row = {**numbers_of(run), **{k: v.item() for k, v in smooth.items()}}
    curve.add(row)
    losses = " ".join(f"{k} {v.item():.3f}" for k, v in smooth.items())
    say(f"phase {row['phase']} images {row['images']} steps {row['steps']} {time.monotonic() - began:.0f} s: {losses}")


def numbers_of(run: Run) -> dict[str, Any]:
    """How far the run is, for a row of a curve."""
    return {name: value for name, value in run.state.progress.items() if name != "precision"}


@torch.no_grad()
def validate(run: Run, phase: dict[str, Any]) -> None:
    """Accuracies of the averaged weights on 128 validation scenes of each part of the phase, appended to a CSV."""
    row: dict[str, Any] = numbers_of(run)
    hits: dict[str, list[float]] = {}
    with (
        averaged(run.state.model, run.state.average),
        torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16),
    ):
        for part, number in ((part, number) for part in parts_of(phase) for number in range(2)):
            batch = make_batch("validation", number * 64, 64, number, part).to(run.device)
            if isinstance(batch, TowerBatch):
                visual = run.state.model.model.visual
                tokens = merge(visual, tower_features(visual, batch.images, run.dtype, run.kernels), run.kernels)
                for name, value in run.state.heads.accuracies(tokens, batch.targets).items():
                    hits.setdefault(name, []).append(value)
            else:
                found: dict[str, list[float]] = {}
                score(found, batch, predictions(run.answer_logits(batch, phase), batch.labels))
                for name, verdicts in found.items():
                    hits.setdefault(f"{part['name']}_{name}" if "name" in part else name, []).extend(verdicts)
    row |= means(hits)
    Curve(run.folder / f"{phase['kind']}_accuracy.csv", run.state.progress["steps"]).add(row)
    say(f"validation: { ({k: round(v, 3) for k, v in row.items()}) }")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options on ``parser``."""
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("cpu.yaml"),
        help="YAML configuration, or the name of a shipped one: cpu.yaml, gpu.yaml (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help=FOLDER_HELP)
    parser.add_argument("--minutes", type=POSITIVE, default=float("inf"), help="stop, resumably, after this time")


def run(args: argparse.Namespace) -> int:
    """Train as ``args`` say; 0 whether all phases are done or the time is up."""
    shipped = CONFIGS / args.config
    config = yaml.safe_load((args.config if args.config.exists() else shipped).read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    training = Run(config, args.out)
    if train(training, 60 * args.minutes):
        layers = active_layers(
            len(training.state.model.model.language_model.layers), config["phases"][-1].get("layers")
        )
        export(training.state, args.out / "model", layers)
        say(f"done: {args.out / 'model'}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="ivcp lab train tiny2", description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(arguments))
