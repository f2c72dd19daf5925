"""Steps of tokens to pieces of text, with the reason it ended and what it cost."""

import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minstep.generate import Step
from minstep.sampling import log_probabilities
from minstep.text.tokenizer import StreamingText
from minstep.validation import check_integer

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None


class Pass(NamedTuple):
    """One forward pass of the main model, without its logits."""

    before: int  # new tokens before it
    drafts: list[int]
    accepted: int
    new: int  # tokens it gave, fewer than 1 + accepted where the text ends among them

    @property
    def kept(self) -> int:
        """How many drafts stand in the text."""
        return min(self.accepted, self.new)


class Continuation:
    """A prompt's continuation as it comes: iterate for its text; the rest is known as it goes on.

    Without a text stream there is an empty piece for each token. The time up to the first token is
    the prompt's. Ends where the steps do, or at a stop text ("stop"). Raises InputError as they do,
    and for `logprobs` below 0.
    Checked by: tests/text/test_continuation.py
    """

    def __init__(
        self, steps: Iterator[Step], stream: StreamingText | None = None, logprobs: int = 0
    ) -> None:
        self.passes: list[Pass] = []  # the first is the prompt's
        self.tokens: list[int] = []
        self.text = ""
        self.stop = "interrupted"  # until it ends: then "eos", "length", "context" or "stop"
        self.logprobs: list[dict[str, Any]] = []  # for each token, when asked for
        self.prompt_seconds = self.seconds = 0.0
        self._steps, self._stream = steps, stream
        self._alternatives = check_integer("logprobs", logprobs, 0)

    def __iter__(self) -> Iterator[str]:
        started = time.perf_counter()
        for step in self._steps:
            now = time.perf_counter()
            if step.tokens:  # without any the prompt was not even read
                self.prompt_seconds = self.prompt_seconds or now - started
                self.seconds = now - started - self.prompt_seconds
            self.passes.append(Pass(len(self.tokens), step.drafts, step.accepted, len(step.tokens)))
            self.stop = step.stop or self.stop
            for token, logits in zip(step.tokens, step.logits, strict=False):
                self.tokens.append(token)
                if self._alternatives:
                    self.logprobs.append(_logprobs(token, logits, self._alternatives))
                yield from self._piece(self._stream.add(token) if self._stream else "")
                if self._stream and self._stream.stopped:
                    self.stop = "stop"
                    return
        if self._stream:
            yield from self._piece(self._stream.finish())

    def _piece(self, text: str) -> Iterator[str]:
        self.text += text
        if text or self._stream is None:
            yield text

    @property
    def mtp_trace(self) -> list[tuple[int, list[int], int]]:
        """For each pass that had drafts: the new tokens before it, the drafts, how many were kept.

        The last pass may have kept more than were wanted.
        """
        return [(each.before, each.drafts, each.accepted) for each in self.passes if each.drafts]

    def stats(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Counts, times in seconds and per second, and what the drafts were worth.

        `acceptance` has for each depth the share of its drafts that were kept;
        `tokens_per_forward` counts passes of the main model after the prompt's own.
        """
        passes = self.passes[1:]
        depths = max((len(each.drafts) for each in passes), default=0)
        drafted = [sum(len(each.drafts) > k for each in passes) for k in range(depths)]
        kept = [sum(each.kept > k for each in passes) for k in range(depths)]
        new = len(self.tokens) - 1
        return {
            "prompt_tokens": len(prompt),
            "prompt_seconds": round(self.prompt_seconds, 4),
            "prompt_tps": _rate(len(prompt), self.prompt_seconds),
            "new_tokens": len(self.tokens),
            "generation_seconds": round(self.seconds, 4),
            "generation_tps": _rate(new, self.seconds),
            "forward_passes": len(passes),
            "tokens_per_forward": round(new / len(passes), 3) if passes else 0.0,
            "acceptance": [round(k / n, 3) for k, n in zip(kept, drafted, strict=True)],
            "peak_memory_bytes": _peak_memory(),
            "stop": self.stop,
        }


def _peak_memory() -> int | None:
    """The most bytes this process has had resident; None where the system does not say."""
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 1) if count > 0 and seconds > 0 else 0.0


def _logprobs(token: int, logits: Any, alternatives: int) -> dict[str, Any]:
    """The log-probability of a token, and of the likeliest ones."""
    logs = log_probabilities(logits)
    best = np.argsort(-logs, kind="stable")[:alternatives].tolist()
    top = [{"token": n, "logprob": float(logs[n])} for n in best]
    return {"token": token, "logprob": float(logs[token]), "top": top}
