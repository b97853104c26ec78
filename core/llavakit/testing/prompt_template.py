"""The contract of a prompt template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavakit.contracts.data import IMAGE, Sample, Turn
from llavakit.contracts.errors import DataError
from llavakit.contracts.interfaces import PromptTemplate, Segment
from llavakit.stream.encode import encode, tokenise
from llavakit.testing.contract import Contract, hold, holding
from llavakit.testing.samples import byte_tokenizer, make_picture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = "Which way is it?", "To the left."
SECOND, UP = "And then?", "Up."
SYSTEM = "You know the way."
ONE = (Turn("human", f"{IMAGE}\n{QUESTION}"), Turn("gpt", ANSWER))
TWO = (*ONE, Turn("human", SECOND), Turn("gpt", UP))


class PromptTemplateContract(Contract[PromptTemplate]):
    """Checks a `PromptTemplate`."""

    kind = PromptTemplate
    picklable = True
    several_turns: bool = True
    """Whether it shows more than one question, and questions without an image."""
    asks_as_it_trains: bool = True
    """Whether what an answer is asked with is how the training text begins."""
    learns_roles: bool = False
    """Whether the loss covers markup in front of an answer, too, as the original's v0 does."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer to try it with."""
        return byte_tokenizer()

    def _segments(self, turns: tuple[Turn, ...]) -> list[Segment]:
        return list(self.build().segments(turns, self.tokenizer()))

    def test_the_answer_is_learned_and_the_question_is_not(self) -> None:
        segments = self._segments(ONE)
        supervised = "".join(segment.text for segment in segments if segment.supervised)
        hold(
            ANSWER in supervised,
            "the loss covers the answer, all of it",
            f"it covers {supervised!r} of the answer {ANSWER!r}",
            "mark the answer's segment, from its first letter to its last, `supervised=True`",
        )
        hold(
            QUESTION not in supervised,
            "the loss does not cover the question", f"it covers {supervised!r}",
            "mark answers alone `supervised=True`",
        )  # fmt: skip

    def test_the_end_of_an_answer_is_learned(self) -> None:
        segments, tokenizer = self._segments(ONE), self.tokenizer()
        supervised = "".join(segment.text for segment in segments if segment.supervised)
        ends = [*self.build().stop(tokenizer), *filter(None, [tokenizer.eos_token])]
        behind = supervised.partition(ANSWER)[2]
        hold(
            any(end in behind for end in ends),
            f"the loss covers what ends an answer, one of {ends}: else no answer ends",
            f"behind the answer it covers {behind!r}",
            "put the end token behind the answer, in a segment with `supervised=True, markup=True`",
        )

    def test_the_loss_begins_with_the_answer(self) -> None:
        """Of the tokens that are learned in front of an answer, none is the question's."""
        if self.learns_roles:
            return
        tokenizer = self.tokenizer()
        segments = self._segments(ONE)
        ids, supervised = tokenise(segments, tokenizer, begin=self.build().adds_bos)
        learned = str(tokenizer.decode([int(i) for i in ids[supervised]]))
        front = learned.partition(ANSWER)[0]
        hold(
            ANSWER in learned and not front.strip(),
            "the first token that is learned is the answer's first",
            f"learned is {learned!r}",
            "give the role its own segment, unsupervised; where the roles are learned on purpose, "
            "`learns_roles = True`",
        )

    def test_every_image_is_shown_once(self) -> None:
        picture = make_picture()
        cases: list[tuple[tuple[Turn, ...], int]] = [(ONE, 1)]
        cases.append(((Turn("human", f"{IMAGE} {IMAGE} {QUESTION}"), ONE[1]), 2))
        if self.several_turns:
            cases += [(TWO, 1), ((Turn("human", QUESTION), ONE[1]), 0)]
        for turns, images in cases:
            sample = Sample("a", turns, (picture,) * images)
            with holding(
                f"{images} images of a sample are shown once each",
                f"keep every `{IMAGE}` of a question, and write none of your own",
            ):
                encoded = encode(sample, self.build(), self.tokenizer())  # counts them
            hold(
                encoded.expand(4).supervised[1:].any(),
                "something is learned", "nothing is", "mark answers `supervised=True`",
            )  # fmt: skip

    def test_every_answer_is_learned(self) -> None:
        if not self.several_turns:
            return
        segments = self._segments(TWO)
        supervised = "".join(segment.text for segment in segments if segment.supervised)
        change = "mark every answer `supervised=True`, and no question"
        for answer in (ANSWER, UP):
            hold(answer in supervised, "every answer is learned", f"{supervised!r}", change)
        hold(SECOND not in supervised, "no question is learned", f"{supervised!r}", change)

    def test_every_turn_is_shown_in_order(self) -> None:
        turns: list[tuple[Turn, ...]] = [ONE]
        if self.several_turns:
            turns += [TWO, (*TWO, Turn("human", "And last?")), TWO[:3]]
        for case in turns:
            text = "".join(segment.text for segment in self._segments(case))
            texts = [turn.text.replace(IMAGE, "").strip() for turn in case]
            if not self.several_turns:
                texts = [ANSWER]  # of a caption the question may be left out
            places = [text.find(part) for part in texts]
            lost = [part for part, place in zip(texts, places, strict=True) if place < 0]
            hold(
                not lost and places == sorted(places),
                "every turn is shown, in order", f"without {lost}: {text!r}",
                "render every turn, not the first or the last alone",
            )  # fmt: skip

    def test_a_text_begins_once(self) -> None:
        tokenizer = self.tokenizer()
        begin = tokenizer.bos_token_id
        ids, _ = tokenise(self._segments(ONE), tokenizer, begin=self.build().adds_bos)
        hold(
            begin is None or list(ids[:2]) != [begin, begin],
            "the text begins with the beginning-of-text token once", f"ids {list(ids[:4])}",
            "write none, or say `adds_bos = False` on the template",
        )  # fmt: skip

    def test_users_text_is_not_markup(self) -> None:
        texts = [segment.text for segment in self._segments(ONE) if segment.markup]
        said = [text for text in (QUESTION, ANSWER) if any(text in own for own in texts)]
        hold(
            not said,
            "a turn's text is not markup: special tokens spelt out in it would count as such",
            f"{said} are", "give turns and markup segments of their own",
        )  # fmt: skip

    def test_a_conversations_system_text_is_shown_or_refused(self) -> None:
        """As a user's text, in front of the first question, where the template has a place."""
        template, tokenizer = self.build(), self.tokenizer()
        before = list(template.segments(ONE, tokenizer))
        try:
            segments = list(template.with_system(SYSTEM).segments(ONE, tokenizer))
        except DataError:
            return
        hold(
            list(template.segments(ONE, tokenizer)) == before,
            "a template stays as it is when another conversation has a system text",
            "it has changed", "return another template from `with_system`",
        )  # fmt: skip
        text = "".join(segment.text for segment in segments)
        if SYSTEM not in text and not self.several_turns:
            return  # of a caption the question is left out, too
        hold(
            SYSTEM in text.partition(QUESTION)[0],
            "a conversation's system text stands in front of its question", f"it is {text!r}",
            "show the text that `with_system` was given, or raise DataError there",
        )  # fmt: skip
        own = [s for s in segments if SYSTEM in s.text and (s.markup or s.supervised)]
        hold(
            not own,
            "a conversation's system text is neither markup nor learned", f"{own}",
            "give it a segment of its own",
        )  # fmt: skip

    def test_a_question_at_the_end_is_left_open(self) -> None:
        asked = "".join(segment.text for segment in self._segments(ONE[:1]))
        hold(
            ANSWER not in asked,
            "a question at the end is left open for the answer", f"{asked!r}", "write no answer",
        )  # fmt: skip
        if self.asks_as_it_trains:
            whole = "".join(segment.text for segment in self._segments(ONE))
            hold(
                whole.startswith(asked.rstrip()),
                "what an answer is asked with is how the training text begins",
                f"{whole!r} does not begin with {asked!r}",
                "render both by one code path; where that is so on purpose, "
                "`asks_as_it_trains = False`",
            )

    def test_the_same_turns_give_the_same_text(self) -> None:
        first, second = self._segments(ONE), self._segments(ONE)
        hold(
            first == second,
            "the same turns give the same text", f"{first}, then {second}",
            "draw nothing at random, and keep nothing on `self`",
        )  # fmt: skip
        template, tokenizer = self.build(), self.tokenizer()
        for turns in (ONE, ONE[:1], ONE):
            again = list(template.segments(turns, tokenizer))
        hold(
            again == first,
            "what was rendered before changes nothing", f"{again}, not {first}",
            "keep nothing on `self`",
        )  # fmt: skip

    def test_turns_out_of_order_are_refused(self) -> None:
        for turns in ((), (ONE[1],), (ONE[0], ONE[0])):
            try:
                self._segments(turns)
            except DataError:
                continue
            roles = ", ".join(turn.role for turn in turns) or "no turn"
            hold(
                False, "turns that do not alternate from a human one raise DataError",
                f"{roles} was rendered", "check the roles first, and raise DataError",
            )  # fmt: skip

    def test_stop_texts_are_not_empty(self) -> None:
        stops = self.build().stop(self.tokenizer())
        hold(
            not isinstance(stops, str) and all(stops),
            "texts that end an answer, none of them empty", repr(stops),
            "leave an empty one out: it ends every answer at once",
        )  # fmt: skip
