"""Train the tiny Qwen2.5-VL: ``ivcp lab train --out runs/tiny [--config train.yaml]``.

Runs on CPU cores, one process each, gradients averaged; stops and resumes at any time (the state is written
atomically every ``save_every`` seconds and when a phase ends).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ivcp_eval.lab.tiny.processor import build_config, finish_generation_config, save_processor
from ivcp_eval.lab.tiny.tasks import MCQ_CATEGORIES, SHORT_CATEGORIES
from ivcp_eval.lab.tiny.training.average import averaged
from ivcp_eval.lab.tiny.training.batches import make_batch
from ivcp_eval.lab.tiny.training.fast import EAGER, compiled_kernels
from ivcp_eval.lab.tiny.training.losses import DenseHeads, all_losses, vision_only_losses
from ivcp_eval.runs.planning.numbers import COUNT, POSITIVE

CURVE_COLUMNS = (
    *("images", "steps", "seconds", "phase", "grounding_plain", "grounding_relation"),
    *(f"mcq_{c}" for c in MCQ_CATEGORIES),
    *("yes_no_present", "yes_no_adversarial", "yes_no_random"),
    *(f"short_{c}" for c in SHORT_CATEGORIES),
)
DEFAULT_CONFIG = Path(__file__).with_name("train.yaml")


def split_parameters(model: Any, heads: DenseHeads) -> tuple[list[Tensor], list[Tensor]]:
    """Return the matrices inside the layers (for Muon) and everything else (for AdamW)."""
    matrices: list[Tensor] = []
    others: list[Tensor] = list(heads.parameters())
    for name, parameter in model.named_parameters():
        inside = ".blocks." in name or ".layers." in name or ".merger.mlp." in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return matrices, others


def build_optimizers(model: Any, heads: DenseHeads, config: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms, biases and the dense heads."""
    matrices, others = split_parameters(model, heads)
    return [
        torch.optim.Muon(
            matrices,
            lr=config["muon_lr"],
            weight_decay=config["weight_decay"],
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=config["adam_lr"], betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Run:
    """State of one training run: model, heads, optimizers, progress."""

    def __init__(self, config: dict[str, Any], out: Path) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        torch.manual_seed(config["seed"])
        self.config, self.out = config, out
        self.kernels = compiled_kernels() if config["compile"] else EAGER
        self.model = Qwen2_5_VLForConditionalGeneration(build_config(**config["model"]))
        self.heads = DenseHeads(self.model.config.text_config.hidden_size)
        self.optimizers = build_optimizers(self.model, self.heads, config)
        self.progress = {"phase": 0, "phase_images": 0, "images": 0, "steps": 0, "seconds": 0.0}
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.base_rates = [group["lr"] for o in self.optimizers for group in o.param_groups]

    def parameters(self) -> list[Tensor]:
        """All trained parameters in a fixed order."""
        return [*self.model.parameters(), *self.heads.parameters()]

    def save(self) -> None:
        """Write the state; the old one stays whole until the new one is."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        tensors |= {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        tensors |= {f"average.{index}": v for index, v in enumerate(self.average)}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{k}": v for k, v in state.items()}
        save_file(
            {k: v.contiguous() for k, v in tensors.items()},
            self.out / "state.tmp",
            metadata={"progress": json.dumps(self.progress)},
        )
        (self.out / "state.tmp").replace(self.out / "state.safetensors")

    def load(self) -> bool:
        """Resume from the saved state; False if there is none."""
        from safetensors import safe_open

        path = self.out / "state.safetensors"
        if not path.exists():
            return False
        tensors = load_file(path)
        with safe_open(path, "pt") as handle:
            self.progress = json.loads(handle.metadata()["progress"])
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, strict=False)
        self.heads.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("heads.")})
        self.average = [
            tensors.get(f"average.{index}", p.detach()).clone() for index, p in enumerate(self.model.parameters())
        ]
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{number}."):
                    _, _, index, name = key.split(".", 3)
                    state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return True

    def export(self, folder: Path) -> None:
        """Write the averaged model in bfloat16 with its processor, loadable with ``from_pretrained``."""
        from transformers import Qwen2_5_VLForConditionalGeneration

        copy = Qwen2_5_VLForConditionalGeneration(self.model.config)
        with averaged(self.model, self.average):
            copy.load_state_dict(self.model.state_dict())
        copy = copy.to(torch.bfloat16)
        finish_generation_config(copy)
        copy.save_pretrained(folder)
        save_processor(folder)

    def set_rates(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times its configured value."""
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, rate in zip(groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def step(self, phase: dict[str, Any], rank: int, world: int) -> dict[str, float]:
        """One optimizer step on ``phase["batch"]`` images (over all processes)."""
        count = phase["batch"] // world
        sizes = phase["sizes"]
        size = tuple(sizes[self.progress["steps"] % len(sizes)])
        first = int(self.progress["images"]) + rank * count
        batch = make_batch("train", first, count, size, tuple(phase["objects"]))
        with torch.autocast("cpu", torch.bfloat16):
            if phase.get("vision_only"):
                loss, parts = vision_only_losses(self.model, self.heads, batch, torch.bfloat16, self.kernels)
            else:
                dense = phase["dense"]
                loss, parts = all_losses(self.model, self.heads, batch, dense, torch.bfloat16, self.kernels)
        loss.backward()
        average_gradients(self.parameters(), world)
        torch.nn.utils.clip_grad_norm_([p for p in self.parameters() if p.grad is not None], 1.0)
        done = self.progress["phase_images"] / phase["images"]
        start, end = phase["rate"]
        warm = min(1.0, (self.progress["phase_images"] / phase["batch"] + 1) / phase.get("warmup_steps", 20))
        self.set_rates(warm * (start + (end - start) * done))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # The average forgets what lies more than a tenth of the run, or 60 steps, back.
        forget = max(1 / 60, 1 / (1 + 0.1 * self.progress["steps"]))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], forget)
        self.progress["steps"] += 1
        self.progress["images"] += count * world
        self.progress["phase_images"] += count * world
        return {"loss": loss.item(), **parts}


def average_gradients(parameters: list[Tensor], world: int) -> None:
    """Average the gradients over the processes (parameters unused by the phase have none anywhere)."""
    if world == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]).to(torch.bfloat16)
    dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient) / world)
        start += gradient.numel()


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append ``row`` to a JSON-lines file (rows of different phases have different columns)."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")


def train(config: dict[str, Any], out: Path, rank: int, world: int, max_seconds: float) -> None:
    """Run every phase of ``config`` that is not done yet, for at most ``max_seconds``."""
    run = Run(config, out)
    resumed = run.load()
    if rank == 0:
        tqdm.write(f"{'resumed at' if resumed else 'started'} {run.progress}")
    began = saved = time.monotonic()
    bar = tqdm(disable=rank != 0, unit="img", initial=int(run.progress["images"]), mininterval=5)
    smooth: dict[str, float] = {}
    while run.progress["phase"] < len(config["phases"]):
        phase = config["phases"][int(run.progress["phase"])]
        while run.progress["phase_images"] < phase["images"]:
            tick = time.monotonic()
            parts = run.step(phase, rank, world)
            run.progress["seconds"] += time.monotonic() - tick
            bar.update(phase["batch"])
            smooth = {k: 0.9 * smooth.get(k, v) + 0.1 * v for k, v in parts.items()}
            if rank == 0 and run.progress["steps"] % config["log_every"] == 0:
                append_row(out / "log.jsonl", {**run.progress, **{k: round(v, 4) for k, v in smooth.items()}})
                bar.set_postfix({k: f"{v:.3f}" for k, v in smooth.items()})
            if rank == 0 and run.progress["steps"] % config["validate_every"] == 0 and not phase.get("vision_only"):
                validate(run, phase)
            if rank == 0 and time.monotonic() - saved > config["save_every"]:
                run.save()
                saved = time.monotonic()
            if _stop(time.monotonic() - began > max_seconds or (out / "STOP").exists(), world):
                if rank == 0:
                    run.save()
                return
        run.progress |= {"phase": run.progress["phase"] + 1, "phase_images": 0}
        if rank == 0:
            run.save()
    if rank == 0:
        run.export(out / "model")


def _stop(wish: bool, world: int) -> bool:
    """Agree among the processes on stopping."""
    if world == 1:
        return wish
    flag = torch.tensor([float(wish)])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def validate(run: Run, phase: dict[str, Any]) -> None:
    """Append teacher-forced validation accuracies to ``curve.csv``."""
    from ivcp_eval.lab.tiny.training.validation import teacher_forced

    row = {k: run.progress[k] for k in ("images", "steps", "seconds")}
    row |= {"phase": run.progress["phase"]}
    sizes = [tuple(size) for size in phase["sizes"]]
    with averaged(run.model, run.average):
        row |= teacher_forced(run.model, tuple(phase["objects"]), sizes, 120 // len(sizes), run.kernels)
    path = run.out / "curve.csv"
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=CURVE_COLUMNS, restval="")
        if fresh:
            writer.writeheader()
        writer.writerow({k: round(v, 4) for k, v in row.items()})
    tqdm.write(json.dumps({k: round(v, 3) for k, v in row.items()}))


def _worker(rank: int, world: int, config: dict[str, Any], out: str, max_seconds: float, meeting: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    train(config, Path(out), rank, world, max_seconds)
    if world > 1:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(
        prog="ivcp lab train tiny", description="Train the tiny Qwen2.5-VL on generated scenes."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for state, logs and the exported model")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML configuration")
    parser.add_argument("--processes", type=COUNT, default=2, help="CPU processes, one thread each")
    parser.add_argument("--minutes", type=POSITIVE, default=float("inf"), help="stop, resumably, after this time")
    arguments = parser.parse_args(argv)
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "STOP").unlink(missing_ok=True)
    meeting = arguments.out / f"meeting.{os.getpid()}"
    rest = (arguments.processes, config, str(arguments.out), 60 * arguments.minutes, str(meeting.absolute()))
    if arguments.processes == 1:
        _worker(0, *rest)
    else:
        torch.multiprocessing.spawn(_worker, args=rest, nprocs=arguments.processes)
    meeting.unlink(missing_ok=True)
