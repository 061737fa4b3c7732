"""Fetching data sets that torchvision knows where to fetch.

Only archives are fetched and unpacked, with torchvision's addresses and checksums. Its data set
classes are not used for reading: some of them unpickle what they have fetched.
"""

import logging
from pathlib import Path
from urllib.error import URLError

from robustft.errors import DataError

__all__ = ["DOWNLOADABLE", "download"]

logger = logging.getLogger(__name__)

# The archive's address and checksum are class attributes of these ...
ARCHIVES = ("CIFAR10", "CIFAR100", "STL10")
# ... and these look at folders only, so that making an object is a safe way to fetch them.
FOLDERS = ("Food101", "DTD", "Caltech256")
DOWNLOADABLE = (*ARCHIVES, "SVHN", *FOLDERS)


def download(name: str, root: Path) -> None:
    """Fetch and unpack a data set into ``root``; does nothing where the files are there.

    Args:
        name: torchvision's name, one of ``DOWNLOADABLE``.
        root: folder; made if missing.

    Raises:
        DataError: the data set cannot be fetched.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive, download_url

    logger.info("fetching %s to %s", name, root)
    known = getattr(datasets, name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if name in ARCHIVES:
            if not (root / known.base_folder).is_dir():
                download_and_extract_archive(
                    known.url, str(root), filename=known.filename, md5=known.tgz_md5
                )
        elif name == "SVHN":
            for split in ("train", "test"):
                address, filename, checksum = known.split_list[split]
                download_url(address, str(root), filename, checksum)
        else:
            known(str(root), download=True)
    except (URLError, OSError, RuntimeError) as error:
        raise DataError(
            f"cannot fetch {name} ({error}); fetch it elsewhere and leave download off: the "
            "message then says what to put where"
        ) from error
