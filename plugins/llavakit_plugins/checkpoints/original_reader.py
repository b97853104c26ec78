"""Runs an exported folder as the original LLaVA would, with transformers' own classes.

It serves the proof of an export. Our own reader accepts all names that a tensor ever had. Other
readers do not, and leave a tensor that they do not find at random values. So here the classes that
others use must find every tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llavakit import IMAGE_ID, LlavaModel, ModelError, Shown
from llavakit.contracts.data import ImageSource
from llavakit_plugins.huggingface.hub import quietly
from llavakit_plugins.huggingface.json_files import read_json
from llavakit_plugins.huggingface.weights import Weights

_PROJECTOR = "model.mm_projector."
_OTHERS = (_PROJECTOR, "model.image_newline")


class OriginalReader:
    """A checkpoint and its tower, fed with the token ids and pixels of `ours`."""

    def __init__(self, folder: Path, tower: Path, ours: LlavaModel) -> None:
        from transformers import (
            CLIPVisionModel,
            LlamaConfig,
            LlamaForCausalLM,
            MistralConfig,
            MistralForCausalLM,
        )

        table = read_json(folder / "config.json")
        network, kind = {
            "llava_llama": (LlamaForCausalLM, LlamaConfig),
            "llava_mistral": (MistralForCausalLM, MistralConfig),
        }[table["model_type"]]
        # LLaVA's own configuration classes are not in transformers:
        # the plain ones take the rest of it
        own = {k: v for k, v in table.items() if k not in ("model_type", "rope_parameters")}
        self._ours = ours
        self._layer: int = table["mm_vision_select_layer"]
        self._first = int(table["mm_vision_select_feature"] == "patch")
        self._tower = _read(CLIPVisionModel, tower, lambda name: False)
        self._language = _read(
            network, folder, lambda name: name.startswith(_OTHERS), config=kind(**own)
        )
        self._newline_E = weights_of(folder).get("model.image_newline")
        self._points = table.get("image_grid_pinpoints")
        self._projector = _projector(folder, table)

    @torch.inference_mode()
    def logits(
        self, prompt: str, images: Sequence[ImageSource] = (), *, raw: bool = False
    ) -> Tensor:
        """Return logits `[T, V]`, float32."""
        found: Tensor = self._language(inputs_embeds=self._embeds(prompt, images, raw=raw)).logits[
            0
        ]
        return found.float()

    @torch.inference_mode()
    def generate_ids(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 64,
        raw: bool = False,
    ) -> list[int]:
        """Return the new tokens of a greedy answer."""
        embeds_1TE = self._embeds(prompt, images, raw=raw)
        mask = torch.ones(embeds_1TE.shape[:2], dtype=torch.long)
        with quietly(report=False):
            found = self._language.generate(
                inputs_embeds=embeds_1TE,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        ids: list[int] = found[0].tolist()
        return ids

    def _embeds(self, prompt: str, images: Sequence[ImageSource], *, raw: bool) -> Tensor:
        """Return embeddings `[1, T, E]`: the text cut at the images, theirs between."""
        encoded = self._ours.prompt(prompt, images, raw=raw)
        ids = torch.from_numpy(encoded.ids)
        pixels = self._ours.prepare(images)
        features: Any = ()
        if pixels is not None:
            given = pixels.to("cpu", self._tower.dtype)
            states = self._tower(given, output_hidden_states=True).hidden_states
            # as the original's CLIPVisionTower:
            # hidden_states[layer], with or without the class token
            kept = states[self._layer][:, self._first :]
            features = self._projector(kept.to(self._language.dtype))
            if encoded.arranged is not None:
                views = features.split([image.views for image in encoded.arranged])
                features = self._unpadded(views, self._ours.views.shown(images, "the prompt"))
        table = self._language.get_input_embeddings()
        rows: list[Tensor] = []
        start = 0
        for number, at in enumerate([*(ids == IMAGE_ID).nonzero()[:, 0].tolist(), len(ids)]):
            rows.append(table(ids[start:at]))
            if at < len(ids):
                rows.append(features[number].to(rows[-1].dtype))
            start = at + 1
        return torch.cat(rows)[None]

    def _unpadded(self, views: Sequence[Tensor], shown: Sequence[Shown]) -> Sequence[Tensor]:
        """Return the rows of each image, as transformers' LLaVA-NeXT lays its views out."""
        from transformers import LlavaNextModel

        config = self._tower.config
        assert self._points is not None
        # the original has [width, height], transformers [height, width]
        points = [[height, width] for width, height in self._points]
        given = SimpleNamespace(vision_config=config, image_grid_pinpoints=points)
        sizes = torch.tensor([[one.height, one.width] for one in shown])
        pack: Any = LlavaNextModel.pack_image_features
        packed = pack(SimpleNamespace(config=given), views, sizes, "default", self._newline_E)
        found: Sequence[Tensor] = packed[0]
        return found


def weights_of(folder: Path) -> Weights:
    weights = Weights.within(folder)
    assert weights is not None
    return weights


def _read(network: Any, folder: Path, others: Callable[[str], bool], **how: Any) -> Any:
    """Return a model of transformers' from its folder, with every tensor that it has.

    Raises ModelError where one is missing, or is left over and none of the `others`.
    """
    with quietly(report=False):
        model, found = network.from_pretrained(
            folder, output_loading_info=True, dtype="auto", **how
        )
    left = [name for name in found["unexpected_keys"] if not others(name)]
    wrong = [*found["missing_keys"], *left, *(name for name, *_ in found["mismatched_keys"])]
    if wrong:
        raise ModelError(
            f"what was written to {folder} is not what transformers' {network.__name__} reads: "
            f"{wrong[0]} is missing, left over or of another shape; report this, with model.toml"
        )
    return model.eval()


def _projector(folder: Path, table: dict[str, Any]) -> nn.Module:
    """Return the projector as the original builds it by its type."""
    weights = weights_of(folder)
    state = {n.removeprefix(_PROJECTOR): weights[n] for n in weights if n.startswith(_PROJECTOR)}
    sizes = (table["mm_hidden_size"], table["hidden_size"])
    depth = re.fullmatch(r"mlp(\d+)x_gelu", table["mm_projector_type"])
    module: nn.Module = nn.Identity()
    if depth:
        layers: list[nn.Module] = [nn.Linear(*sizes)]
        for _ in range(1, int(depth[1])):
            layers += [nn.GELU(), nn.Linear(sizes[1], sizes[1])]
        module = nn.Sequential(*layers)
    elif table["mm_projector_type"] == "linear":
        module = nn.Linear(*sizes)
    module.load_state_dict(state, assign=True)
    return module.eval()
