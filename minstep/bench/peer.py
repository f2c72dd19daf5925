"""The process that runs torch beside us: started, asked, and ended.

Checked by: tests/bench/test_peer.py
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from minstep.errors import LONGEST_MESSAGE, shown

SCRIPT = Path(__file__).with_name("torch_peer.py")
FLOATS = ("float32", "bfloat16")  # that a peer computes in
HOW = "pip install -e '.[oracle]', or --peer with a Python that has both"


class PeerError(Exception):
    """The other process could not do what it was asked for: the message, printable, says why."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(" ".join(message.split()), LONGEST_MESSAGE))


class Peer:
    """A running peer. `versions` names its packages; `ask` has it do something."""

    def __init__(self, process: "subprocess.Popen[str]", log: Any) -> None:
        self._process, self._log = process, log
        first = self._answer()
        if "missing" in first:
            raise PeerError(f"{first['missing']} ({HOW})")
        versions = first["versions"]
        self.versions = ", ".join(f"{name} {version}" for name, version in versions.items())
        self.versions += f", {first['threads']} threads"

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request, which names a method of TorchPeer. Raises PeerError."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has ended: reading says why
            pass
        answer = self._answer()
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
            return answer
        except json.JSONDecodeError:
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines()
            raise PeerError(f"the peer ended: {(lines or ['it said nothing'])[-1]}") from None


class Setup(NamedTuple):
    """What every case is given."""

    folder: Path  # for files of its own, removed after the run
    peer: Peer | None
    rounds: int
    quick: bool  # smaller sizes where these would take long
    seed: int


@contextmanager
def peer(python: str) -> Iterator[Peer]:
    """A peer under that Python; it ends with the block, however that ends. Raises PeerError."""
    # It is to run as it would by itself, and minstep asks NumPy for a single thread.
    environment = {key: x for key, x in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                [python, "-P", str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                encoding="utf-8",
            )
        except OSError as error:
            raise PeerError(f"{python}: cannot be run: {error.strerror}") from error
        with process:
            try:
                yield Peer(process, log)
            finally:
                process.kill()
