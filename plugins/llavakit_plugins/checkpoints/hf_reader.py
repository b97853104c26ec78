"""Runs an exported folder with transformers, with the interface of our models, for the proof."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llavakit import Encoded, LlavaModel
from llavakit.contracts.data import IMAGE, ImageSource, Turn
from llavakit_plugins.checkpoints.families import ONEVISION, Family
from llavakit_plugins.checkpoints.parity import sample_images
from llavakit_plugins.huggingface.hub import quietly


class HfReader:
    """One of transformers' LLaVAs from a folder, given the token ids and pixels of `ours`."""

    def __init__(self, folder: Path, ours: LlavaModel, family: Family) -> None:
        self._folder, self._ours, self._family = folder, ours, family
        with quietly(report=False):
            self._model: Any = family.network().from_pretrained(folder).eval()
        # the other ways leave out what they cannot do: Gemma 2's soft cap, in transformers 5.17
        self._model.set_attn_implementation("eager")
        self._image_token: int = self._model.config.image_token_index

    def _inputs(
        self, prompt: str, images: Sequence[ImageSource], *, raw: bool
    ) -> dict[str, Tensor]:
        encoded = self._ours.prompt(prompt, images, raw=raw)
        ids = self._expanded(encoded)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pixels = self._ours.prepare(images)
        if pixels is not None:
            inputs["pixel_values"] = pixels.to("cpu", self._model.dtype)
        if pixels is not None and encoded.arranged is not None:
            counts = [image.views for image in encoded.arranged]
            views = inputs["pixel_values"].split(counts)
            # one tensor is wanted for all images: those with fewer views are filled up with zeros
            inputs["pixel_values"] = nn.utils.rnn.pad_sequence(list(views), batch_first=True)
            shown = self._ours.views.shown(images, "the prompt")
            inputs["image_sizes"] = torch.tensor([[one.height, one.width] for one in shown])
            if self._family is ONEVISION:
                inputs["batch_num_images"] = torch.tensor([len(images)])
        return inputs

    def _expanded(self, encoded: Encoded) -> Tensor:
        """Return ids `[1, T]` with one image token for each of an image's rows."""
        rows = encoded.expand(self._ours.visual_tokens)
        return torch.from_numpy(np.where(rows.visual, self._image_token, rows.token_ids))[None]

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
        if self._family is ONEVISION and find_spec("torchvision") is None:
            return {"processor": "not compared: transformers makes it with torchvision alone"}
        with quietly(report=False):
            processor = AutoProcessor.from_pretrained(self._folder)
            backends = ["pil", "torchvision"] if find_spec("torchvision") is not None else ["pil"]
            others = {
                name: AutoImageProcessor.from_pretrained(self._folder, backend=name)
                for name in backends
            }
            processor.image_processor = others["pil"]
        question, image = f"{IMAGE}\nWhat is in the picture?", sample_images(1)[0]
        segments = ours.template.segments([Turn("human", question)], tokenizer)
        found = processor(
            text=["".join(segment.text for segment in segments)],
            images=[image],
            add_special_tokens=ours.template.adds_bos,
            return_tensors="pt",
        )
        expected = self._expanded(ours.prompt(question, [image]))
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
            "processor_ids_equal": torch.equal(found["input_ids"], expected),
            "processor_pixel_difference": away["pil"],
            "torchvision_pixel_difference": away.get("torchvision"),
        }
