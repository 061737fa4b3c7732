"""Tell Ray when AWS is about to take this spot machine back: python spot_notice.py

AWS writes the notice into the machine's own metadata, two minutes ahead. Ray 2.60.0 does not look
there, so this does, beside Ray on every worker (ray_config.yaml), and hands the notice on as a
drain request: from then on Ray places nothing here, and the loss is no failure of a trial.
It ends after that, and at once on a machine that is not a spot machine.

`ray drain-node` is hidden and not stable between versions: a test compares its options with Ray's.
"""

import argparse
import datetime
import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

METADATA = "http://169.254.169.254"
ANSWER_SECONDS = 2.0
RAY_SECONDS = 30.0

log = logging.getLogger("spot_notice")
# Metadata is never asked for through a proxy.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Wait for the notice and hand it on; 0 after that, or if none will ever come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--metadata", default=METADATA, help="address of the metadata service")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--proc", type=Path, default=Path("/proc"), help="where processes are seen")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    said = ""
    while True:
        try:
            if read(options.metadata, "instance-life-cycle") != "spot":
                log.info("not a spot machine: there will be no notice")
                return 0
            notice = read(options.metadata, "spot/instance-action")
            if notice is not None:
                command = drain_command(notice, raylet_options(options.proc))
                log.info("%s: %s", notice, " ".join(command))
                subprocess.run(command, check=True, timeout=RAY_SECONDS)
                return 0
        # Tried again as long as the machine is there; the same trouble is said once.
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            if str(error) != said:
                said = str(error)
                log.warning("%s", error)
        time.sleep(options.pause)


def read(metadata: str, path: str) -> str | None:
    """Return an item of the machine's metadata (IMDSv2), or None if it does not exist."""
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    ask = urllib.request.Request(f"{metadata}/latest/api/token", headers=lifetime, method="PUT")
    with opener.open(ask, timeout=ANSWER_SECONDS) as answer:
        token = answer.read().decode()
    own = {"X-aws-ec2-metadata-token": token}
    ask = urllib.request.Request(f"{metadata}/latest/meta-data/{path}", headers=own)
    try:
        with opener.open(ask, timeout=ANSWER_SECONDS) as answer:
            text: str = answer.read().decode()
            return text
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def raylet_options(proc: Path) -> dict[str, str]:
    """Return the options that this machine's raylet was started with: its id, the head's address.

    Raises:
        ValueError: if there is not exactly one raylet.
    """
    found = []
    for path in proc.glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        # It has ended since it was listed.
        except (FileNotFoundError, ProcessLookupError):
            continue
        if Path(words[0]).name == "raylet":
            pairs = (word.removeprefix("--").partition("=") for word in words[1:])
            found.append({name: value for name, _, value in pairs})
    if len(found) != 1:
        raise ValueError(f"{len(found)} raylets run here, not one")
    return found[0]


def drain_command(notice: str, raylet: dict[str, str]) -> list[str]:
    """Return the command that drains this node.

    Args:
        notice: AWS's, such as ``{"action": "terminate", "time": "2026-03-01T10:02:00Z"}``.
        raylet: the options of this machine's raylet.
    """
    when = json.loads(notice).get("time")
    left = 0.0
    if when is not None:
        end = datetime.datetime.fromisoformat(when)
        left = (end - datetime.datetime.now(datetime.UTC)).total_seconds()
    command = ["ray", "drain-node", "--address", raylet["gcs-address"]]
    command += ["--node-id", raylet["node_id"], "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "AWS takes this spot machine back"]
    return [*command, "--deadline-remaining-seconds", str(max(0, int(left)))]


if __name__ == "__main__":
    sys.exit(main())
