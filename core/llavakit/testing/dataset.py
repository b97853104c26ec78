"""The contract of a data set."""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.contracts.data import Sample
from llavakit.contracts.interfaces import Dataset
from llavakit.model.images import open_image
from llavakit.testing.contract import Contract


def _same(left: Sequence[Sample], right: Sequence[Sample]) -> bool:
    return [(s.id, s.turns, len(s.images)) for s in left] == [
        (s.id, s.turns, len(s.images)) for s in right
    ]


class DatasetContract(Contract[Dataset]):
    """Checks a `Dataset` with a few samples."""

    kind = Dataset

    def test_it_has_samples_at_every_index(self) -> None:
        data = self.build()
        assert len(data) > 0, "build one with samples"
        by_index = [data[index] for index in range(len(data))]
        assert _same(by_index, list(data)), "iterating gives other samples than indexing"
        try:
            data[len(data)]
        except IndexError:
            return
        raise AssertionError("an index behind the end must raise IndexError")

    def test_every_build_gives_the_same_samples(self) -> None:
        assert _same(list(self.build()), list(self.build())), "a resumed run would see others"

    def test_every_sample_is_whole(self) -> None:
        for sample in self.build():
            assert isinstance(sample.id, str)
            assert sample.id, "errors name a sample by its id"
            sample.check()
            for image in sample.images:
                assert open_image(image, sample.id).mode == "RGB"

    def test_a_plan_expects_what_is_there(self) -> None:
        data = self.build()
        expected = type(data).expect(self.stated())
        if expected is not None:
            samples, tokens = expected
            assert samples == len(data), f"`expect` says {samples} samples, there are {len(data)}"
            assert tokens > 0
