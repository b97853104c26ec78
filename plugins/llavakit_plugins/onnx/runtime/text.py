"""The tokenizer of an exported folder. It needs the library `tokenizers` only, no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llavakit.contracts.errors import ModelError
from llavakit_plugins.huggingface.words import words_of
from llavakit_plugins.onnx.runtime.folder import Folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokenizer:
    """The methods of a tokenizer that `llavakit`'s encoding and detokenising use."""

    quick_reader = staticmethod(words_of)

    def __init__(self, backend: Tokenizer, settings: dict[str, Any]) -> None:
        self.backend_tokenizer = backend
        self._cleans = bool(settings.get("clean_up_tokenization_spaces", False))

    @classmethod
    def of(cls, folder: Folder) -> TextTokenizer:
        from tokenizers import Tokenizer

        path = folder.file("tokenizer.json")
        if not path.is_file():  # a pipe would be waited for
            raise ModelError(f"{folder.path} lacks {path.name}; copy the whole folder again")
        try:
            backend = Tokenizer.from_file(str(path))
            backend.encode("a \0 \U0010fffd")  # of no word list: what stands for others is there
        except Exception as error:  # tokenizers raises bare exceptions
            raise ModelError(
                f"{path} cannot be read: {error!s:.300}; copy the folder again"
            ) from error
        return cls(backend, folder.json("tokenizer_config.json"))

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The tokens that were added to the vocabulary, by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """Return a token as it is written in the vocabulary, or None for an unknown id."""
        return self.backend_tokenizer.id_to_token(token)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of tokens; the same text as transformers' `decode` gives."""
        text = self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return _clean_up(text) if self._cleans else text


def _clean_up(text: str) -> str:
    """Remove the spaces that a word-level tokenizer leaves before punctuation, as transformers."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip() if spaced == " ' " else spaced[1:])
    return text
