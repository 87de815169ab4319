"""The state of a training run in one folder: weights, their average, optimizers, progress; resumable from any kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ivcp_eval.lab.tiny.training.average import averaged
from ivcp_eval.lab.training_log import write_tensors

STATE = "state.safetensors"
TOWER = "tower.safetensors"
_VISUAL = "model.visual."


class State:
    """Model, pre-training heads, optimizers and progress.

    Attributes:
        progress: ``phase``, ``phase_images``, ``images``, ``steps``, ``seconds`` so far.
        average: running average of the model's parameters, which is what is validated and exported.
    """

    def __init__(self, model: Any, heads: Any, config: dict[str, Any], folder: Path) -> None:
        self.model, self.heads, self.folder = model, heads, folder
        self.optimizers = build_optimizers(model, heads, config)
        self.base_rates = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.average = [p.detach().clone() for p in model.parameters()]
        self.progress: dict[str, Any] = {"phase": 0, "phase_images": 0, "images": 0, "steps": 0, "seconds": 0.0}

    def parameters(self) -> list[Tensor]:
        """All parameters in a fixed order."""
        return [*self.model.parameters(), *self.heads.parameters()]

    def set_rates(self, factor: float, tower: float = 1.0) -> None:
        """Set every learning rate to ``factor`` times its configured value, the tower's ``tower`` times that."""
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, rate in zip(groups, self.base_rates, strict=True):
            group["lr"] = rate * factor * (tower if group["tower"] else 1.0)

    def update(self) -> None:
        """One step of the optimizers on the gradients at hand, then of the average."""
        with_gradient = [p for p in self.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(with_gradient, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # The average forgets what lies more than a tenth of the run, or 60 steps, back.
        forget = max(1 / 60, 1 / (1 + 0.1 * self.progress["steps"]))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], forget)

    def save(self) -> None:
        """Write the state; the old one stays whole until the new one is on disk."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        tensors |= {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        tensors |= {f"average.{index}": v for index, v in enumerate(self.average)}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{k}": v for k, v in state.items()}
        metadata = {"progress": json.dumps(self.progress)}
        write_tensors(self.folder / STATE, tensors, metadata)

    def _check_shapes(self, path: Path, tensors: dict[str, Tensor]) -> None:
        own = {k: v for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        saved = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
        wrong = [
            k for k in own.keys() | saved.keys() if k not in own or k not in saved or own[k].shape != saved[k].shape
        ]
        if wrong:
            raise ValueError(
                f"{path} is the state of another model ({len(wrong)} tensors differ, e.g. {min(wrong)}); "
                "use the configuration it was made with, or another folder"
            )

    def load_weights(self, path: Path) -> None:
        """Start from the averaged weights of another run's state, with fresh optimizers and no progress.

        Or, where ``path`` is a folder, from an exported model (`lab/tiny2/model`), which has no heads.

        Raises:
            ValueError: if the state belongs to a model of another shape.
        """
        if path.is_dir():
            made = type(self.model).from_pretrained(path, dtype=torch.float32)
            tensors = {f"model.{k}": v for k, v in made.state_dict().items() if k != "lm_head.weight"}
        else:
            tensors = load_file(path)
        self._check_shapes(path, tensors)
        with torch.no_grad():
            for index, (name, parameter) in enumerate(self.model.named_parameters()):
                parameter.copy_(tensors.get(f"average.{index}", tensors[f"model.{name}"]))
                self.average[index].copy_(parameter)
        if heads := {k[6:]: v for k, v in tensors.items() if k.startswith("heads.")}:
            self.heads.load_state_dict(heads)

    def load(self) -> bool:
        """Resume from the saved state; False if there is none.

        Raises:
            ValueError: if the state belongs to a model of another shape.
        """
        path = self.folder / STATE
        if not path.exists():
            return False
        tensors = load_file(path)
        self._check_shapes(path, tensors)
        saved = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
        with safe_open(path, "pt") as handle:
            self.progress = json.loads(handle.metadata()["progress"])
        self.model.load_state_dict(saved, strict=False)
        self.heads.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("heads.")})
        with torch.no_grad():
            for index, average in enumerate(self.average):
                average.copy_(tensors[f"average.{index}"])
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{number}."):
                    _, _, parameter, name = key.split(".", 3)
                    state.setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return True

    def save_tower(self) -> None:
        """Write the averaged vision tower beside the state, for other runs to start from."""
        with averaged(self.model, self.average):
            tower = {k: v for k, v in self.model.state_dict().items() if k.startswith(_VISUAL)}
            write_tensors(self.folder / TOWER, tower, {})

    def load_tower(self, path: Path) -> None:
        """Take the vision tower of ``path``, also into the average.

        Raises:
            ValueError: if the file holds something else than this model's tower.
        """
        tower = load_file(path)
        own = {k for k in self.model.state_dict() if k.startswith(_VISUAL)}
        if tower.keys() != own:
            raise ValueError(f"{path} does not hold this model's vision tower; use one that this trainer wrote")
        self.model.load_state_dict(tower, strict=False)
        with torch.no_grad():
            torch._foreach_copy_(self.average, [p.detach() for p in self.model.parameters()])


def build_optimizers(model: nn.Module, heads: nn.Module, config: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms, biases and heads.

    Parameters without a gradient (a frozen tower, unused heads) are left alone by both.
    """
    matrices: dict[bool, list[Tensor]] = {True: [], False: []}
    others: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        tower = name.startswith(_VISUAL) and ".merger." not in name
        inside = ".blocks." in name or ".layers." in name or ".merger.mlp." in name
        (matrices if inside and parameter.ndim == 2 else others)[tower].append(parameter)
    head_group: dict[str, Any] = {"params": list(heads.parameters()), "tower": False}
    return [
        torch.optim.Muon(
            [{"params": matrices[tower], "tower": tower} for tower in (True, False)],
            lr=config["muon_lr"],
            weight_decay=config["weight_decay"],
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [head_group, *({"params": others[tower], "tower": tower} for tower in (True, False))],
            lr=config["adam_lr"],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        ),
    ]
