"""AWS's notice becomes a drain request: against a stand-in for its metadata, and for `ray`."""

import datetime
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy_files import CLUSTER

SCRIPT = CLUSTER / "aws" / "spot_notice.py"
NODE, HEAD = "ab" * 28, "10.0.0.5:6379"
RAYLET = [
    "/venv/raylet",
    "--node_ip_address=10.0.0.9",
    f"--node_id={NODE}",
    f"--gcs-address={HEAD}",
]
OTHER = ["python", "agent.py", "--node-id=ff", "--gcs-address=elsewhere:1"]


class Metadata(http.server.ThreadingHTTPServer):
    """The metadata service of a machine: version 2, so nothing without a token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.items = {"instance-life-cycle": "spot"}
        self.later: dict[str, str] = {}
        """Items that appear at the third look."""
        self.looks = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        whole = self.path == "/latest/api/token"
        whole = whole and int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        self.say(200 if whole else 400, "a token")

    def do_GET(self) -> None:
        path = self.path.removeprefix("/latest/meta-data/")
        if self.headers["X-aws-ec2-metadata-token"] != "a token":
            self.say(401, "")
            return
        if path == "spot/instance-action":
            self.server.looks += 1
            if self.server.looks == 3:
                self.server.items |= self.server.later
        item = self.server.items.get(path)
        self.say(404 if item is None else 200, item or "")

    def say(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def watch(metadata: Metadata, folder: Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script to its end; return it, and the lines that `ray` was called with."""
    for number, words in {"17": RAYLET, "18": OTHER}.items():
        (folder / number).mkdir()
        (folder / number / "cmdline").write_bytes("\0".join([*words, ""]).encode())
    called = folder / "called.txt"
    # Fails the first time, as where the head does not answer.
    ray = f'#!/bin/bash\nprintf "%s\\n" "$*" >> {called}\n[ $(wc -l < {called}) -gt 1 ]\n'
    (folder / "ray").write_text(ray)
    (folder / "ray").chmod(0o755)
    options = ["--metadata", metadata.address, "--pause", "0.02", "--proc", str(folder)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env={
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "http_proxy": "http://nowhere",
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done, called.read_text().splitlines() if called.exists() else []


def notice_in(seconds: float) -> str:
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_the_notice_is_handed_on_until_ray_has_taken_it(metadata: Metadata, tmp_path: Path) -> None:
    metadata.later = {"spot/instance-action": notice_in(120)}
    done, called = watch(metadata, tmp_path)
    assert done.returncode == 0, done.stderr
    # Not at the looks before, again after the failure, and not after that.
    assert metadata.looks == 4
    assert len(called) == 2
    words = called[1].split(" ")
    assert words[0] == "drain-node"
    assert 100 <= int(words[-1]) <= 120

    from ray.scripts.scripts import drain_node

    parsed = drain_node.make_context("drain-node", parsed_words(called[1])).params
    assert parsed["address"] == HEAD
    assert parsed["node_id"] == NODE
    assert parsed["reason"] == "DRAIN_NODE_REASON_PREEMPTION"


def parsed_words(line: str) -> list[str]:
    """Return the words that Ray sees: the message is one of them, though it has spaces."""
    before, message, after = line.partition("AWS takes this spot machine back")
    return [*before.split()[1:], message, *after.split()]


def test_a_time_that_is_over_is_no_time_left(metadata: Metadata, tmp_path: Path) -> None:
    metadata.items["spot/instance-action"] = notice_in(-30)
    _, called = watch(metadata, tmp_path)
    assert called[-1].endswith("--deadline-remaining-seconds 0")


def test_a_machine_that_is_not_spot_is_left_alone(metadata: Metadata, tmp_path: Path) -> None:
    metadata.items = {"instance-life-cycle": "on-demand", "spot/instance-action": notice_in(9)}
    done, called = watch(metadata, tmp_path)
    assert done.returncode == 0
    assert called == []
    assert metadata.looks == 0
