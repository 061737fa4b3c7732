"""The verb ``robustft datamap``: the page from stored statistics, with pictures where they fit."""

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from robustft.cli import main
from robustft.data import datasets, text_sets
from robustft.data.base import Split
from robustft.data.glue import TextTable
from robustft.data.source import Loaded
from robustft.data.text_sets import LoadedText
from robustft.datamap_verb import Datamap, draw_datamap
from robustft.errors import ConfigError, DataError
from robustft.methods.instance_format import Manifest, Record, fingerprint
from robustft.methods.instance_statistics import StatisticsFolder

COUNT, CLASSES, RECORDS = 30, 3, 3
NAMES = ("px-linf-k5-4/255", "identity")
IDS = np.sort(np.random.default_rng(0).permutation(50)[:COUNT]).astype(np.int64)


def labels_of(ids: Any) -> Any:
    return (ids * 7) % CLASSES


def write(folder: Path, *, data: str = "fashion_mnist_mini") -> Path:
    """Write statistics in which the perturbed loss rises with the id."""
    manifest = Manifest(
        data=data,
        split="train",
        num_instances=COUNT,
        fingerprint=fingerprint(IDS, labels_of(IDS)),
        num_classes=CLASSES,
        model="small_resnet",
        run="a-run",
        perturbations={name: {} for name in NAMES},
    )
    target = StatisticsFolder(folder, manifest)
    target.prepare()
    for number in range(RECORDS):
        record = Record(record=number, epoch=number, global_step=10 * number, weights="w")
        target.begin(record)
        clean = (0.1 + 0.01 * np.cos(IDS)).astype(np.float32)
        floats = {
            f"{side}_{name}": np.full(COUNT, 0.5, dtype=np.float32)
            for side in ("clean", "pert")
            for name in ("logit", "margin", "prob")
        }
        parts = []
        for code in range(2):
            perturbed = clean if code else (clean + 0.02 * (IDS + 1) * (1 + number)).astype("f4")
            parts.append(
                {
                    "instance_id": IDS,
                    "perturbation": np.full(COUNT, code),
                    "label": labels_of(IDS),
                    "clean_pred": labels_of(IDS),
                    "pert_pred": labels_of(IDS),
                    "clean_loss": clean,
                    "pert_loss": perturbed,
                    "delta_norm": np.zeros(COUNT, dtype=np.float32),
                    **floats,
                }
            )
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        target.write_part(record, 0, 1, columns)
        target.finish(record)
    return folder


def images() -> Any:
    """A data set of 50 grey pictures, each as bright as its id, in another order than the ids."""
    ids = np.arange(50, dtype=np.int64)[::-1].copy()
    pictures = np.repeat(ids.astype(np.uint8), 256).reshape(50, 1, 16, 16)
    split = Split(pictures, labels_of(ids), ids)
    return Loaded(train=split, test=split, class_names=("one", "two", "three"), whole=False)


def points_of(folder: Path) -> Any:
    page = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(page.partition('id="points">')[2].partition("</script>")[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("datamap") / "statistics")


def test_page_picture_and_document(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name, root: images())
    code = main(["datamap", str(folder), "--output", str(tmp_path), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (document["instances"], document["records"]) == (COUNT, RECORDS)
    assert document["perturbation"] == NAMES[0]
    assert document["without_pictures"] is None
    checks = {row["check"]: row for row in document["checks"]}
    assert checks["identity"]["value"] == 0
    assert checks["split_half_reliability"]["value"] == pytest.approx(1)
    assert "reliability_across_seeds" not in checks
    with Image.open(tmp_path / "plots" / "data-map.png") as drawn:
        assert min(drawn.size) > 300
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("The histograms are of all instances", "robust, share 0.3", "small_resnet"):
        assert text in page
    points = points_of(tmp_path)
    assert sorted(int(point["id"]) for point in points) == IDS.tolist()
    for point in points:
        content = base64.b64decode(point["picture"].partition("base64,")[2])
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.getpixel((3, 3)) == int(point["id"]), "another instance's picture"
        assert point["label"] == ("one", "two", "three")[labels_of(int(point["id"]))]


def test_the_score_orders_the_page(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name, root: images())
    for metric, first in (("perturbed_loss_mean_r", IDS[0]), ("perturbed_loss_mean", IDS[-1])):
        draw_datamap(Datamap(statistics=folder, metric=metric, output=tmp_path / metric))
        page = (tmp_path / metric / "report.html").read_text(encoding="utf-8")
        strip = page.partition("Most robust")[2].partition("Least robust")[0]
        assert strip.index(f"{first}") < strip.index(f"{IDS[1] if first == IDS[0] else IDS[-2]}")
        assert f"{metric} under {NAMES[0]}" in page


def changed(**columns: Any) -> Any:
    loaded = images()
    return dataclasses.replace(loaded, train=dataclasses.replace(loaded.train, **columns))


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (changed(labels=1 - labels_of(images().train.ids) % 2), "hold other instances or labels"),
        (changed(ids=images().train.ids + 1), "hold other instances or labels"),
        (DataError("digits: no such folder"), "the data cannot be read (digits: no such folder)"),
    ],
    ids=["labels", "ids", "missing"],
)
def test_without_the_runs_own_data_there_are_no_pictures(
    found: Any, why: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, root: str | None) -> Any:
        assert (name, root) == ("fashion_mnist_mini", "there")
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(datasets, "load_dataset", load)
    answer = draw_datamap(Datamap(statistics=folder, root="there", output=tmp_path))
    assert isinstance(answer.text, str)
    assert "\n\nWithout pictures: the " in answer.text
    assert why in answer.text
    assert why in answer.document["without_pictures"]
    points = points_of(tmp_path)
    assert all(point["picture"] is None for point in points)
    assert why.partition("(")[0] in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "plots" / "data-map.png").is_file()


def test_an_unknown_data_set_has_no_pictures(tmp_path: Path) -> None:
    folder = write(tmp_path / "statistics", data="mine")
    answer = draw_datamap(Datamap(statistics=folder, output=tmp_path / "out"))
    assert answer.document["without_pictures"] == "mine is no data set that robustft knows."


def test_points_of_text_show_their_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "statistics", data="sst2")
    ids = np.arange(50, dtype=np.int64)
    rows = TextTable(
        text_a=pa.array([f"sentence {number}" for number in ids]),
        text_b=None,
        labels=labels_of(ids),
        positions=ids,
        origin="here",
        num_classes=CLASSES,
    )
    monkeypatch.setattr(
        text_sets, "load_text_set", lambda name, root: LoadedText(train=rows, test=rows)
    )
    monkeypatch.setitem(
        text_sets.TEXT_DATASETS,
        "sst2",
        dataclasses.replace(text_sets.TEXT_DATASETS["sst2"], class_names=("a", "b", "c")),
    )
    draw_datamap(Datamap(statistics=folder, output=tmp_path / "out"))
    for point in points_of(tmp_path / "out"):
        assert point["sentence"] == f"sentence {point['id']}"


def test_what_cannot_be_drawn_is_said_in_a_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["datamap", str(tmp_path / "nothing")]) == 2
    assert "holds no instance statistics" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="'blur-weak' was not measured"):
        draw_datamap(Datamap(statistics=folder, perturbation="blur-weak", output=tmp_path))
    with pytest.raises(ConfigError, match=r"share = 0\.5"):
        draw_datamap(Datamap(statistics=folder, share=0.5, output=tmp_path))
