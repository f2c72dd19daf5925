"""Processes of their own, whose memory is counted."""

import os
from collections.abc import Sequence


def forked_small(command: Sequence[str]) -> list[str]:
    """The command with a shell as its parent.

    Linux takes what a process had resident before it became another program for that one's peak,
    and a worker of pytest may have had a gigabyte.
    """
    return ["/bin/sh", "-c", '"$@"; exit $?', "sh", *command] if os.name == "posix" else [*command]
