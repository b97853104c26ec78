"""The contract of a data set."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import zip_longest

from llavakit.contracts.data import Sample
from llavakit.contracts.interfaces import Dataset
from llavakit.stream.images import open_image
from llavakit.testing.contract import Contract, hold, holding


def _difference(left: Sequence[Sample], right: Sequence[Sample], *, pixels: bool = True) -> str:
    """Say in what the samples differ first; empty where they do not."""
    for number, (one, other) in enumerate(zip_longest(left, right)):
        if one is None or other is None:
            return f"{len(left)} samples, not {len(right)}"
        for name in ("id", "turns"):
            first, second = getattr(one, name), getattr(other, name)
            if first != second:
                return f"`{name}` of sample {number} is {first!r}, not {second!r}"
        if len(one.images) != len(other.images):
            return f"sample `{one.id}` has {len(one.images)} images, not {len(other.images)}"
        if pixels and _pixels(one) != _pixels(other):
            return f"the image of sample `{one.id}` (index {number}) has other pixels"
    return ""


def _pixels(sample: Sample) -> list[tuple[tuple[int, int], bytes]]:
    images = [open_image(image, sample.id) for image in sample.images]
    return [(image.size, image.tobytes()) for image in images]


class DatasetContract(Contract[Dataset]):
    """Checks a `Dataset` with a few samples."""

    kind = Dataset
    picklable = True
    ids_recur: bool = False  #: Whether the files themselves may give two samples one id.

    def expected(self) -> Sequence[Sample] | None:
        """Return the samples that `build` must have, made by other means than the data set itself.

        Written by hand: ids, turns, and images (paths, or pictures made beside the data). Nothing
        else can show that an image belongs to its own row, or that the last row is there. None
        where the data cannot be known.
        """
        raise self.unstated(
            "expected", "return the samples that it must have, written by hand (or None)"
        )

    def test_it_has_the_samples_of_its_data(self) -> None:
        expected = self.expected()
        if expected is None:
            return
        difference = _difference(list(self.build()), expected)
        hold(
            not difference,
            f"the {len(expected)} samples of `expected`: ids, turns, and the images of their rows",
            difference, "fix `__len__` and `__getitem__`, or `expected` where that is wrong",
        )  # fmt: skip

    def test_it_has_samples_at_every_index(self) -> None:
        data = self.build()
        hold(len(data) > 0, "at least one sample", "none", "build one with samples")
        with holding("`data[index]` gives every sample", "fix `__getitem__`"):
            by_index = [data[index] for index in range(len(data))]
        backwards = [data[index] for index in reversed(range(len(data)))][::-1]
        difference = _difference(backwards, by_index)
        hold(
            not difference,
            "a sample depends on its index alone, and is the same each time", difference,
            "augment nothing at random, and keep no position on `self`",
        )  # fmt: skip
        difference = _difference(list(data), by_index)
        hold(
            not difference,
            "iterating gives the samples that indexing gives", difference,
            "leave `__iter__` out: the inherited one asks for each index",
        )  # fmt: skip
        try:
            data[len(data)]
        except IndexError:
            return
        hold(False, "an index behind the end raises IndexError", "a sample", "raise IndexError")

    def test_ids_are_unique(self) -> None:
        if self.ids_recur:
            return
        ids = [sample.id for sample in self.build()]
        recurring = sorted({i for i in ids if ids.count(i) > 1})
        hold(
            not recurring,
            "no two samples have one id: errors and records name a sample by it",
            f"{recurring[:3]} recur",
            "make ids of what tells rows apart; where the files repeat them, `ids_recur = True`",
        )

    def test_every_build_gives_the_same_samples(self) -> None:
        difference = _difference(list(self.build()), list(self.build()))
        hold(
            not difference,
            "every build gives the same samples: a resumed run would see others", difference,
            "seed what is drawn, sort what comes from sets and folders, augment nothing at random",
        )  # fmt: skip

    def test_a_copy_in_another_process_has_the_same_samples(self) -> None:
        data = self.build()
        with holding("it can be pickled, with all its samples", "keep no open file on `self`"):
            copy = pickle.loads(pickle.dumps(data))  # noqa: S301 - its own
            difference = _difference(list(copy), list(data))
        hold(not difference, "a pickled copy has the same samples", difference, "pickle it whole")

    def test_every_sample_is_whole(self) -> None:
        for number, sample in enumerate(self.build()):
            hold(
                isinstance(sample.id, str) and sample.id,
                "errors name a sample by its id, a text", f"{sample.id!r} at index {number}",
                "give each sample an id",
            )  # fmt: skip
            with holding(
                "roles alternate from a human turn, and each image has its placeholder",
                "fix the sample's turns and images",
            ):
                sample.check()
            with holding("every image can be opened", "fix `Sample.images`"):
                _pixels(sample)

    def test_a_plan_expects_what_is_there(self) -> None:
        data = self.build()
        expected = type(data).expect(self.stated())
        if expected is not None:
            samples, tokens = expected
            hold(
                samples == len(data),
                "`expect` says how many samples there are",
                f"{samples}, there are {len(data)}", "fix `expect`",
            )  # fmt: skip
            hold(tokens > 0, "a mean of tokens above 0", tokens, "fix `expect`, or return None")
