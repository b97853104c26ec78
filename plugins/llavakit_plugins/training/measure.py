"""The loss of micro-batches by an objective, and what the model was before training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit import LlavaModel, PackedBatch, Run, Stopped, explain_write
from llavakit_plugins.training.agreement import in_each
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.features import Features
from llavakit_plugins.training.kinds import Objective, Predicted
from llavakit_plugins.training.objectives import sample_logprobs
from llavakit_plugins.training.parallel import own_micros

T = TypeVar("T")
_ENTRY = "supervised"
_BLOCK = 1024  # samples whose log-probabilities are computed, and then perhaps kept
_SECONDS = 30.0  # between two times that they are kept


def entry_of(model: LlavaModel, *, sharded: bool) -> Callable[..., Any]:
    """Return a function of (batch, features, of): what `of` makes of supervised hidden states.

    Of divided weights it is FSDP's way into the model, which gathers them.
    """

    def supervised(batch: PackedBatch, features: Tensor | None, of: Callable[[Tensor], T]) -> T:
        embeds_TE = model.embed(batch, features)
        return of(model.language.hidden(embeds_TE, batch.packing, batch.supervised_rows))

    if not sharded:
        return supervised
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(model, _ENTRY, supervised)
    register_fsdp_forward_method(model, _ENTRY)
    found: Callable[..., Any] = getattr(model, _ENTRY)
    return found


class Measure:
    """The loss of micro-batches of a corpus, and the figures that the objective reports."""

    def __init__(
        self, model: LlavaModel, entry: Callable[..., Any], objective: Objective, corpus: Corpus
    ) -> None:
        self.objective = objective
        self._model, self._entry, self._corpus = model, entry, corpus
        self._reference_N: Tensor | None = None  # of every sample of the data set, on the CPU

    def __call__(self, batch: PackedBatch, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss `[]` and the figures `[F]`, float32, both summed over the micro-batch."""
        reference_S = None
        if self._reference_N is not None:
            index_S = torch.tensor(batch.samples)
            reference_S = self._reference_N[index_S].to(self._model.device)

        def of(hidden_ME: Tensor) -> tuple[Tensor, Tensor]:
            loss, figures = self.objective.loss(self._predicted(batch, hidden_ME, reference_S))
            none = torch.zeros(0, device=hidden_ME.device)
            return loss, torch.stack(list(figures)).detach() if figures else none

        found: tuple[Tensor, Tensor] = self._entry(batch, features, of)
        return found

    def weight(self, samples: Sequence[int]) -> int:
        """Return what sums over these samples are divided by."""
        return self.objective.weight(len(samples), self._corpus.supervised_of(samples))

    def _predicted(
        self, batch: PackedBatch, hidden_ME: Tensor, reference_S: Tensor | None
    ) -> Predicted:
        counts = batch.supervised_rows.counts
        language = self._model.language
        return Predicted(language, hidden_ME, batch.targets_M, counts, reference_S)

    def refer(
        self,
        run: Run,
        features: Features,
        name: str,
        capacity: int,
        empty: Callable[[], Tensor] | None,
        alive: Callable[[], object],
    ) -> None:
        """Keep the model's log-probabilities of all samples, before it learns anything.

        They are kept in the step's folder under a `name`, and read from there where an earlier
        attempt kept them, all or some. All processes must call it, with the model in evaluation
        mode and without gradients. `empty` gives the features of a micro-batch without images,
        where weights are divided. Raises Stopped.
        """
        if not self.objective.refers:
            return
        corpus, group = self._corpus, run.process_group
        file = run.directory / f"{name}.safetensors"
        total = len(corpus.samples)
        key = sha256(corpus.lengths.tobytes() + corpus.supervised_counts.tobytes()).hexdigest()
        done, values_N = group.broadcast(_kept(file, key) if group.is_main else (0, torch.zeros(0)))
        if not done:
            values_N = torch.full((len(corpus.lengths),), torch.nan)
        saved = time.monotonic()
        while done < total:
            block = [int(sample) for sample in corpus.samples[done : done + _BLOCK]]
            values_N[block] = self._block(block, group, features, capacity, empty, alive)
            done += len(block)
            stopping = run.stopping()
            late = time.monotonic() - saved > _SECONDS
            if group.is_main and (late or stopping or done >= total):
                partial = file.with_suffix(".partial")
                with explain_write(file):
                    at = torch.tensor([done])
                    save_file({"values": values_N, "done": at}, partial, {"key": key})
                    partial.replace(file)
                saved = time.monotonic()
            run.progress(done, total, "reference")
            if stopping and done < total:
                raise Stopped
        self._reference_N = values_N

    def _block(
        self,
        block: Sequence[int],
        group: Any,
        features: Features,
        capacity: int,
        empty: Callable[[], Tensor] | None,
        alive: Callable[[], object],
    ) -> Tensor:
        """Return the log-probabilities of some samples, of which each process does a share."""
        place = {sample: at for at, sample in enumerate(block)}
        values = torch.zeros(len(block))
        micros = own_micros(self._corpus, block, capacity, group.rank, group.size)

        def share() -> None:
            found = features.load([micro.samples for micro in micros])
            for micro, (batch, own) in zip(micros, found, strict=True):
                alive()
                if own is None and empty is not None:
                    own = empty()

                def of(hidden_ME: Tensor, batch: PackedBatch = batch) -> Tensor:
                    return sample_logprobs(self._predicted(batch, hidden_ME, None))

                logprobs_S = self._entry(batch, own, of)
                if micro.counts:
                    values[[place[sample] for sample in batch.samples]] = logprobs_S.cpu()

        if empty is None:
            in_each(group, share)
        else:  # each forward pass of divided weights waits for the other processes
            share()
        summed: Tensor = group.sum(values)
        return summed


def _kept(file: Path, key: str) -> tuple[int, Tensor]:
    """Return how many samples an earlier attempt did, and their values; 0 where it did none."""
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as opened:
            same = (opened.metadata() or {}).get("key") == key
        found = load_file(file) if same else {}
        return (int(found["done"]), found["values"]) if found else (0, torch.zeros(0))
    except (OSError, SafetensorError, KeyError, ValueError):
        return 0, torch.zeros(0)  # there is none, or it is damaged: computed again
