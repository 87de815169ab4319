"""EvoComp's compressor: taught which tokens an evolutionary search kept, by a GHM loss and a cosine.

A label is searched for when its example comes the first time, and kept in ``labels.jsonl``, so that the time limit of a
run and its resumption hold for the search too. A label depends on the example and the settings alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivcp_eval.engine import check_ratio
from ivcp_eval.files import damage_as_clear_error, sealed_line, unsealed_line
from ivcp_eval.interface.registry import adapter
from ivcp_eval.lab.subsets.answered import Answered
from ivcp_eval.lab.subsets.evolution import Settings, search, token_groups
from ivcp_eval.lab.training import part
from ivcp_eval.lab.training.examples import Examples
from ivcp_eval.lab.training.frozen import Encoded, Frozen
from ivcp_eval.lab.training.part import Loss
from ivcp_eval.methods._at_input import places
from ivcp_eval.methods.evocomp import HEADS, Compressor

LABELS = "labels.jsonl"


class Part(part.Part):
    """Options: ``search`` (`Settings`), ``ratio`` and ``seed`` of the labels, ``states``, ``bins``, ``separation``.

    Attributes:
        labels: found so far, by the digest of their example.
    """

    def __init__(self, frozen: Frozen, options: Mapping[str, Any], example: Encoded) -> None:
        super().__init__(frozen, options, example)
        known = [field.name for field in fields(Settings)]
        if strange := sorted({*options["search"]} - {*known}):
            raise ValueError(f"part.search has {', '.join(strange)}; it knows {', '.join(known)}")
        check_ratio(options["ratio"])
        if options["states"] < HEADS or options["states"] % HEADS or options["bins"] < 1:
            raise ValueError(
                f"part.states={options['states']} must be a multiple of the {HEADS} heads, part.bins={options['bins']} "
                "1 or more"
            )
        self.settings = Settings(**options["search"])
        self.labels: dict[str, list[int]] = {}
        self.journal: Path | None = None
        self.tell: Callable[[str], None] = lambda text: None
        answered = self.answered(example)
        self.net = Compressor(answered.embeddings.shape[-1], options["states"]).to(answered.hidden.device)

    def prepare(self, examples: Examples, folder: Path, tell: Callable[[str], None]) -> None:
        """Read the labels of an earlier run; a line that was being written when it ended is searched for again."""
        self.journal, self.tell = folder / LABELS, tell
        content = self.journal.read_bytes() if self.journal.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        with damage_as_clear_error(self.journal, "remove the file, and every label is searched for again"):
            for line in whole.splitlines():
                row = json.loads(unsealed_line(line))
                self.labels[row["key"]] = row["subset"]
        if whole != content:
            with self.journal.open("r+b") as stream:
                stream.truncate(len(whole))

    def loss(self, example: Encoded, rng: np.random.Generator, done: float) -> Loss:
        """How far the compressor is from the label."""
        answered = self.answered(example)
        kept, device = self.label(example, answered), answered.hidden.device
        words = answered.hidden[0, answered.question]
        losses, right = [], []
        for image in answered.images(self.options["ratio"]):
            target = torch.isin(image.tokens, kept).float().to(device)
            logits, states = self.net(answered.embeddings[image.tokens], words, places(image).float().to(device))
            losses.append(
                ghm(logits, target, self.options["bins"]) + self.options["separation"] * likeness(states, target)
            )
            picked = logits.detach().topk(int(target.sum())).indices
            right.append(float(target[picked].mean()))
        return torch.stack(losses).mean(), {"found": float(np.mean(right))}

    def answered(self, example: Encoded) -> Answered:
        """The example at the first layer that may be cut."""
        model, weights = self.frozen.model, self.frozen.weights
        wired = adapter(weights.family)
        facts = wired.facts(model.config, weights.family)
        return Answered.of(model, wired, facts, example.inputs, example.labels, example.layout)

    def label(self, example: Encoded, answered: Answered) -> Tensor:
        """(K,) int64: the visual tokens that the search keeps."""
        key = self._key(example)
        if key not in self.labels:
            budget = sum(image.budget for image in answered.images(self.options["ratio"]))
            vocabulary = self.frozen.model.get_input_embeddings().weight
            groups = token_groups(answered.embeddings, vocabulary).cpu()
            generator = torch.Generator().manual_seed(int(key[:15], 16))
            found = search(answered.losses, groups, budget, self.settings, generator)
            self.labels[key] = found.subset.tolist()
            row = {"key": key, "subset": self.labels[key], "loss": found.loss, "whole": answered.whole_loss()}
            row |= {"covered": found.covered, "curve": found.curve, "asked": found.asked}
            if self.journal is not None:
                with self.journal.open("ab") as stream:
                    stream.write(sealed_line(json.dumps(row).encode()))
            first, last = found.curve[0], found.curve[-1]
            self.tell(f"label {len(self.labels)}: {found.asked} subsets, fitness {first:.3f} -> {last:.3f}")
        return torch.tensor(self.labels[key])

    def _key(self, example: Encoded) -> str:
        """Of everything that a label depends on."""
        weights = self.frozen.weights
        of = {"search": vars(self.settings), "ratio": self.options["ratio"], "seed": self.options["seed"]}
        of |= {"model": weights.checkpoint.name, "revision": weights.revision, "dtype": self.frozen.placement.dtype}
        digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode())
        for name in sorted(example.inputs):
            if isinstance(example.inputs[name], Tensor):
                digest.update(example.inputs[name].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def ghm(logits: Tensor, target: Tensor, bins: int) -> Tensor:
    """Binary cross-entropy in which tokens of equally large gradients share one weight (GHM, arXiv 1811.05181).

    Args:
        logits, target: (N,). bins: of the gradient's length, which is in 0..1.
    """
    length = (logits.detach().sigmoid() - target).abs()
    number = (length * bins).long().clamp_max(bins - 1)
    count = torch.bincount(number, minlength=bins)
    weight = 1 / (count[number] * (count > 0).sum())
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="sum")


def likeness(states: Tensor, target: Tensor) -> Tensor:
    """Cosine between the mean state of kept tokens and that of the others; 0 where one side is empty."""
    kept = target.bool()
    if bool(kept.all()) or not bool(kept.any()):
        return states.new_zeros(())
    return torch.nn.functional.cosine_similarity(states[kept].mean(dim=0), states[~kept].mean(dim=0), dim=0)
