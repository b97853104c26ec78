"""An exported LLaVA with the methods of `llavakit.LlavaModel`, without torch.

Shapes: I images, P' visual tokens of an image, D width of features, Q rows that a connector reads,
B sequences, T rows, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from llavakit import (
    IMAGE_ID,
    Answering,
    Encoded,
    Prefixes,
    Token,
    Unfinished,
    View,
    Views,
    Written,
    choose_tokens,
    joined,
    special_stops,
    tokenise,
)
from llavakit.contracts.data import ImageSource, Sample, Video
from llavakit.contracts.errors import ModelError
from llavakit.contracts.interfaces import Segment
from llavakit.contracts.model import Asked, Sampling
from llavakit_plugins.onnx.runtime.agreement import check_graphs, running
from llavakit_plugins.onnx.runtime.folder import Folder, read
from llavakit_plugins.onnx.runtime.layout import (
    CONNECTOR,
    DECODER,
    EMBEDDINGS,
    FEATURES,
    VISION,
    VISUAL_EMBEDS,
)
from llavakit_plugins.onnx.runtime.sessions import (
    Decoder,
    give_back_memory,
    open_session,
    pick_provider,
)
from llavakit_plugins.onnx.runtime.text import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
MadeOf = tuple[IntArray, FloatArray | None]
"""Rows `[R, K]` that are made of others: which, and their weights; None: the largest counts."""


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
) -> OnnxModel:
    """Return the model in a folder that `llava-run export --format onnx` wrote.

    `precision` is one that the folder holds, by default the first. `device` is cpu, cuda or auto.
    `threads` is the number of CPU threads, by default onnxruntime's own choice. Raises ModelError
    if a file is missing or changed, or if the installed onnxruntime does not know its operators.
    """
    if threads is not None and threads < 1:
        raise ModelError(f"`threads` is {threads}; give 1 or more, or None")
    folder, chosen = read(Path(path), precision)
    return OnnxModel(folder, chosen, provider=pick_provider(device), threads=threads)


class OnnxModel(Answering[FloatArray]):
    """A LLaVA that runs in onnxruntime. All arrays are numpy's, on the CPU."""

    def __init__(
        self,
        folder: Folder,
        precision: str,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        array: Callable[[FloatArray], Any] = lambda logits: logits,
    ) -> None:
        self.manifest, self.precision, self.provider = folder.manifest, precision, provider
        self._tokenizer = TextTokenizer.of(folder)
        self.prefixes = Prefixes()
        """The last dialogues, read already."""
        self._tiling = folder.tiling
        self._newline_E = folder.newline()
        self._array = array
        """Converts the numpy array that `logits` returns, for example to a tensor."""
        self._sessions = {
            graph: open_session(folder, graph, precision, provider, threads)
            for graph in folder.graphs
        }
        check_graphs(folder, self._sessions)
        self.decoder = Decoder(
            self._sessions.pop(DECODER),
            folder.manifest.shapes,
            in_place=folder.manifest.attention == "group_query",
            provider=provider,
        )
        give_back_memory()

    @property
    def visual_tokens(self) -> int:
        """Embeddings of one view of an image (P')."""
        return self.manifest.shapes.visual_tokens

    @property
    def max_length(self) -> int:
        """Most rows of a sequence, images and answer included."""
        return self.manifest.shapes.max_length

    @property
    def batches_alike(self) -> bool:
        """Whether several prompts at once get the answers that each gets alone.

        The scales of int8's activations are those of a whole batch.
        """
        return self.precision != "int8"

    @property
    def views(self) -> Views:
        view = View(self.manifest.preparation.size, self.visual_tokens)
        return Views(self._tiling, view, self.upright)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return cast("PreTrainedTokenizerBase", self._tokenizer)  # it has the methods the core uses

    @property
    def stops(self) -> Sequence[str]:
        return self.manifest.prompt.stops

    @property
    def end_ids(self) -> frozenset[int]:
        return frozenset(self.manifest.end_tokens)

    def _render(self, dialogue: Sample) -> Encoded:
        form = self.manifest.prompt
        pieces = list(form.pieces(dialogue.turns, dialogue.system))
        return self._encode(pieces, begins=form.adds_bos)

    def _read_raw(self, prompt: str) -> Encoded:
        return self._encode([Segment(prompt, markup=True)], begins=True)

    def _encode(self, pieces: Sequence[Segment], *, begins: bool) -> Encoded:
        """Return a prompt's tokens; with `begins`, after those that the tokenizer puts first."""
        first = self.manifest.prompt.beginning if begins else ()
        ids, supervised = tokenise(pieces, self.tokenizer, begin=False)
        return Encoded(
            np.concatenate((np.asarray(first, np.int64), ids)),
            np.concatenate((np.zeros(len(first), np.bool_), supervised)),
        )

    def prepare(
        self, images: Sequence[ImageSource], where: str = "the prompt"
    ) -> FloatArray | None:
        """Return the pixels `[I, 3, H, W]`, float32, of a prompt's images; None if it has none.

        `where` names the prompt in errors. Raises DataError for an image that cannot be read.
        """
        if not images:
            return None
        prepare = self.manifest.preparation.prepare
        stills = sum(not isinstance(image, Video) for image in images)
        views = [self.views.cut(image, where, stills) for image in images]
        return np.stack([prepare(view) for image in views for view in image])

    def join(self, prepared: Sequence[FloatArray | None]) -> FloatArray | None:
        pixels = [pixels_IHW for pixels_IHW in prepared if pixels_IHW is not None]
        return np.concatenate(pixels) if pixels else None

    def features(self, pixels_IHW: FloatArray) -> FloatArray:
        """Return the visual embeddings `[I, P', E]`, float32, of pixels `[I, 3, H, W]`.

        Where the connector is a graph of its own, return what it reads: features `[I, P', D]`.
        """
        return self._run(VISION, pixels_IHW, "pixel_values", "image_features")

    def connect(self, found: FloatArray, pooled: MadeOf | None) -> FloatArray:
        """Return the embeddings `[N, E]` of a prompt's views, from what `features` gives.

        `pooled` says which features the connector's Q rows are made of; None: each of its own.
        """
        if CONNECTOR in self._sessions:
            if pooled is not None:
                found = made_of(found.reshape(-1, found.shape[-1]), pooled)[None]
            found = self._run(CONNECTOR, found, FEATURES, VISUAL_EMBEDS)
        return found.reshape(-1, found.shape[-1])

    def embed(self, encoded: Encoded, pixels_IHW: FloatArray | None) -> FloatArray:
        """Return the embeddings `[T, E]`, float32, of a prompt: text rows and visual rows."""
        rows = encoded.expand(self.visual_tokens)
        embeds_TE: FloatArray = self.embed_ids(rows.token_ids[None])[0]
        if pixels_IHW is not None and len(pixels_IHW):
            embeds_TE[rows.visual] = self.arranged(self.features(pixels_IHW), encoded)
        return embeds_TE

    def arranged(self, found: FloatArray, encoded: Encoded) -> FloatArray:
        """Return the visual rows `[N, E]` of a prompt, from what `features` gives of its views."""
        tokens = self.visual_tokens
        rows, _, pooled = joined(encoded.images(tokens), tokens)
        rows_NE = made_of(self.connect(found, pooled), rows)
        if self._newline_E is not None:
            rows_NE[rows.index_RK[:, 0] < 0] = self._newline_E
        return rows_NE

    def logits(
        self, prompt: Asked, images: Sequence[ImageSource] = (), *, raw: bool = False
    ) -> Any:
        """Return logits `[T, V]`, float32, of all rows of the spliced sequence.

        With `raw`, `prompt` is tokenised as it is, without the prompt template.
        """
        encoded, images = self.ask(prompt, images, raw=raw)
        embeds_TE = self.embed(encoded, self.prepare(images))
        return self._array(self.trace(embeds_TE)[0])

    def trace(self, embeds_TE: FloatArray) -> tuple[FloatArray, list[npt.NDArray[Any]]]:
        """Return logits `[T, V]` of all rows, and each layer's keys and values `[1, G, T, K]`."""
        self._check_room([len(embeds_TE)], 0)
        decoder = self.decoder.again()
        logits = decoder.read(embeds_TE[None], np.ones((1, len(embeds_TE)), np.int64))
        held = decoder.held()
        decoder.release()
        return logits[0], held

    def _write(
        self,
        prompts: Sequence[Encoded],
        pixels_IHW: FloatArray | None,
        sampling: Sampling,
        *,
        remember: bool = False,
    ) -> Iterator[list[tuple[int, Token]]]:
        each = [index for index in range(len(prompts)) for _ in range(sampling.n)]
        written = [
            Written(sampling, prompts[index].ids.tolist(), number % sampling.n)
            for number, index in enumerate(each)
        ]
        found = self.prefixes.recall(prompts[0], pixels_IHW) if remember else None
        held, known = (), 0
        if found is not None:
            held, known = found.held or (), found.front.length(self.visual_tokens)
            prompts, pixels_IHW = [found.rest], found.pixels_IHW
        embeds = self._embed_prompts(prompts, pixels_IHW)
        lengths = [known + len(rows) for rows in embeds]
        room = self._check_room(lengths, sampling.max_new_tokens)
        ends = special_stops(self.tokenizer, sampling.stop) | self.end_ids
        unfinished = Unfinished(self.tokenizer, ends, sampling.stop, [room[i] for i in each])
        # the whole cache is allocated at the start:
        # the operator writes into it and cannot make it longer
        capacity = max(n + m for n, m in zip(lengths, room, strict=True))
        decoder, steps = self.decoder.again(), -1
        try:
            logits_BV = self._read(decoder, embeds, capacity, held, known)[each]
            steps = 0
            if sampling.n > 1:
                decoder.select(each)
            lengths = [lengths[index] for index in each]
            while True:
                tokens = choose_tokens(logits_BV, [written[index] for index in unfinished.active])
                for index, token in zip(unfinished.active, tokens, strict=True):
                    written[index].ids.append(token.id)
                yield list(zip(unfinished.active, tokens, strict=True))
                going = unfinished.take([token.id for token in tokens])
                if not going:
                    return
                # finished sequences leave the batch, so that they cost no further work
                if len(going) < len(tokens):
                    decoder.select(going)
                    tokens = [tokens[index] for index in going]
                positions = [[lengths[index] + steps] for index in unfinished.active]
                embeds_B1E = self.embed_ids(np.asarray([[token.id] for token in tokens], np.int64))
                logits_BV = decoder.step(embeds_B1E, np.asarray(positions, np.int64))
                steps += 1
        finally:  # also where nobody asks for the rest
            if found is not None and sampling.n == 1 and steps >= 0:
                # copied, because the rest of the buffer would stay in memory with it
                kept = [value[:, :, : lengths[0] + steps].copy() for value in decoder.held()]
                found.keep(kept, sum(value.nbytes for value in kept), written[0].ids[:steps])
            decoder.release()

    def _embed_prompts(
        self, encoded: Sequence[Encoded], pixels_IHW: FloatArray | None
    ) -> list[FloatArray]:
        """Return the embeddings `[T, E]` of each prompt."""
        found, begin = [], 0
        for one in encoded:
            end = begin + sum(image.views for image in one.images(self.visual_tokens))
            found.append(self.embed(one, None if pixels_IHW is None else pixels_IHW[begin:end]))
            begin = end
        return found

    def _read(
        self,
        decoder: Decoder,
        embeds: Sequence[FloatArray],
        capacity: int,
        held: Sequence[npt.NDArray[Any]],
        known: int,
    ) -> FloatArray:
        """Read the prompts as one batch, padded on the right; return the next logits of each.

        Only the rows from the shortest prompt's last one on get logits: those of the other rows
        would be most of the memory.
        """
        lengths = [len(rows) for rows in embeds]
        longest = max(lengths)
        batch_BTE = np.zeros((len(embeds), longest, embeds[0].shape[1]), np.float32)
        real_BT = np.zeros((len(embeds), longest), np.int64)
        for index, rows in enumerate(embeds):
            batch_BTE[index, : len(rows)] = rows
            real_BT[index, : len(rows)] = 1
        keep = longest - min(lengths) + 1
        room = capacity + longest - min(lengths)
        logits_BKV = decoder.read(
            batch_BTE, real_BT, keep=keep, capacity=room, held=held, known=known
        )
        last = [length - 1 - (longest - keep) for length in lengths]
        return logits_BKV[np.arange(len(lengths)), last]

    def _check_room(self, lengths: Sequence[int], new: int) -> list[int]:
        """Return how many tokens each sequence may still get, at most `new`.

        Raises ModelError if a prompt leaves no room for one.
        """
        longest = self.manifest.shapes.max_length
        room = [min(new, longest - length) for length in lengths]
        if min(room) < min(new, 1):
            raise ModelError(
                f"the prompt has {max(lengths)} tokens with its images; the language model reads "
                f"at most {longest}: shorten it"
            )
        return room

    def embed_ids(self, ids_BT: IntArray) -> FloatArray:
        """Return the embeddings `[B, T, E]`, float32, of tokens."""
        # IMAGE_ID is negative and has no embedding; row 0 stands in until features replace it
        ids = np.where(ids_BT == IMAGE_ID, 0, ids_BT)
        return self._run(EMBEDDINGS, ids, "input_ids", "inputs_embeds")

    def _run(self, graph: str, given: npt.NDArray[Any], name: str, made: str) -> FloatArray:
        """Return the one output, `made`, of a graph with one input, `name`."""
        with running(graph):
            (found,) = self._sessions[graph].run([made], {name: given})
        return cast("FloatArray", found)


def made_of(found_ND: FloatArray, made: MadeOf) -> FloatArray:
    """Return rows `[R, D]` that are made of others: weighted sums, or the largest of each."""
    index_RK, weights_RK = made
    index_KR = index_RK.T
    if weights_RK is not None:
        pairs = zip(index_KR, weights_RK.T[..., None], strict=True)
        return cast("FloatArray", sum(found_ND[index_R] * w_R1 for index_R, w_R1 in pairs))
    rows_RD: FloatArray = found_ND[index_KR[0]]
    for index_R in index_KR[1:]:  # not all at once, which would be K times the rows
        np.maximum(rows_RD, found_ND[index_R], out=rows_RD)
    return rows_RD
