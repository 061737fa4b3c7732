"""Serve MLflow's web pages on the local SQLite store: ``robustft ui``."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import NoReturn

from robustft.errors import ConfigError, ResourceError
from robustft.runtime.mlflow_store import sqlite_path
from robustft.runtime.spool import mask
from robustft.runtime.tracking import UI_VIEW, default_uri

__all__ = ["serve_ui"]

logger = logging.getLogger(__name__)


def serve_ui(storage: Path, *, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Serve MLflow's UI on the SQLite store under ``storage`` until interrupted: ``robustft ui``.

    Logs the address when the server answers. Ctrl-C and SIGTERM stop the server.

    Args:
        storage: storage root of the runs.
        host: address to listen on; the default is reachable from this machine only.
        port: port to listen on.

    Returns:
        Exit code: 0 after an interruption, else the server's own.

    Raises:
        ConfigError: there is no store yet, or runs are tracked elsewhere.
        ResourceError: the port is taken.
    """
    uri = default_uri(storage)
    database = sqlite_path(uri)
    if database is None:
        raise ConfigError(
            f"runs are tracked at {mask(uri)} (MLFLOW_TRACKING_URI): open that address, or unset "
            f"the variable to see the local store"
        )
    if not database.exists():
        raise ConfigError(f"{database} does not exist: run something first, e.g. make demo")
    _refuse_taken_port(host, port)
    artifacts = (database.parent / "mlflow-artifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--artifacts-destination", artifacts, "--workers", "1"]
    command += ["--host", host, "--port", str(port), "--uvicorn-opts", "--log-level warning"]
    # Without job execution the server is two processes instead of ten.
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
    environment |= os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = storage.absolute() / "mlflow-ui.log"
    previous = signal.signal(signal.SIGTERM, _interrupt)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        address = f"http://{host}:{port}"
        if _wait_until_healthy(process, address):
            logger.info("MLflow UI: %s/#/experiments%s (Ctrl-C stops it)", address, UI_VIEW)
        code = process.wait()
        logger.error("the MLflow server ended with exit code %d; its output is in %s", code, log)
        return code
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(process)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _refuse_taken_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what runs there or "
                f"choose another port with --port"
            ) from error


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str) -> bool:
    """Poll ``/health`` until it answers (True) or the server has ended (False)."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
