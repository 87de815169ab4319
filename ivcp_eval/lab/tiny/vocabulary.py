"""Vocabulary of the tiny model: every byte, the words and fixed phrases of its prompts, Qwen's special tokens.

A word of the vocabulary is one token, a digit is one token, and any other text falls back to bytes, so that
arbitrary prompts can be encoded without an unknown token.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

#: Qwen2.5-VL's special tokens (names as in Qwen/Qwen2.5-VL-7B-Instruct's tokenizer); ids follow the words here.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

#: Fixed phrases of the benchmark prompts and of the answer format, one token each.
PHRASES = (
    "You are a helpful assistant.",
    '{"bbox_2d": [',
    "]}",
    " and output the bbox coordinates in JSON format.",
    "Please select the correct answer from the options above.",
    "Answer the question using a single word or phrase.",
    " Please answer yes or no.",
    "Question: ",
    "Options:\n",
)

#: Words that are one token with and without a leading space.
WORDS = [
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "orange",
    "cyan",
    "white",
    "black",
    "gray",
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "diamond",
    "sign",
    "circles",
    "squares",
    "triangles",
    "stars",
    "crosses",
    "rings",
    "diamonds",
    "signs",
    "solid",
    "striped",
    "small",
    "large",
    "big",
    "objects",
    "object",
    "shape",
    "shapes",
    "number",
    "image",
    "picture",
    "colour",
    "color",
    "plate",
    "left",
    "right",
    "above",
    "below",
    "of",
    "the",
    "a",
    "an",
    "is",
    "are",
    "there",
    "in",
    "on",
    "this",
    "it",
    "many",
    "how",
    "what",
    "which",
    "that",
    "has",
    "with",
    "Is",
    "Are",
    "How",
    "What",
    "Which",
    "Where",
    "Locate",
    "Please",
    "Question",
    "Options",
    "List",
    "all",
    "none",
    "answer",
    "yes",
    "no",
    "Yes",
    "No",
    "true",
    "false",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "zero",
    "shown",
    "written",
    "drawn",
    "read",
    "and",
    "or",
    "to",
    "from",
    "at",
    "by",
    "not",
    "visible",
    "see",
    "system",
    "user",
    "assistant",
    "You",
    "helpful",
    "A",
    "B",
    "C",
    "D",
    "E",
    "F",
]

#: Digits are always single tokens; ", " or ". " before a digit is one token too, so that a box stays short.
PRETOKENIZER_PATTERN = (
    r"[,.] (?=\p{N})"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

_PUNCTUATION = (", ", ". ", "?\n", ".\n", " \n", "\n\n", " ?", "??", "...")


def _byte_level(text: str) -> str:
    """Return ``text`` in the printable alphabet of byte-level BPE (a space becomes ``Ġ``)."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in pieces)


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer: 256 bytes, words, phrases, special tokens (no training, hence deterministic)."""
    vocabulary: dict[str, int] = {}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(symbol, len(vocabulary))
    for text in (*_PUNCTUATION, *(form for word in WORDS for form in (word, " " + word))):
        vocabulary.setdefault(_byte_level(text), len(vocabulary))
    # ignore_merges: a whole pre-token that is in the vocabulary is one token; everything else stays bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(phrase, special=False, normalized=False) for phrase in PHRASES])
    return tokenizer
