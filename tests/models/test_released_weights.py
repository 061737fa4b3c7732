"""Adversarially trained CIFAR-10 networks of others, where the developers' files are at hand."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from robustft.models import bare, load_start

SHARED = Path(__file__).parents[2] / ".." / "shared"
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,017 test pictures that exist without JPEG loss."""
    from PIL import Image
    from pyarrow import parquet

    path = SHARED / "data" / "cifar10" / "test_lossless.parquet"
    if not path.exists():
        pytest.skip(f"needs {path.name} of the developers' CIFAR-10 folder")
    table = parquet.read_table(path)
    arrays = [
        np.asarray(Image.open(io.BytesIO(data.as_py())).convert("RGB")) for data in table["image"]
    ]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return images, torch.from_numpy(table["label"].to_numpy().astype(np.int64))


@pytest.mark.parametrize(
    ("architecture", "file", "std", "correct"),
    [
        ("resnet4b", "cifar10_resnet4b_adv.safetensors", (0.2471, 0.2435, 0.2616), 0.773),
        ("cnn_a", "cifar10_cnn_a_adv4.safetensors", (0.225, 0.225, 0.225), 0.594),
    ],
)
def test_clean_accuracy_is_what_the_weights_are_known_for(
    pictures, architecture, file, std, correct
):
    path = SHARED / "models" / file
    if not path.exists():
        pytest.skip(f"needs {file} of the developers' model folder")
    start = load_start(
        path,
        architecture=architecture,
        num_classes=10,
        image_shape=(3, 32, 32),
        mean=CIFAR_MEAN,
        std=std,
    )
    model = start.build()
    images, labels = pictures
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
        unnormalised = (bare(model)(images).argmax(1) == labels).float().mean().item()
    # Two pictures either way: rounding differs between processors.
    assert accuracy == pytest.approx(correct, abs=2.5 / len(labels))
    assert unnormalised < accuracy - 0.1
