"""Text classifiers of ``transformers`` behind one interface: token ids in, logits out.

Any architecture with a sequence classification head works (BERT, RoBERTa, DistilBERT, DeBERTa, and
so on); nothing of it is copied or changed. Code that comes with a model is never run, and weights
are read from safetensors only.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from robustft.config import to_dict
from robustft.errors import CheckpointError, ConfigError, ResourceError
from robustft.models.checkpoints import require_finite, without_nan

__all__ = [
    "TextModel",
    "TextStart",
    "load_text_model_dir",
    "load_text_start",
    "new_text_start",
    "require_fit",
    "save_text_model",
]

logger = logging.getLogger(__name__)

WEIGHTS, CARD = "model.safetensors", "card.json"
OWN_FIELDS = ("model", "num_classes", "source", "digest")
NETWORK = "network."
"""Prefix of the network's entries in the state dict of a :class:`TextModel`."""
POOLER = "pooler"
"""Part of an encoder that pre-training without a sentence objective leaves out."""
NUM_NAMED = 3
"""How many keys an error message names."""

READ_ERRORS = (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError)
"""What ``transformers`` raises for files that are missing, damaged, or of another kind."""


class TextModel(nn.Module):
    """A classifier of token ids.

    Batches are int64 ``[n, 2, L]``: token ids in row 0, token types in row 1, short rows filled up
    with the padding id, which the attention does not see.

    Args:
        network: a sequence classification model of ``transformers``.
        pad_id: the padding id.

    Attributes:
        network: as given; parameter names are its own behind "network.".
    """

    def __init__(self, network: nn.Module, *, pad_id: int) -> None:
        super().__init__()
        self.network: Any = network
        self.pad_id = pad_id
        accepted = inspect.signature(network.forward).parameters
        # RoBERTa accepts token types and has one: a pair's would be out of its table.
        num_types = getattr(self.network.config, "type_vocab_size", 0)
        self._uses_types = "token_type_ids" in accepted and num_types > 1

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[n, classes]`` of token ids and types, int64 ``[n, 2, L]``."""
        tokens, types = inputs.unbind(1)
        further = {"token_type_ids": types} if self._uses_types else {}
        mask = (tokens != self.pad_id).long()
        logits: Tensor = self.network(input_ids=tokens, attention_mask=mask, **further).logits
        return logits

    def embed(self, inputs: Tensor) -> Tensor:
        """Return word embeddings as the table holds them, ``[n, L, width]``.

        Positions and types are not added, and nothing is normalised or dropped yet.
        """
        embeddings: Tensor = self.network.get_input_embeddings()(inputs[:, 0])
        return embeddings

    def from_embeddings(self, embeddings: Tensor, inputs: Tensor) -> Tensor:
        """Return logits ``[n, classes]`` with ``embeddings`` in place of the tokens' own.

        ``from_embeddings(embed(inputs), inputs)`` equals ``forward(inputs)`` (without dropout).

        Args:
            embeddings: ``[n, L, width]``; gradients flow into them.
            inputs: the batch that they belong to, for padding, positions and types.

        Raises:
            ConfigError: the shapes do not belong together.

        Note:
            The embeddings replace the output of the table, while the model is given token ids as
            always. With the argument ``inputs_embeds`` instead, models that count positions from
            the token ids (RoBERTa and its relatives) would count over the padding.
        """
        table = self.network.get_input_embeddings()
        if embeddings.shape[:2] != (len(inputs), inputs.shape[2]):
            raise ConfigError(
                f"embeddings {list(embeddings.shape)} do not belong to inputs "
                f"{list(inputs.shape)}: give embed(inputs), changed or not"
            )
        handle = table.register_forward_hook(lambda *_: embeddings)
        try:
            logits: Tensor = self(inputs)
        finally:
            handle.remove()
        return logits


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextStart:
    """Everything needed to build the starting model on any worker, without reading it again.

    Args:
        model: what the weights are read from if ``config`` is None: a model's folder, or its id on
            the hub; else just a name for reports.
        num_classes: width of the last layer.
        config: of the architecture, as ``config.json`` holds it.
        tokenizer_files: name -> content of the files that the tokeniser is saved in.
        state: state dict of the :class:`TextModel` (CPU tensors), or None for fresh weights.
        seed: of the fresh weights, those of a new classifier included.
        source: where the weights come from, in words, for cards and reports.
        fresh_head: whether the classifier is untrained, so that the model's own accuracy means
            nothing.
    """

    model: str
    num_classes: int
    config: Mapping[str, Any] | None = None
    tokenizer_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    state: Mapping[str, Tensor] | None = None
    seed: int = 0
    source: str = "fresh weights"
    fresh_head: bool = True

    def build(self) -> TextModel:
        """Return a new module on the CPU, in eval mode.

        Raises:
            CheckpointError: the architecture cannot be built, or the weights do not fit.
        """
        if self.config is None:
            start = load_text_start(self.model, num_classes=self.num_classes, seed=self.seed)
            return dataclasses.replace(start, state=self.state or start.state).build()
        model = _wrap(_network(self.config, self.num_classes, self.seed))
        if self.state is not None:
            _require_keys(self.state, model.state_dict(), self.source)
            model.load_state_dict(dict(self.state), strict=True)
        return model.eval()


def new_text_start(
    name: str, config: Mapping[str, Any], *, num_classes: int, tokenizer: str, seed: int = 0
) -> TextStart:
    """Return fresh weights of an architecture.

    Args:
        name: for reports.
        config: "model_type" and what else ``config.json`` would hold.
        num_classes: width of the last layer.
        tokenizer: folder or hub id of the tokeniser that is saved with the model.
        seed: of the weights.
    """
    return TextStart(
        model=name,
        num_classes=num_classes,
        config=dict(config),
        tokenizer_files=_tokenizer_files(tokenizer),
        seed=seed,
    )


def load_text_start(
    source: str, *, num_classes: int, seed: int = 0, name: str | None = None
) -> TextStart:
    """Read a pretrained encoder or classifier; a head that it lacks is made fresh.

    A head of another number of classes is replaced, the encoder must be whole (but for the pooler
    of models that were pretrained without one). The fresh head depends on ``seed`` alone; the
    global random state is neither read nor changed.

    Args:
        source: a model's folder, or its id on the Hugging Face hub
            (``robustft.data.tokens.model_source`` gives the folder of "minilm").
        num_classes: width of the last layer.
        seed: of a fresh head.
        name: what cards and reports call it, for example "minilm"; None is ``source`` itself.

    Raises:
        CheckpointError: nothing can be read there, weights come as a pickle only, need code of
            their own, or are of another architecture.
        ConfigError: ``transformers`` is missing.
    """
    _refuse_pickles(Path(source).expanduser())
    transformers = _transformers()
    try:
        with _quiet(transformers), _seeded(seed):
            network, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                source,
                num_labels=num_classes,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except READ_ERRORS as error:
        raise CheckpointError(
            f"cannot load the text model {source!r} ({_first_line(error)}): give a folder with "
            "config.json and safetensors weights, or, where there is a network, a hub id"
        ) from error
    fresh = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    encoder = f"{network.base_model_prefix}."
    lost = sorted(key for key in fresh if key.startswith(encoder) and POOLER not in key)
    if lost:
        named = ", ".join(lost[:NUM_NAMED])
        raise CheckpointError(
            f"{source} does not hold the weights of its encoder: {len(lost)} are missing or of "
            f"another shape ({named}); give the model that its config.json describes"
        )
    if fresh:
        logger.info("%s: %d tensors are fresh (%s)", source, len(fresh), ", ".join(sorted(fresh)))
    model = _wrap(network)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    require_finite(state, source)
    config = network.config.to_dict()
    config.pop("_name_or_path", None)  # where it lay on this machine
    return TextStart(
        model=name or source,
        num_classes=num_classes,
        config=config,
        tokenizer_files=_tokenizer_files(source),
        state=state,
        seed=seed,
        source=name or source,
        fresh_head=bool(fresh),
    )


def require_fit(start: TextStart, *, vocab_size: int, pad_id: int, max_length: int) -> None:
    """Raise ConfigError unless the task's tokens can be the model's.

    Args:
        start: the model, with its ``config``.
        vocab_size: number of the tokeniser's ids.
        pad_id: the tokeniser's padding id.
        max_length: longest row in tokens.
    """
    config = start.config or {}
    rows, padding = config.get("vocab_size"), config.get("pad_token_id")
    if rows is not None and vocab_size > rows:
        raise ConfigError(
            f"the tokeniser has {vocab_size} ids and {start.model} embeddings for {rows}: set the "
            "task's tokenizer to that of the model"
        )
    if padding is not None and padding != pad_id:
        raise ConfigError(
            f"the tokeniser pads with id {pad_id} and {start.model} with {padding}: set the task's "
            "tokenizer to that of the model"
        )
    positions = config.get("max_position_embeddings")
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"max_length = {max_length}, but {start.model} has {positions} positions: lower it"
        )


def save_text_model(
    directory: str | Path,
    *,
    start: TextStart,
    state: Mapping[str, Tensor],
    card: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a folder that ``transformers`` loads, and ``card.json``.

    ``AutoModelForSequenceClassification.from_pretrained(directory)`` and
    ``AutoTokenizer.from_pretrained(directory)`` read it, and so does :func:`load_text_model_dir`.
    The card comes last: an interruption leaves one whose digest does not fit, or none.

    Args:
        directory: made if missing; files of an older model in it are replaced.
        start: what the model was made from.
        state: state dict in the layout of ``start.build()``.
        card: whatever JSON or a configuration can hold. Numbers that are not finite become null.

    Returns:
        The card as written; ``digest`` is the SHA-256 of the weight file.

    Raises:
        CheckpointError: ``state`` does not fit the architecture.
        ConfigError: ``card`` has a field that this function writes itself.
        ResourceError: the directory cannot be written.
    """
    directory = Path(directory)
    taken = sorted(set(card) & set(OWN_FIELDS))
    if taken:
        raise ConfigError(f"card fields {', '.join(taken)} are written here: leave them out")
    state = {name: value.detach().cpu() for name, value in state.items()}
    model = dataclasses.replace(start, state=state, source="the state to be saved").build()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".model-", dir=directory) as part:
            with _quiet(_transformers()):
                # One file whatever the size: a shard of its own could be lost.
                model.network.save_pretrained(part, max_shard_size="1TB")
            for name, content in start.tokenizer_files.items():
                Path(part, name).write_bytes(content)
            with Path(part, WEIGHTS).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            written = {
                "model": start.model,
                "num_classes": start.num_classes,
                "source": start.source,
                "digest": digest,
                **without_nan(to_dict(card)),
            }
            text = json.dumps(written, indent=2, allow_nan=False) + "\n"
            Path(part, CARD).write_text(text, encoding="utf-8")
            names = sorted(path.name for path in Path(part).iterdir())
            for name in sorted(names, key=lambda name: name == CARD):
                os.replace(Path(part, name), directory / name)
    except OSError as error:
        raise ResourceError(
            f"cannot write the model to {directory}: {error.strerror or error}; "
            "free space there or choose another folder"
        ) from error
    return written


def load_text_model_dir(path: str | Path) -> tuple[TextStart, dict[str, Any]]:
    """Read a directory that :func:`save_text_model` wrote.

    Returns:
        The model as a starting point, and its card.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are not those of the card.
    """
    path = Path(path)
    try:
        card = json.loads((path / CARD).read_text(encoding="utf-8"))
        with (path / WEIGHTS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {error.filename}: {error.strerror}; a model directory holds {WEIGHTS} "
            f"and {CARD}"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path / CARD} is not valid JSON ({error}): copy it again"
        ) from error
    if not isinstance(card, dict) or set(OWN_FIELDS) - set(card):
        raise CheckpointError(
            f"{path / CARD} was not written by save_text_model: load the folder as a pretrained "
            "model instead"
        )
    if digest != card["digest"]:
        raise CheckpointError(
            f"{path / WEIGHTS} is not the file that {CARD} describes (SHA-256 differs): "
            "it was changed or cut off; copy the whole directory again"
        )
    start = load_text_start(
        str(path), num_classes=int(card["num_classes"]), name=str(card["model"])
    )
    if start.fresh_head:
        raise CheckpointError(f"{path} has no classifier: copy the whole directory again")
    return dataclasses.replace(start, source=f"model directory {path}"), card


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            "text needs the package transformers: pip install 'robustft[text]'"
        ) from error


def _network(config: Mapping[str, Any], num_classes: int, seed: int) -> nn.Module:
    """Return an architecture with fresh weights."""
    transformers = _transformers()
    values = {key: value for key, value in config.items() if key != "model_type"}
    values.pop("num_labels", None)
    try:
        described = transformers.AutoConfig.for_model(config["model_type"], **values)
        if described.num_labels != num_classes:
            described.num_labels = num_classes
        with _quiet(transformers), _seeded(seed), torch.device("cpu"):
            network: nn.Module = transformers.AutoModelForSequenceClassification.from_config(
                described, trust_remote_code=False, dtype=torch.float32
            )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"transformers cannot build this text model ({_first_line(error)}): its config needs a "
            "model_type with a head for sequence classification"
        ) from error
    return network


def _wrap(network: Any) -> TextModel:
    pad_id = network.config.pad_token_id
    if pad_id is None:
        raise CheckpointError(
            f"the config of {network.config.model_type} has no pad_token_id: add the padding id of "
            "the model's tokeniser to config.json"
        )
    return TextModel(network, pad_id=int(pad_id)).eval()


def _tokenizer_files(source: str) -> dict[str, bytes]:
    """Return the files that the tokeniser of a model is saved in: small ones."""
    transformers = _transformers()
    try:
        with _quiet(transformers), tempfile.TemporaryDirectory() as folder:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    except READ_ERRORS as error:
        raise CheckpointError(
            f"{source} has no tokeniser that can be read ({_first_line(error)}): put the model's "
            "tokenizer.json and tokenizer_config.json into its folder"
        ) from error


def _refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError for a folder whose only weights are pickles."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights as a pickle only ({pickles[0]}), which may run anything "
            "when it is read: where you trust it, load it with transformers and write it again "
            "with model.save_pretrained(folder), which makes safetensors"
        )


def _require_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    wrong = sorted(set(state) ^ set(expected))
    wrong += [
        name for name in expected if name in state and state[name].shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{origin} does not fit the text model: {len(wrong)} tensors are missing, unexpected "
            f"or of another shape ({', '.join(wrong[:NUM_NAMED])}); build it from the config and "
            "the number of classes that it was trained with"
        )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, and put the global random state back."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators as well, and fork_rng restores the CPU.
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep advice and progress bars of ``transformers`` out of the user's terminal."""
    logs = transformers.utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
