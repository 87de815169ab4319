"""A session that answers while VLMEvalKit's own loop asks: `ivcp vlmeval`, and `ivcp_eval.register`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ivcp_eval.engine.cost.predicted import Decoder, solve_budget
from ivcp_eval.interface import models, variants
from ivcp_eval.interface.failures import FAILURES, device_lost
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.registry import default_parameters, read_parameters
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement
from ivcp_eval.runs.store.journal import Journal
from ivcp_eval.vlmeval_bridge import register as bridge_register

if TYPE_CHECKING:
    from ivcp_eval.vlmeval_bridge.model import BridgedVLM, Message


@dataclass
class LiveAnswers:
    """Answers one message after the other; with a journal, never the same one twice."""

    session: Session
    variant: Variant
    journal: Journal | None = None

    def __call__(self, message: Message, dataset: str | None) -> str:
        """The text that is scored; a sample that fails is journalled with its error.

        Raises:
            RuntimeError: the sample failed and there is no journal, or the process lost its GPU, as all others would.
        """
        from ivcp_eval.vlmeval_bridge.datasets import message_key

        key = message_key(message)
        known = self.journal.records.get(key) if self.journal else None
        if known is not None and known.is_settled:
            return known.scored
        answer = self._answer(message, dataset)
        if self.journal:
            self.journal.append(key, answer)
        elif answer.error:
            raise RuntimeError(answer.error)
        if answer.error and device_lost(self.session.model):
            line = answer.error.partition("\n")[0]
            raise RuntimeError(f"this process lost its GPU ({line}); run the same command again to continue")
        return answer.scored

    def _answer(self, message: Message, dataset: str | None) -> Answer:
        from ivcp_eval.vlmeval_bridge.model import benchmark_of
        from ivcp_eval.vlmeval_bridge.reading import videos

        parts = videos.parts(message)
        grounding = dataset is not None and benchmark_of(dataset).kind == "grounding"
        try:
            return self.session.answer(parts, self.variant, grounding)
        except FAILURES as error:
            # One sample must not end the run: it is kept, counted, retried next time, and marks the cell incomplete.
            return Answer.failed(error)


def live_model(session: Session, variant: Variant, journal: Journal | None = None) -> BridgedVLM:
    """VLMEvalKit's model that asks a session."""
    from ivcp_eval.vlmeval_bridge.environment import import_vlmeval

    import_vlmeval()
    from ivcp_eval.vlmeval_bridge.model import BridgedVLM, Prompting

    return BridgedVLM(variant.name, Prompting(session.adapter), LiveAnswers(session, variant, journal))


def from_variant_name(name: str) -> BridgedVLM:
    """What VLMEvalKit's registry calls: load the model of ``MODEL__METHOD__rRATIO`` on the default device."""
    variant = variants.parse(name)
    variant = replace(variant, parameters=read_parameters(variant.method, variant.parameters))
    weights = models.locate(variant.model)
    session = Session(weights, Placement().resolve(), Limits.published(weights))
    own = weights.checkpoint.methods.get(variant.method, {})
    variant = variant.tuned(own, default_parameters(variant.method))
    if variant.budget is not None:
        variant = solve_budget(variant, Decoder.of(weights))
    session.check(variant)
    return live_model(session, variant)


def register(models: Sequence[str] = ()) -> list[str]:
    """Make our models and benchmarks known to VLMEvalKit in this process (idempotent).

    Args:
        models: variant names beside the default ones, e.g. ``qwen25__fastv__r0.33``.

    Returns:
        The registered model names. Raises as `vlmeval_bridge.register`.
    """
    return bridge_register(from_variant_name, models)
