"""A conversation: what was said so far, what an answer is, and the loop of a terminal chat."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

from tokenizers import Tokenizer

from minstep.cli.terminal import Display, note, read_line, summary
from minstep.errors import InputError
from minstep.generate import Step
from minstep.text.continuation import Continuation
from minstep.text.prompt import ChatStream, Event, Prompt, SpecialTokens, render
from minstep.text.reply import PlainStream, gathered
from minstep.text.tokenizer import StreamingText, encode
from minstep.text.tool_calls import Piece, Tools

NOTHING = {"role": "user", "content": ""}  # a question whose prompt shows what can be rendered
Decode = Callable[[list[int]], Iterator[Step]]

WELCOME = "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves"
HELP = """\
/reset        forget everything but the system text
/system TEXT  set the system text; without TEXT show it
/exit         leave, as Ctrl-D does
A line that begins with a space is sent as it is, even with a / next.
A tool's result is a line such as <tool_response>RESULT</tool_response>."""


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

        Closed or interrupted before its end, what was said so far is the answer. Where that is
        nothing at all, `text` is not kept either. Raises InputError for what cannot be a prompt.
        """
        self.stats = {}
        question = {"role": "user", "content": text}
        prompt = self._prompt(question)
        stream, reply = StreamingText(self._tokenizer, self._stops), self._reader()
        said = Continuation(decode(prompt), stream)
        try:
            for piece in said:
                yield from reply.feed(piece)
            yield from reply.finish()
        finally:
            self.stats = said.stats(prompt)
            if said.tokens:  # parsed anew: an interrupt may have come while `reply` was at work
                answer = gathered(self._reader(), said.text + stream.finish())
                self.messages += [question, answer.as_dict()]

    def _prompt(self, question: dict[str, Any]) -> list[int]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        messages = [*system, *self.messages, question]
        text = render(messages, self._tools, special_tokens=self._special_tokens)
        return encode(self._tokenizer, text, is_rendered=True)

    def _reader(self) -> ChatStream | PlainStream:
        return ChatStream(self._tools)


class Story(Conversation):
    """One growing text, for a model that continues text and has not learned to answer.

    What is asked is put behind the text so far, after a blank line, and the answer is what comes
    next: no template, no thinking, no calls. The system text is its beginning.
    """

    def _prompt(self, question: dict[str, Any]) -> list[int]:
        told = (each["content"] for each in (*self.messages, question))
        text = "\n\n".join(filter(None, (self._system, *told)))
        return encode(self._tokenizer, Prompt.of([Piece(text, "the text")], self._special_tokens))

    def _reader(self) -> PlainStream:
        return PlainStream()


def obey(conversation: Conversation, line: str) -> str | None:
    """Do what a line that begins with a slash says: what to tell the user, None to leave."""
    name, *rest = line.split(maxsplit=1)
    text = rest[0].strip() if rest else ""
    if name == "/exit":
        return None
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.messages.clear()
        return "forgotten" + (", but for the system text" if conversation.system else "")
    if name == "/system" and text:
        conversation.system = text
        return f"the system text is now: {text}"
    if name == "/system":
        return f"the system text is: {conversation.system or 'none'}"
    return f"{name} is no command; /help lists them, and a space before it sends it as it is"


def talk(
    conversation: Conversation,
    decode: Decode,
    display: Display,
    is_interactive: bool,
    read: Callable[[], str] = read_line,
) -> None:
    """Answer the user's lines until they end, obeying those that begin with a slash.

    Ctrl-C stops an answer; without one it clears the line, and twice in a row it leaves. Where
    nobody sits at a terminal it is raised, and so is InputError: there nobody can try again.
    """
    was_interrupted = False
    if is_interactive:
        note(WELCOME)
    while True:
        try:
            line = read()
            was_interrupted = False
            if line.startswith("/"):
                told = obey(conversation, line)
                if told is None:
                    return
                note(told)
            elif line.strip():
                _answer(conversation, line.strip(), decode, display, is_interactive)
        except InputError as error:
            if not is_interactive:
                raise
            note(f"minstep: {error}")
        except EOFError:
            if is_interactive:
                note("")
            return
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            note("" if was_interrupted else "\n(Ctrl-C again, or Ctrl-D, leaves)")
            if was_interrupted:
                return
            was_interrupted = True


def _answer(
    conversation: Conversation, text: str, decode: Decode, display: Display, is_interactive: bool
) -> None:
    """Show the answer to `text`, and what it cost."""
    try:
        with closing(conversation.ask(text, decode)) as events:
            for event in events:
                display.show(event)
    except KeyboardInterrupt:
        if not is_interactive:
            raise
    finally:
        display.end()
    if conversation.stats.get("new_tokens"):
        note(summary(conversation.stats), is_dim=True)
    else:
        note("nothing was said, so your message is taken back")
