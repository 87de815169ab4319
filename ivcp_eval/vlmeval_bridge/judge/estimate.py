"""What a judge will cost, before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ivcp_eval.vlmeval_bridge.judge.questions import Question

# US dollars per million tokens (input, output), as OpenAI published them; they change, so each is overridable.
PRICES_DATE = "2025-05"
PRICES: Mapping[str, tuple[float, float]] = {
    "gpt-4o-2024-08-06": (2.50, 10.00),
    "gpt-4o-2024-11-20": (2.50, 10.00),
    "gpt-4o-mini-2024-07-18": (0.15, 0.60),
    "gpt-4-turbo-2024-04-09": (10.00, 30.00),
    "gpt-4.1-2025-04-14": (2.00, 8.00),
}
_BYTES_PER_TOKEN = 4  # of English in GPT-4o's encoding; a tokenizer would have to be downloaded
_MESSAGE_TOKENS = 4  # that the chat format adds to each message


@dataclass(frozen=True)
class Estimate:
    """Requests and tokens.

    Attributes:
        calls: requests to be sent, one per question. cached: questions whose verdict is known already.
        tokens_in, tokens_out: about; the latter at most.
        dollars: None if the price is not known.
    """

    calls: int
    cached: int
    tokens_in: int
    tokens_out: int
    dollars: float | None

    def __str__(self) -> str:
        cost = "price unknown" if self.dollars is None else f"about ${self.dollars:.2f} (prices of {PRICES_DATE})"
        return (
            f"{self.calls} calls ({self.cached} more verdicts are cached), about {self.tokens_in:,} tokens in and "
            f"at most {self.tokens_out:,} out, {cost}"
        )


def tokens(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


def estimate(
    unasked: Iterable[Question],
    cached: int,
    snapshot: str,
    price: tuple[float, float] | None = None,
    length: int | None = None,
) -> Estimate:
    """Cost of asking.

    Args:
        unasked: what will be sent (`Judge.unasked`). cached: how many need not be.
        snapshot: the model as it is sent. price: dollars per million tokens (input, output); None takes `PRICES`.
        length: of a reply, in place of the questions' own limits.
    """
    calls = tokens_in = tokens_out = 0
    for question in unasked:
        calls += 1
        tokens_in += sum(tokens(message["content"]) + _MESSAGE_TOKENS for message in question.messages)
        tokens_out += length or question.max_tokens
    price = price or PRICES.get(snapshot)
    dollars = None if price is None else (tokens_in * price[0] + tokens_out * price[1]) / 1e6
    return Estimate(calls, cached, tokens_in, tokens_out, dollars)
