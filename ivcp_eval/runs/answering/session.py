"""A loaded model that answers conversations under any variant, and says what each answer cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ivcp_eval.benchmarks import clips
from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.engine import Run, prune
from ivcp_eval.engine.cost import clock
from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.engine.fork import Ready, fork
from ivcp_eval.files import storable
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.failures import InputRefused, contained, deadline, steps
from ivcp_eval.interface.models import Weights, without_progress_bars
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.records.masks import Masks
from ivcp_eval.interface.registry import adapter, make_method
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.batching import Fits
from ivcp_eval.runs.answering.boxes import scored_box
from ivcp_eval.runs.answering.generation import finite_logits, neutral
from ivcp_eval.runs.answering.quantising import loading, quantise
from ivcp_eval.runs.answering.timing import Times
from ivcp_eval.runs.planning.placement import Limits, Placement
from model_adapters._checkpoint import refuse_broken
from model_adapters._shrink import shrink

_METHOD = "the method, or the model"
Parts = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Generated:
    """New tokens and what they were made from.

    Attributes:
        conversation: what was encoded.
        whole: the conversation before its pictures were made smaller; None if they were not. share: of their tokens.
    """

    new: torch.Tensor
    run: Run
    inputs: Mapping[str, Any]
    conversation: list[Mapping[str, Any]]
    whole: list[Mapping[str, Any]] | None
    share: float


class Session:
    """One model in memory.

    Args:
        timeout: seconds that one answer may take; None sets no limit. What is answered together may take as long as
            all of it alone, so that sharing never makes an answer late (`failures.deadline` says what is interrupted).
        fits: file that remembers how many variants fitted beside each other, for whoever loads the model so again.
    """

    def __init__(
        self,
        weights: Weights,
        placement: Placement,
        limits: Limits,
        trust_remote_code: bool = False,
        timeout: float | None = None,
        fits: Path | None = None,
    ) -> None:
        self.weights, self.placement, self.limits, self.timeout = weights, placement, limits, timeout
        self.adapter = adapter(weights.family)
        with without_progress_bars():
            self.model, self.processor = self.adapter.load(
                str(weights.source),
                revision=None,
                dtype=getattr(torch, placement.dtype),
                device=placement.device,
                attention=placement.attention,
                min_pixels=limits.min_pixels,
                max_pixels=limits.max_pixels,
                trust_remote_code=trust_remote_code,
                **loading(weights.quantised, getattr(torch, placement.dtype)),
            )
        refuse_broken(self.model, str(weights.source))
        quantise(self.model, weights.quantised)
        self.model.generation_config = neutral(self.model.generation_config)
        self._device = next(self.model.parameters()).device
        cuda = self._device.type == "cuda"
        self.device_name = torch.cuda.get_device_name(self._device) if cuda else self._device.type
        self.text_config = self.adapter.text_model(self.model).config.get_text_config()
        self.shape = DecoderShape.of(self.text_config)
        self._steps = list(steps(self.model))
        self._fits = Fits(fits)  # variants of prompts of a size

    @contained(_METHOD)
    def check(self, variant: Variant) -> None:
        """Raise ValueError now if the variant can not run on this model (unknown parameter, layer out of range).

        Also if no retention ratio holds its budget.
        """
        if variant.budget is not None and variant.budget.problem:
            raise Unsupported(variant.budget.problem)
        if make_method(variant.method).is_served:
            raise ValueError(f"method {variant.method!r} is what a server does; there is nothing to run here")
        with self._pruned(variant):
            pass

    @contained(_METHOD)
    def answer(self, parts: Parts, variant: Variant, grounding: bool = False) -> Answer:
        """Answer one conversation greedily.

        Args:
            parts: ``{"image": PIL.Image or path}``, ``{"text": str}`` and videos, decoded (`AbstractAdapter.encode`)
                or to be decoded (`clips.opened`), in order.
            grounding: also find the canonical box ``[x1, y1, x2, y2]`` (fractions of the original image), or "no box"
                where the answer holds none in the family's declared format.

        Raises:
            AnswerTimeout: it took longer than allowed. OSError: a picture cannot be decoded. clips.VideoRefused: a
                video cannot.
        """
        generated = self._generate(parts, variant)
        new, run, inputs, conversation = generated.new, generated.run, generated.inputs, generated.conversation
        if generated.whole is None:
            return self._answer(new, run, inputs, conversation, grounding)
        whole = self._visual_tokens(self._encoded(generated.whole)[0])
        answer = self._answer(new, run, inputs, conversation, grounding, whole=whole)
        # Each image may round up to one token more.
        allowed = generated.share * whole + sum("image" in part for part in parts)
        return replace(answer, over_budget=generated.run.visual_kept[0] > allowed)

    @contained(_METHOD)
    def time(self, parts: Parts, variant: Variant) -> Times:
        """Answer one conversation under the clock; raises as `answer`."""
        with clock.phases(self.model, self.adapter) as phases:
            total = clock.timed(lambda: self._generate(parts, variant), self._device)
        return Times(
            vision_ms=_round(phases.vision_ms),
            prefill_ms=round(phases.prefill_ms, 4),
            decode_ms_per_token=_round(phases.decode_ms_per_token),
            end_to_end_ms=round(total, 4),
        )

    def _generate(self, parts: Parts, variant: Variant) -> _Generated:
        with self._time(1) as check:
            conversation, whole = _decoded(parts, [variant]), None
            share = make_method(variant.method, variant.parameters).pixel_share(variant.ratio)
            if share is not None:
                if any("video" in part for part in conversation):
                    raise InputRefused(
                        f"method {variant.method!r} shrinks pictures and would leave the video as it is; show fewer "
                        "frames instead"
                    )
                whole = conversation
                conversation = [
                    {"image": shrink(part["image"], self.adapter, self.processor, share)} if "image" in part else part
                    for part in conversation
                ]
            inputs, tensors = self._encoded(conversation)
            check()
            layout = self.adapter.layout(self.processor, [conversation])
            with torch.inference_mode(), self._pruned(variant, layout) as run:
                out = self.model.generate(**tensors, **self._options)
        return _Generated(out[0, tensors["input_ids"].shape[1] :], run, inputs, conversation, whole, share or 1.0)

    def answer_all(
        self, parts: Parts, variants: Sequence[Variant], grounding: bool = False, exact: bool = False
    ) -> list[Answer]:
        """Answer one conversation under every variant, sharing what they share (`engine.fork`).

        The picture is decoded, preprocessed and encoded once; variants that change the picture, or repeat
        the baseline, run on their own.

        Args:
            parts, grounding: as for `answer`. exact: one variant after the other, for half precision.

        Returns:
            Per variant what `answer` returns.

        Raises:
            AnswerTimeout: an answer that ran on its own, or all others together, took longer than allowed.
        """
        return self._together([parts], variants, grounding, exact)[0]

    def answer_batch(
        self, conversations: Sequence[Parts], variants: Sequence[Variant], grounding: bool = False
    ) -> list[list[Answer]]:
        """`answer_all` of several conversations at once, padded to the longest; they should be about equally long.

        Returns:
            Per conversation, per variant.

        Raises:
            ValueError: the pictures are laid out differently (tiles). AnswerTimeout: as `answer_all`.
        """
        return self._together(conversations, variants, grounding, False)

    def prompt_tokens(self, parts: Parts) -> int:
        """Length of the unpruned prompt of a conversation. Raises OSError if a picture cannot be decoded."""
        return int(self._encoded(_decoded(parts))[0]["input_ids"].shape[1])

    @contained(_METHOD)
    def _together(
        self, conversations: Sequence[Parts], variants: Sequence[Variant], grounding: bool, exact: bool
    ) -> list[list[Answer]]:
        decoded = [_decoded(parts, variants) for parts in conversations]
        layouts = [dict(self.adapter.layout(self.processor, [conversation])) for conversation in decoded]
        frames = [layout.pop("frames", None) for layout in layouts]
        if any(layout != layouts[0] for layout in layouts):
            raise ValueError("the pictures of these samples are laid out differently; answer them one at a time")
        if any(frames):  # which are the rows' own
            layouts[0]["frames"] = self.adapter.layout(self.processor, decoded)["frames"]
        own = [i for i, variant in enumerate(variants) if _on_its_own(variant)]
        rest = [i for i in range(len(variants)) if i not in own]
        answered = [{i: self.answer(conversation, variants[i], grounding) for i in own} for conversation in decoded]
        if rest:
            forked = self._forked(decoded, layouts[0], [variants[i] for i in rest], grounding, exact)
            for answers, pairs in zip(answered, forked, strict=True):
                answers |= {i: answer for i, (answer, _) in zip(rest, pairs, strict=True)}
        return [[answers[i] for i in range(len(variants))] for answers in answered]

    @contained(_METHOD)
    def answer_and_runs(
        self, parts: Parts, variants: Sequence[Variant | Ready], grounding: bool = False
    ) -> list[tuple[Answer, Run]]:
        """`answer_all` that also says which tokens survived; variants that change the picture are refused."""
        conversation = _decoded(parts, variants)
        (pairs,) = self._forked(
            [conversation], self.adapter.layout(self.processor, [conversation]), variants, grounding, False
        )
        return pairs

    def _forked(
        self,
        decoded: list[list[Mapping[str, Any]]],
        layout: Mapping[str, Any],
        variants: Sequence[Variant | Ready],
        grounding: bool,
        exact: bool,
    ) -> list[list[tuple[Answer, Run]]]:
        """One pass: per conversation, per variant."""
        with self._time(len(variants) * len(decoded)) as check, torch.inference_mode():
            inputs, tensors = self._encoded(*decoded)
            check()
            size = int(tensors["input_ids"].numel())
            branches = fork(
                self.model,
                variants,
                tensors,
                layout=layout,
                exact=exact,
                at_once=self._fits.most(size),
                too_many=partial(self._fits.too_many, size),
                fitted=partial(self._fits.fitted, size),
                **self._options,
            )
        results = []
        for sample in range(len(decoded)):
            rows = [branch.run.row(sample) for branch in branches]
            results.append(
                [
                    (self._answer(branch.tokens[sample], row, inputs, decoded[sample], grounding, sample), row)
                    for branch, row in zip(branches, rows, strict=True)
                ]
            )
        return results

    def _time(self, answers: int) -> Any:
        """The time limit of so many answers made together."""
        return deadline(self._steps, None if self.timeout is None else self.timeout * answers)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            **self.adapter.stated(),
            "max_new_tokens": self.limits.max_new_tokens,
            "logits_processor": finite_logits(),
        }

    def _encoded(self, *conversations: list[Mapping[str, Any]]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """What the processor made, and the same on the model's device."""
        try:
            inputs = self.adapter.encode(self.processor, list(conversations))
        except (ValueError, ArithmeticError, IndexError) as error:
            raise InputRefused(f"the model's processor refuses the sample: {error}") from error
        return inputs, {k: v.to(self._device) if hasattr(v, "to") else v for k, v in inputs.items()}

    def _answer(
        self,
        new: torch.Tensor,
        run: Run,
        inputs: Mapping[str, Any],
        conversation: list[Mapping[str, Any]],
        grounding: bool,
        sample: int = 0,
        whole: int | None = None,
    ) -> Answer:
        """From the new tokens and the facts of one row.

        Args:
            conversation: what was asked. sample: of ``inputs``.
            whole: visual tokens of the image as it was, where a smaller one was asked about.
        """
        text = storable(self.processor.batch_decode([new], skip_special_tokens=True)[0].strip())
        frame = self.adapter.box_frame(self.processor, inputs, sample) if grounding else None
        return Answer(
            prediction=text,
            box=scored_box(text, self.adapter, frame) if grounding else None,
            device=self.device_name,
            visual_tokens=whole or run.visual_prompt[0],
            visual_kept=run.visual_kept[0],
            text_tokens=len(run.kept[0]) - run.visual_kept[0],
            visual_per_layer=tuple(layer[0] for layer in run.visual_per_layer),
            visual_cached=tuple(layer[0] for layer in run.visual_cached),
            kv_analytic=_round(run.analytic_share(0, int(new.numel()) - 1)),
            visual_pairs=tuple(layer[0] for layer in run.visual_pairs),
            visual_mlp=tuple(layer[0] for layer in run.visual_mlp),
            new_tokens=int(new.numel()),
            nonfinite_scores=sum(run.nonfinite_scores),
            masks=self._masks(run, conversation).to_text() if run.cuts else "",
        )

    def _masks(self, run: Run, conversation: list[Mapping[str, Any]]) -> Masks:
        """Of one row; what only the processor knows of where the views lie is filled in."""
        masks = run.masks()
        pictures = iter([part["image"] for part in conversation if "image" in part])
        images = []
        for image in masks.images:
            whole = image.frame is None  # frames of videos know what they show
            covered = self.adapter.covered(self.processor, next(pictures).size) if whole else None
            images.append(replace(image, views=tuple(replace(v, covers=v.covers or covered) for v in image.views)))
        return replace(masks, images=tuple(images))

    def _visual_tokens(self, inputs: Mapping[str, Any]) -> int:
        mask = self.adapter.image_mask(self.model, inputs)
        return 0 if mask is None else int(mask.sum())

    def _pruned(self, variant: Variant, layout: Mapping[str, Any] | None = None) -> Any:
        options = {**(layout or {}), **variant.parameters}
        return prune(self.model, variant.method, variant.ratio, seed=variant.seed, **options)


def _on_its_own(variant: Variant) -> bool:
    """Whether the variant shares no pass: it changes the picture, or is there to be answered apart from others."""
    method = make_method(variant.method, variant.parameters)
    return method.repeats_baseline or method.pixel_share(variant.ratio) is not None


def _decoded(parts: Parts, variants: Sequence[Variant | Ready] = ()) -> list[Mapping[str, Any]]:
    """What is shown, and of videos how they move where one of the variants asks for it."""
    methods = (v.method if isinstance(v, Ready) else make_method(v.method, v.parameters) for v in variants)
    moving = any("video" in part for part in parts) and any("motion" in method.needs for method in methods)
    return [_shown(part, moving) for part in parts]


def _shown(part: Mapping[str, Any], moving: bool) -> Mapping[str, Any]:
    if "video" in part:
        return clips.opened(part, moving)
    return {"image": decoded(part["image"])} if "image" in part else part


def _round(value: float | None) -> float | None:
    return None if value is None or value != value else round(value, 4)


def timed_load(*args: Any, **kwargs: Any) -> tuple[Session, float]:
    """A `Session` and the seconds it took to load."""
    start = time.perf_counter()
    with contained("loading the model"):
        return Session(*args, **kwargs), time.perf_counter() - start
