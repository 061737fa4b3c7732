"""Checks that the package in the current folder, unpacked from its wheel, is whole and importable.

``make check`` runs it where the wheel was unpacked, with the source tree out of sight.
"""

import sys
from pathlib import Path


def main() -> None:
    """Import the unpacked package and read what has to be inside it."""
    here = Path.cwd()
    sys.path.insert(0, str(here))
    import robustft

    package = Path(robustft.__file__).parent
    if package != here / "robustft":
        sys.exit(f"imported {package}, not the unpacked wheel in {here}")
    for name in ("py.typed", "data/fashion_mnist_mini/LICENSE"):
        if not (package / name).is_file():
            sys.exit(f"the wheel lacks {name}: see package-data in pyproject.toml")
    task = robustft.load_task(robustft.TaskConfig())
    print(f"robustft {robustft.__version__}: {len(task.splits['test'])} embedded test images")


if __name__ == "__main__":
    main()
