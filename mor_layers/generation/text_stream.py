"""TextStream: decodes tokens as they are generated, up to the first stop string."""

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Returns text as soon as it is certain.

    Characters whose bytes are incomplete are held back, as is text that may turn out to be the
    beginning of a stop string.

    Args:
        decode: returns the text of token ids.
        stop: strings that end the text; the first one that occurs is removed.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._begin = 0  # decoding starts here, because text may depend on earlier tokens
        self._end = 0  # tokens whose text is in `_held` or has been returned
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token; return the text that is now certain, and whether a stop string occurred."""
        self._ids.append(token)
        before = self.decode(self._ids[self._begin : self._end])
        now = self.decode(self._ids[self._begin :])
        if now.endswith(_INCOMPLETE):
            return "", False
        self._begin, self._end = self._end, len(self._ids)
        return self._release(now[len(before) :])

    def rest(self) -> str:
        """The text that was held back. Call this once, after the last token."""
        before = self.decode(self._ids[self._begin : self._end])
        text, is_stopped = self._release(self.decode(self._ids[self._begin :])[len(before) :])
        held, self._held, self._begin, self._end = self._held, "", len(self._ids), len(self._ids)
        return text if is_stopped else text + held

    def _release(self, text: str) -> tuple[str, bool]:
        text = self._held + text
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self._held, self._ids, self._begin, self._end = "", [], 0, 0
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
