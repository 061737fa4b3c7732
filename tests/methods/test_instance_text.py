"""The collector for text: closed forms, what does not matter, what it costs, and no trace."""

import copy
import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from text_fixtures import tiny_text_start, tiny_text_task
from torch import Tensor, nn
from torch.nn import functional

from robustft.config import from_dict, to_dict
from robustft.data.text import TextSplit
from robustft.errors import ConfigError
from robustft.methods.instance_collector import Collected
from robustft.methods.instance_perturbations import EmbeddingPerturbation, GradientPerturbation
from robustft.methods.instance_text import (
    collect_text,
    word_surface,
)
from robustft.models.text import TextModel
from robustft.training.text_loader import text_rows

PAD, WIDTH, VOCABULARY = 0, 6, 20
LENGTHS = (1, 4, 2, 7, 3, 7, 5)
CPU = torch.device("cpu")

Columns = dict[str, np.ndarray[Any, Any]]


class Bag(nn.Module):
    """Logits w . s and -w . s of the sum s of a sentence's embeddings: everything is linear.

    Padding counts as well, so that whatever moves it shows.
    """

    def __init__(self, *, scale: float = 0.3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.pad_id = PAD
        self.table = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=dtype))
        self.weight = nn.Parameter(scale * torch.randn(WIDTH, generator=draw, dtype=dtype))

    def embed(self, inputs: Tensor) -> Tensor:
        return self.table[inputs[:, 0]]

    def from_embeddings(self, embeddings: Tensor, inputs: Tensor) -> Tensor:
        value = embeddings.sum(1) @ self.weight
        padding = (inputs[:, 0] == PAD).sum(1) * (self.table[PAD] @ self.weight)
        return torch.stack([value - padding, padding - value], dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.from_embeddings(self.embed(inputs), inputs)


def bag(**options: Any) -> Any:
    return Bag(**options).eval()


def make_split(lengths: tuple[int, ...] = LENGTHS) -> TextSplit:
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, VOCABULARY, sum(lengths)).astype(np.int32)
    count = len(lengths)
    return TextSplit(
        text_a=pa.array(["a"] * count),
        text_b=None,
        labels=np.arange(count, dtype=np.int64) % 2,
        ids=draw.permutation(100)[:count].astype(np.int64),
        tokens=tokens,
        token_types=np.zeros(len(tokens), dtype=np.int8),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
    )


def ordered(*parts: Collected) -> Columns:
    """Return the rows of all parts, by perturbation and id."""
    columns = {
        name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns
    }
    order = np.lexsort((columns["instance_id"], columns["perturbation"]))
    return {name: values[order] for name, values in columns.items()}


def margins(split: TextSplit, model: Any) -> tuple[Any, Any, Any]:
    """Return the gold logit w . s (or -w . s), the lengths and the norms of w, by id."""
    order = np.argsort(split.ids)
    rows = [split.tokens[split.offsets[row] : split.offsets[row + 1]] for row in order]
    weight, table = model.weight.detach(), model.table.detach()
    values = [float(table[torch.from_numpy(row).long()].sum(0) @ weight) for row in rows]
    signs = 1 - 2 * split.labels[order]
    return signs * np.array(values), split.lengths[order], (weight.norm(), weight.abs().sum())


# --- what is measured ----------------------------------------------------------------------------

K, STEP = 3, 0.02
REACH = K * STEP


def linear_steps(**options: Any) -> EmbeddingPerturbation:
    return EmbeddingPerturbation(eps=None, step_size=STEP, num_steps=K, **options)


@pytest.mark.parametrize(
    ("perturbation", "fall"),
    [
        # Each of n tokens goes the same way: a sentence's length is shared as reach / sqrt(n).
        (linear_steps(), lambda n, l2, l1: REACH * math.sqrt(n) * l2),
        (linear_steps(per="token"), lambda n, l2, l1: REACH * n * l2),
        (linear_steps(legacy_steps=True), lambda n, l2, l1: (K - 1) * STEP * math.sqrt(n) * l2),
        (
            EmbeddingPerturbation(eps=0.03, step_size=STEP, num_steps=K),
            lambda n, l2, l1: 0.03 * math.sqrt(n) * l2,
        ),
        (
            EmbeddingPerturbation(eps=0.03, step_size=STEP, num_steps=K, per="token"),
            lambda n, l2, l1: 0.03 * n * l2,
        ),
        (linear_steps(norm="Linf"), lambda n, l2, l1: REACH * n * l1),
        (
            EmbeddingPerturbation(norm="Linf", eps=0.05, num_steps=K),
            lambda n, l2, l1: 0.05 * n * l1,
        ),
        (EmbeddingPerturbation(eps=0.5, num_steps=1), lambda n, l2, l1: 0.5 * math.sqrt(n) * l2),
    ],
    ids=lambda value: value.name if isinstance(value, EmbeddingPerturbation) else "",
)
def test_a_linear_model_loses_what_the_closed_form_says(perturbation: Any, fall: Any) -> None:
    split, model = make_split(), bag()
    found = ordered(collect_text(model, split, perturbations=[perturbation], batch_size=3))
    values, lengths, norms = margins(split, model)
    falls = np.array([float(fall(n, *norms)) for n in lengths])
    # The gold logit is the negative of the other: its probability is sigmoid(2 value).
    np.testing.assert_allclose(found["clean_loss"], np.log1p(np.exp(-2 * values)), atol=1e-12)
    after = values - falls
    np.testing.assert_allclose(found["pert_loss"], np.log1p(np.exp(-2 * after)), atol=1e-9)
    np.testing.assert_allclose(found["pert_margin"], 2 * after, atol=1e-9)
    np.testing.assert_array_equal(found["pert_pred"] == found["label"], after > 0)


def test_largest_divides_by_the_largest_entry_of_sentence_or_token() -> None:
    gradient = torch.tensor([[[1.0, -4.0], [2.0, 0.5]], [[0.0, 0.0], [0.0, 3.0]]])
    whole = EmbeddingPerturbation(norm="Linf", eps=None, step_size=1.0, direction="largest")
    each = EmbeddingPerturbation(
        norm="Linf", eps=None, step_size=1.0, direction="largest", per="token"
    )
    assert whole.uphill(gradient).tolist() == [[[0.25, -1], [0.5, 0.125]], [[0, 0], [0, 1]]]
    assert each.uphill(gradient).tolist() == [[[0.25, -1], [1, 0.25]], [[0, 0], [0, 1]]]


def test_lengths_are_those_of_the_perturbation() -> None:
    split = make_split()
    chosen = [
        EmbeddingPerturbation(eps=0.3, num_steps=2),
        EmbeddingPerturbation(eps=0.3, num_steps=2, per="token"),
        EmbeddingPerturbation(norm="Linf", eps=0.3, num_steps=2),
        linear_steps(start_size=0.01),
    ]
    found = ordered(collect_text(bag(), split, perturbations=chosen))
    lengths = split.lengths[np.argsort(split.ids)]
    sentence, token, entry, free = found["delta_norm"].reshape(4, -1)
    np.testing.assert_allclose(sentence, 0.3, rtol=1e-9)
    np.testing.assert_allclose(token, 0.3 * np.sqrt(lengths), rtol=1e-9)
    np.testing.assert_allclose(entry, 0.3 * np.sqrt(lengths * WIDTH), rtol=1e-9)
    assert (free <= REACH + 0.01).all()
    assert (free > REACH - 0.01).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda n: 0.05 / math.sqrt(3)),
        ({"per": "token"}, lambda n: 0.05 * math.sqrt(n / 3)),
        ({"norm": "Linf"}, lambda n: 0.05 * math.sqrt(n * WIDTH / 3)),
    ],
)
def test_random_starts_have_their_published_size(options: Any, expected: Any) -> None:
    # mag / sqrt(3) is the expected length of uniform(-1, 1) * mag / sqrt(tokens * width).
    only = EmbeddingPerturbation(
        eps=None, step_size=1.0, num_steps=1, legacy_steps=True, start_size=0.05, **options
    )
    # The short ones are padded, and padding gets no noise.
    split = make_split((40,) * 30 + (10,) * 30)
    found = ordered(collect_text(bag(), split, perturbations=[only], batch_size=60))
    lengths = split.lengths[np.argsort(split.ids)]
    for count in (10, 40):
        mean = found["delta_norm"][lengths == count].mean()
        assert mean == pytest.approx(expected(count), rel=0.04)


def test_losses_can_be_measured_against_the_clean_prediction() -> None:
    gold, pred = (
        ordered(collect_text(bag(), make_split(), perturbations=[linear_steps()], target=target))
        for target in ("gold", "pred")
    )
    wrong = gold["clean_pred"] != gold["label"]
    assert wrong.any()
    assert (pred["clean_loss"][wrong] < gold["clean_loss"][wrong]).all()
    assert (pred["pert_loss"] > pred["clean_loss"]).all()


def test_sure_predictions_are_attacked_all_the_same() -> None:
    """In float32 the cross-entropy of a sure sentence has no gradient: it would look robust."""
    model, split = bag(scale=40.0, dtype=torch.float32), make_split((9, 9))
    inputs, _, _ = text_rows(split, np.arange(2), device=CPU, pad_id=PAD)
    split.labels[:] = model(inputs).argmax(1).numpy()
    found = ordered(
        collect_text(model, split, perturbations=[EmbeddingPerturbation(eps=0.5, num_steps=2)])
    )
    assert (found["clean_prob"] == 1).all()
    np.testing.assert_allclose(found["delta_norm"], 0.5, rtol=1e-5)
    assert (found["pert_margin"] < found["clean_margin"] - 1).all()


# --- with a transformer, pairs and token types ---------------------------------------------------

L2 = EmbeddingPerturbation(eps=0.4, num_steps=K)
TOKEN = EmbeddingPerturbation(eps=0.1, num_steps=K, per="token", start_size=0.05)
LINF = EmbeddingPerturbation(norm="Linf", eps=0.01, num_steps=K)
EVERY = (L2, TOKEN, LINF, "identity")


@pytest.fixture(scope="module")
def pairs() -> TextSplit:
    return tiny_text_task(13, pair=True).splits["train"]


@pytest.fixture(scope="module")
def model() -> TextModel:
    """A network whose token types matter."""
    network = tiny_text_start(tiny_text_task(13, pair=True), layers=1).build()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # Random weights of a fresh BERT are so small that all its logits are the same.
            parameter.mul_(1.0 if "LayerNorm" in name else 8.0)
    return network


@pytest.fixture(scope="module")
def alone(model: TextModel, pairs: TextSplit) -> Columns:
    double = copy.deepcopy(model).double()
    return ordered(collect_text(double, pairs, perturbations=EVERY, record=2, batch_size=13))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 5), (4, 100), (20, 2)])
def test_shards_and_batches_do_not_matter(
    world_size: int, batch_size: int, model: TextModel, pairs: TextSplit, alone: Columns
) -> None:
    double = copy.deepcopy(model).double()
    parts = [
        collect_text(
            double,
            pairs,
            perturbations=EVERY,
            record=2,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    assert len({part.num_forwards for part in parts}) == 1
    found = ordered(*parts)
    assert found["instance_id"].tolist() == [*sorted(pairs.ids.tolist())] * len(EVERY)
    for name, expected in alone.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6, err_msg=name)


def test_random_starts_depend_on_seed_record_and_sentence(
    model: TextModel, pairs: TextSplit
) -> None:
    def losses(**options: Any) -> Any:
        return ordered(collect_text(model, pairs, perturbations=[TOKEN], **options))["pert_loss"]

    first = losses(record=1, seed=0)
    np.testing.assert_array_equal(first, losses(record=1, seed=0))
    for other in (losses(record=2, seed=0), losses(record=1, seed=1)):
        assert (first != other).mean() > 0.5


@pytest.mark.parametrize("batch_size", [1, 5, 13])
def test_the_identity_changes_exactly_nothing(
    batch_size: int, model: TextModel, pairs: TextSplit
) -> None:
    found = ordered(
        collect_text(model, pairs, perturbations=["identity", L2], batch_size=batch_size)
    )
    count = len(pairs)
    for name in ("loss", "logit", "margin", "prob", "pred"):
        np.testing.assert_array_equal(found[f"pert_{name}"][:count], found[f"clean_{name}"][:count])
    assert (found["delta_norm"][:count] == 0).all()
    assert (found["pert_loss"][count:] > found["clean_loss"][count:]).all()


def test_the_clean_pass_is_the_model_token_types_included(
    model: TextModel, pairs: TextSplit
) -> None:
    inputs, labels, ids = text_rows(pairs, np.arange(len(pairs)), device=CPU, pad_id=model.pad_id)
    with torch.no_grad():
        losses = functional.cross_entropy(model(inputs), labels, reduction="none")
        without = inputs.clone()
        without[:, 1] = 0
        lost = functional.cross_entropy(model(without), labels, reduction="none")
    assert ((losses - lost).abs() > 1e-3).any(), "token types must matter here"
    found = ordered(collect_text(model, pairs, perturbations=["identity"]))
    order = torch.argsort(ids)
    np.testing.assert_allclose(found["clean_loss"], losses[order], atol=1e-5)


def test_padding_is_left_alone(model: TextModel, pairs: TextSplit) -> None:
    inputs, labels, ids = text_rows(pairs, np.arange(len(pairs)), device=CPU, pad_id=model.pad_id)
    surface = word_surface(model, inputs)
    assert surface.free is not None
    padding = ~surface.free.squeeze(2)
    assert padding.any()
    moved = surface.base.clone()
    moved[padding] += 5
    with torch.no_grad():
        torch.testing.assert_close(surface.forward(moved), surface.forward(surface.base))
    # A model that looks at padding gains nothing by it (the closed forms above have it too).
    found = collect_text(bag(), make_split((1, 9)), perturbations=[L2])
    assert found.columns["delta_norm"] == pytest.approx(0.4)
    assert len(ids) == len(labels)


def test_half_precision_models_are_attacked_in_float32(pairs: TextSplit) -> None:
    half = bag(dtype=torch.bfloat16)
    found = ordered(collect_text(half, make_split(), perturbations=[L2]))
    np.testing.assert_allclose(found["delta_norm"], 0.4, rtol=1e-5)
    assert found["pert_loss"].dtype == np.float32


# --- cost ----------------------------------------------------------------------------------------

PRICES = {
    "one from the sentence": ((L2,), K + 1, K),
    "two share the first gradient": ((L2, LINF), 1 + 2 * K, 1 + 2 * (K - 1)),
    "a random start shares nothing": ((TOKEN,), 1 + K + 1, K),
    "the control": (("identity",), 1 + 1, 0),
    "everything": (EVERY, 1 + 2 * K + (K + 1) + 1, 1 + 2 * (K - 1) + K),
}


@pytest.mark.parametrize("case", PRICES)
def test_passes_are_those_of_the_table(case: str, model: TextModel, pairs: TextSplit) -> None:
    perturbations, forwards, backwards = PRICES[case]
    passes: Counter[str] = Counter()

    def forward(module: nn.Module, inputs: Any) -> None:
        passes["forward"] += len(inputs[0])

    def backward(module: nn.Module, gradients: Any) -> None:
        trains = any(parameter.requires_grad for parameter in module.parameters())
        passes["to weights" if trains else "to embeddings"] += len(gradients[0])

    hooks = (
        model.register_forward_pre_hook(forward),
        model.network.classifier.register_full_backward_pre_hook(backward),
    )
    found = collect_text(model, pairs, perturbations=perturbations, batch_size=8)
    for hook in hooks:
        hook.remove()
    count = len(pairs)
    assert (passes["forward"], passes["to embeddings"]) == (forwards * count, backwards * count)
    assert passes["to weights"] == 0
    assert (found.num_forwards, found.num_backwards) == (forwards * count, backwards * count)


@pytest.mark.parametrize("steps", [5, 8])
def test_the_cost_is_about_two_passes_per_step(steps: int) -> None:
    """Published: 1 + 3 K, a full backward being two forwards; K counts forwards there."""
    published = EmbeddingPerturbation(
        eps=None, step_size=0.08, num_steps=steps, legacy_steps=True, start_size=0.05
    )
    found = collect_text(bag(), make_split((4, 5)), perturbations=[published])
    assert found.num_forwards + found.num_backwards == 2 * 2 * steps


# --- no trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, model: TextModel, pairs: TextSplit) -> None:
    network = copy.deepcopy(model).train()
    parameters = dict(network.named_parameters())
    for place, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(place % 3 != 0)
        if place % 2:
            parameter.grad = torch.full_like(parameter, 0.5)
    before = copy.deepcopy(network)
    flags = [parameter.requires_grad for parameter in parameters.values()]
    gradients = [
        None if parameter.grad is None else parameter.grad.clone()
        for parameter in parameters.values()
    ]
    torch.manual_seed(3)
    random = torch.get_rng_state()
    if fails:
        calls = []

        def broken(module: nn.Module, inputs: Any) -> None:
            calls.append(torch.rand(1))
            if len(calls) == 3:
                raise MemoryError

        handle = network.network.classifier.register_forward_pre_hook(broken)
        with pytest.raises(MemoryError):
            collect_text(network, pairs, perturbations=EVERY, batch_size=8)
        handle.remove()
    else:
        collect_text(network, pairs, perturbations=EVERY, batch_size=8)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in network.modules())
    assert [parameter.requires_grad for parameter in parameters.values()] == flags
    for value, old, gradient in zip(
        parameters.values(), before.parameters(), gradients, strict=True
    ):
        assert torch.equal(value, old)
        if gradient is None:
            assert value.grad is None
        else:
            assert value.grad is not None
            assert torch.equal(value.grad, gradient)
    assert not network.network.get_input_embeddings()._forward_hooks


# --- names and options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "emb-l2-k8-0.6"),
        ({"per": "token", "eps": 1.5}, "emb-l2-k8-1.5-token"),
        (
            {"eps": None, "step_size": 0.08, "legacy_steps": True, "start_size": 0.05},
            "emb-l2-k8-step0.08-legacy-start0.05",
        ),
        ({"norm": "Linf", "eps": None, "step_size": 0.01, "direction": "largest"},
         "emb-linf-k8-step0.01-largest"),
    ],
)  # fmt: skip
def test_perturbations_have_names(options: Any, name: str) -> None:
    perturbation = EmbeddingPerturbation(**options)
    assert perturbation.name == name
    assert from_dict(EmbeddingPerturbation, to_dict(perturbation)) == perturbation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": None}, "give step_size"),
        ({"per": "word"}, "value of per 'word'"),
        ({"num_steps": 0}, "num_steps = 0"),
        ({"direction": "largest"}, "belongs to norm = 'Linf'"),
    ],
)
def test_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbeddingPerturbation(**options)


def test_what_cannot_be_done_to_text_is_refused() -> None:
    for wrong in ("blur-weak", GradientPerturbation()):
        with pytest.raises(ConfigError, match="perturbed in its word embeddings"):
            collect_text(bag(), make_split(), perturbations=[wrong])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="two perturbations are called"):
        collect_text(bag(), make_split(), perturbations=[L2, L2])
    with pytest.raises(ConfigError, match="nothing to measure"):
        collect_text(bag(), make_split(), perturbations=[])
    with pytest.raises(ConfigError, match="the split is empty"):
        collect_text(bag(), make_split().take(np.arange(0)), perturbations=[L2])
