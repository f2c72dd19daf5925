"""A conversation: its messages so far, and what an answer is."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from minstep.errors import InputError
from minstep.generate import Step
from minstep.text.continuation import Continuation
from minstep.text.prompt import Prompt, SpecialTokens, render
from minstep.text.reply import ChatStream, Event, PlainStream, gathered
from minstep.text.tokenizer import StreamingText, encode
from minstep.text.tool_calls import Piece, Tools

NOTHING = {"role": "user", "content": ""}  # a question whose prompt shows what can be rendered
Decode = Callable[[list[int]], Iterator[Step]]


class Conversation:
    """The messages so far, and the rule of what an answer is; it reads and prints nothing.

    `special_tokens` is for what the messages spell, as for `render`. Raises InputError when the
    system text or the tools cannot be rendered.
    Differs: each turn reads its whole prompt again instead of keeping the caches. The template
        drops the thinking of earlier turns, so that from there on the prompt is another one.
    Checked by: tests/text/test_conversation.py
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        system: str | None = None,
        tools: Tools = None,
        stops: Sequence[str] = (),
        special_tokens: SpecialTokens = "released",
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self.stats: dict[str, Any] = {}  # of the last answer
        self._tokenizer, self._tools, self._stops = tokenizer, tools, stops
        self._special_tokens: SpecialTokens = special_tokens
        self._system = system or None
        self._prompt(NOTHING)

    @property
    def system(self) -> str | None:
        """The system text, None without one. What cannot be rendered is refused."""
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        before, self._system = self._system, text
        try:
            self._prompt(NOTHING)
        except InputError:
            self._system = before
            raise

    def ask(self, text: str, decode: Decode) -> Generator[Event, None, None]:
        """The answer's pieces as they come; with the last one the messages hold it and `text`.

        Closed or interrupted before its end, the tokens so far are the answer. Without any token
        `text` is not kept either. Raises InputError for what cannot be a prompt.
        """
        self.stats = {}
        question = {"role": "user", "content": text}
        prompt = self._prompt(question)
        stream, reply = StreamingText(self._tokenizer, self._stops), self._reader()
        answer = Continuation(decode(prompt), stream)
        try:
            for piece in answer:
                yield from reply.feed(piece)
            yield from reply.finish()
        finally:
            self.stats = answer.stats(prompt)
            if answer.tokens:  # parsed anew: an interrupt may have come while `reply` was at work
                parsed = gathered(self._reader(), answer.text + stream.finish())
                self.messages += [question, parsed.as_dict()]

    def _prompt(self, question: dict[str, Any]) -> list[int]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        messages = [*system, *self.messages, question]
        text = render(messages, self._tools, special_tokens=self._special_tokens)
        return encode(self._tokenizer, text, is_rendered=True)

    def _reader(self) -> ChatStream | PlainStream:
        return ChatStream(self._tools)


class Story(Conversation):
    """One growing text, for a model that continues text and has not learned to answer.

    A question is appended to the text so far, after a blank line, and the answer is what comes
    next: no template, no thinking, no calls. The system text is its beginning.
    """

    def _prompt(self, question: dict[str, Any]) -> list[int]:
        contents = (each["content"] for each in (*self.messages, question))
        text = "\n\n".join(filter(None, (self._system, *contents)))
        return encode(self._tokenizer, Prompt.of([Piece(text, "the text")], self._special_tokens))

    def _reader(self) -> PlainStream:
        return PlainStream()
