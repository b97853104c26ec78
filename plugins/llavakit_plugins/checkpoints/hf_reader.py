"""Runs an exported folder with transformers, with the interface of our models, for the proof."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llavakit import Encoded, LlavaError, LlavaModel
from llavakit.contracts.data import IMAGE, ImageSource, Sample, Turn, Video
from llavakit_plugins.checkpoints.families import ONEVISION, VIDEO, Family
from llavakit_plugins.checkpoints.parity import sample_images
from llavakit_plugins.huggingface.hub import quietly

_TURNS = (
    Turn("human", f"{IMAGE}\nWhat is in the picture?"),
    Turn("gpt", "A cat."),
    Turn("human", "Are you sure?"),
)


class HfReader:
    """One of transformers' LLaVAs from a folder, given the token ids and pixels of `ours`."""

    def __init__(self, folder: Path, ours: LlavaModel, family: Family) -> None:
        self._folder, self._ours, self._family = folder, ours, family
        with quietly(report=False):
            self._model: Any = family.network().from_pretrained(folder).eval()
        # the other ways leave out what they cannot do: Gemma 2's soft cap, in transformers 5.17
        self._model.set_attn_implementation("eager")

    def _inputs(
        self, prompt: str, images: Sequence[ImageSource], *, raw: bool
    ) -> dict[str, Tensor]:
        encoded = self._ours.prompt(prompt, images, raw=raw)
        ids = self._expanded(encoded, images)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pixels = self._ours.prepare(images)
        if pixels is None:
            return inputs
        pixels = pixels.to("cpu", self._model.dtype)
        if encoded.arranged is None:
            return inputs | {"pixel_values": pixels}
        views = pixels.split([image.views for image in encoded.arranged])
        shown = self._ours.views.shown(images, "the prompt")
        stills = [number for number, one in enumerate(shown) if not one.frames]
        if stills:
            # one tensor is wanted for all images: those with fewer views are filled up with zeros
            padded = nn.utils.rnn.pad_sequence([views[n] for n in stills], batch_first=True)
            sizes = torch.tensor([[shown[n].height, shown[n].width] for n in stills])
            inputs |= {"pixel_values": padded, "image_sizes": sizes}
            if self._family is ONEVISION:
                inputs["batch_num_images"] = torch.tensor([len(stills)])
        if len(stills) < len(shown):
            videos = [one for number, one in enumerate(views) if number not in stills]
            inputs["pixel_values_videos"] = torch.stack(videos)
        return inputs

    def _expanded(self, encoded: Encoded, images: Sequence[ImageSource]) -> Tensor:
        """Return ids `[1, T]` with a token for each row of an image or a video."""
        config = self._model.config
        moves = [isinstance(image, Video) for image in images]
        tokens = [config.video_token_index if one else config.image_token_index for one in moves]
        rows = encoded.expand(self._ours.visual_tokens)
        lengths = [len(image.index_RK) for image in encoded.images(self._ours.visual_tokens)]
        ids = rows.token_ids.copy()
        ids[rows.visual] = np.repeat(tokens, lengths)
        return torch.from_numpy(ids)[None]

    @torch.inference_mode()
    def logits(
        self, prompt: str, images: Sequence[ImageSource] = (), *, raw: bool = False
    ) -> Tensor:
        """Return logits `[T, V]`, float32."""
        found: Tensor = self._model(**self._inputs(prompt, images, raw=raw)).logits[0]
        return found.float()

    def generate_ids(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 64,
        raw: bool = False,
    ) -> list[int]:
        """Return the new tokens of a greedy answer."""
        inputs = self._inputs(prompt, images, raw=raw)
        with quietly(report=False):
            found = self._model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
            )
        ids: list[int] = found[0, inputs["input_ids"].shape[1] :].tolist()
        return ids

    def processor_figures(self) -> dict[str, Any]:
        """Return whether the folder's processor makes our token ids and our pixels.

        The pixels of its two image processors are compared: Pillow's, and torchvision's, which is
        transformers' default where torchvision is installed, and rounds otherwise.
        """
        from transformers import AutoImageProcessor, AutoProcessor

        ours, tokenizer = self._ours, self._ours.language.tokenizer
        if VIDEO in self._family.tokens and find_spec("torchvision") is None:
            return {"processor": "not compared: transformers makes it with torchvision alone"}
        with quietly(report=False):
            processor = AutoProcessor.from_pretrained(self._folder)
            backends = ["pil", "torchvision"] if find_spec("torchvision") is not None else ["pil"]
            others = {
                name: AutoImageProcessor.from_pretrained(self._folder, backend=name)
                for name in backends
            }
            processor.image_processor = others["pil"]
        image, equal = sample_images(1)[0], True
        for count in (1, 3):  # what is behind an answer may be read in another way
            try:
                segments = ours.template.segments(_TURNS[:count], tokenizer)
                prompt = ours.prompt(Sample("proof", _TURNS[:count], (image,)), ())
            except LlavaError:  # it takes one question only
                continue
            found = processor(
                text=["".join(segment.text for segment in segments)],
                images=[image],
                add_special_tokens=ours.template.adds_bos,
                return_tensors="pt",
            )
            equal &= torch.equal(found["input_ids"], self._expanded(prompt, [image]))
        pixels = ours.prepare([image])
        assert pixels is not None
        wanted = pixels.cpu().float()
        away = {
            name: (
                other(image, return_tensors="pt")["pixel_values"].view_as(wanted)
                - wanted
            ).abs().max().item()
            for name, other in others.items()
        }  # fmt: skip
        return {
            "processor_ids_equal": equal,
            "processor_pixel_difference": away["pil"],
            "torchvision_pixel_difference": away.get("torchvision"),
        }
