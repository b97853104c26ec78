"""Makes llavakit's models available in lmms-eval, which finds this module by an entry point.

python -m lmms_eval --model llavakit --model_args pretrained=MODEL --tasks mme
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL.Image import Image
from tqdm import tqdm

import llavakit
from llavakit import LlavaModel, ModelError
from llavakit.contracts.data import IMAGE
from llavakit.contracts.model import Sampling

_MAX_NEW_TOKENS = 1024
manifest = ModelManifest(
    model_id="llavakit", simple_class_path="llavakit_plugins.evaluation.lmms_eval.Llavakit"
)
"""The entry that lmms-eval's registry reads."""


class Llavakit(lmms):  # type: ignore[misc]
    """A model in a folder of any layout that llavakit reads.

    `pretrained` is the folder. Raises ModelError for what these models cannot do: videos,
    likelihoods, several rounds.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        batch_size: int | str = 1,
        **unknown: Any,
    ) -> None:
        super().__init__()
        strange = [name for name, value in unknown.items() if value is not None]
        if strange:
            raise ModelError(
                f"llavakit takes `pretrained`, `device` and `batch_size`, not {', '.join(strange)}"
            )
        self.model = llavakit.load(Path(pretrained), device=device)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return the answer to each request; requests with the same settings are batched."""
        answers = [""] * len(requests)
        # sorted, because groupby joins neighbours only; answers return in the order of requests
        order = sorted(range(len(requests)), key=lambda index: self._settings(requests[index]))
        with tqdm(total=len(requests), disable=self.rank != 0, desc="llavakit") as bar:
            for settings, indices in groupby(order, lambda index: self._settings(requests[index])):
                group = list(indices)
                for begin in range(0, len(group), self.batch_size):
                    chosen = group[begin : begin + self.batch_size]
                    texts = self._answer([self._prompt(requests[i]) for i in chosen], settings)
                    for index, text in zip(chosen, texts, strict=True):
                        until = requests[index].args[1].get("until") or ()
                        answers[index] = _cut(text, [until] if isinstance(until, str) else until)
                    bar.update(len(chosen))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise ModelError("llavakit's adapter has no likelihoods; choose tasks that generate")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise ModelError("llavakit's adapter answers one round; choose other tasks")

    def _settings(self, request: Instance) -> tuple[int, float, float]:
        """Return the number of new tokens, temperature and top-p that the task states."""
        arguments: Mapping[str, Any] = request.args[1]
        samples = arguments.get("do_sample", True)
        # `do_sample = False` means greedy whatever temperature is stated beside it,
        # as transformers reads it
        temperature = float(arguments.get("temperature") or 0.0) if samples else 0.0
        top_p = arguments.get("top_p")
        tokens = int(arguments.get("max_new_tokens") or _MAX_NEW_TOKENS)
        return tokens, temperature, 1.0 if top_p is None else float(top_p)

    def _prompt(self, request: Instance) -> tuple[str, list[Image]]:
        context: str
        visual: Callable[[Any], Any]
        context, _, visual, identity, task, split = request.args
        images = list(visual(self.task_dict[task][split][identity]) or ())
        for image in images:
            if not isinstance(image, Image):
                raise ModelError(
                    f"task {task} shows a {type(image).__name__}; llavakit's models see images only"
                )
        # a text whose marks do not fit the images: drop the marks, and all images go to the front
        if context.count(IMAGE) not in (0, len(images)):
            context = context.replace(IMAGE, "").strip()
        return context, images

    def _answer(
        self, prompts: Sequence[tuple[str, list[Image]]], settings: tuple[int, float, float]
    ) -> list[str]:
        tokens, temperature, top_p = settings
        if isinstance(self.model, LlavaModel):
            # a fixed seed: the figures of a task can then be computed again
            return self.model.answer(prompts, Sampling(tokens, temperature, top_p, seed=0))
        return [
            self.model.generate(text, images=images, max_new_tokens=tokens)
            for text, images in prompts
        ]


def _cut(text: str, until: Sequence[str]) -> str:
    """Return the text up to the first of the texts that end an answer."""
    ends = [text.find(end) for end in until if end and end in text]
    return text[: min(ends)] if ends else text
