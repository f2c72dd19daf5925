"""The process of the command line, as `minstep` and as `python -m minstep`.

It is ready for Ctrl-C before anything large is imported. What comes before is Python's own start
and the script that pip wrote, in which Python itself answers Ctrl-C.
"""

import os
import signal
import sys

ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> int:
    """Run the command in sys.argv; its exit code, 130 after Ctrl-C."""
    for each in ENDS:
        if signal.getsignal(each) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(each, _leave)  # an import may lose or rename a KeyboardInterrupt
    code: object = 130
    try:
        from minstep.cli.main import main as run

        code = run()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        pass
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # lead it to nowhere: Python's own flush would fail too
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    for each in ENDS:  # all is done, and Python's own end would print what a signal breaks off
        signal.signal(each, signal.SIG_IGN)
    return code if isinstance(code, int) else 0


def _leave(number: int, _: object) -> None:
    """Leave at once: nothing has been written yet, or everything has been."""
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
