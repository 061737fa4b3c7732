"""The doctor: every kind of trouble is found and named with its remedy, and nothing else is."""

import dataclasses
import http.server
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from robustft import cluster_verbs
from robustft.cluster_verbs import Doctor, Submit, examine, separated, write_checks
from robustft.errors import ConfigError
from robustft.parsing import parse
from robustft.runtime import doctor, node_facts
from robustft.runtime.doctor import (
    GIB,
    Check,
    check_cluster,
    check_node,
    check_tracking,
    diagnose,
    read_pins,
)
from robustft.runtime.node_facts import Folder, NodeFacts, folder_facts

PINS = {"ray": "2.60.0", "torch": "2.15.0", "mlflow": "3.17.2", "tyro": "1.0.17"}
HEALTHY = NodeFacts(
    host="one",
    python=(3, 11, 7),
    versions={**PINS, "robustft": "0.1.0"},
    torch_error="",
    torch_cuda="13.2",
    cuda_usable=True,
    gpus=("H100", "H100"),
    backends=("nccl", "gloo"),
    open_files=65536,
    memory=64 * GIB,
    shared_memory=32 * GIB,
    folders=(Folder("/shared/home", "", 100 * GIB, True),),
)


def judged(facts: NodeFacts, pins: dict[str, str] = PINS) -> list[Check]:
    return list(check_node(facts, pins, where="one", source="constraints.txt"))


def troubles(checks: list[Check]) -> list[tuple[str, str]]:
    return [(check.level, check.subject) for check in checks if check.level != "ok"]


# --- one node ------------------------------------------------------------------------------------


def test_a_healthy_node_has_no_troubles() -> None:
    checks = judged(HEALTHY)
    assert troubles(checks) == []
    assert not [check for check in checks if check.remedy]
    assert "2 x H100; torch for CUDA 13.2" in [check.found for check in checks]
    cpu = dataclasses.replace(HEALTHY, gpus=(), torch_cuda=None, cuda_usable=False)
    assert troubles(judged(dataclasses.replace(cpu, backends=("gloo",)))) == []


@pytest.mark.parametrize(
    ("change", "trouble", "words"),
    [
        ({"python": (3, 14, 0)}, ("error", "Python"), "3.11 to 3.13"),
        ({"python": (3, 10, 9)}, ("error", "Python"), "3.11 to 3.13"),
        ({"versions": {**HEALTHY.versions, "tyro": "1.1"}}, ("warning", "packages"), "tyro 1.1"),
        ({"versions": {"ray": "2.60.0"}}, ("error", "packages"), "torch, mlflow, robustft"),
        ({"torch_error": "torchvision::nms"}, ("error", "torch"), "torchvision together"),
        ({"torch_cuda": None}, ("error", "GPUs"), "CUDA build"),
        ({"cuda_usable": False}, ("error", "GPUs"), "NVIDIA driver"),
        ({"backends": ("gloo",)}, ("error", "collectives"), "lacks nccl"),
        ({"backends": ()}, ("error", "collectives"), "lacks nccl and gloo"),
        ({"open_files": 1024}, ("warning", "open files"), "ulimit -n 65536"),
        ({"shared_memory": 64 * 2**20}, ("warning", "shared memory"), "--shm-size"),
    ],
)
def test_each_trouble_is_found_with_its_remedy(
    change: dict[str, Any], trouble: tuple[str, str], words: str
) -> None:
    checks = judged(dataclasses.replace(HEALTHY, **change))
    assert troubles(checks) == [trouble]
    (found,) = [check for check in checks if check.level != "ok"]
    assert words in f"{found.found} {found.remedy}"
    assert found.remedy


def test_hidden_gpus_are_no_trouble() -> None:
    # Ray hides the GPUs from a task that asks for none.
    assert troubles(judged(dataclasses.replace(HEALTHY, cuda_usable=None))) == []


def test_a_cpu_build_of_the_pinned_torch_is_the_pinned_torch() -> None:
    versions = {**HEALTHY.versions, "torch": "2.15.0+cpu"}
    assert troubles(judged(dataclasses.replace(HEALTHY, versions=versions))) == []


def test_a_package_that_is_pinned_and_not_needed_may_be_absent() -> None:
    assert troubles(judged(HEALTHY, {**PINS, "deepspeed": "0.19.8"})) == []


def test_without_pins_nothing_is_compared() -> None:
    assert troubles(judged(HEALTHY, {})) == []


@pytest.mark.parametrize(
    ("free", "error", "level"),
    [(100 * GIB, "", "ok"), (GIB, "", "warning"), (GIB // 4, "", "error"), (0, "denied", "error")],
)
def test_folders_need_room(free: int, error: str, level: str) -> None:
    (check,) = doctor.check_folder(Folder("/shared", error, free, None), where="one")
    assert check.level == level
    assert bool(check.remedy) == (level != "ok")


# --- several nodes -------------------------------------------------------------------------------


def cluster(
    *changes: dict[str, Any], skews: list[tuple[float, float]] | None = None
) -> list[Check]:
    nodes = [
        dataclasses.replace(HEALTHY, host=f"node-{index}", **change)
        for index, change in enumerate(changes)
    ]
    return list(check_cluster(nodes, skews or [(0.0, 0.01)] * len(nodes)))


def test_equal_nodes_have_no_troubles() -> None:
    assert troubles(cluster({}, {}, {})) == []
    # The patch version of Python may differ.
    assert troubles(cluster({}, {"python": (3, 11, 9)})) == []


@pytest.mark.parametrize(
    ("change", "subject", "words"),
    [
        ({"python": (3, 12, 1)}, "Python", "node-1: 3.12"),
        ({"versions": {**HEALTHY.versions, "ray": "2.59.0"}}, "ray", "node-1: 2.59.0"),
        ({"versions": PINS}, "robustft", "node-1: not installed"),
    ],
)
def test_nodes_that_differ_are_named(change: dict[str, Any], subject: str, words: str) -> None:
    (found,) = [check for check in cluster({}, change) if check.level != "ok"]
    assert (found.level, found.subject) == ("error", subject)
    assert words in found.found


def test_a_clock_counts_as_wrong_only_beyond_what_the_measurement_may_be() -> None:
    assert troubles(cluster({}, {}, skews=[(0.0, 0.0), (-3.0, 0.1)])) == [("warning", "clocks")]
    assert troubles(cluster({}, {}, skews=[(0.0, 0.0), (3.0, 2.5)])) == []
    found = cluster({}, {}, skews=[(9.0, 0.0), (3.0, 0.0)])
    assert "node-0 differs from the driver's by at least 9.0 s" in found[0].found


def test_a_folder_that_is_not_shared_is_found() -> None:
    lonely = {"folders": (Folder("/shared/home", "", 100 * GIB, False),)}
    (found,) = [check for check in cluster({}, {}, lonely) if check.level != "ok"]
    assert (found.level, found.subject) == ("error", "shared folder")
    assert "on node-2 than on the driver's" in found.found
    # Without a marker (the driver could not write one) nothing is known.
    unknown = {"folders": (Folder("/shared/home", "", 100 * GIB, None),)}
    assert "shared folder" not in [check.subject for check in cluster(unknown, unknown)]


def test_names_of_nodes_on_one_machine_differ() -> None:
    assert doctor._names(["a", "b"]) == ["a", "b"]
    assert doctor._names(["a", "a"]) == ["a#0", "a#1"]


def test_more_gpus_than_there_are_cannot_be_offered() -> None:
    assert not list(doctor._check_gpu_count(HEALTHY, 2))
    assert not list(doctor._check_gpu_count(HEALTHY, 1))
    (found,) = doctor._check_gpu_count(HEALTHY, 4)
    assert "offers 4 and the NVIDIA driver lists 2" in found.found


# --- MLflow --------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, Callable[[int], None], list[str | None]]]:
    """Return address, what sets the code of the next answers, and the Authorization headers."""
    state = {"code": 200}
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(state["code"])
            self.end_headers()

        def do_POST(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(state["code"] if self.path.startswith("/api/2.0/mlflow/") else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", lambda c: state.update(code=c), seen
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.mark.parametrize(
    ("code", "level", "words"),
    [
        (200, "ok", ""),
        (401, "error", "MLFLOW_TRACKING_USERNAME"),
        (403, "error", "--allowed-hosts"),
        (500, "error", "server's log"),
    ],
)
def test_mlflow_is_asked_what_a_run_would_ask(
    server: tuple[str, Callable[[int], None], list[str | None]], code: int, level: str, words: str
) -> None:
    address, answer_with, seen = server
    answer_with(code)
    (check,) = check_tracking(f"{address}/", {})
    assert (check.level, seen) == (level, [None])
    assert words in check.remedy
    login = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "hunter2"}
    list(check_tracking(address, login))
    assert seen[1] == "Basic bWU6aHVudGVyMg=="


def test_mlflow_that_is_away_is_a_warning_without_its_password() -> None:
    (check,) = check_tracking("http://me:hunter2@127.0.0.1:1", {})
    assert check.level == "warning"
    assert "robustft sync" in check.remedy
    assert "hunter2" not in check.found
    (check,) = check_tracking("sqlite:////runs/mlflow.db", {})
    assert check.level == "ok"


@pytest.mark.parametrize("code", [200, 401, 403, 500])
def test_any_answer_shows_that_a_node_reaches_mlflow(
    server: tuple[str, Callable[[int], None], list[str | None]],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    address, answer_with, seen = server
    answer_with(code)
    asked, reason = doctor._tracking_reach(address.replace("://", "://me:hunter2@"))
    assert (asked, reason, seen) == (address, "", [None])
    (check,) = doctor._check_reach("node-1", asked, reason)
    assert (check.level, check.where, check.subject) == ("ok", "node-1", "MLflow")


def test_a_node_that_does_not_reach_mlflow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (check,) = reach("http://127.0.0.1:1")
    assert (check.level, check.where, check.subject) == ("warning", "node-1", "MLflow")
    assert "http://127.0.0.1:1 does not answer from here ([Errno" in check.found
    assert "robustft sync" in check.remedy
    # A node's own variable is what a driver there would use.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:2")
    asked, reason = doctor._tracking_reach("http://127.0.0.1:1")
    assert asked == "http://127.0.0.1:2"
    assert reason
    # A file needs no way to it: that of folders has been looked at.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert not list(reach("sqlite:////runs/mlflow.db"))


def test_what_speaks_no_http_is_no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for ask in (lambda uri: list(check_tracking(uri, {})), lambda uri: list(reach(uri))):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            greeter = threading.Thread(target=greet, args=(listener,))
            greeter.start()
            (check,) = ask(f"http://127.0.0.1:{listener.getsockname()[1]}")
            greeter.join()
        assert check.level == "warning"
        assert "220 mail" in check.found


def reach(uri: str) -> Iterator[Check]:
    return doctor._check_reach("node-1", *doctor._tracking_reach(uri))


def greet(listener: socket.socket) -> None:
    """Answer as another service would."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(b"220 mail\r\n")


# --- facts ---------------------------------------------------------------------------------------


def test_pins_are_read_as_they_are_written() -> None:
    text = "# comment\nPyYAML==6.0.3\nast_serialize==0.13.1  # why\n\n"
    assert read_pins(text) == {"pyyaml": "6.0.3", "ast-serialize": "0.13.1"}


def test_folders_are_looked_at_and_left_as_they_were(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    found = folder_facts(str(tmp_path / "not" / "there"), str(marker))
    assert (found.error, found.marker) == ("", True)
    assert found.free > 0
    assert folder_facts(str(tmp_path), str(tmp_path / "other")).marker is False
    assert sorted(tmp_path.iterdir()) == [marker]
    # Nobody may write into a file as if it were a folder, not even root.
    assert folder_facts(str(marker / "below"), None).error


def test_gpus_are_those_that_the_driver_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100'\necho 'NVIDIA H100'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert node_facts._listed_gpus() == ("NVIDIA H100", "NVIDIA H100")
    program.write_text("#!/bin/sh\necho 'has failed because it could not communicate'\nexit 9\n")
    assert node_facts._listed_gpus() == ()


def test_this_machine_can_be_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ROBUSTFT_STORAGE", str(tmp_path / "runs"))
    checks = diagnose()
    subjects = {check.subject for check in checks}
    assert {"Python", "packages", "GPUs", "collectives", "open files", "folder"} <= subjects
    assert "MLflow" in subjects
    assert list(tmp_path.iterdir()) == []


def test_a_broken_torch_is_a_finding_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(HEALTHY, torch_error="no libcudart", folders=())
    monkeypatch.setattr(doctor, "node_facts", lambda *asked: broken)
    assert ("error", "torch") in troubles(diagnose())


# --- the verbs -----------------------------------------------------------------------------------


def test_the_answer_says_all_and_ends_with_1_if_something_must_be_repaired(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [
        Check("ok", "here", "Python", "3.11.7"),
        Check("warning", "a", "MLflow", "away", "wait"),
    ]
    monkeypatch.setattr(doctor, "diagnose", lambda address: found)
    answer = examine(Doctor())
    assert (answer.code, answer.document["ok"]) == (0, True)
    found.append(Check("error", "b", "[GPUs]", "none " * 40, "buy some"))
    answer = examine(Doctor())
    assert (answer.code, answer.document["ok"]) == (1, False)
    assert json.loads(json.dumps(answer.document))["checks"][2]["remedy"] == "buy some"

    stream = io.StringIO()
    write_checks(found, stream)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "ok      here: Python: 3.11.7"
    assert lines[2] == "        -> wait"
    assert lines[3].startswith("error   b: [GPUs]: none none")
    assert lines[-1] == "not ready to run: 1 errors, 1 warnings"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["submit", "a.py", "--lr", "1"], ["submit", "a.py", "--", "--lr", "1"]),
        (["submit", "--no_wait", "a.py"], ["submit", "--no_wait", "a.py", "--"]),
        (["submit", "a.py", "--", "x"], ["submit", "a.py", "--", "x"]),
        (["submit", "--help"], ["submit", "--help"]),
        (["train", "a.py", "--lr", "1"], ["train", "a.py", "--lr", "1"]),
    ],
)
def test_what_follows_the_script_is_the_scripts(words: list[str], expected: list[str]) -> None:
    assert separated(words) == expected


def test_the_command_line_of_submit() -> None:
    words = separated(["submit", "--address", "http://h:1", "--no-wait", "a.py", "--lr", "1"])[1:]
    verb = parse(Submit, words)
    assert (verb.script, verb.arguments) == ("a.py", ("--lr", "1"))
    assert (verb.address, verb.no_wait) == ("http://h:1", True)
    verb = parse(Submit, ["--json", "--env", "A=b", "--env", "C=d", "a.py"])
    assert (verb.env, verb.script, verb.json) == (("A=b", "C=d"), "a.py", True)


def test_submit_refuses_before_it_connects(tmp_path: Path) -> None:
    verb = Submit(script=str(tmp_path / "no.py"), address="http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="does not exist"):
        cluster_verbs.submit_script(verb)
