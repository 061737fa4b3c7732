"""The command line: ``robustft VERB ...``. Thin: every verb is a few calls into the library.

``--help``, wrong options and wrong values are tyro's work, from the configuration classes and
their docstrings. torch, Ray and MLflow are imported only where a verb needs them.

Exit codes: 0 done; 1 the run failed; 2 bad input, with one sentence on standard error; 130 Ctrl-C.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro

from robustft.cluster_verbs import Doctor, Submit, examine, separated, submit_script
from robustft.compare_verb import Compare, Report, compare_stored, report_again
from robustft.datamap_verb import Datamap, draw_datamap
from robustft.errors import ConfigError, RobustftError, UnknownNameError
from robustft.evaluate_verb import Evaluate, evaluate_model
from robustft.parsing import parse
from robustft.surface_verb import Surface, draw_surfaces
from robustft.verbs import Answer, Options, table

if TYPE_CHECKING:
    from robustft.runtime.experiment import Experiment
    from robustft.runtime.run import Report as RunReport

__all__ = ["experiment_cli", "main"]

DESCRIPTION = """Robust fine-tuning of neural networks.

Start here: robustft ls presets; robustft validate rift-embedded; robustft search rift-embedded
"""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


@dataclasses.dataclass(frozen=True, slots=True)
class PresetWork:
    """How a preset becomes an answer: ``adapt`` before the overrides, ``do`` after them."""

    adapt: Callable[["Experiment"], "Experiment"]
    do: Callable[["Experiment"], Answer]
    description: str


# --- verbs that take a preset --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PresetVerb:
    preset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PRESET")]]
    """Name of a preset (see `robustft ls presets`) or path of a YAML file. It comes first."""


class Train(PresetVerb):
    """Run a preset's method once, without its search.

    Example: robustft train rift-embedded --method.lr 0.001 --method.modules layer2.0.conv2

    Every field of the preset: robustft train PRESET --help
    """


class Search(PresetVerb):
    """Run a preset with its search: layers, learning rates, seeds.

    Example: robustft search rift-embedded --search.space.lr 0.001 0.01

    Every field of the preset: robustft search PRESET --help
    """


class Mrc(PresetVerb):
    """Rank the layers of a preset's starting model by module robust criticality (RiFT).

    Example: robustft mrc rift-embedded --method.mrc_examples 500
    """


class Validate(PresetVerb):
    """Check a preset against this machine, its data and its cluster without training.

    Example: robustft validate rift-cifar10-r18 --runtime.workers 4
    """


def _unchanged(experiment: "Experiment") -> "Experiment":
    return experiment


def _without_search(experiment: "Experiment") -> "Experiment":
    from robustft.runtime.experiment import SearchConfig

    return dataclasses.replace(experiment, search=SearchConfig(metric=experiment.search.metric))


def _with_search(experiment: "Experiment") -> "Experiment":
    if not experiment.search.space:
        raise ConfigError(
            "the preset has no search.space, so there is nothing to search: add one to its YAML "
            "file, or use robustft train"
        )
    return experiment


def _run(experiment: "Experiment") -> Answer:
    import psutil

    from robustft.runtime.run import run

    # From the process's start on, so that imports count as start-up.
    return _report(run(experiment, began=psutil.Process().create_time()))


def _report(report: "RunReport") -> Answer:
    from robustft.evaluation.report import write_summary

    document = {
        "directory": str(report.directory),
        "report": str(report.report_html),
        "summary": dict(report.summary),
    }
    return Answer(document, partial(write_summary, report.data))


def _mrc(experiment: "Experiment") -> Answer:
    from robustft.runtime.run import rank_layers

    rows = [dict(row) for row in rank_layers(experiment)]
    return Answer({"layers": rows}, table(rows))


def _validate(experiment: "Experiment") -> Answer:
    from robustft.runtime.preflight import validate

    findings = validate(experiment)
    failed = any(finding.level == "error" for finding in findings)
    lines = [f"{finding.level}: {finding.text}" for finding in findings]
    document = {"ok": not failed, "findings": [dataclasses.asdict(f) for f in findings]}
    text = "\n".join([*lines, "not ready to run" if failed else "ready to run"])
    return Answer(document, text, code=2 if failed else 0)


PRESET_VERBS: dict[type[PresetVerb], PresetWork] = {
    Train: PresetWork(_without_search, _run, "One run of the preset; its fields are options."),
    Search: PresetWork(_with_search, _run, "The preset's search; its fields are options."),
    Mrc: PresetWork(_without_search, _mrc, "Layers of the preset's start; its fields are options."),
    Validate: PresetWork(_unchanged, _validate, "Checks the preset; its fields are options."),
}

# --- the other verbs -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ls(Options):
    """List what there is: methods, models, datasets, attacks, presets, corruptions, suites; runs.

    Example: robustft ls presets
    """

    kind: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="KIND")]] = "all"
    """methods, models, datasets, attacks, presets, corruptions, suites, or all of these; or runs,
    those in $ROBUSTFT_STORAGE (else ./runs)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume(Options):
    """Continue a run that was interrupted; finished trials are not repeated.

    Example: robustft resume runs/rift-embedded/RUN_ID
    """

    run_dir: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN_DIR")]]
    """Folder of the run: runs/<experiment>/<run-id>, or the URI at which it is published."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sync(Options):
    """Send to MLflow what a run recorded while MLflow was away.

    Example: robustft sync runs/rift-embedded/RUN_ID --tracking_uri http://mlflow:5000
    """

    run_dir: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN_DIR")]]
    """Folder of the run: runs/<experiment>/<run-id>."""
    tracking_uri: str | None = None
    """MLflow address; None: $MLFLOW_TRACKING_URI, else the run's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ui(Options):
    """Open MLflow's web pages on the runs made on this machine, until Ctrl-C.

    Example: robustft ui --port 5001
    """

    storage: str | None = None
    """Folder of all runs; None: $ROBUSTFT_STORAGE, else ./runs."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only."""
    port: int = 5000
    """Port to listen on."""


def _ls(verb: Ls) -> Answer:
    from robustft.listing import listed

    found = listed(verb.kind)
    blocks = []
    for kind, entries in found.items():
        width = max((len(name) for name in entries), default=0)
        lines = [f"  {name:<{width}}  {text}".rstrip() for name, text in entries.items()]
        blocks.append("\n".join([kind, *lines]))
    return Answer(found, "\n\n".join(blocks))


def _resume(verb: Resume) -> Answer:
    from robustft.runtime.run import resume

    return _report(resume(verb.run_dir))


def _sync(verb: Sync) -> Answer:
    from robustft.runtime.tracking import replay

    sent = replay(verb.run_dir, tracking_uri=verb.tracking_uri)
    return Answer(dataclasses.asdict(sent), f"sent {sent.records} records to {sent.uri}")


def _ui(verb: Ui) -> Answer:
    from robustft.runtime.experiment import RuntimeConfig
    from robustft.runtime.session import storage_root
    from robustft.runtime.ui import serve_ui

    storage = storage_root(RuntimeConfig(storage=verb.storage))
    code = serve_ui(storage, host=verb.host, port=verb.port)
    return Answer({"code": code}, "", code=min(code, 1))


VERBS: dict[type[Options], Callable[[Any], Answer]] = {
    Compare: compare_stored,
    Datamap: draw_datamap,
    Doctor: examine,
    Evaluate: evaluate_model,
    Ls: _ls,
    Report: report_again,
    Resume: _resume,
    Surface: draw_surfaces,
    Submit: submit_script,
    Sync: _sync,
    Ui: _ui,
}

# --- entrances -----------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = separated(list(sys.argv[1:] if args is None else args))

    def work() -> int:
        verb, rest = _parse_verb(words)
        if isinstance(verb, PresetVerb):
            return _run_preset(verb.preset, rest, PRESET_VERBS[type(verb)], _prog(type(verb)))
        return _answer(verb, lambda: VERBS[type(verb)](verb))

    return _guarded(work, words)


def experiment_cli(preset: str, description: str, args: Sequence[str] | None = None) -> int:
    """Run a preset as a script does: ``python experiments/rift_sweep.py [overrides]``.

    Args:
        preset: name of the preset; the command line overrides any of its fields.
        description: what the script does, for ``--help``.
        args: command line; None is this process's own.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if args is None else args)
    work = PresetWork(_unchanged, _run, description)
    return _guarded(lambda: _run_preset(preset, words, work, Path(sys.argv[0]).name), words)


def _prog(verb: type[Any]) -> str:
    return f"robustft {verb.__name__.lower()}"


def _parse_verb(words: list[str]) -> tuple[Any, list[str]]:
    """Return the verb and, for one with a preset, the words that the preset's fields explain."""
    named = {verb.__name__.lower(): verb for verb in (*PRESET_VERBS, *VERBS)}
    if words and not words[0].startswith("-") and words[0] not in named:
        raise UnknownNameError("verb", words[0], named)
    annotated = tuple(Annotated[v, tyro.conf.subcommand(name)] for name, v in named.items())
    verbs: Any = Union[annotated]  # noqa: UP007  a union of a table has no other spelling
    options: dict[str, Any] = {"prog": "robustft", "description": DESCRIPTION}
    # The fields of a preset are unknown here, and so is a --help that follows it: they are left
    # over. Whatever fails is parsed once more below, which then says what is wrong, or helps.
    silent = {"add_help": False, "console_outputs": False, "return_unknown_args": True}
    with contextlib.suppress(ConfigError):
        verb, rest = parse(verbs, words, **options, **silent)
        if isinstance(verb, PresetVerb) or not rest:
            return verb, rest
    return parse(verbs, words, **options), []


def _run_preset(preset: str, words: list[str], work: PresetWork, prog: str) -> int:
    """Load ``preset``, apply the overrides, do the work, and return the exit code."""
    from robustft.runtime.experiment import Experiment, load_experiment

    experiment = work.adapt(load_experiment(preset))
    # The experiment's own fields are at top level: --method.lr, not --experiment.method.lr.
    field = ("experiment", Annotated[Experiment, tyro.conf.arg(name="")])
    command = dataclasses.make_dataclass(
        "Command", [field], bases=(Options,), frozen=True, kw_only=True
    )
    options = parse(
        command,
        words,
        default=command(experiment=experiment),
        prog=f"{prog} {preset}" if prog.startswith("robustft ") else prog,
        description=work.description,
    )
    return _answer(options, lambda: work.do(options.experiment))


def _answer(options: Options, work: Callable[[], Answer]) -> int:
    """Do the work with logs on standard error, print its answer, and return the exit code."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("robustft").setLevel(logging.INFO)

    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        answer = work()
    if options.json:
        _write_json(answer.document)
    elif callable(answer.text):
        answer.text(sys.stdout)
    elif answer.text:
        sys.stdout.write(answer.text.rstrip() + "\n")
    return answer.code


def _write_json(document: Any) -> None:
    # Numbers that JSON lacks (NaN, infinities) become null.
    finite = json.loads(json.dumps(document), parse_constant=lambda _: None)
    sys.stdout.write(json.dumps(finite, indent=1) + "\n")


def _guarded(work: Callable[[], int], words: Sequence[str]) -> int:
    """Return the exit code of ``work``; what is wrong becomes one sentence on standard error.

    With ``--json`` among the words it also becomes the document on standard output. The words
    are looked at as they are, since what is wrong may be that they cannot be parsed.
    """
    # What follows a bare -- belongs to the script that is submitted.
    words = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in words or os.environ.get("ROBUSTFT_DEBUG") == "1"
    try:
        return work()
    except KeyboardInterrupt as error:
        return _failed(str(error) or "interrupted", "Interrupted", INTERRUPTED, words)
    except BrokenPipeError:
        # The reader has gone (robustft ls | head). Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RobustftError as error:
        if debug:
            traceback.print_exc()
        return _failed(str(error), type(error).__name__, error.exit_code, words)


def _failed(sentence: str, kind: str, code: int, words: Sequence[str]) -> int:
    sys.stderr.write(f"robustft: {sentence}\n")
    if "--json" in words:
        _write_json({"error": {"kind": kind, "text": sentence, "exit_code": code}})
    return code


if __name__ == "__main__":
    sys.exit(main())
