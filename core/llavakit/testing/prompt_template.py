"""The contract of a prompt template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavakit.contracts.data import IMAGE, Sample, Turn
from llavakit.contracts.errors import DataError
from llavakit.contracts.interfaces import PromptTemplate, Segment
from llavakit.stream.encode import encode
from llavakit.testing.contract import Contract
from llavakit.testing.samples import byte_tokenizer, make_picture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = "Which way is it?", "To the left."
ONE = (Turn("human", f"{IMAGE}\n{QUESTION}"), Turn("gpt", ANSWER))
TWO = (*ONE, Turn("human", "And then?"), Turn("gpt", "Up."))


class PromptTemplateContract(Contract[PromptTemplate]):
    """Checks a `PromptTemplate`."""

    kind = PromptTemplate
    several_turns: bool = True
    """Whether it shows more than one question, and questions without an image."""
    asks_as_it_trains: bool = True
    """Whether what an answer is asked with is how the training text begins."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer to try it with."""
        return byte_tokenizer()

    def _segments(self, turns: tuple[Turn, ...]) -> list[Segment]:
        return list(self.build().segments(turns, self.tokenizer()))

    def test_the_answer_is_learned_and_the_question_is_not(self) -> None:
        segments = self._segments(ONE)
        supervised = "".join(segment.text for segment in segments if segment.supervised)
        assert ANSWER in supervised, "the answer is not learned"
        assert QUESTION not in supervised, "the question is learned"

    def test_the_end_of_an_answer_is_learned(self) -> None:
        segments, tokenizer = self._segments(ONE), self.tokenizer()
        supervised = "".join(segment.text for segment in segments if segment.supervised)
        ends = [*self.build().stop(tokenizer), *filter(None, [tokenizer.eos_token])]
        behind = supervised.partition(ANSWER)[2]
        assert any(end in behind for end in ends), (
            f"behind the answer {behind!r} is learned, which holds none of {ends}: no answer ends"
        )

    def test_every_image_is_shown_once(self) -> None:
        picture = make_picture()
        cases: list[tuple[tuple[Turn, ...], int]] = [(ONE, 1)]
        cases.append(((Turn("human", f"{IMAGE} {IMAGE} {QUESTION}"), ONE[1]), 2))
        if self.several_turns:
            cases += [(TWO, 1), ((Turn("human", QUESTION), ONE[1]), 0)]
        for turns, images in cases:
            sample = Sample("a", turns, (picture,) * images)
            encoded = encode(sample, self.build(), self.tokenizer())  # counts them
            assert encoded.image_count == images
            assert encoded.supervised_count(4) > 0, "nothing is learned"

    def test_every_answer_is_learned(self) -> None:
        if not self.several_turns:
            return
        supervised = "".join(segment.text for segment in self._segments(TWO) if segment.supervised)
        assert ANSWER in supervised
        assert "Up." in supervised
        assert "And then?" not in supervised

    def test_users_text_is_not_markup(self) -> None:
        texts = [segment.text for segment in self._segments(ONE) if segment.markup]
        said = [text for text in (QUESTION, ANSWER) if any(text in own for own in texts)]
        assert not said, f"{said} must not be markup: special tokens in it would count as such"

    def test_a_question_at_the_end_is_left_open(self) -> None:
        asked = "".join(segment.text for segment in self._segments(ONE[:1]))
        assert ANSWER not in asked
        if self.asks_as_it_trains:
            whole = "".join(segment.text for segment in self._segments(ONE))
            assert whole.startswith(asked.rstrip()), f"{whole!r} does not begin with {asked!r}"

    def test_the_same_turns_give_the_same_text(self) -> None:
        assert self._segments(ONE) == self._segments(ONE)

    def test_turns_out_of_order_are_refused(self) -> None:
        for turns in ((), (ONE[1],), (ONE[0], ONE[0])):
            try:
                self._segments(turns)
            except DataError:
                continue
            raise AssertionError(f"{turns} must raise DataError")

    def test_stop_texts_are_not_empty(self) -> None:
        assert all(self.build().stop(self.tokenizer())), "an empty stop text ends every answer"
