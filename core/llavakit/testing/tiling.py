"""The contract of a tiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from PIL import Image

from llavakit.stream.tiling import Arrangement, Clip, Shown, Tiling, View
from llavakit.testing.contract import Contract, hold, holding


class TilingContract(Contract[Tiling]):
    """Checks a `Tiling`."""

    kind = Tiling
    picklable = True
    view: View = View(32, 16)
    """What a view is made of: an edge of 32 pixels, 4 x 4 embeddings."""
    sizes: ClassVar[Sequence[tuple[int, int]]] = (
        (1, 1), (32, 32), (97, 61), (61, 97), (640, 480), (4000, 300), (300, 4000), (1, 199),
    )  # fmt: skip
    """Width and height of the images to try it with."""
    clips: ClassVar[Sequence[Clip]] = (
        Clip(32, 32, 1, 25.0), Clip(64, 48, 7, 0.0), Clip(48, 64, 300, 29.97), Clip(97, 61, 90, 1),
    )  # fmt: skip
    """Videos to try it with, where it shows any: width, height, frames, frames a second."""
    any_size: bool = False
    """Whether views may have other sizes than the encoder's, which its `prepare` then changes."""

    def _shown(self) -> list[Shown]:
        images = [Shown(*size, images) for size in self.sizes for images in (1, 2)]
        return images + [shown for shown, _ in self._videos()]

    def _videos(self) -> list[tuple[Shown, Sequence[int]]]:
        sampled = [(clip, self.build().sample(clip)) for clip in self.clips]
        return [
            (Shown(clip.width, clip.height, 1, len(frames)), frames)
            for clip, frames in sampled
            if frames is not None
        ]

    def _arrange(self, shown: Shown) -> Arrangement:
        with holding(
            f"an image of {shown.width}x{shown.height} is laid out",
            "let `arrange` answer for every size",
        ):
            return self.build().arrange(shown, self.view)

    def test_rows_are_made_of_the_views(self) -> None:
        for shown in self._shown():
            found = self._arrange(shown)
            index, most = found.index_RK, found.views * self.view.tokens
            size = f"for {shown.width}x{shown.height}"
            hold(
                index.ndim == 2 and index.dtype == np.int64 and index.size,
                f"an index of integers (int64) `[R, K]` {size}",
                f"{index.dtype} {list(index.shape)}", "return one row of the index for each row",
            )  # fmt: skip
            least = -1 if self.build().separates else 0
            hold(
                index.min() >= least and index.max() < most,
                f"embeddings 0 to {most - 1} of {found.views} views, and -1 where `separates`, "
                f"{size}", f"{index.min()} to {index.max()}",
                "count views from 0, and set `separates = True` for a learned row",
            )  # fmt: skip
            several = index.shape[1] > 1
            weights = found.weights_RK
            hold(
                not several or weights is not None or found.pools,
                f"weights for the {index.shape[1]} embeddings of a row {size}", "None",
                "return `weights_RK`, or an index of one column",
            )  # fmt: skip
            if weights is not None:
                shows = index[:, 0] >= 0
                hold(
                    weights.shape == index.shape and weights.dtype == np.float32
                    and np.allclose(weights[shows].sum(1), 1, atol=1e-5),
                    f"float32 weights in the shape of the index that add up to 1 {size}",
                    f"{weights.dtype} {list(weights.shape)}", "make each row a mean",
                )  # fmt: skip

    def test_every_view_is_shown(self) -> None:
        for shown in self._shown():
            if not shown.frames and max(shown[:2]) > 2 * min(shown[:2]):
                continue  # of a long thin image a tile may be padding alone
            found = self._arrange(shown)
            seen = {int(i) // self.view.tokens for i in np.unique(found.index_RK) if i >= 0}
            hold(
                len(seen) == found.views,
                f"every one of {found.views} views becomes rows", f"{sorted(seen)} do",
                "count `views` right, or ask for fewer",
            )  # fmt: skip

    def test_it_cuts_as_many_views_as_it_arranges(self) -> None:
        for shown in self._shown():
            picture = _picture(shown)
            before = picture.tobytes()
            with holding("every image is cut", "let `cut` answer for every size"):
                tiling = self.build()  # of a video each frame is cut by itself
                cut = [tiling.cut(picture, shown, self.view) for _ in range(shown.frames or 1)]
            views, expected = [view for one in cut for view in one], self._arrange(shown).views
            hold(
                len(views) == expected,
                f"{expected} views of {_named(shown)}, as `arrange` says",
                len(views), "let both count in the same way",
            )  # fmt: skip
            modes, sizes = {view.mode for view in views}, {view.size for view in views}
            hold(modes == {"RGB"}, "views in RGB", modes, "keep the mode of the image")
            square = (self.view.size, self.view.size)
            hold(
                self.any_size or shown.frames or not tiling.varies or sizes == {square},
                f"squares of {square[0]} pixels", sizes,
                "cut squares, or set `any_size = True` where the encoder's `prepare` takes others",
            )  # fmt: skip
            hold(
                picture.tobytes() == before, "the image stays as it is", "it was changed", "copy it"
            )

    def test_frames_are_a_videos_own(self) -> None:
        for clip in self.clips:
            found = self.build().sample(clip)
            if found is None:
                continue
            hold(
                len(found) > 0 and list(found) == sorted(set(found))
                and found[0] >= 0 and found[-1] < clip.frames,
                f"frames of 0 to {clip.frames - 1}, ascending, each once", list(found),
                "let `sample` choose among `clip.frames`",
            )  # fmt: skip
            hold(
                self.build().varies, "`varies` where videos are shown", "False",
                "set `varies = True`: else `arrange` is not asked",
            )  # fmt: skip

    def test_only_one_that_pools_makes_rows_of_features(self) -> None:
        for shown in self._shown():
            if self._arrange(shown).pools:
                hold(
                    self.build().pools, f"`pools` of the tiling, as of {_named(shown)}", "False",
                    "set `pools = True`, so that connectors which cannot do it are refused",
                )  # fmt: skip

    def test_rows_follow_from_the_size_alone(self) -> None:
        tiling = self.build()
        for shown in self._shown():
            first = tiling.arrange(shown, self.view)
            for other in self._shown():
                tiling.arrange(other, self.view)
            again = self.build().arrange(shown, self.view)
            for one in (tiling.arrange(shown, self.view), again):
                hold(
                    np.array_equal(one.index_RK, first.index_RK) and one.views == first.views,
                    "the same rows for the same size, always", "other rows",
                    "keep nothing on `self` in `arrange`, and draw nothing at random",
                )  # fmt: skip

    def test_one_that_does_not_vary_is_one_view(self) -> None:
        tiling = self.build()
        if tiling.varies:
            return
        for shown in self._shown():
            found = self._arrange(shown)
            hold(
                found.views == 1
                and np.array_equal(found.index_RK[:, 0], np.arange(self.view.tokens)),
                "one view, its embeddings in order", f"{found.views} views",
                "set `varies = True`: else `arrange` is not asked",
            )  # fmt: skip

    def test_an_overview_begins_the_rows(self) -> None:
        for shown in self._shown():
            found = self._arrange(shown)
            if found.overview is None:
                continue
            count = found.overview[0] * found.overview[1]
            hold(
                0 < count <= len(found.index_RK) and (found.index_RK[:count] >= 0).all(),
                f"an overview of {found.overview}: so many rows without a separator come first",
                f"{len(found.index_RK)} rows", "say None where none shows all of the image",
            )  # fmt: skip

    def test_what_is_shown_decides_the_views(self) -> None:
        shown = Shown(97, 61)
        first, second = _picture(shown), _picture(shown, 1)
        one, two = (
            b"".join(view.tobytes() for view in self.build().cut(image, shown, self.view))
            for image in (first, second)
        )
        hold(one != two, "other images, other views", "the same", "cut the image that is given")


def _named(shown: Shown) -> str:
    what = f"a video of {shown.frames} frames" if shown.frames else "an image"
    return f"{what} of {shown.width}x{shown.height}"


def _picture(shown: Shown, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((shown.width, shown.height))
