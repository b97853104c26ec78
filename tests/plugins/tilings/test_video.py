"""Videos laid out: against transformers' own pooling and sampling of frames."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from llavakit import Clip, Shown, Tiling, View, joined
from llavakit.testing import TilingContract
from llavakit_plugins.tilings.anyres import Anyres, AnyresOptions
from llavakit_plugins.tilings.single import Single, SingleOptions
from llavakit_plugins.tilings.video import VideoOptions, sampled

LENGTHS = (1, 2, 3, 5, 8, 16, 32)


class TestOneVisions(TilingContract):
    def build(self) -> Tiling:
        self.options = {"grids": "6x6", "cap": 9, "only_alone": True, "video": {}}
        return Anyres(AnyresOptions.model_validate(self.options))


class TestNextVideos(TilingContract):
    def build(self) -> Tiling:
        video = {"pool": "average", "pool_features": True, "newline": "none"}
        self.options = {"video": video}
        return Anyres(AnyresOptions.model_validate(self.options))


class TestOfOneView(TilingContract):
    any_size = True

    def build(self) -> Tiling:
        self.options = {"video": {"frames": 4, "rate": 1.0, "newline": "row", "stride": 3}}
        return Single(SingleOptions.model_validate(self.options))


class TestLargestOfFeatures(TilingContract):
    any_size = True

    def build(self) -> Tiling:
        video = {"pool": "max", "pool_features": True, "newline": "frame", "spread": "parts"}
        self.options = {"video": video}
        return Single(SingleOptions.model_validate(self.options))


def rows_of(features_FPD: torch.Tensor, options: VideoOptions) -> torch.Tensor:
    """Return the rows of a video whose embeddings are its features; the learned row is zero."""
    frames, tokens, width = features_FPD.shape
    tiling = Single(SingleOptions(video=options))
    found = tiling.arrange(Shown(64, 48, 1, frames), View(32, tokens))
    (index, weights), count, pooled = joined([found], tokens)
    flat = features_FPD.flatten(0, 1)
    if pooled is not None:
        taken = flat[torch.from_numpy(pooled.index_RK)]
        flat = (
            taken.amax(1) if pooled.weights_RK is None
            else (taken * torch.from_numpy(pooled.weights_RK)[..., None]).sum(1)
        )  # fmt: skip
    assert len(flat) == count
    flat = torch.cat((flat, torch.zeros(1, width, dtype=flat.dtype)))  # -1 is the last
    taken = flat[torch.from_numpy(index)]
    return taken[:, 0] if weights is None else (taken * torch.from_numpy(weights)[..., None]).sum(1)


@pytest.mark.parametrize("mode", ["average", "max"])
@pytest.mark.parametrize(("edge", "stride"), [(4, 2), (5, 2), (7, 3), (24, 2)])
def test_pooling_is_that_of_llava_next_video(mode: str, edge: int, stride: int) -> None:
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

    sizes = {"image_size": edge * 8, "patch_size": 8, "hidden_size": 6}
    config = SimpleNamespace(
        spatial_pool_mode=mode, spatial_pool_stride=stride, vision_config=SimpleNamespace(**sizes)
    )
    pooler: nn.Module = LlavaNextVideoPooler(config)
    options = VideoOptions.model_validate(
        {"pool": mode, "stride": stride, "pool_features": True, "newline": "none"}
    )
    for frames in LENGTHS:
        features = torch.randn(frames, edge**2, 6, generator=torch.Generator().manual_seed(frames))
        expected = pooler(features).flatten(0, 1)
        torch.testing.assert_close(rows_of(features, options), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("edge", [4, 5, 14, 27])
def test_interpolation_is_that_of_onevision(edge: int) -> None:
    from transformers import LlavaOnevisionModel

    known: Any = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(image_size=edge * 8, patch_size=8))
    )
    for frames in LENGTHS:
        features = torch.randn(frames, edge**2, 6, generator=torch.Generator().manual_seed(frames))
        expected = LlavaOnevisionModel.apply_pooling(known, features).flatten(0, 1)
        found = rows_of(features, VideoOptions())
        torch.testing.assert_close(found[:-1], expected, atol=1e-5, rtol=1e-5)
        assert not found[-1].any()  # the learned row ends it


def test_learned_rows_stand_where_the_option_says() -> None:
    for newline, at in {
        "none": [], "end": [8], "frame": [4, 9], "row": [2, 5, 8, 11],
    }.items():  # fmt: skip
        tiling = Single(SingleOptions.model_validate({"video": {"newline": newline}}))
        found = tiling.arrange(Shown(64, 48, 1, 2), View(32, 16))
        assert np.flatnonzero(found.index_RK[:, 0] < 0).tolist() == at, newline
        assert tiling.separates == (newline != "none")


def test_parts_are_those_of_transformers_video_processors() -> None:
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    short = VideoMetadata(total_num_frames=10, fps=1.0)
    if default_sample_indices_fn(short, num_frames=7).tolist() == [*range(7)]:
        pytest.skip("this transformers takes whole steps, and so no frames of a video's end")
    draw = np.random.default_rng(0)
    for frames, wanted in draw.integers(1, 400, (200, 2)).tolist():
        clip = Clip(64, 48, frames, float(draw.uniform(1, 60)))
        known = VideoMetadata(total_num_frames=frames, fps=clip.rate)
        options = VideoOptions(frames=min(wanted, frames), spread="parts")
        expected = default_sample_indices_fn(known, num_frames=min(wanted, frames)).tolist()
        assert sampled(clip, options) == expected
        rate = float(draw.uniform(0.1, 1)) * clip.rate
        options = VideoOptions(frames=4096, rate=rate, spread="parts")
        assert sampled(clip, options) == default_sample_indices_fn(known, fps=rate).tolist()


def test_ends_are_those_of_llava_next() -> None:
    """As its `load_video`: one frame a second, and evenly many where that is too many."""
    assert sampled(Clip(1, 1, 100, 25.0), VideoOptions(rate=1.0, frames=8)) == [0, 25, 50, 75]
    assert sampled(Clip(1, 1, 100, 29.97), VideoOptions(rate=1.0, frames=8)) == [0, 30, 60, 90]
    even = np.linspace(0, 299, 8, dtype=int).tolist()
    assert sampled(Clip(1, 1, 300, 25.0), VideoOptions(rate=1.0, frames=8)) == even
    assert sampled(Clip(1, 1, 300, 25.0), VideoOptions(frames=8)) == even
    # what is shorter is shown whole, and each frame once
    assert sampled(Clip(1, 1, 5, 25.0), VideoOptions(frames=8)) == [0, 1, 2, 3, 4]
    # a folder knows no rate
    assert sampled(Clip(1, 1, 300, 0.0), VideoOptions(rate=1.0, frames=8)) == even


def test_the_largest_is_taken_of_features_alone() -> None:
    with pytest.raises(ValidationError, match="pool_features"):
        VideoOptions(pool="max")


@pytest.mark.parametrize(
    ("frames", "varies", "pools", "test", "sentence"),
    [
        ([0, 0], True, True, "test_frames_are_a_videos_own", "ascending, each once"),
        ([10**6], True, True, "test_frames_are_a_videos_own", "ascending, each once"),
        ([0], False, True, "test_frames_are_a_videos_own", "`varies` where videos are shown"),
        ([0], True, False, "test_only_one_that_pools_makes_rows_of_features", "`pools`"),
    ],
)
def test_the_contract_finds_what_is_wrong(
    frames: list[int], varies: bool, pools: bool, test: str, sentence: str
) -> None:
    class Wrong(Single):
        def sample(self, clip: Clip) -> list[int]:
            return frames

    class Contract(TilingContract):
        any_size = True

        def build(self) -> Tiling:
            video = {"pool": "average", "pool_features": True}
            tiling = Wrong(SingleOptions.model_validate({"video": video}))
            tiling.varies, tiling.pools = varies, pools
            return tiling

    with pytest.raises(AssertionError, match=sentence):
        getattr(Contract(), test)()
