"""Tokens that come one by one, as text that comes piece by piece: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.data.tokenizer import Tokenizer
from longspan.errors import InputError

_UNDECODED = "\ufffd"
"""What a tokenizer gives for bytes that are no character, or none yet."""


class TextStream:
    """Turns tokens into text as they come.

    What is given out is final. A character whose bytes are not all there is held back, and so is what may be the beginning of a
    stop string, whatever tokens they are spread over.

    Args:
        tokenizer: of the tokens.
        before: the tokens that come before the first, whose text is not given out: a word may look otherwise where a text begins.
        stop: strings at which the text ends; none of them is given out.

    Raises:
        InputError: for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise InputError("a stop string must have at least one character; got ''. Leave it out")
        self.stopped_by: str | None = None
        """The stop string that was found."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # Decoded together: the text of `_shown` is out or held, and that of `_new` comes behind it.
        self._shown, self._new = list(before), list[int]()
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain now that this token has come; nothing any more once a stop string was found."""
        if self.stopped_by is not None:
            return ""
        self._new.append(token)
        before = self._tokenizer.decode(self._shown)
        text = self._tokenizer.decode([*self._shown, *self._new])
        # Bytes behind a whole character may make it none again, until those of the next one are there.
        if not text.startswith(before) or text.endswith(_UNDECODED) or text == before:
            return ""
        self._shown, self._new = self._new, []
        return self._cut(self._held + text[len(before) :])

    def finish(self) -> str:
        """The text that was held back, when no more tokens come: without a character that is not whole."""
        if self.stopped_by is not None:
            return ""
        before = self._tokenizer.decode(self._shown)
        text = self._tokenizer.decode([*self._shown, *self._new]).rstrip(_UNDECODED)
        self._new = []
        rest = self._cut(self._held + (text[len(before) :] if text.startswith(before) else ""))
        held, self._held = self._held, ""
        return rest + held

    def _cut(self, text: str) -> str:
        """What of `text` is before every stop string, also before one that may have begun; the rest is held back."""
        self._held = ""
        found = [(text.index(stop), stop) for stop in self._stop if stop in text]
        if found:
            # Of two at one place, the longer one changes nothing.
            position, self.stopped_by = min(found)
            return text[:position]
        length = max((_length_of_beginning(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - length :]
        return text[: len(text) - length]


def _length_of_beginning(text: str, stop: str) -> int:
    """Of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
