"""Text that a trained model writes: the sample of a run, and what ``longspan generate`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longspan.data.packing import Documents
from longspan.data.text_stream import TextStream
from longspan.data.tokenizer import Tokenizer
from longspan.errors import NonFiniteError


def prompt_tokens(tokenizer: Tokenizer, prompt: str, documents: Documents) -> list[int]:
    """The tokens of a prompt that opens a document, as training has them.

    Where documents are concatenated the end of the one before stands in front of each. Where memory is reset there is nothing in
    front; of an empty prompt, which would leave no token to go on from, it stands there, too.
    """
    tokens = tokenizer.encode([prompt])[0]
    return [tokenizer.end_of_document, *tokens] if documents == "concatenate" or not tokens else tokens


class WrittenText:
    """The text of tokens as they come, a piece at a time, to be iterated over once.

    Args:
        tokenizer: of the tokens.
        prompt: those before the first.
        tokens: such as `longspan.models.decode` gives.
        stop: strings at which the text ends, as in `TextStream`.

    Iterating raises NonFiniteError, after the last piece, where logits are no longer numbers.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int], stop: Sequence[str] = ()):
        self.num_tokens = 0
        """Tokens that have come so far."""
        self._tokens = tokens
        self._stream = TextStream(tokenizer, prompt, stop)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text."""
        return self._stream.stopped_by

    def __iter__(self) -> Iterator[str]:
        try:
            for token in self._tokens:
                self.num_tokens += 1
                yield self._stream.push(token)
                if self.stopped_by is not None:
                    return
        except NonFiniteError:
            yield self._stream.finish()
            raise
        yield self._stream.finish()


def printable(text: str) -> str:
    """Text as a terminal may show it: a model may write what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
