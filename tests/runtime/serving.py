"""A port on which nobody listens, and ``robustft ui`` in a process of its own."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 120.0  # seconds after which a flush counts as hanging; ordinarily it takes one


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port on which nobody listens and which nobody else gets meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


@contextlib.contextmanager
def served(storage: Path, port: int) -> Iterator[None]:
    """Run ``serve_ui`` in a process of its own and end it as Ctrl-C does."""
    code = (
        "import sys, pathlib, robustft.runtime.ui as ui; "
        "sys.exit(ui.serve_ui(pathlib.Path(sys.argv[1]), port=int(sys.argv[2])))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, storage, str(port)])
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/health"))
        assert process.poll() is None
        yield
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 0
    assert not answers(f"http://127.0.0.1:{port}/health")


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
