"""What a training takes, of a process whose size is known."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from robustft.runtime.memory import MemoryWatch

TRIAL = "ray::ImplicitFunc.train"
PATIENCE = 20.0
HOLDING = """
import sys
block = bytearray(b"x") * (int(sys.argv[1]) << 20)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holding(mebibytes: int, *, title: str) -> Iterator[None]:
    """Run a process with this title that has written to so much memory."""
    # Python finds its library by its name, which is not its own here.
    with subprocess.Popen(
        [title, "-S", "-c", HOLDING, str(mebibytes)],
        executable=sys.executable,
        env={**os.environ, "PYTHONHOME": sys.base_prefix},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate()


def test_a_trial_is_as_large_as_what_it_holds() -> None:
    held, more = 64, 192
    with (
        holding(more, title="ray::IDLE"),
        MemoryWatch(seconds=0.01) as watch,
        holding(held, title=TRIAL),
    ):
        end = time.monotonic() + PATIENCE
        while not watch.largest >= held and time.monotonic() < end:
            time.sleep(0.01)
    assert held <= watch.largest < more
