"""Our model directories, and weights of others in every layout that is in circulation."""

import json
import logging
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustft.errors import CheckpointError, ConfigError, ResourceError, UnknownNameError
from robustft.models import Start, build_model, load_model_dir, load_start, save_model, state_digest

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
ASKED = {
    "architecture": "resnet4b",
    "num_classes": 5,
    "image_shape": (3, 16, 16),
    "mean": MEAN,
    "std": STD,
}
CARD = {"method": "rift", "threat": "Linf 2/255", "metrics": {"val/clean": 0.75}, "commit": "abc"}


@pytest.fixture
def weights():
    """A trained-looking network: nothing in it is what a fresh build would give."""
    return build_model(
        **{"name": "resnet4b", **without("architecture")}, seed=7
    ).network.state_dict()


def without(*names, **changes):
    return {k: v for k, v in ASKED.items() if k not in names} | changes


def load(path, **changes) -> Start:
    return load_start(path, **{**ASKED, **changes})


def same(start: Start, weights) -> bool:
    """Whether ``start`` builds a model with exactly ``weights`` in its network."""
    built = start.build().network.state_dict()
    return state_digest(built) == state_digest(weights)


# --- model directories -----------------------------------------------------------------------


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    start = Start(**ASKED, seed=3, source="adversarial training")
    state = start.build().state_dict()
    written = save_model(tmp_path / "model", start=start, state=state, card=CARD)
    loaded, card = load_model_dir(tmp_path / "model")
    assert card == written == {**CARD, **{k: card[k] for k in card if k not in CARD}}
    assert card["architecture"] == "resnet4b"
    assert card["image_shape"] == [3, 16, 16]
    assert card["source"] == "adversarial training"
    assert state_digest(loaded.state) == state_digest(state)
    assert (loaded.mean, loaded.std) == (MEAN, STD)
    inputs = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.build()(inputs), start.build()(inputs))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "card.json",
        "model.safetensors",
    ]


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    start = Start(**ASKED)
    state = start.build().state_dict()
    state["network.layer1.0.conv1.bias"] = state["network.layer1.0.conv2.bias"]
    state["network.linear1.weight"] = torch.rand(128, 100).T
    save_model(tmp_path, start=start, state=state, card={})
    loaded, _ = load_model_dir(tmp_path)
    assert state_digest(loaded.state) == state_digest(state)


def test_batch_norm_counters_survive(tmp_path):
    start = Start(**{**ASKED, "architecture": "small_resnet"})
    model = start.build().train()
    model(torch.rand(4, 3, 16, 16))
    save_model(tmp_path, start=start, state=model.state_dict(), card={})
    loaded, _ = load_model_dir(tmp_path)
    assert loaded.build().network.bn1.num_batches_tracked.item() == 1
    assert state_digest(loaded.state) == state_digest(model.state_dict())


def test_saving_over_an_older_model_replaces_it(tmp_path):
    for seed in (1, 2):
        start = Start(**ASKED, seed=seed)
        save_model(tmp_path, start=start, state=start.build().state_dict(), card={"seed": seed})
    loaded, card = load_model_dir(tmp_path)
    assert card["seed"] == 2
    assert state_digest(loaded.state) == state_digest(start.build().state_dict())


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    start = Start(**ASKED)
    card = {"metrics": {"val/clean": float("nan"), "grid": (1.0, float("inf"))}}
    save_model(tmp_path, start=start, state=start.build().state_dict(), card=card)
    text = (tmp_path / "card.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {
        "val/clean": None,
        "grid": [1.0, None],
    }


def test_what_cannot_be_saved_is_refused(tmp_path):
    start = Start(**ASKED)
    state = start.build().state_dict()
    with pytest.raises(ConfigError, match="digest, mean are written by save_model"):
        save_model(tmp_path, start=start, state=state, card={"mean": 1, "digest": 2})
    state.pop("network.conv1.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(network\.conv1\.bias\)"):
        save_model(tmp_path, start=start, state=state, card={})
    assert list(tmp_path.iterdir()) == []
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(ResourceError, match="choose another folder"):
        save_model(blocked, start=start, state=start.build().state_dict(), card={})


def test_a_failed_write_keeps_the_older_model(tmp_path, monkeypatch):
    start = Start(**ASKED)
    save_model(tmp_path, start=start, state=start.build().state_dict(), card={"seed": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    other = Start(**ASKED, seed=9)
    with pytest.raises(ResourceError, match="No space left on device; free space"):
        save_model(tmp_path, start=other, state=other.build().state_dict(), card={"seed": 9})
    assert load_model_dir(tmp_path)[1]["seed"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_directories_get_a_sentence(tmp_path):
    start = Start(**ASKED)
    state = start.build().state_dict()
    save_model(tmp_path, start=start, state=state, card={})
    card, weights = tmp_path / "card.json", tmp_path / "model.safetensors"
    text, data = card.read_text(), weights.read_bytes()

    changed = bytearray(data)
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        load_model_dir(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_model_dir(tmp_path)
    weights.write_bytes(data)
    card.write_text(text[:-20])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model_dir(tmp_path)
    card.write_text("[]")
    with pytest.raises(CheckpointError, match="lacks architecture"):
        load_model_dir(tmp_path)
    card.write_text(text.replace('"num_classes": 5', '"num_classes": "many"'))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model_dir(tmp_path)
    card.write_text(text.replace("resnet4b", "resnet4c"))
    with pytest.raises(UnknownNameError, match="did you mean 'resnet4b'"):
        load_model_dir(tmp_path)
    card.unlink()
    with pytest.raises(CheckpointError, match=r"a model directory holds model\.safetensors"):
        load_model_dir(tmp_path)


def test_load_start_takes_a_directory_only_for_what_it_is(tmp_path):
    start = Start(**ASKED)
    save_model(tmp_path, start=start, state=start.build().state_dict(), card={})
    # The directory's own normalisation holds, whatever the task's is.
    assert load(tmp_path, mean=(0.5, 0.5, 0.5)).mean == MEAN
    with pytest.raises(CheckpointError, match="has architecture resnet4b, but cnn_a"):
        load(tmp_path, architecture="cnn_a")
    with pytest.raises(CheckpointError, match="has num_classes 5, but 10"):
        load(tmp_path, num_classes=10)


# --- other people's layouts ------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "1.", "1.module.", "module.1.", "_orig_mod."])
@pytest.mark.parametrize("nesting", [None, "net", "state_dict", "model", "model_state_dict"])
def test_prefixes_and_nesting_of_torch_files(tmp_path, weights, prefix, nesting):
    state = {prefix + name: value for name, value in weights.items()}
    torch.save({nesting: state, "epoch": 9} if nesting else state, tmp_path / "w.pth")
    start = load(tmp_path / "w.pth")
    assert same(start, weights)
    assert start.source == str(tmp_path / "w.pth")
    assert (start.mean, start.std) == (MEAN, STD)


@pytest.mark.parametrize("prefix", ["", "network.", "module.network."])
def test_prefixes_of_safetensors_files(tmp_path, weights, prefix):
    save_file({prefix + name: value for name, value in weights.items()}, tmp_path / "w.safetensors")
    assert same(load(tmp_path / "w.safetensors"), weights)


def test_the_old_torch_format_and_half_precision(tmp_path, weights):
    half = {name: value.half() for name, value in weights.items()}
    torch.save(half, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "w.pt"), {name: value.float() for name, value in half.items()})


def test_positions_of_a_sequential_are_no_prefix(tmp_path):
    """cnn_a is itself called 0, 2, 5, 7: with a normaliser before it, 1.0, 1.2, ..."""
    weights = build_model(name="cnn_a", **without("architecture"), seed=5).network.state_dict()
    for prefix in ("", "1."):
        torch.save({prefix + k: v for k, v in weights.items()}, tmp_path / "w.pt")
        assert same(load(tmp_path / "w.pt", architecture="cnn_a"), weights)


def test_dead_wrn_weights_are_dropped_with_a_log_line(tmp_path, caplog):
    asked = {**ASKED, "architecture": "wrn34_10"}
    weights = build_model(name="wrn34_10", **without("architecture")).network.state_dict()
    dead = {n.replace("block1", "sub_block1"): v for n, v in weights.items() if "block1" in n}
    released = {f"module.{n}": v for n, v in {**weights, **dead}.items()}
    torch.save({"state_dict": released}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, logger="robustft"):
        start = load_start(tmp_path / "w.pt", **asked)
    assert same(start, weights)
    assert f"dropped {len(dead)} unused entries (sub_block1)" in caplog.text


def test_counters_that_old_files_lack_are_filled_in(tmp_path):
    asked = {**ASKED, "architecture": "small_resnet"}
    weights = build_model(name="small_resnet", **without("architecture")).network.state_dict()
    old = {n: v for n, v in weights.items() if not n.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "w.pt")
    assert same(load_start(tmp_path / "w.pt", **asked), weights)


def test_a_normalised_file_brings_its_own_normalisation(tmp_path, weights):
    model = build_model(name="resnet4b", **without("architecture"), seed=7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    start = load(tmp_path / "w.safetensors", mean=(0.1, 0.1, 0.1))
    assert same(start, weights)
    assert start.mean == pytest.approx(MEAN)
    inputs = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(start.build()(inputs), model.eval()(inputs))
    # The same normalisation as asked for keeps its exact numbers.
    assert load(tmp_path / "w.safetensors").mean == MEAN


def test_a_foreign_normaliser_is_ignored_and_a_difference_is_said(tmp_path, weights, caplog):
    state = {f"1.{name}": value for name, value in weights.items()}
    state["0.mean"], state["0.std"] = torch.tensor(MEAN), torch.tensor(STD)
    torch.save(state, tmp_path / "w.pt")
    start = load(tmp_path / "w.pt")
    assert same(start, weights)
    assert caplog.text == ""
    start = load(tmp_path / "w.pt", mean=(0.1, 0.1, 0.1))
    assert same(start, weights)
    assert start.mean == (0.1, 0.1, 0.1)
    assert "carries a normalisation" in caplog.text


def test_misfits_are_listed_and_counted(tmp_path, weights):
    state = dict(weights)
    for name in ("conv1.weight", "conv1.bias"):
        del state[name]
    state.update({f"extra.{index}": torch.zeros(1) for index in range(5)})
    state["linear2.weight"] = torch.zeros(9, 100)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "w.pt")
    text = str(caught.value)
    assert "does not fit resnet4b with 5 classes and 3x16x16 images" in text
    assert "2 missing (conv1.weight, conv1.bias)" in text
    assert "5 unexpected (extra.0, extra.1, extra.2 and 2 more)" in text
    assert "1 of another shape (linear2.weight [9, 100] instead of [5, 100])" in text


def test_a_prefix_that_only_some_names_have_is_left_alone(tmp_path):
    torch.save({"0.weight": torch.zeros(1), "1.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"2 unexpected \(0\.weight, 1\.weight\)"):
        load(tmp_path / "w.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path, weights):
    weights["conv1.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"NaN or infinite: 1 tensors \(conv1\.bias\)"):
        load(tmp_path / "w.pt")


def test_the_start_is_a_copy(tmp_path, weights):
    """Training one built model changes neither the start nor the next build."""
    torch.save(weights, tmp_path / "w.pt")
    start = load(tmp_path / "w.pt")
    digest = state_digest(start.state)
    with torch.no_grad():
        start.build().network.conv1.weight.zero_()
    assert state_digest(start.state) == digest


# --- RobustBench -----------------------------------------------------------------------------


def test_robustbench_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(CheckpointError, match="needs the package robustbench"):
        load("robustbench/Linf/Engstrom2019Robustness", num_classes=10)
    with pytest.raises(CheckpointError, match="not 5"):
        load("robustbench/Linf/Engstrom2019Robustness")
    with pytest.raises(CheckpointError, match="write robustbench/<threat>/<id>"):
        load("robustbench/Engstrom2019Robustness", num_classes=10)


def test_robustbench_models_must_fit_like_any_other(monkeypatch):
    model = build_model(name="resnet4b", **without("architecture", num_classes=10), seed=4).network
    asked = []

    def load_model(*, model_name: str, dataset: str, threat_model: str) -> nn.Module:
        asked.append((model_name, dataset, threat_model))
        if model_name == "Unknown":
            raise KeyError(model_name)
        return model

    package, utils = types.ModuleType("robustbench"), types.ModuleType("robustbench.utils")
    utils.load_model = load_model
    monkeypatch.setitem(sys.modules, "robustbench", package)
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    assert same(load("robustbench/L2/Some_id", num_classes=10), model.state_dict())
    assert asked == [("Some_id", "cifar10", "L2")]
    with pytest.raises(CheckpointError, match="could not load Unknown"):
        load("robustbench/L2/Unknown", num_classes=10)
    with pytest.raises(CheckpointError, match="does not fit cnn_a"):
        load("robustbench/L2/Some_id", num_classes=10, architecture="cnn_a")


# --- digests ---------------------------------------------------------------------------------


def test_state_digest_sees_names_types_shapes_and_values_but_not_order():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    digest = state_digest(base)
    assert digest == state_digest(dict(reversed(base.items())))
    assert digest == state_digest({**base, "a": torch.tensor([1.0, 9.0, 2.0])[::2]})
    for change in (
        {"a": torch.tensor([1.0, 2.5])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"c": torch.tensor(3)},
    ):
        assert state_digest({**base, **change}) != digest
    assert len(state_digest({"x": torch.ones(2, dtype=torch.bfloat16)})) == 64
