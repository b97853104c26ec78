"""The model: vision encoder, connector and language model around one packed stream.

I views of images, P patches, P' visual tokens of a view, D vision width, E language width,
T rows of the stream, L separator rows, M supervised rows, S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llavakit.contracts.data import Sample, Video
from llavakit.contracts.errors import ModelError
from llavakit.contracts.interfaces import PromptTemplate, Segment
from llavakit.contracts.model import Asked, Images, Sampling
from llavakit.contracts.networks import Connector, LanguageModel, VisionEncoder
from llavakit.contracts.packing import Stream
from llavakit.model.answer import Answering
from llavakit.model.generate import generate_stream
from llavakit.model.prefix import Prefixes
from llavakit.model.sampling import Token
from llavakit.stream.batch import PackedBatch, pack
from llavakit.stream.encode import Encoded, encode, tokenise
from llavakit.stream.images import Views
from llavakit.stream.tiling import Tiling, View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USED = ("scaling", "_active_adapter", "_disable_adapters", "_forward_hooks", "_forward_pre_hooks")


class LlavaModel(nn.Module, Answering[Tensor]):
    """A LLaVA: images become embeddings in the rows of a text stream.

    Raises ModelError where the parts do not fit each other.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        connector: Connector,
        language: LanguageModel,
        template: PromptTemplate,
        *,
        choices: dict[str, dict[str, Any]],
        tiling: Tiling | None = None,
        image_newline: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.language = language
        self.template = template
        self.prefixes = Prefixes()  #: The last dialogues, read already.
        self.tiling = None if tiling is None or not tiling.varies else tiling  #: None: one view.
        if image_newline is None and tiling is not None and tiling.separates:
            image_newline = nn.Parameter(torch.randn(language.width) * language.width**-0.5)
        self.image_newline = image_newline  #: The learned row `[E]`; a new one as in LLaVA-NeXT.
        self.choices = choices  #: What a recipe says of each part: makes the same again.
        patches = vision.tokens(vision.image_size)
        if self.tiling is not None and self.tiling.pools and self.visual_tokens != patches:
            raise ModelError(
                f"tiling `{self.tiling.name}` pools features before the connector, and connector "
                f"`{connector.name}` makes {self.visual_tokens} tokens of {patches}; use `mlp`, or "
                "pool behind it"
            )

    @property
    def device(self) -> torch.device:
        return next(self.language.parameters()).device

    @property
    def visual_tokens(self) -> int:
        """How many embeddings one view of an image has (P'): its rows, where it is one view."""
        return self.connector.tokens(self.vision.tokens(self.vision.image_size))

    @property
    def views(self) -> Views:
        """How images become views and rows."""
        return Views(self.tiling, View(self.vision.image_size, self.visual_tokens), self.upright)

    def features(self, pixels_IHW: Tensor) -> Tensor:
        """Return the patch features `[I, P, D]` of views `[I, 3, H, W]`, prefix stripped."""
        features_IPD: Tensor = self.vision(pixels_IHW)
        expected = self.vision.prefix_tokens + self.vision.tokens(pixels_IHW.shape[-1])
        if features_IPD.shape[1] != expected:
            raise ModelError(
                f"vision encoder `{self.vision.name}` gave {features_IPD.shape[1]} tokens, but "
                f"says {self.vision.prefix_tokens} prefix + "
                f"{expected - self.vision.prefix_tokens} patches; fix `tokens` or `prefix_tokens`"
            )
        if features_IPD.shape[2] != self.vision.width:
            raise ModelError(
                f"vision encoder `{self.vision.name}` gave features of width "
                f"{features_IPD.shape[2]}, but says {self.vision.width}; fix `width`"
            )
        return features_IPD[:, self.vision.prefix_tokens :]  # class tokens stand for no patch

    def embed(self, batch: PackedBatch, features_IPD: Tensor | None) -> Tensor:
        """Return the stream's embeddings `[T, E]`, text and visual rows."""
        if features_IPD is None:
            return self.language.embed(batch.token_ids_T)
        features_IPD = batch.pool(features_IPD)
        ids_and_rows = (batch.token_ids_T, batch.visual_rows_N, batch.visual_kept_N)
        look_up = (self.language.embed, self.language.embedding_VE)
        stream = Stream(*ids_and_rows, *look_up, batch.weights_KN)
        own = type(self.connector) if batch.weights_KN is None else Connector
        embeds_TE = own.project_into(self.connector, features_IPD, stream)
        if (newline_E := self.image_newline) is not None:  # without rows, for a gradient of zeros
            rows_L = batch.separator_rows_L
            rows_LE = newline_E.to(embeds_TE.dtype).expand(len(rows_L), -1)
            embeds_TE = embeds_TE.index_copy(0, rows_L, rows_LE)
        return embeds_TE

    def loss(self, batch: PackedBatch, features_IPD: Tensor | None) -> Tensor:
        """Return the summed cross-entropy of the batch's targets, float32 `[]`.

        Divide by the number of targets of the whole optimisation step: then every target weighs
        the same, however the step was cut into micro-batches.
        """
        embeds_TE = self.embed(batch, features_IPD)
        hidden_ME = self.language.hidden(embeds_TE, batch.packing, batch.supervised_rows)
        return self.language.loss(hidden_ME, batch.targets_M)

    def merged(self) -> LlavaModel:
        """Return the model as weights alone give it, which is what exporters write.

        See `LanguageModel.merged`; a model that has nothing but weights is returned itself.
        """
        language = self.language.merged()
        if language is self.language:
            return self
        own = {"use": language.name, **language.options.model_dump(mode="json")}
        choices = {**self.choices, "language": own}
        parts = (self.vision, self.connector, language, self.template)
        same = {"tiling": self.tiling, "image_newline": self.image_newline}
        merged = LlavaModel(*parts, choices=choices, **same)  # type: ignore[arg-type]
        return merged.train(self.training)  # a new module is in training mode

    def prepare(self, images: Images, where: str = "the prompt") -> Tensor | None:
        """Return the pixels `[I, 3, H, W]` of all views of a prompt's images, or None for none."""
        if not images:
            return None
        dtype = next(self.vision.parameters(), torch.empty(0)).dtype  # it may have no weights
        stills = sum(not isinstance(one, Video) for one in images)
        pixels = [self.views.read(self.vision, one, where, stills) for one in images]
        return torch.cat(pixels).to(self.device, dtype)

    def join(self, prepared: Sequence[Tensor | None]) -> Tensor | None:
        pixels = [pixels_IHW for pixels_IHW in prepared if pixels_IHW is not None]
        return torch.cat(pixels) if pixels else None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.language.tokenizer

    @property
    def stops(self) -> Sequence[str]:
        return self.template.stop(self.language.tokenizer)

    @property
    def end_ids(self) -> frozenset[int]:
        return self.language.end_ids

    def _render(self, dialogue: Sample) -> Encoded:
        return encode(dialogue, self.template, self.language.tokenizer)

    def _read_raw(self, prompt: str) -> Encoded:
        return Encoded(*tokenise([Segment(prompt, markup=True)], self.language.tokenizer))

    @torch.inference_mode()
    def logits(self, prompt: Asked, images: Images = (), *, raw: bool = False) -> Tensor:
        """Return logits `[T, V]`, float32, of every row of the spliced sequence."""
        encoded, images = self.ask(prompt, images, raw=raw)
        batch = pack([encoded], [0], self.visual_tokens)
        hidden_TE = self.language.hidden(
            self._embed(batch, self.prepare(images)), batch.packing.to(self.device)
        )
        return self.language.logits(hidden_TE).float()

    def _write(
        self,
        prompts: Sequence[Encoded],
        pixels_IHW: Tensor | None,
        sampling: Sampling,
        *,
        remember: bool = False,
    ) -> Iterator[list[tuple[int, Token]]]:
        ids, given = [one.ids.tolist() for one in prompts], dict[str, Any]()
        if remember and not self.training:  # dropout makes other keys each time
            found = self.prefixes.recall(prompts[0], pixels_IHW, self._stamp())
            known = found.front.length(self.visual_tokens)
            given = {"held": found.held, "known": known, "keep": found.keep}
            prompts, pixels_IHW = [found.rest], found.pixels_IHW
        batch = pack(prompts, range(len(prompts)), self.visual_tokens)
        with torch.inference_mode():
            embeds_TE = self._embed(batch, pixels_IHW)
        packing = batch.packing.to(self.device)
        return generate_stream(self.language, embeds_TE, packing, sampling, ids, **given)

    def _stamp(self) -> object:
        """Return what changes when weights do, or how they are used: precision, adapters, hooks."""
        kind, weights = self.device.type, [*self.parameters(), *self.buffers()]
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        marks = [(id(w), w.dtype, w.device, w.is_inference() or w._version) for w in weights]
        # what is written through `data`, as averaged weights are, has no version
        full = [one.detach() for one in weights if one.numel()]
        middles = [one[tuple(size // 2 for size in one.shape)].item() for one in full]
        used = [[vars(one).get(name) for name in _USED] for one in self.modules()]
        return half, marks, f"{middles}{used}"

    def _embed(self, batch: PackedBatch, pixels_IHW: Tensor | None) -> Tensor:
        features_IPD = None if pixels_IHW is None else self.features(pixels_IHW)
        return self.embed(batch.to(self.device), features_IPD)
