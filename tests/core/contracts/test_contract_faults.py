"""Each fault that authors of networks made is caught by its contract, in a sentence of use.

Faults of components without weights are in `test_contract_faults_data`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.conftest import LANGUAGE, VISION, make_tokenizer
from tests.core.contracts import test_contracts as good
from tests.core.contracts.faulty import caught, run_check
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit import Connector, LanguageModel, Options
from llavakit.contracts.packing import Packing, Rows
from llavakit_plugins.connectors.mlp import Linear
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions
from llavakit_plugins.vision.clip import Clip, ClipOptions

# -- connectors ------------------------------------------------------------------------------------


class BatchOfTwo(Linear):
    def forward(self, features_BPD: Tensor) -> Tensor:
        flat = super().forward(features_BPD).flatten()
        return flat.view(2, features_BPD.shape[1], -1)


class BatchWhileTraced(Linear):
    """Right for every batch, but a Python number of it enters the graph."""

    def forward(self, features_BPD: Tensor) -> Tensor:
        images = [super(BatchWhileTraced, self).forward(image[None]) for image in features_BPD]
        return torch.cat(images)


class OverTheBatch(Linear):
    def forward(self, features_BPD: Tensor) -> Tensor:
        return super().forward(features_BPD / features_BPD.std(0, unbiased=False).clamp(min=0.1))


class ConstantTokens(Linear):
    def tokens(self, patches: int) -> int:
        return 5


class WholeOnly(Linear):
    def forward(self, features_BPD: Tensor) -> Tensor:
        table = torch.ones(features_BPD.shape[-1], features_BPD.shape[-1])
        return super().forward(features_BPD @ table)


class BackToFloat(Linear):
    def forward(self, features_BPD: Tensor) -> Tensor:
        return super().forward(features_BPD).float()


class Unpicklable(Linear):
    def __init__(self, options: Options, **widths: int) -> None:
        super().__init__(options, **widths)
        self.act = lambda x: x


# -- vision encoders -------------------------------------------------------------------------------


class FixedBatch(Clip):
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        features = super().forward(pixels_BCHW)
        return features.reshape(2, -1, features.shape[-1])


class PrefixBehind(Clip):
    prefix_tokens = 1

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        patches = super().forward(pixels_BCHW)[:, -16:]
        return torch.cat((patches, patches.mean(1, keepdim=True)), dim=1)


class Transposed(Clip):
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        features = super().forward(pixels_BCHW)
        front, patches = features[:, :-16], features[:, -16:]
        turned = patches.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
        return torch.cat((front, turned), dim=1)


class Turned(Clip):
    def prepare(self, image: Image.Image) -> Tensor:
        return super().prepare(image).flip(-1)


class Bgr(Clip):
    def prepare(self, image: Image.Image) -> Tensor:
        return super().prepare(image).flip(0)


class AnySize(Clip):
    def tokens(self, image_size: int) -> int:
        return 16


class ClosedOver(Clip):
    def __init__(self, options: Any, model: Any = None) -> None:
        super().__init__(options, model)
        self.turn = lambda image: image.convert("RGB")


# -- language models -------------------------------------------------------------------------------


class MeanLoss(Vicuna):
    def loss(self, hidden_ME: Tensor, targets_M: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden_ME).float(), targets_M)


class OtherLoss(Vicuna):
    """Its loss does not go through what it does to logits."""

    def logits(self, hidden_ME: Tensor) -> Tensor:
        return 5 * torch.tanh(super().logits(hidden_ME))


class Wholly(Vicuna):
    def hidden(self, embeds_TE: Tensor, packing: Packing, rows: Any = None) -> Tensor:
        table = torch.eye(embeds_TE.shape[-1])
        return super().hidden(embeds_TE @ table, packing, rows)


class Endless(Vicuna):
    end_ids = frozenset()


class Uncalled(Vicuna):
    @property
    def blocks(self) -> list[nn.Module]:
        return [nn.Identity()]


class Unmerged(Vicuna):
    def merged(self) -> Any:
        return self


class Dropped(Vicuna):
    def merged(self) -> Any:
        plain = Vicuna(VicunaOptions(config=LANGUAGE))
        known = {k.replace(".base_layer", ""): v for k, v in self.state_dict().items()}
        plain.load_state_dict(known, strict=False)
        return plain


class Recurrent(LanguageModel):
    """A recurrent network, its state in the cache; `own` keeps it on itself instead."""

    name = "recurrent"
    width, max_length = 8, 64
    own = False

    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(64, 8), nn.GRUCell(8, 8)
        self.lm_head = nn.Linear(8, 64, bias=False)
        self.kept: Tensor | None = None

    def embed(self, ids_T: Tensor) -> Tensor:
        embeds: Tensor = self.table(ids_T)
        return embeds

    @property
    def head(self) -> nn.Linear:
        return self.lm_head

    def cache_shape(self) -> tuple[int, int, int]:
        return 1, 1, 1

    def hidden(self, embeds_TE: Tensor, packing: Packing, rows: Rows | None = None) -> Tensor:
        cache = packing.cache
        states = None if cache is None else cache.states[0].get("h")
        if self.own and cache is not None and any(cache.lengths):
            states = self.kept
        found, last = [], []
        for sequence, (start, end) in enumerate(pairwise(packing.starts)):
            state = embeds_TE.new_zeros(1, 8) if states is None else states[sequence][None]
            for row in range(start, end):
                state = self.cell(embeds_TE[row][None], state)
                found.append(state)
            last.append(state)
        if cache is not None:
            self.kept = cache.states[0]["h"] = torch.cat(last)
        hidden = torch.cat(found)
        return hidden if rows is None else hidden[rows.index_M]


class OnItself(Recurrent):
    own = True


def linear(component: type[Linear]) -> Connector:
    torch.manual_seed(0)
    return component(component.Options(), vision_width=8, language_width=16)


def clip(component: type[Clip], **more: Any) -> Clip:
    torch.manual_seed(0)
    return component(ClipOptions(config=VISION, **more))


def vicuna(component: type[Vicuna], **more: Any) -> Vicuna:
    torch.manual_seed(0)
    language = component(VicunaOptions(config=LANGUAGE, **more))
    language.tokenizer = make_tokenizer()
    return language


def recurrent(component: type[Recurrent]) -> Recurrent:
    torch.manual_seed(0)
    return component()


LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0}
FAULTS: list[tuple[type[Any], Any, str, str]] = [
    (
        good.TestLinear,
        lambda: linear(BatchOfTwo),
        "takes_any_number",
        "one image in, one image out",
    ),
    (good.TestLinear, lambda: linear(BatchOfTwo), "is_traced", "take the number of images from"),
    (good.TestLinear, lambda: linear(BatchWhileTraced), "is_traced", "`linear`"),
    (good.TestLinear, lambda: linear(OverTheBatch), "of_no_other", "never over dimension 0"),
    (
        good.TestLinear,
        lambda: linear(ConstantTokens),
        "says_how_many",
        "compute it of its argument",
    ),
    (good.TestLinear, lambda: linear(WholeOnly), "half_precision", "in bfloat16"),
    (good.TestLinear, lambda: linear(BackToFloat), "half_precision", "torch.float32"),
    (good.TestLinear, lambda: linear(Unpicklable), "another_process", "keep no lambda"),
    (good.TestClip, lambda: clip(FixedBatch), "of_no_other", "any number of images"),
    (good.TestClip, lambda: clip(PrefixBehind), "row_by_row", "put prefix tokens in front"),
    (good.TestClip, lambda: clip(Transposed), "row_by_row", "flatten [height, width]"),
    (good.TestClip, lambda: clip(Turned), "row_by_row", "changes most with it"),
    (good.TestClip, lambda: clip(Bgr), "red_green", "a red image lights channel [2]"),
    (good.TestClip, lambda: clip(AnySize), "larger_image", "compute it of its argument"),
    (good.TestClip, lambda: clip(ClosedOver), "another_process", "keep no lambda"),
    (good.TestVicuna, lambda: vicuna(MeanLoss), "the_loss_is", "the sum of the cross-entropy"),
    (good.TestVicuna, lambda: vicuna(OtherLoss), "the_loss_is", "the sum of the cross-entropy"),
    (good.TestVicuna, lambda: vicuna(Wholly), "half_precision", "in bfloat16"),
    (good.TestVicuna, lambda: vicuna(Endless), "can_end", "else no answer ends"),
    (good.TestVicuna, lambda: vicuna(Uncalled), "every_block", "calls of the blocks [0]: [0]"),
    (good.TestVicuna, lambda: vicuna(Unmerged, lora=LORA), "are_merged", "has no adapters"),
    (good.TestVicuna, lambda: vicuna(Dropped, lora=LORA), "are_merged", "computes what the model"),
    (good.TestVicuna, lambda: recurrent(OnItself), "left_go_on", "`cache.states`"),
    (good.TestVicuna, lambda: recurrent(OnItself), "two_caches", "`cache.states`"),
]


@pytest.mark.parametrize(("contract", "build", "test", "said"), FAULTS)
def test_a_planted_fault_is_caught(
    contract: type[Any], build: Any, test: str, said: str, tmp_path: Path
) -> None:
    caught(contract, build, test, tmp_path / "x", said)


@pytest.mark.parametrize("test", ["cache_gives", "left_go_on", "two_caches", "selected_rows"])
def test_a_recurrent_state_in_the_cache_is_kept_in_order(test: str, tmp_path: Path) -> None:
    run_check(good.TestVicuna, lambda: recurrent(Recurrent), test, tmp_path / "x")


@pytest.mark.parametrize("more", [{"select": "cls_patch"}, {"layer": -1}])
def test_an_encoder_with_its_class_token_in_front_is_in_order(
    more: dict[str, Any], tmp_path: Path
) -> None:
    run_check(good.TestClip, lambda: clip(Clip, **more), "row_by_row", tmp_path / "x")


@pytest.mark.parametrize("test", ["are_merged", "half_precision", "the_loss_is", "every_block"])
def test_adapters_that_are_merged_keep_the_contract(test: str, tmp_path: Path) -> None:
    run_check(good.TestVicuna, lambda: vicuna(Vicuna, lora=LORA), test, tmp_path / "x")
