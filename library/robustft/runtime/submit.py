"""``robustft submit``: a script as a Ray job, its log followed, and its own exit code returned.

The job ships the folder that holds ``runtime_env.yaml``, as ``ray job submit --runtime-env`` does.
Three things are different. The submission id is made of the command and the commit, so that the
same command given twice follows the job instead of starting a second one. The log is polled over
HTTP: Ray's log stream breaks on a busy machine, while the job goes on. And the exit code is that of
the script, where ``ray job submit`` has only 0 and 1.
"""

import dataclasses
import hashlib
import ipaddress
import logging
import os
import re
import shlex
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from robustft.config import load_yaml
from robustft.errors import ConfigError, ResourceError, RunError
from robustft.runtime.spool import mask

__all__ = [
    "Ended",
    "Job",
    "choose_id",
    "exit_code",
    "follow",
    "job_address",
    "prepare",
    "set_client_environment",
    "submit",
]

log = logging.getLogger(__name__)

ENVIRONMENT_FILE = "runtime_env.yaml"
"""Marks the folder that a job ships, and says what else it needs."""
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Where ``ray start --head``, ``ray dashboard`` and ``kubectl port-forward`` put the dashboard."""
TRACKING_URI = "MLFLOW_TRACKING_URI"
SECRET_NAME = re.compile(r"(?i)token|passw|pwd|secret|credential|(^|_)key($|_)")
"""Names of variables that a job must not be given: everyone who sees the cluster can read them."""
TERMINAL = {"SUCCEEDED", "FAILED", "STOPPED"}
FIRST_PAUSE, LONGEST_PAUSE, SLOWER = 0.5, 5.0, 1.3
"""Seconds between two looks at a job: short after news, then longer by the factor SLOWER."""
PATIENCE = 60
"""Looks in a row that may fail before we give up on the cluster: about five minutes."""
LAST_LOOKS = 3
"""The same for the log of a job that has ended, whose node may be gone."""


class Client(Protocol):
    """What we use of ``ray.job_submission.JobSubmissionClient``."""

    def submit_job(self, **options: Any) -> str:
        """Start a job and return its submission id."""

    def list_jobs(self) -> Sequence[Any]:
        """Return every job that the cluster remembers."""

    def get_job_info(self, job_id: str) -> Any:
        """Return status, message and driver_exit_code."""

    def get_job_logs(self, job_id: str) -> str:
        """Return everything that the job has written so far."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is submitted."""

    entrypoint: str
    """Shell command, relative to the folder that is shipped."""
    runtime_env: Mapping[str, Any]
    """Ray's runtime environment; holds no secrets."""
    commit: str
    """Commit of the shipped folder, "+" appended if it has uncommitted changes; "" if none."""
    stem: str
    """Submission id before any suffix: the same for the same command and commit."""

    @property
    def repeatable(self) -> bool:
        """True if the commit says everything about the code that is shipped."""
        return bool(self.commit) and not self.commit.endswith("+")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How far a submission came.

    Args:
        submission_id: Ray's name of the job.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        code: exit code of the script; 0 while it has not ended.
        message: Ray's own sentence about the status.
    """

    submission_id: str
    status: str
    code: int
    message: str


def prepare(
    script: Path,
    arguments: Sequence[str],
    *,
    variables: Mapping[str, str],
    extra: Iterable[str] = (),
) -> Job:
    """Return the job that runs ``script`` from the folder that ships it. Nothing is sent.

    Args:
        script: Python file at or below a folder with ``runtime_env.yaml``.
        arguments: the script's own arguments.
        variables: environment variables of this process; only the MLflow address is passed on.
        extra: ``NAME=VALUE`` for the job besides those of ``runtime_env.yaml``.

    Raises:
        ConfigError: the script is missing or nothing ships it, or a secret would become public.
    """
    script = script.expanduser().resolve()
    if not script.is_file():
        raise ConfigError(f"{script} does not exist: name a script, e.g. experiments/rift_sweep.py")
    root = next(
        (folder for folder in script.parents if (folder / ENVIRONMENT_FILE).is_file()), None
    )
    if root is None:
        raise ConfigError(
            f"no folder above {script} holds {ENVIRONMENT_FILE}, which says what a job ships: "
            "submit from a checkout of robustft, or put one beside your scripts"
        )
    environment = load_yaml(root / ENVIRONMENT_FILE)
    shipped = str(environment.get("working_dir", "."))
    if "://" not in shipped:
        environment["working_dir"] = str((root / shipped).resolve())
    environment["env_vars"] = {
        **environment.get("env_vars", {}),
        **_tracking(variables),
        **_named(extra),
    }
    words = ["python", script.relative_to(root).as_posix(), *arguments]
    entrypoint = shlex.join(words)
    if mask(entrypoint) != entrypoint:
        raise ConfigError(
            "the command holds a password, which everyone who sees the cluster's jobs could read: "
            "leave it out and set it as a variable on the nodes"
        )
    commit = _commit(root)
    identity = "\0".join([*words, commit, *sorted(extra)]).encode()
    stem = re.sub(r"[^a-z0-9]+", "-", script.stem.lower()).strip("-") or "job"
    return Job(
        entrypoint=entrypoint,
        runtime_env=environment,
        commit=commit,
        stem=f"{stem}-{hashlib.sha256(identity).hexdigest()[:12]}",
    )


def choose_id(job: Job, statuses: Mapping[str, str]) -> tuple[str, bool]:
    """Return the submission id and whether a job with that id is already under way.

    Args:
        job: what is to be submitted.
        statuses: submission id -> status of every job that the cluster remembers.
    """
    count = 1
    name = job.stem
    while name in statuses:
        if job.repeatable and statuses[name] not in TERMINAL:
            return name, True
        count += 1
        name = f"{job.stem}-{count}"
    return name, False


def exit_code(status: str, driver_code: int | None) -> int:
    """Return what a shell would have said: 128 + n after signal n, never 0 unless it succeeded."""
    if status == "SUCCEEDED":
        return 0
    if driver_code is None:
        return 1
    return 128 - driver_code if driver_code < 0 else driver_code or 1


def follow(
    client: Client,
    submission_id: str,
    write: Callable[[str], object],
    *,
    pause: Callable[[float], object] = time.sleep,
) -> Ended:
    """Write the job's log as it grows, until the job has ended.

    Args:
        client: the cluster.
        submission_id: the job.
        write: gets each new piece of the log once.
        pause: waits so many seconds.

    Raises:
        RunError: the cluster has not answered for several minutes; the job may still go on.
    """
    shown, missed, wait = 0, 0, FIRST_PAUSE
    while True:
        info = None
        try:
            # In this order: once the status is final, the log that is read after it is whole.
            info = client.get_job_info(submission_id)
            fresh = client.get_job_logs(submission_id)[shown:]
        except (OSError, RuntimeError) as error:
            missed += 1
            ended = info is not None and str(info.status) in TERMINAL
            if missed >= (LAST_LOOKS if ended else PATIENCE):
                if info is not None and ended:
                    log.warning("the end of the log cannot be read: %s", _first_line(error))
                    return _ended(submission_id, info)
                raise RunError(
                    f"the cluster does not answer any more ({_first_line(error)}); job "
                    f"{submission_id} may still run: give the same command again, or ask "
                    f"`ray job status {submission_id}`"
                ) from error
        else:
            missed = 0
            if fresh:
                write(fresh)
                shown, wait = shown + len(fresh), FIRST_PAUSE
            if str(info.status) in TERMINAL:
                return _ended(submission_id, info)
        pause(wait)
        wait = min(LONGEST_PAUSE, wait * SLOWER)


def submit(job: Job, *, address: str, wait: bool, write: Callable[[str], object]) -> Ended:
    """Start a job, or find the one that is already under way, and follow it to its end.

    Args:
        job: from ``prepare``.
        address: of the cluster's dashboard, http or https.
        wait: False returns as soon as the cluster has accepted the job.
        write: gets each new piece of the log once.

    Raises:
        ResourceError: nothing answers at ``address``, or it wants another token.
        RunError: the cluster refused the job, or stopped answering.
        KeyboardInterrupt: Ctrl-C; the job goes on, and the text says how to stop it.
    """
    set_client_environment(address)
    client = _connect(address)
    try:
        statuses = {
            str(details.submission_id): str(details.status)
            for details in client.list_jobs()
            if details.submission_id
        }
        name, running = choose_id(job, statuses)
        if running:
            log.info("%s is under way already: following it", name)
        else:
            log.info("submitting %s to %s: %s", name, address, job.entrypoint)
            metadata = {"commit": job.commit} if job.commit else {}
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=name,
                runtime_env=dict(job.runtime_env),
                metadata=metadata,
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the cluster at {address} did not take the job ({_first_line(error)}): see "
            "`robustft doctor` and the dashboard's own log"
        ) from error
    if not wait:
        status = statuses[name] if running else "PENDING"
        return Ended(submission_id=name, status=status, code=0, message="not waited for")
    try:
        return follow(client, name, write)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{name} goes on: give the same command again to follow it, or stop it with "
            f"`ray job stop {name} --address {address}`"
        ) from None


def job_address(given: str | None, variables: Mapping[str, str]) -> str:
    """Return the dashboard's address: as given, $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, or local.

    Raises:
        ConfigError: it is not an http address (RAY_ADDRESS often names the port of the GCS).
    """
    named = given or variables.get("RAY_API_SERVER_ADDRESS") or variables.get("RAY_ADDRESS")
    address = (named or DEFAULT_ADDRESS).rstrip("/")
    if not re.match(r"https?://[^/]", address):
        raise ConfigError(
            f"{address} is not where jobs are submitted: give the dashboard's address, e.g. "
            "--address http://127.0.0.1:8265"
        )
    if mask(address) != address:
        raise ConfigError("the address holds a password: put the cluster's token in RAY_AUTH_TOKEN")
    return address


def set_client_environment(address: str) -> None:
    """Set what Ray's job client reads, before ray is imported.

    ``RAY_AUTH_MODE`` is respected; where it is not set, a token is sent if there is one.
    """
    # Ray's client prefers these variables to the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    mode = "token" if named or Path("~/.ray/auth_token").expanduser().is_file() else "disabled"
    os.environ.setdefault("RAY_AUTH_MODE", mode)


def _connect(address: str) -> Client:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client: Client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ResourceError(
            f"the cluster at {address} wants another token: set RAY_AUTH_MODE=token and its token "
            "in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from error
    except (OSError, RuntimeError) as error:
        raise ResourceError(
            f"no Ray dashboard answers at {address} ({_first_line(error)}): forward its port (ray "
            "dashboard ray_config.yaml, or kubectl port-forward), or name another with --address"
        ) from error
    return client


def _ended(submission_id: str, info: Any) -> Ended:
    return Ended(
        submission_id=submission_id,
        status=str(info.status),
        code=exit_code(str(info.status), info.driver_exit_code),
        message=info.message or "",
    )


def _tracking(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the MLflow address for the job, if it means the same on another machine."""
    uri = variables.get(TRACKING_URI, "")
    if mask(uri) != uri:
        raise ConfigError(
            f"{TRACKING_URI} holds a password, which everyone who sees the cluster's jobs could "
            "read: leave it out of the address and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD on the nodes"
        )
    if uri and (not re.match(r"https?://", uri) or _is_loopback(uri)):
        log.warning(
            "%s=%s is of this machine only and is not passed on: the nodes' own variable decides; "
            "where the cluster is this machine, add --env %s=%s",
            TRACKING_URI,
            uri,
            TRACKING_URI,
            uri,
        )
        return {}
    return {TRACKING_URI: uri} if uri else {}


def _is_loopback(uri: str) -> bool:
    """Return True if the address means whichever machine reads it."""
    try:
        host = urllib.parse.urlsplit(uri).hostname or ""
    except ValueError as error:
        raise ConfigError(f"{TRACKING_URI}={uri} is no address ({error}): correct it") from error
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _named(extra: Iterable[str]) -> dict[str, str]:
    found = {}
    for text in extra:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env {text} must be written as NAME=VALUE")
        if SECRET_NAME.search(name) or mask(value) != value:
            raise ConfigError(
                f"--env {name} looks like a secret, which everyone who sees the cluster's jobs "
                "could read: set it on the nodes instead"
            )
        found[name] = value
    return found


def _commit(root: Path) -> str:
    """Return the commit; unlike that of a run's record, new files make it a changed one."""
    answers = []
    for words in (("describe", "--always", "--abbrev=12"), ("status", "--porcelain")):
        command = ["git", "--no-optional-locks", *words]
        try:
            done = subprocess.run(
                command, cwd=root, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode != 0:
            return ""
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return mask(lines[0]) if lines else type(error).__name__
