"""One way of running a model: method, ratio or budget, parameters, and the names VLMEvalKit sees. No torch."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

BASELINE = "none"
#: Data types and kernels of attention that a model may be loaded with.
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
SEPARATOR = "__"
OWN = "own"

BudgetKind = Literal["final", "layer_mean", "flops"]
KINDS: tuple[BudgetKind, ...] = ("final", "layer_mean", "flops")
#: (visual, text) tokens of the prompt for which FLOPs are equal, where nothing else is said: about a megapixel in most
#: families, and a question with its chat template.
PROMPT = (1024, 64)
_UNSOLVED = "no ratio was found yet that holds this budget; see ivcp_eval.engine.cost.predicted.solve_budget"
_SEED, _PROMPT = "seed", "budget_prompt"  # among the parameters in a name; no method has parameters of these names
_NAME = re.compile(rf"(r|{'|'.join(KINDS)})([0-9.eE+-]+)")


@dataclass(frozen=True)
class CostTarget:
    """What a variant costs, asked for in place of its method's own retention ratio, as a share of the unpruned model.

    Attributes:
        kind: visual tokens after the last cut ("final"), visual tokens that the prefill processes, mean over decoder
            layers ("layer_mean"), or decoder FLOPs of the prefill ("flops").
        target: share in (0, 1].
        prompt: (visual, text) tokens of the prompt for which FLOPs are equal; None for the other kinds.
        problem: why no ratio holds it; empty once one was found (`engine.cost.predicted.solve_budget`).
    """

    kind: BudgetKind
    target: float
    prompt: tuple[int, int] | None = None
    problem: str = _UNSOLVED

    @property
    def label(self) -> str:
        """As the CSV has it: ``layer_mean``, ``flops(1024+64)``."""
        return self.kind if self.prompt is None else f"{self.kind}({self.prompt[0]}+{self.prompt[1]})"

    @classmethod
    def of(cls, kind: str, target: float, prompt: tuple[int, ...] | None = None) -> CostTarget | None:
        """The budget that a user named; None for "own" (or empty), the method's own ratio.

        Raises:
            ValueError: another kind, or a prompt that is not two counts of which the first is above 0.
        """
        if prompt is not None and (len(prompt) != 2 or prompt[0] < 1 or prompt[1] < 0):
            raise ValueError(f"prompt {list(prompt)} is not VISUAL TEXT, two numbers of tokens, e.g. 1024 64")
        if kind in ("", OWN):
            return None
        if kind not in KINDS:
            raise ValueError(f"budget {kind!r} is unknown; use {OWN} (the method's own ratio), {', '.join(KINDS)}")
        lengths = PROMPT if prompt is None else (prompt[0], prompt[1])
        return cls(kind, target, lengths if kind == "flops" else None)


@dataclass(frozen=True)
class Server:
    """A served engine that answers in place of a model in this process (docs/design/served.md).

    Attributes:
        base_url: of an OpenAI-compatible server, up to and including ``/v1``; without user, password or query.
        model: what is sent as ``model``; empty for the only one that the server lists.
        options: further fields of each request, such as ``repetition_penalty``; None leaves one of ours out.
        concurrency: requests under way at once.
        key: the environment variable that holds the server's key.
    """

    base_url: str
    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    key: str = "SERVED_API_KEY"

    def __post_init__(self) -> None:
        """Raises ValueError, with what is allowed."""
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base_url {_without_secrets(self.base_url)!r} must look like http://host:8000/v1")
        if url.username is not None or url.query or url.fragment:
            raise ValueError(
                f"base_url {_without_secrets(self.base_url)!r} is given with a user, password or query, and results "
                f"hold it; put the key into the environment variable {self.key}"
            )
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be a whole number above 0, got {self.concurrency}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key):
            raise ValueError("key of a server is the name of an environment variable, e.g. SERVED_API_KEY")
        if taken := {"model", "messages", "stream", "n"} & set(self.options):
            raise ValueError(f"options {', '.join(sorted(taken))} are not free to choose; e.g. max_tokens, top_p are")
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Server:
        """The server of plain values, as a sweep file has them.

        Raises:
            ValueError: an unknown key, or a value of another kind.
        """
        kinds = {"base_url": str, "model": str, "options": Mapping, "concurrency": int, "key": str}
        for name, value in given.items():
            if name not in kinds:
                raise ValueError(f"a server has no {name!r}; allowed: {', '.join(kinds)}")
            if not isinstance(value, kinds[name]) or isinstance(value, bool):
                raise ValueError(f"{name} of a server is {value!r}, which is no {kinds[name].__name__}")
        if "base_url" not in given:
            raise ValueError("a server needs a base_url, e.g. http://localhost:8000/v1")
        return cls(**given)

    @property
    def host(self) -> str:
        """``localhost:8000``."""
        return urlsplit(self.base_url).netloc

    @property
    def target(self) -> str:
        """Equal for servers that must give the same answers, whatever the variants that they stand for are called."""
        return json.dumps([self.base_url, self.model, self.options], sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """What can change an answer or a time; where the key is cannot."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "key"}


def _without_secrets(url: str) -> str:
    """A URL as errors show it."""
    return url.partition("?")[0].rpartition("@")[2][:80]


@dataclass(frozen=True)
class Variant:
    """A pruned (or, with method ``none``, unpruned) way of running one model.

    Attributes:
        model: short name. method: registered name. ratio: retention ratio in (0, 1], which the method is run at.
        parameters: of the method, as the user gave them. seed: of methods that draw.
        budget: what is held in place of a ratio of the user's; ``ratio`` is then the one that was found to hold it.
        implied: parameters that go without saying, since the checkpoint sets them to these values itself (`tuned`).
        server: who answers; None for the model in this process. What a server does to be faster, it does unseen, and
            ``ratio`` is what it was started with, as the user says.
    """

    model: str
    method: str = BASELINE
    ratio: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    budget: CostTarget | None = None
    implied: tuple[str, ...] = field(default=(), compare=False)
    server: Server | None = None

    @property
    def key(self) -> str:
        """Equal for what a user would call the same variant."""
        served = () if self.server is None else (self.server.to_json(),)
        return repr((self.model, self.method, self.share, sorted(self.parameters.items()), self.seed, *served))

    @property
    def requested(self) -> float:
        """The share that the user asked for: of visual tokens, or of what the budget counts."""
        return self.ratio if self.budget is None else self.budget.target

    @property
    def share(self) -> str:
        """``r0.5``, or ``flops0.5`` for a held budget."""
        return f"{'r' if self.budget is None else self.budget.kind}{_short(self.requested)}"

    @property
    def name(self) -> str:
        """``tiny__ivc_prune__r0.5``, with what else was asked for: ``tiny__fastv__r0.5__layer=3__seed=1``.

        Different for different variants, back by `parse`, and safe as a file name and as a model name in VLMEvalKit.
        """
        if self.method == BASELINE:
            return self.model
        shown = {key: value for key, value in self.parameters.items() if key not in self.implied}
        if self.seed:
            shown[_SEED] = self.seed
        if self.server is not None:  # told apart by it, but a server is not known by a name
            shown["server"] = f"{self.server.host}/{self.server.model}"
        if self.budget is not None and self.budget.prompt not in (None, PROMPT):
            shown[_PROMPT] = "+".join(map(str, self.budget.prompt or ()))
        parts = [f"{_safe(key)}={_safe(text_of(shown[key]))}" for key in sorted(shown)]
        return SEPARATOR.join((self.model, self.method, self.share, *parts))

    @property
    def baseline(self) -> Variant:
        """The unpruned variant of the same model."""
        return Variant(self.model)

    def tuned(self, own: Mapping[str, Any], defaults: Mapping[str, Any]) -> Variant:
        """The variant on a checkpoint: with the checkpoint's parameters where the user gave none.

        Parameters at the method's defaults are left out, so that saying them makes no other variant.

        Args:
            own: what the checkpoint sets for this method. defaults: of the method.
        """
        merged = {**own, **self.parameters}
        own, defaults, merged = (_plain(given) for given in (own, defaults, merged))
        kept = {k: v for k, v in merged.items() if k in own or k not in defaults or v != defaults[k]}
        implied = tuple(sorted(key for key in own if kept[key] == own[key]))
        return dataclasses.replace(self, parameters=kept, implied=implied)

    def to_json(self) -> dict[str, Any]:
        """As a record holds it; without a budget as before there were any, so that earlier hashes stay."""
        fields = dataclasses.asdict(self)
        del fields["implied"]
        if self.budget is None:
            del fields["budget"]
        del fields["server"]
        return fields if self.server is None else {**fields, "server": self.server.to_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Variant:
        """Back from `to_json`, through JSON."""
        budget = fields.get("budget")
        if budget is not None:
            budget = CostTarget(**{**budget, "prompt": None if budget["prompt"] is None else tuple(budget["prompt"])})
        server = Server(**fields["server"]) if fields.get("server") else None
        return cls(**{**fields, "budget": budget, "server": server})


def parse(name: str) -> Variant:
    """What `Variant.name` gave, back into a variant; the ratio is 0.5 if none is named.

    ``MODEL__METHOD__layer_mean0.6`` and the like name a budget, whose ratio is still to be found.

    Raises:
        ValueError: another form, or a ratio outside (0, 1].
    """
    model, separator, rest = name.partition(SEPARATOR)
    if model and not separator:
        return Variant(model)
    method, *parts = rest.split(SEPARATOR)
    share = parts.pop(0) if parts and "=" not in parts[0] else "r0.5"
    match = _NAME.fullmatch(share)
    try:
        value = float(match[2]) if match else 0.0
        given = dict(parameter(unquote(part)) for part in parts)
        seed, prompt = int(given.pop(_SEED, 0)), given.pop(_PROMPT, None)
        counts = None if prompt is None else tuple(int(text) for text in str(prompt).split("+"))
    except (TypeError, ValueError):
        match = None
    if not model or not method or not match or not 0 < value <= 1:
        raise ValueError(
            f"model name {name!r} is not MODEL, MODEL__METHOD or MODEL__METHOD__rRATIO with 0 < RATIO <= 1 "
            f"({', '.join(f'{kind}SHARE' for kind in KINDS)} in place of rRATIO hold a budget), and after it "
            "__KEY=VALUE for every parameter, and seed=N"
        )
    kind = OWN if match[1] == "r" else match[1]
    return Variant(model, method, value, given, seed, CostTarget.of(kind, value, counts))


def parameter(text: str) -> tuple[str, Any]:
    """``key=value`` as users write it; the value is JSON where it is JSON, else text.

    Raises:
        ValueError: it is not of this form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"parameter {text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, {"True": True, "False": False, "None": None}.get(value, value)


def numbers_of(text: str) -> list[Any] | None:
    """``2,2,2``, in brackets or not, as the list that it is; None for other text."""
    try:
        found = json.loads(f"[{text.strip().strip('()[]').removesuffix(',')}]")
    except json.JSONDecodeError:
        return None
    return found if all(isinstance(one, int | float) for one in found) else None


def text_of(value: Any) -> str:
    """A parameter's value as `parameter` reads it back; files are named by their path."""
    plain = isinstance(value, str) and parameter(f"key={value}") == ("key", value)
    return value if plain else json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with tuples as lists, as JSON gives them back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}


def _safe(text: str) -> str:
    """Percent-encoded but for what file names and `SEPARATOR` leave alone."""
    return re.sub("_(?=_|$)|(?<=_)_", "%5F", quote(text, safe="+,"))


def _short(number: float) -> str:
    """``0.5``; all digits where six do not tell numbers apart."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)
