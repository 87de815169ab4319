"""DeepSeek-VL2 on native transformers parts: SigLIP tower, MLP projector, tile layout, DeepSeek language model.

Loads the original safetensors by name; no remote code. Written from the description in
https://arxiv.org/abs/2412.10302 and the facts of https://github.com/deepseek-ai/DeepSeek-VL2 @ ef9f91e.
Which tensors are mapped where: `weights.py` and docs/checkpoints/deepseek_vl2.md.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel, SiglipVisionModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ivcp_eval.interface.names import output_cache, spelling, spellings
from model_adapters.deepseek_vl2.configuration import DeepseekVL2Config
from model_adapters.deepseek_vl2.layout import assemble
from model_adapters.deepseek_vl2.weights import register_weight_names

IMAGE_INPUTS = ("pixel_values", "images_spatial_crop", "image_sizes")


class DeepseekVL2Projector(nn.Module):
    """Joins each 2 x 2 patches and maps them to the language model: (B, P, C) -> (B, ceil(sqrt(P) / 2)^2, E)."""

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__()
        projector = config.projector_config
        self.ratio: int = projector["downsample_ratio"]
        width = projector["n_embed"] * projector["mlp_ratio"]
        sizes = [projector["input_dim"] * self.ratio**2, *[width] * (projector["depth"] - 1), projector["n_embed"]]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.GELU(), nn.Linear(before, after)]
        self.layers = nn.Sequential(*layers[1:])

    def forward(self, patches: Tensor) -> Tensor:
        """Patches beyond an odd grid's right and lower edge are zeros; a joined vector runs channel by channel."""
        side = round(patches.shape[1] ** 0.5)
        grid = patches.unflatten(1, (side, side))
        missing = -side % self.ratio
        grid = nn.functional.pad(grid, (0, 0, 0, missing, 0, missing))
        cells = grid.unflatten(1, (-1, self.ratio)).unflatten(3, (-1, self.ratio))  # B, r, 2, c, 2, C
        joined: Tensor = self.layers(cells.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2))
        return joined


class DeepseekVL2PreTrainedModel(PreTrainedModel):
    """What both classes share with transformers."""

    config_class = DeepseekVL2Config
    config: DeepseekVL2Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(spellings("cache"))  # noqa: RUF012 (copied per instance by the base class)
    # The tower's pooling head is in the published files and never run (ignore_head).
    _keys_to_ignore_on_load_unexpected = [r"vision\.attn_pool\."]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekVL2TileLayout):
            for token in (module.newline, module.separator):
                init.normal_(token, mean=0.0, std=token.numel() ** -0.5)


class DeepseekVL2TileLayout(nn.Module):
    """Puts the views of each image in a line, with the learned newline and separator tokens."""

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__()
        self.newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.separator = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.config = config

    def forward(self, views: Tensor, images_spatial_crop: Tensor) -> list[Tensor]:
        """Per row the tokens of its images (N, E), from all views (V, g g, E) and (B, I, 2) tiles (w, h)."""
        newline, separator = self.newline.to(views), self.separator.to(views)
        head = self.config.global_view_pos == "head"
        crops = [[(w, h) for w, h in row if w and h] for row in images_spatial_crop.tolist()]
        unread = iter(views.split([1 + w * h for row in crops for w, h in row]))
        rows = []
        for row in crops:
            images = [assemble(next(unread), tiles, newline, separator, head) for tiles in row]
            rows.append(torch.cat(images) if images else views.new_zeros(0, views.shape[-1]))
        return rows


def _language_model(config: Any) -> PreTrainedModel:
    if config.model_type == "deepseek_ocr2_text":  # has no entry in AutoModel
        from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

        text_model: PreTrainedModel = DeepseekOcr2TextModel._from_config(config)
        return text_model
    auto: PreTrainedModel = AutoModel.from_config(config)
    return auto


class DeepseekVL2Model(DeepseekVL2PreTrainedModel):
    """Tower, projector and decoder, without the language model head."""

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__(config)
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.projector = DeepseekVL2Projector(config)
        self.layout = DeepseekVL2TileLayout(config)
        self.language_model = _language_model(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        embedding: nn.Module = self.language_model.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, images_spatial_crop: Tensor) -> list[Tensor]:
        """Per row the tokens of all its images, (N, E); shapes as in `forward`."""
        counts = [sum(1 + w * h for w, h in row if w and h) for row in images_spatial_crop.tolist()]
        used = [pixels[:count] for pixels, count in zip(pixel_values, counts, strict=True)]
        if [pixels.shape[0] for pixels in used] != counts:
            raise ValueError(
                f"images_spatial_crop asks for {counts} views in the rows, pixel_values holds {pixel_values.shape[1]}"
            )
        projected = self.projector(self.vision_tower(torch.cat(used)).last_hidden_state)
        rows: list[Tensor] = self.layout(projected, images_spatial_crop)
        return rows

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        image_sizes: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The decoder's output.

        Args:
            input_ids: (B, S); each image stands as its `layout.n_tokens` placeholders.
            pixel_values: (B, T, 3, P, P): per row the views of its images in order, thumbnail first, zero-padded.
            images_spatial_crop: (B, I, 2) tiles (w, h) of each image, zeros where a row has fewer images.
            image_sizes: (B, I, 2) original (width, height); not used here but by whoever asks which tokens show
                padding.
            inputs_embeds: (B, S, E) instead of ``input_ids``; placeholders are then known by their embedding.
            **kwargs: as the native language model takes them.

        Raises:
            ValueError: placeholders and image tokens do not match, or images came without their tiles.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            inputs_embeds = self._with_images(input_ids, inputs_embeds, pixel_values, images_spatial_crop)
        output: BaseModelOutputWithPast = self.language_model(inputs_embeds=inputs_embeds, **kwargs)
        return output

    def _with_images(
        self, input_ids: Tensor | None, embeds: Tensor, pixel_values: Tensor, crops: Tensor | None
    ) -> Tensor:
        if crops is None or self.config.image_token_id is None:
            raise ValueError(
                "pixel_values came without images_spatial_crop, or config.image_token_id is not set: use the inputs "
                "of DeepseekVL2Processor, and set model.config.image_token_id to its image_token_id"
            )
        features = self.get_image_features(pixel_values, crops)
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, device=embeds.device)
            mask = (embeds == self.get_input_embeddings()(token).to(embeds)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        expected, got = mask.sum(1).tolist(), [row.shape[0] for row in features]
        if expected != got:
            raise ValueError(f"the rows hold {expected} image placeholders, their images make {got} tokens")
        return embeds.masked_scatter(mask[..., None].to(embeds.device), torch.cat(features).to(embeds))


class DeepseekVL2ForConditionalGeneration(DeepseekVL2PreTrainedModel, GenerationMixin):
    """DeepSeek-VL2 tiny, small and 27B, depending on the configuration of the language model."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__(config)
        self.model = DeepseekVL2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As every transformers model, from the published files or from those of `save_pretrained`."""
        register_weight_names(cls.__name__)
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every transformers model; the tensors get their published names."""
        register_weight_names(type(self).__name__)
        super().save_pretrained(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The language model head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, S or ``logits_to_keep``, vocabulary); inputs as in `DeepseekVL2Model.forward`.

        The cache is ``past_key_values`` until transformers 5.23 and ``cache`` from 5.24 on; either is taken.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            images_spatial_crop=images_spatial_crop,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{spelling("cache"): past_key_values if cache is None else cache},
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        # A number counts from the end, 0 means all; a tensor lists positions.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{spelling("cache"): output_cache(outputs)},
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As the base class; images go in once per cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in IMAGE_INPUTS:
                inputs.pop(name, None)
        return inputs
