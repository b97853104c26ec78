"""The contract of a chat model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llavakit.contracts.data import Message
from llavakit.contracts.errors import ChatError
from llavakit.contracts.interfaces import ChatModel
from llavakit.testing.contract import Contract, hold

_SYSTEM, _USER = Message("system", "Be brief."), Message("user", "Is it red?")
_MORE = (Message("assistant", "Yes."), Message("user", "Sure?"))


class ChatModelContract(Contract[ChatModel]):
    """Checks a `ChatModel`. Build one that answers without a network."""

    kind = ChatModel

    def sent(self, model: ChatModel) -> str | None:
        """Return all that reached the service (or the model's prompt) with the newest request.

        A stand-in server keeps its last request, a local model the text it was given. None where
        nobody can see it.
        """
        raise self.unstated(
            "sent", "return the text of the newest request, or None where nobody can see it"
        )

    def failing(self) -> ChatModel | None:
        """Return one that gets no answer: a wrong key, a server that is down. None: there is none.

        Its errors must be raised: returned as text, they would become training data.
        """
        raise self.unstated(
            "failing", "return one that gets no answer (a server that is down), or None"
        )

    def test_it_answers_with_text(self) -> None:
        model = self.build()
        for messages in ([_USER], [_SYSTEM, _USER], [_SYSTEM, _USER, *_MORE]):
            before = list(messages)
            answer = model.complete(messages)
            hold(
                isinstance(answer, str),
                "`complete` gives text", type(answer).__name__, "return the reply's text",
            )  # fmt: skip
            hold(answer.strip(), "an answer", repr(answer), "raise ReplyError for an empty one")
            hold(
                messages == before,
                "`complete` leaves the messages as they are", messages, "copy them first",
            )  # fmt: skip

    def test_every_message_is_sent(self) -> None:
        for messages in ([_SYSTEM, _USER], [_SYSTEM, _USER, *_MORE]):
            model = self.build()
            model.complete(messages)
            sent = self.sent(model)
            if sent is None:
                return
            lost = [m for m in messages if m.content not in sent]
            hold(
                not lost,
                "the service gets every message, the system's too",
                f"{lost} is not in {sent[:500]!r}", "hand on all of `messages`",
            )  # fmt: skip

    def test_what_fails_is_raised_and_never_a_reply(self) -> None:
        for ask in (_complete, _reply):
            model = self.failing()
            if model is None:
                return
            try:
                answer = ask(model, [_USER])
            except ChatError:
                continue
            except Exception as error:
                hold(
                    False, "a request that fails raises ChatError or ReplyError",
                    f"{type(error).__name__}: {error}", "turn it into one of them, with a remedy",
                )  # fmt: skip
            else:
                hold(
                    False, "a request that fails raises ChatError or ReplyError",
                    f"the reply {answer!r}", "raise it: as a reply it would become training data",
                )  # fmt: skip


def _complete(model: ChatModel, messages: Sequence[Message]) -> str:
    return model.complete(messages)


def _reply(model: ChatModel, messages: Sequence[Message]) -> str:
    async def once() -> str:
        try:
            return (await model.reply(messages)).text
        finally:
            await model.close()

    return asyncio.run(once())
