"""The evaluation of text models: clean, noisy, attacked, and on fixed adversarial sets.

As in ``evaluate``, work is cut into independent shards that go through ``map``; what an attack does
to a sentence depends on the sentence, its id and the seed only, so the result is the same for any
number of shards and workers.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from robustft.attacks.text import (
    SYNONYMS,
    Field,
    TextClassifier,
    TextEncoder,
    Words,
    close_synonyms,
    find_wordnet,
    mean_embedding_norm,
    wordnet_synonyms,
)
from robustft.attacks.text.classifier import attacked_field
from robustft.data.text import TextSplit, TextTask
from robustft.data.tokens import load_tokenizer
from robustft.errors import ConfigError, DataError, UnknownNameError
from robustft.evaluation.mapping import Mapper, in_turn, shared_key
from robustft.evaluation.outcome import Flag
from robustft.evaluation.text_outcome import (
    AdversarialText,
    FixedOutcome,
    TextEvaluation,
)
from robustft.evaluation.text_sanity import check_items, checked_flags
from robustft.evaluation.text_shards import check_text_shard, measure_text_shard, tokens_of
from robustft.models import state_digest

__all__ = ["TEXT_SUITES", "TextEvaluationConfig", "evaluate_text"]

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")
ItemT = TypeVar("ItemT")

TEXT_SUITES: dict[str, tuple[str, ...]] = {
    "clean": ("clean",),
    "quick": ("clean", "fixed", "char_noise"),
    "standard": ("clean", "fixed", "char_noise", "deepwordbug", "synonym_greedy"),
    "full": ("clean", "fixed", "char_noise", "deepwordbug", "synonym_greedy", "embedding_pgd"),
}
ATTACKS = ("deepwordbug", "synonym_greedy", "embedding_pgd")
MEASURES = ("clean", "fixed", "char_noise", *ATTACKS)
SYNONYM_SOURCES = ("auto", "wordnet", "builtin")

CANDIDATES = 8
"""Broken sentences are shown from the first so many examples per one wanted, whatever the shards
are."""

F1_TASKS = ("qqp",)
"""Tasks whose classes are so unequal that GLUE asks for F1 as well."""

COUNTS = (
    "limit",
    "max_distance",
    "num_candidates",
    "embedding_steps",
    "embedding_restarts",
    "sanity_examples",
    "ece_bins",
    "shard_size",
    "batch_size",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextEvaluationConfig:
    """How a text model is measured."""

    suite: str = "standard"
    """A name in TEXT_SUITES, or measurements joined by commas: "clean,fixed,deepwordbug"."""
    limit: int | None = None
    """Evaluate only so many examples of the split, >= 1, drawn with a fixed seed; None: all. Fixed
    sets are always read whole."""
    field: Field | None = None
    """Text of a pair that attacks change: "a" or "b"; None: b."""
    noise_levels: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Probabilities of an error per word for char_noise, each in (0, 1]."""
    noise_seeds: tuple[int, ...] = (0, 1, 2)
    """Each level is measured with each of these seeds and averaged."""
    max_share: float = 0.2
    """Largest share of a sentence's words that deepwordbug and synonym_greedy change, in (0, 1]."""
    max_distance: int = 30
    """Largest Levenshtein distance of deepwordbug, >= 1."""
    num_candidates: int = 8
    """Synonyms tried per word, >= 1."""
    synonyms: str = "auto"
    """wordnet: WordNet's files, which must be installed; builtin: the small table of the package;
    auto: WordNet where it is installed."""
    min_cosine: float | None = None
    """Try only synonyms whose embedding in the measured model has this cosine with the word's, in
    [-1, 1]; None: all. Models with other embeddings then meet other synonyms."""
    embedding_eps: float = 0.1
    """Radius of embedding_pgd per token, in mean embedding norms, > 0."""
    embedding_steps: int = 10
    """Steps of embedding_pgd, >= 1."""
    embedding_restarts: int = 2
    """Random starts of embedding_pgd, >= 1."""
    sanity: bool = True
    """With every attack, also look for signs that the numbers cannot be trusted."""
    sanity_examples: int = 64
    """Examples that these checks look at, >= 1, drawn with a fixed seed."""
    num_strips: int = 8
    """Broken sentences to keep per attack, >= 0, for the report."""
    ece_bins: int = 15
    """Bins of the expected calibration error, >= 1."""
    shard_size: int = 256
    """Sentences per fan-out item, >= 1; changes the result by rounding at most."""
    batch_size: int = 256
    """Sentences per forward pass, >= 1; halved where memory is short; changes the result by
    rounding at most."""
    seed: int = 0
    """Seed of the attacks."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"text_evaluation.{name} = {value} must be at least 1")
        if self.num_strips < 0:
            raise ConfigError(f"text_evaluation.num_strips = {self.num_strips} must be at least 0")
        for name in ("noise_levels", "noise_seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"text_evaluation.{name} = {values} is empty or names one twice")
        if not all(0 < share <= 1 for share in (*self.noise_levels, self.max_share)):
            raise ConfigError("text_evaluation.noise_levels and max_share must be within (0, 1]")
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            raise ConfigError(f"text_evaluation.min_cosine = {self.min_cosine} must be in [-1, 1]")
        if not (math.isfinite(self.embedding_eps) and self.embedding_eps > 0):
            raise ConfigError(f"text_evaluation.embedding_eps = {self.embedding_eps} must be > 0")
        if self.synonyms not in SYNONYM_SOURCES:
            raise UnknownNameError("source of synonyms", self.synonyms, SYNONYM_SOURCES)
        text_measures(self.suite)


def text_measures(suite: str) -> tuple[str, ...]:
    """Return the measurements of a suite name or of a comma-separated list of measurements.

    Raises:
        UnknownNameError: there is no such suite or measurement.
    """
    if suite in TEXT_SUITES:
        return TEXT_SUITES[suite]
    names = tuple(dict.fromkeys(name.strip() for name in suite.split(",") if name.strip()))
    for name in names or (suite,):
        if name not in MEASURES:
            known = [*TEXT_SUITES, *MEASURES]
            raise UnknownNameError("text evaluation suite or measurement", name, known)
    return names


def evaluate_text(
    model: nn.Module,
    task: TextTask,
    *,
    config: TextEvaluationConfig | None = None,
    split: str = "test",
    map: Mapper | None = None,
    device: str | None = None,
    tokenizer: TextEncoder | None = None,
) -> TextEvaluation:
    """Measure ``model`` on one split of ``task`` and on its fixed sets.

    Only sentences that are right without an attack are attacked. Noise is no attack: it may put a
    wrong sentence right, and every sentence is measured under it.

    Args:
        model: int64 ``[n, 2, length]`` -> logits; it is evaluated in eval mode and left as it was.
        task: the data.
        config: what is measured; the default is the suite "standard".
        split: "test" (read it once, at the end) or "val".
        map: where the shards run; None is a loop in this process.
        device: "cpu" or "cuda" where the shards compute; None: where the model is.
        tokenizer: the task's, if it is loaded already.

    Raises:
        UnknownNameError: no such split.
        ConfigError: the model gives no logits of the task's classes, or no access to the embeddings
            that are to be attacked; WordNet is asked for and not installed.
        DataError: the split is empty, or one of the sentences to attack is.
        ResourceError: not even one sentence at a time fits into memory.
    """
    config = config or TextEvaluationConfig()
    if split not in task.splits:
        raise UnknownNameError("split", split, task.splits)
    if len(task.splits[split]) == 0:
        raise DataError(f"split {split!r} of {task.name} has no examples: choose another split")
    measures = text_measures(config.suite)
    attacks = [name for name in measures if name in ATTACKS]
    data = _limited(task.splits[split], config.limit)
    classifier = TextClassifier(
        model,
        load_tokenizer(task.tokenizer) if tokenizer is None else tokenizer,
        max_length=task.max_length,
        batch_size=config.batch_size,
    )
    training = any(module.training for module in model.modules())
    run = _Run(
        classifier, data, task, config=config, split=split, map=map or in_turn, device=device
    )
    _check_outputs(classifier, data, task)
    run.prepare(measures)
    flags = run.check(attacks, training=training) if attacks and config.sanity else []
    passes = {"num_forwards": run.num_forwards + 1, "num_backwards": run.num_backwards}
    run.num_forwards = run.num_backwards = 0
    run.measure_unattacked(measures)
    run.attack(attacks)
    return TextEvaluation(
        split=split,
        ids=data.ids,
        masks=run.masks,
        fixed=run.fixed,
        settings={
            **dataclasses.asdict(config),
            **run.facts,
            "task": task.name,
            "task_digest": task.digest,
            "num_classes": task.num_classes,
            "model_digest": run.model_digest,
            "f1": task.name in F1_TASKS,
            "field": run.field,
            "sanity_passes": passes,
        },
        num_forwards=run.num_forwards,
        num_backwards=run.num_backwards,
        num_queries=run.num_queries,
        num_changed_words=run.num_changed_words,
        partners=dict(task.partners),
        leaky=task.leaky and split == "test",
        confidence=run.confidence,
        steps=run.steps,
        flags=flags,
        examples=run.examples,
    )


class _Run:
    """An evaluation under way: what its items share and what has been found so far."""

    def __init__(
        self,
        classifier: TextClassifier,
        data: TextSplit,
        task: TextTask,
        *,
        config: TextEvaluationConfig,
        split: str,
        map: Mapper,
        device: str | None,
    ) -> None:
        self.classifier, self.data, self.task = classifier, data, task
        self.config, self.split, self.map = config, split, map
        self.field = attacked_field(config.field, pair=task.pair)
        self.model_digest = state_digest(classifier.model.state_dict())
        self.key = shared_key(self.model_digest, type(classifier.model), data.ids, task.digest)
        self.shared: dict[str, Any] = {
            "model": classifier.model,
            "tokenizer": classifier.encoder,
            "max_length": task.max_length,
            "sets": {split: data},
            "synonyms": {},
            "device": device,
            "batch_size": config.batch_size,
        }
        self.calls: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self.masks: dict[str, NDArray[np.bool_]] = {}
        self.fixed: dict[str, FixedOutcome] = {}
        self.num_queries: dict[str, NDArray[np.int64]] = {}
        self.num_changed_words: dict[str, NDArray[np.int64]] = {}
        self.confidence: NDArray[np.float32] | None = None
        self.steps: list[dict[str, Any]] = []
        self.examples: list[AdversarialText] = []
        self.num_forwards = self.num_backwards = 0

    def prepare(self, measures: Sequence[str]) -> None:
        """Settle what the attacks are called with, and refuse what cannot be attacked."""
        config = self.config
        if "fixed" in measures:
            self.shared["sets"] |= self.task.fixed
        if len(measures) > 1 or "clean" not in measures:
            _check_sentences(self.data, self.field)
        options: dict[str, dict[str, Any]] = {}
        if "deepwordbug" in measures:
            options["deepwordbug"] = {
                "max_share": config.max_share,
                "max_distance": config.max_distance,
                "seed": config.seed,
            }
        if "synonym_greedy" in measures:
            table = self.shared["synonyms"] = self._synonyms()
            text = json.dumps(table, sort_keys=True)
            options["synonym_greedy"] = {
                "max_share": config.max_share,
                "num_candidates": config.num_candidates,
                "table": hashlib.sha256(text.encode()).hexdigest(),
            }
        if "embedding_pgd" in measures:
            options["embedding_pgd"] = {
                "eps": config.embedding_eps * self._mean_norm(),
                "num_steps": config.embedding_steps,
                "num_restarts": config.embedding_restarts,
                "seed": config.seed,
            }
        self.calls = {
            name: {"attack": name, "options": {**chosen, "field": self.field}}
            for name, chosen in options.items()
        }

    def check(self, attacks: Sequence[str], *, training: bool) -> list[Flag]:
        """Look for signs that the numbers to come cannot be trusted."""
        white_box = hasattr(self.classifier.model, "from_embeddings")
        items = check_items(
            self.split,
            num_examples=len(self.data),
            count=self.config.sanity_examples,
            attacks=[self.calls[name] for name in attacks],
            mean_norm=self._mean_norm() if white_box else None,
        )
        values = self._map(check_text_shard, items, "sanity checks")
        flags = checked_flags(items, values, num_classes=self.task.num_classes, training=training)
        for flag in flags:
            if flag.raised:
                logger.warning("%s: %s", flag.name, flag.text)
        return flags

    def measure_unattacked(self, measures: Sequence[str]) -> None:
        """Measure clean accuracy, fixed sets and noise."""
        work: list[tuple[str, dict[str, Any]]] = []
        everything = np.arange(len(self.data))
        for name in self.shared["sets"]:
            item = {"measure": "clean", "set": name}
            count = len(self.shared["sets"][name])
            work += [(name, {**item, "rows": rows}) for rows in self._shards(np.arange(count))]
        if "char_noise" in measures:
            for level in self.config.noise_levels:
                for seed in self.config.noise_seeds:
                    options = {"probability": level, "seed": seed, "field": self.field}
                    call = {"attack": "char_noise", "options": options}
                    work += [
                        (f"char_noise-{level:g}/{seed}", self._item(call, rows))
                        for rows in self._shards(everything)
                    ]
        values = self._map(measure_text_shard, [item for _, item in work], "without attack")
        found: dict[str, list[dict[str, Any]]] = {}
        for (name, _), value in zip(work, values, strict=True):
            found.setdefault(name, []).append(value)
        clean = found.pop(self.split)
        self.masks["clean"] = _joined(clean, "correct")
        self.confidence = _joined(clean, "confidence")
        for name, shards in found.items():
            if name in self.shared["sets"]:
                rest = self.shared["sets"][name]
                self.fixed[name] = FixedOutcome(
                    ids=rest.ids, labels=rest.labels, predicted=_joined(shards, "predicted")
                )
            else:
                self.masks[name] = _joined(shards, "correct")
                self.num_changed_words[name] = _joined(shards, "changed")

    def attack(self, attacks: Sequence[str]) -> None:
        """Run every attack on what is right without one."""
        standing = np.flatnonzero(self.masks["clean"])
        work = [
            (name, self._item(self.calls[name], rows))
            for name in attacks
            for rows in self._shards(standing)
        ]
        # One name for all suites, under which another suite finds what is stored.
        values = self._map(measure_text_shard, [item for _, item in work], "attacks")
        for name in attacks:
            mask = self.masks["clean"].copy()
            queries, changed = (np.zeros(len(mask), dtype=np.int64) for _ in range(2))
            own = [
                (item["rows"], value)
                for (other, item), value in zip(work, values, strict=True)
                if other == name
            ]
            for rows, value in own:
                mask[rows] = value["correct"]
                queries[rows], changed[rows] = value["queries"], value["changed"]
            self.masks[name], self.num_queries[name] = mask, queries
            if name != "embedding_pgd":
                self.num_changed_words[name] = changed
                self._show(name, [value for _, value in own])
            step = {"attack": name, "attacked": len(standing), "standing": int(mask.sum())}
            for total in ("num_forwards", "num_backwards", "seconds"):
                step[total] = sum(value[total] for _, value in own)
            self.steps.append(step)
            logger.info("%s: %d of %d standing", name, mask.sum(), len(mask))

    def _show(self, attack: str, values: Sequence[Mapping[str, Any]]) -> None:
        data, own = self.data, []
        texts = _texts(data, self.field)
        others = _texts(data, "b" if self.field == "a" else "a") if self.task.pair else None
        for value in values:
            shown = zip(value["shown_rows"], value["shown_predicted"], value["texts"], strict=True)
            own += [
                AdversarialText(
                    attack=attack,
                    id=int(data.ids[row]),
                    label=int(data.labels[row]),
                    predicted=int(predicted),
                    clean=texts[row],
                    adversarial=text,
                    other=None if others is None else others[row],
                )
                for row, predicted, text in shown
            ]
        self.examples += own[: self.config.num_strips]

    def _item(self, call: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
        shown = CANDIDATES * self.config.num_strips
        return {"measure": "attack", "set": self.split, **call, "shown": shown, "rows": rows}

    def _map(
        self,
        fn: Callable[[Any, Any], dict[str, Any]],
        items: Sequence[dict[str, Any]],
        label: str,
    ) -> list[dict[str, Any]]:
        if not items:
            return []
        name = f"evaluate {self.split}: {label}"
        values = self.map(fn, items, shared=self.shared, key=self.key, name=name)
        for value in values:
            self.num_forwards += int(value["num_forwards"])
            self.num_backwards += int(value["num_backwards"])
        before = self.shared["batch_size"]
        fitted = min(int(value["shrunk_to"]) or before for value in values)
        if fitted < before:
            logger.warning(
                "memory holds %d sentences at a time, not %d: batches are smaller from here on",
                fitted,
                before,
            )
            self.shared["batch_size"] = fitted
        return values

    def _shards(self, rows: NDArray[np.int64]) -> list[list[int]]:
        size = self.config.shard_size
        return [rows[first : first + size].tolist() for first in range(0, len(rows), size)]

    def _mean_norm(self) -> float:
        if "mean_embedding_norm" not in self.facts:
            found = mean_embedding_norm(self.classifier, tokens_of(self.data))
            self.facts["mean_embedding_norm"] = found
        return float(self.facts["mean_embedding_norm"])

    def _synonyms(self) -> dict[str, tuple[str, ...]]:
        """Return the synonyms of the split's words: workers need no WordNet of their own."""
        sentences = [Words.of(text) for text in _texts(self.data, self.field)]
        words = sorted({one[i].lower() for one in sentences for i in range(len(one))})
        source = self.config.synonyms
        folder = None if source == "builtin" else find_wordnet()
        if folder is not None:
            table = wordnet_synonyms(folder, words)
        elif source == "wordnet":
            raise ConfigError(
                "WordNet is not installed here: install Debian's wordnet-base, set "
                "ROBUSTFT_WORDNET to its folder, or choose text_evaluation.synonyms = builtin"
            )
        else:
            table = {word: SYNONYMS[word] for word in words if word in SYNONYMS}
        if self.config.min_cosine is not None:
            table = close_synonyms(table, self.classifier, min_cosine=self.config.min_cosine)
        self.facts |= {
            "synonyms": "builtin" if folder is None else "wordnet",
            "words_with_synonyms": len(table),
        }
        return table


def _texts(data: TextSplit, field: Field) -> list[str]:
    column = data.text_a if field == "a" or data.text_b is None else data.text_b
    texts: list[str] = column.to_pylist()
    return texts


def _check_sentences(data: TextSplit, field: Field) -> None:
    empty = [row for row, text in enumerate(_texts(data, field)) if not text.strip()]
    if empty:
        raise DataError(
            f"text_{field} of example {data.ids[empty[0]]} is empty and cannot be attacked "
            f"({len(empty)} such examples): remove them, or choose suite clean"
        )


def _check_outputs(classifier: TextClassifier, data: TextSplit, task: TextTask) -> None:
    """Raise ConfigError unless the model gives logits of the task's classes."""
    logits = classifier.classify(tokens_of(data.take(np.arange(1))))
    if logits.shape[1] != task.num_classes:
        raise ConfigError(
            f"the model must return logits [n, {task.num_classes}], the classes of {task.name}, "
            f"and one sentence gives {list(logits.shape)}: the model belongs to other data"
        )


def _limited(split: TextSplit, limit: int | None) -> TextSplit:
    if limit is None or limit >= len(split):
        return split
    # Files are often sorted by class, so a prefix of the file would be no sample of the split.
    return split.take(np.random.default_rng(0).permutation(len(split))[:limit])


def _joined(shards: Sequence[Mapping[str, Any]], name: str) -> NDArray[Any]:
    return np.concatenate([shard[name] for shard in shards])
