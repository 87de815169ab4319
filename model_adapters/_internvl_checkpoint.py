"""InternVL's original checkpoints on the native classes: names, the fused projections, the config; no remote code.

Facts: the originals' modeling_internvl_chat.py, modeling_internlm2.py and modeling_intern_vit.py in
https://github.com/OpenGVLab/InternVL (internvl_chat/internvl/model), and convert_internvl_weights_to_hf.py in
https://github.com/huggingface/transformers @ 015d3b2. Nothing is copied. docs/checkpoints.md lists every name.

InternLM2 is Llama under other names, but for ``wqkv``: its rows are, for each key/value head, the query heads that
share it, then the key head, then the value head. InternViT fuses the three plainly, queries first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Patterns are tried in order on whole names; the first that matches names the tensor.
_LANGUAGE = {
    r"model\.tok_embeddings\.weight": "model.embed_tokens.weight",
    r"output\.weight": "lm_head.weight",
    r"model\.layers\.(\d+)\.attention\.wo\.(weight|bias)": r"model.layers.\1.self_attn.o_proj.\2",
    r"model\.layers\.(\d+)\.attention_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"model\.layers\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"model\.layers\.(\d+)\.feed_forward\.w1\.weight": r"model.layers.\1.mlp.gate_proj.weight",
    r"model\.layers\.(\d+)\.feed_forward\.w2\.weight": r"model.layers.\1.mlp.down_proj.weight",
    r"model\.layers\.(\d+)\.feed_forward\.w3\.weight": r"model.layers.\1.mlp.up_proj.weight",
    r"(model\.norm\.weight)": r"\1",
    # Qwen2 has its native names already.
    r"(lm_head\.weight|model\.embed_tokens\.weight)": r"\1",
    r"(model\.layers\.\d+\.(?:self_attn|mlp|input_layernorm|post_attention_layernorm)\..*)": r"\1",
}
_FUSED_LANGUAGE = re.compile(r"model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)")


def language_tensors(name: str, tensor: Tensor, n_heads: int, n_kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    """A tensor of an InternLM2 or Qwen2 language model under the native names of Llama or Qwen2.

    Args:
        name: without the ``language_model.`` of the whole model.
        tensor: for ``wqkv``: ((H + 2 G) D, E) weight or ((H + 2 G) D,) bias.
        n_heads, n_kv_heads: H and G.

    Raises:
        ValueError: an unknown name, or a ``wqkv`` whose rows do not fit H and G.
    """
    fused = _FUSED_LANGUAGE.fullmatch(name)
    if fused is None:
        yield _renamed(name, _LANGUAGE, "language model"), tensor
        return
    layer, kind = fused.groups()
    if tensor.shape[0] % (n_heads + 2 * n_kv_heads):
        raise ValueError(f"{name} has {tensor.shape[0]} rows, which {n_heads} + 2 * {n_kv_heads} heads do not divide")
    shared = n_heads // n_kv_heads
    groups = tensor.unflatten(0, (n_kv_heads, shared + 2, -1))  # (G, H / G + 2, D, ...)
    parts = {"q": groups[:, :shared].flatten(0, 2), "k": groups[:, -2].flatten(0, 1), "v": groups[:, -1].flatten(0, 1)}
    for part, value in parts.items():
        yield f"model.layers.{layer}.self_attn.{part}_proj.{kind}", value.contiguous()


def _renamed(name: str, patterns: dict[str, str], part: str) -> str:
    for pattern, native in patterns.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(native)
    raise ValueError(f"tensor {name!r} is none that InternVL's {part} is known to have; see docs/checkpoints.md")
