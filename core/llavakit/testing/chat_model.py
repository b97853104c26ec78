"""The contract of a chat model."""

from __future__ import annotations

from llavakit.contracts.data import Message
from llavakit.contracts.interfaces import ChatModel
from llavakit.testing.contract import Contract


class ChatModelContract(Contract[ChatModel]):
    """Checks a `ChatModel`. Build one that answers without a network."""

    kind = ChatModel

    def test_it_answers_with_text(self) -> None:
        model = self.build()
        system, user = Message("system", "Be brief."), Message("user", "Is it red?")
        more = [Message("assistant", "Yes."), Message("user", "Sure?")]
        for messages in ([user], [system, user], [system, user, *more]):
            before = list(messages)
            answer = model.complete(messages)
            assert isinstance(answer, str), f"`complete` gives {type(answer).__name__}, not text"
            assert answer.strip(), "`complete` gives an empty answer"
            assert messages == before, "`complete` changes the messages it is given"
