"""Tilings and connectors that give another form than they should are named before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from llavakit import Connector, ModelError
from llavakit.contracts.packing import Stream
from llavakit.stream.images import Views
from llavakit.stream.tiling import Arrangement, Shown, Tiling, View

VIEW = View(8, 4)
IN_ORDER = np.arange(4)[:, None]
PICTURE = Image.new("RGB", (30, 20))


class Own(Tiling):
    """Returns what it was given."""

    name = "own"

    def __init__(self, arranged: Any = None, views: Any = (PICTURE,)) -> None:
        super().__init__()
        self.arranged, self.views = arranged or Arrangement(1, IN_ORDER), views

    def arrange(self, shown: Shown, view: View) -> Arrangement:
        return self.arranged

    def cut(self, image: Image.Image, shown: Shown, view: View) -> Sequence[Image.Image]:
        return self.views  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "arranged",
    [
        Arrangement(1, IN_ORDER.astype(np.int32)),
        Arrangement(1, IN_ORDER[:, 0]),
        Arrangement(1, IN_ORDER + 1),
        Arrangement(2, IN_ORDER + 5),
        Arrangement(1, IN_ORDER - 1),  # a separator, which it does not ask for
        Arrangement(1, IN_ORDER[:0]),
        Arrangement(1, IN_ORDER.tolist()),
        Arrangement(1, IN_ORDER, np.ones((4, 2), np.float32)),
        IN_ORDER.tolist(),
    ],
    ids=["int32", "1-D", "behind", "behind two", "separator", "no rows", "list", "weights", "none"],
)
def test_rows_that_views_do_not_have(arranged: Any) -> None:
    views = Views(Own(arranged), VIEW)
    with pytest.raises(ModelError, match=r"tiling `own` lays an image of 640 x 480 out in rows"):
        views.of()


def test_rows_that_views_do_have() -> None:
    separating = Own(Arrangement(1, IN_ORDER - 1))
    separating.separates = True
    for tiling in (Own(), separating, Own(Arrangement(2, IN_ORDER + 4))):
        assert Views(tiling, VIEW).of() is tiling.arranged


@pytest.mark.parametrize(
    "cut",
    [(), (PICTURE, PICTURE), (PICTURE.convert("L"),), (np.zeros((8, 8, 3)),)],
    ids=["none", "two", "grey", "array"],
)
def test_views_of_another_number_or_kind(cut: Any) -> None:
    with pytest.raises(ModelError, match=r"tiling `own` cuts an image of sample `s` into . views"):
        Views(Own(views=cut), VIEW).cut(PICTURE, "sample `s`", 1)
    assert list(Views(Own(), VIEW).cut(PICTURE, "sample `s`", 1)) == [PICTURE]


@pytest.mark.parametrize("tokens", [2.5, 0, -1, None, "4"])
def test_tokens_that_are_no_number(tokens: Any) -> None:
    for tiling in (None, Own()):
        with pytest.raises(ModelError, match=r"the connector makes .* tokens of a view; let its"):
            Views(tiling, View(8, tokens)).of()


class Gives(Connector):
    name = "gives"

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.made = made

    def forward(self, features_BPD: Tensor) -> Any:
        return self.made(features_BPD)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda x: None, "<class 'NoneType'>"),
        (lambda x: (x,), "<class 'tuple'>"),
        (lambda x: x.numpy(), "<class 'numpy.ndarray'>"),
        (lambda x: x[:, 1:], r"\(1, 3, 8\)"),
    ],
)
def test_a_connector_gives_a_tensor(made: Callable[[Tensor], Any], said: str) -> None:
    ids = torch.zeros(6, dtype=torch.int64)
    rows = torch.arange(4)
    stream = Stream(ids, rows, None, lambda ids_T: torch.zeros(len(ids_T), 8), None)
    with pytest.raises(ModelError, match=rf"connector `gives` gave {said} where \(1, 4, 8\) was"):
        Gives(made).project_into(torch.ones(1, 4, 8), stream)


class Tied(Connector):
    """Two layers of one weight."""

    name = "tied"

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, features_BPD: Tensor) -> Tensor:
        made: Tensor = self.second(self.first(features_BPD))
        return made


def test_weights_under_two_names_are_told_where_they_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="`tied` shares weights, which its own `save` and `load`"):
        Tied().save(tmp_path)
