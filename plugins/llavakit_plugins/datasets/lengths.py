"""How long a sample is: by a tokenizer and a template, or estimated from its characters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llavakit import USUAL, Shown, View, Views, encode
from llavakit.contracts.data import IMAGE, Sample, Video
from llavakit.contracts.errors import DataError
from llavakit_plugins.datasets.expected import CHARACTERS_A_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavakit.contracts.interfaces import PromptTemplate

_TURN_TOKENS = 5  # role and separator, roughly


@dataclass(frozen=True)
class Lengths:
    """How the length of a sample is computed."""

    max_length: int = 2048
    """The length in tokens at which training would cut a sample."""
    views: Views = field(default_factory=lambda: Views(None, View(336, 256)))
    """How images become rows."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Without a tokenizer, lengths are estimated from the number of characters."""
    template: PromptTemplate | None = None
    """Needed beside a tokenizer."""

    def count(self, sample: Sample, *, as_images: bool = False) -> tuple[int, int]:
        """Return the number of tokens of a sample, and of its supervised ones after the cut.

        With `as_images`, each image and video counts as a usual image. Raises ModelError for videos
        where the tiling shows none.
        """
        views, longest = self.views, self.max_length
        usual = [] if views.tiling is None else [USUAL] * len(sample.images)
        visual, shown = views.view.tokens, usual if as_images else self._shown(sample)
        template, tokenizer = self.template, self.tokenizer
        if tokenizer is not None and template is not None:
            encoded = views.place(encode(sample, template, tokenizer, longest), shown)
            learned = encoded.expand(visual).supervised[1:]  # nothing predicts the first token
            return encoded.length(visual, whole=True), int(learned.sum())
        position = supervised = 0
        rows = [len(views.of(one).index_RK) for one in shown] or [visual] * len(sample.images)
        for turn in sample.turns:
            text = turn.text.replace(IMAGE, "") if turn.role == "human" else turn.text
            length = round(len(text) / CHARACTERS_A_TOKEN)
            position += _TURN_TOKENS
            if turn.role == "human":
                images = turn.text.count(IMAGE)
                position += sum(rows[:images])
                rows = rows[images:]
            if turn.role == "gpt":  # even an empty answer has a supervised end token
                supervised += max(0, min(max(1, length), longest - position))
            position += length
        return position, supervised

    def _shown(self, sample: Sample) -> list[Shown]:
        """Return the sizes of a sample's images, where its rows depend on them."""
        shown = []
        stills = sum(not isinstance(image, Video) for image in sample.images)
        for image in sample.images:
            try:
                found = self.views.shown([image], f"sample `{sample.id:.200}`")
            except DataError:  # found with the images
                found = [USUAL] if self.views.tiling is not None else []
            shown += [one._replace(images=stills) for one in found]
        return shown
