"""A local S3-compatible server for tests: on the loopback interface, a free port, in memory."""

import logging
import urllib.request
from collections.abc import Iterator

from moto.server import ThreadedMotoServer

__all__ = ["BUCKET", "served_bucket"]

BUCKET = "s3://bucket/store"


def served_bucket() -> Iterator[dict[str, str]]:
    """Serve an empty bucket; yield the environment variables by which clients find it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    request = urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")
    with urllib.request.urlopen(request):
        pass
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.stop()
