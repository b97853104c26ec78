"""What the language model reads before it ever meets an image."""

from __future__ import annotations

import re

from llavakit import PromptTemplate, Registry, Use
from llavakit.contracts.data import IMAGE
from llavakit_plugins.generation.scenes import compose
from llavakit_plugins.generators.offline import Offline, OfflineOptions
from llavakit_plugins.training.backbones.text import documents
from llavakit_plugins.training.backbones.tokenizer import train_tokenizer


def words(text: str) -> list[str]:
    return sorted(re.findall(r"\w+", text.lower()))


def test_a_document_begins_with_the_words_of_a_caption_in_any_order() -> None:
    contexts = [
        scene.context(str(number), "x.png")
        for number, scene in enumerate(compose("train", 8, 0, most=1))
    ]
    choice = {"use": "vicuna_v1", "system": ""}
    template = Registry.installed().build(Use[PromptTemplate].model_validate(choice))
    teacher = Offline(OfflineOptions())
    found = list(documents(contexts, teacher, template, train_tokenizer([], 0), seed=0))
    assert len(found) == len(contexts)
    in_order = 0
    for context, document in zip(contexts, found, strict=True):
        text = "".join(segment.text for segment in document)
        assert IMAGE not in text
        first = document[1] if document[0].text.startswith("USER") else document[0]
        assert not first.supervised, "what stands for the image is never learned"
        said = first.text.partition("\n")[0]
        assert words(said) in [words(caption) for caption in context.captions]
        in_order += any(said in re.sub(r"[^\w ]", "", c.lower()) for c in context.captions)
        supervised = [segment.text for segment in document if segment.supervised]
        assert supervised[-1] == "</s>"
        values = {box.category for box in context.boxes}
        assert any(value in text.lower() for value in values for text in supervised)
    assert in_order < len(found) / 4
