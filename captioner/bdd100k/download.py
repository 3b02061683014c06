"""BDD100K from Kaggle: the label files alone, or the whole data set with its images.

In a Kaggle or Colab notebook the set is a read-only folder that the notebook attaches: it is taken as it lies there,
labels and images, and nothing is downloaded. Elsewhere kagglehub downloads, resumes and caches; this module adds what
it leaves to its caller:

- room on the disk is asked for before gigabytes are fetched, not found missing after;
- what kagglehub would take for complete and is not (a zip under the name of the label file, a cut label file, a broken
  archive that no later call gets past) is found, deleted and fetched anew;
- whatever goes wrong is one UserError that names the data set, the file and the remedy.

kagglehub takes a while to import: import this module where something is to be fetched, not at the top of a script.
"""

import errno
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import kagglehub
import requests
from kagglehub.cache import Cache
from kagglehub.clients import build_kaggle_client
from kagglehub.colab_cache_resolver import DatasetColabCacheResolver
from kagglehub.config import get_cache_folder
from kagglehub.exceptions import (
    BackendError,
    ColabEnvironmentError,
    CredentialError,
    DataCorruptionError,
    KaggleEnvironmentError,
    NotFoundError,
    handle_call,
)
from kagglehub.handle import DatasetHandle
from kagglehub.kaggle_cache_resolver import DatasetKaggleCacheResolver
from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

from captioner.runtime.errors import UserError
from captioner.runtime.files import find_existing

# Where things lie in solesensei/solesensei_bdd100k. Other sets are searched for files and folders of these names.
LABEL_FILES = {
    "val": "bdd100k_labels_release/bdd100k/labels/bdd100k_labels_images_val.json",
    "train": "bdd100k_labels_release/bdd100k/labels/bdd100k_labels_images_train.json",
}
IMAGE_FOLDER = "bdd100k/bdd100k/images/100k"

MOUNTS = ("KAGGLE_CACHE_MOUNT_FOLDER", "COLAB_CACHE_MOUNT_FOLDER")  # kagglehub's variables for another mount than:
MOUNT_FOLDER = "/kaggle/input"  # under which notebooks attach data sets

HANDLE = re.compile(r"([\w-]+)/([\w-]+)(?:/versions/([1-9]\d*))?", re.ASCII)
EXAMPLE_HANDLE = "solesensei/solesensei_bdd100k/versions/2"
LISTED = 5  # files of an unknown layout that an error names

OWN_COPY = (
    "or download the set by hand and give --labels and --images; in a notebook, attach it as an input; or try --demo, "
    "which needs no download and no account"
)


class BrokenDownload(UserError):
    """What was fetched is not what Kaggle holds. It is deleted when this is raised: the next call fetches it anew."""


class NotOnKaggle(UserError):
    """Kaggle has no data set, version or file of that name."""


# --------------------------------------------------------------------------------------------------------------
# what is fetched


def fetch_labels(dataset: str, subset: Literal["val", "train", "both"]) -> list[Path]:
    """The label files (or folders of them) of `subset`: from the set that is there, else fetched, one download each.

    A file that is cached is not fetched again; the whole set is, where Kaggle has no label file in the usual place.
    `dataset` is a handle with its version, owner/name/versions/2. Raises UserError if the labels can't be had.
    """
    handle = parse_handle(dataset)
    return [_find_or_fetch_labels(handle, part) for part in (LABEL_FILES if subset == "both" else [subset])]


def fetch_images(dataset: str) -> Path:
    """The folder with the images of the set; where no set is there, all of it is fetched: kagglehub fetches no folder.

    That is the set's folder `images/100k` or, where it has none, its own folder. `dataset` is a handle with its
    version, owner/name/versions/2. Raises UserError if the disk has less than twice the set's size or it can't be had.
    """
    return find_image_folder(fetch_whole_set(parse_handle(dataset)))


def fetch_whole_set(handle: DatasetHandle) -> Path:
    """The folder of the whole set: attached, cached or, where there is neither, downloaded and unpacked."""
    with explain_failures(handle):
        root = attach_set(handle) or find_cached_set(handle)
        if root is None:
            check_disk_space(handle)
            root = Path(kagglehub.dataset_download(str(handle)))
    return root


def parse_handle(dataset: str) -> DatasetHandle:
    """Read owner/name/versions/N. Raises UserError if it is anything else.

    The version must be there: without it kagglehub asks Kaggle for the newest each time, even for a cached set, and
    next year's run may be on other data.
    """
    match = HANDLE.fullmatch(dataset)
    if match is None:
        raise UserError(f"--kaggle-dataset {dataset}: must be owner/name/versions/number, such as {EXAMPLE_HANDLE}")
    owner, name, version = match.groups()
    if version is None:
        raise UserError(
            f"--kaggle-dataset {dataset}: pin the version, {dataset}/versions/N, as in {EXAMPLE_HANDLE}; without it "
            "the data may change from run to run, and Kaggle is asked each time even if they are on this disk"
        )
    return DatasetHandle(owner=owner, dataset=name, version=int(version))


def attach_set(handle: DatasetHandle) -> Path | None:
    """The read-only folder of the set in a Kaggle or Colab notebook; None elsewhere, where it must be downloaded.

    A set that is attached already is found without asking: a notebook may have no internet.
    """
    for mount in dict.fromkeys(os.environ.get(name, MOUNT_FOLDER) for name in MOUNTS):
        for name in (f"datasets/{handle.owner}/{handle.dataset}", handle.dataset):
            if (folder := Path(mount, name)).is_dir():
                return folder
    if any(resolver().is_supported(handle) for resolver in (DatasetKaggleCacheResolver, DatasetColabCacheResolver)):
        return Path(kagglehub.dataset_download(str(handle)))
    return None


def find_cached_set(handle: DatasetHandle) -> Path | None:
    """Folder of the whole data set if it is cached and complete, else None. Asks no network."""
    cache = Cache()
    if not Path(cache.get_path(handle)).exists():
        # Somebody freed the disk and left kagglehub's mark of completeness. The next label file fetched alone would
        # make the folder anew, and folder and mark together pass for the whole set.
        cache.mark_as_incomplete(handle)
    root = cache.load_from_cache(handle)
    return Path(root) if root else None


# --------------------------------------------------------------------------------------------------------------
# what lies where


def find_image_folder(root: Path) -> Path:
    """The folder `images/100k` in a data set, wherever it lies; the set's own folder if it has none."""
    usual = root / IMAGE_FOLDER
    if usual.is_dir():
        return usual
    return min((path for path in root.rglob("images/100k") if path.is_dir()), default=root)


def find_labels(root: Path, subset: str) -> Path:
    """The labels of `subset` in a data set of any layout.

    That is the file of the 2018 release, else the one of 2020, else a folder of one file an image, wherever it lies.
    Raises UserError, with the JSON files that there are, if it has none of them.
    """
    usual = root / LABEL_FILES[subset]
    if usual.is_file():
        return usual
    files = sorted(root.rglob("*.json"), key=lambda file: (file.parent.parts, file.name))
    found = [file for name in (usual.name, f"det_{subset}.json") for file in files if file.name == name]
    found += [file.parent for file in files if file.parent.name == subset]
    if found:
        return found[0]
    listed = ", ".join(str(file.relative_to(root)) for file in files[:LISTED]) or "none"
    raise UserError(
        f"{root}: no labels of {subset} found in this data set, neither {usual.name}, det_{subset}.json nor a folder "
        f"{subset} of .json files (its .json files: {listed}); give them with --labels, and the images with --images"
    )


# --------------------------------------------------------------------------------------------------------------
# label files


def _find_or_fetch_labels(handle: DatasetHandle, subset: str) -> Path:
    """The labels of `subset`: from the whole set, or one file by itself, from the cache or from Kaggle."""
    path = LABEL_FILES[subset]
    with explain_failures(handle, path):
        attached = attach_set(handle)
        if attached is not None:
            return find_labels(attached, subset)
        root = find_cached_set(handle)
        file = Path(root or Cache().get_path(handle), path)
        if (root or Cache().load_from_cache(handle, path)) and is_whole_json(file):
            return file
        if root is not None and not file.exists():
            return find_labels(root, subset)
    try:
        return _download_label_file(handle, path)
    except BrokenDownload:
        # kagglehub resumes on top of whatever lies there. Kaggle sends large files as a zip, so after a kill that may
        # be half unpacked JSON, or a zip that kagglehub takes for the JSON since its size is right. It is deleted now:
        # the second try starts from nothing.
        return _download_label_file(handle, path)
    except NotOnKaggle:
        return find_labels(fetch_whole_set(handle), subset)


def _download_label_file(handle: DatasetHandle, path: str) -> Path:
    with explain_failures(handle, path):
        file = Path(kagglehub.dataset_download(str(handle), path=path))
        if not is_whole_json(file):
            raise DataCorruptionError("it does not begin and end as JSON does")
        return file


def is_whole_json(file: Path) -> bool:
    """Whether a file begins and ends as a JSON array or object: not cut, not a zip, not a web page.

    A look at both ends costs nothing at 1.4 GB; what they can't show, the reading of the labels does.
    """
    try:
        with open(file, "rb") as stream:
            start = stream.read(64).lstrip()[:1]
            stream.seek(max(0, file.stat().st_size - 64))
            end = stream.read().rstrip()[-1:]
    except FileNotFoundError:
        return False
    return start + end in (b"[]", b"{}")


# --------------------------------------------------------------------------------------------------------------
# disk


def check_disk_space(handle: DatasetHandle) -> None:
    """Raise UserError if the disk of kagglehub's cache has no room for the download and what is unpacked from it.

    Both lie there at once, and JPEGs hardly shrink in an archive: that is twice the size that Kaggle gives.
    """
    folder = Path(get_cache_folder()).absolute()
    cache = Cache()
    parts = [Path(cache.get_archive_path(handle)), *Path(cache.get_path(handle)).rglob("*")]
    there = sum(part.stat().st_size for part in parts if part.is_file())  # of a fetch that was interrupted
    needed = max(0, 2 * ask_size(handle) - there)
    free = shutil.disk_usage(find_existing(folder)).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 2**30:.1f} GiB free, and Kaggle data set {handle} needs {needed / 2**30:.1f} GiB for "
            "the download and for unpacking it; make room, or set KAGGLEHUB_CACHE to a folder on another disk, or give "
            "your own copy with --labels and --images"
        )


def ask_size(handle: DatasetHandle) -> int:
    """Bytes of the data set's newest version as Kaggle gives them; 0 where it gives none."""
    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = handle.owner, handle.dataset
    with build_kaggle_client() as client:
        return handle_call(lambda: client.datasets.dataset_api_client.get_dataset(request), handle).total_bytes or 0


def _discard(handle: DatasetHandle, path: str | None) -> None:
    """Delete what lies in the cache of one file, or of the whole set the archive, so that no download resumes on it."""
    cache = Cache()
    if path is None:
        Path(cache.get_archive_path(handle)).unlink(missing_ok=True)
        return
    Path(f"{cache.get_path(handle, path)}.zip").unlink(missing_ok=True)
    cache.delete_from_cache(handle, path)


# --------------------------------------------------------------------------------------------------------------
# failures


@contextmanager
def explain_failures(handle: DatasetHandle, path: str | None = None) -> Iterator[None]:
    """Turn what kagglehub raises into one UserError that names the data set, the file and the remedy.

    BrokenDownload for what came broken, after deleting it: kagglehub itself would take it for a finished download
    (its size is right) and fail on it each time.
    """
    what = f"Kaggle data set {handle}" + (f", file {path}" if path else "")
    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        kind = NotOnKaggle if status == 404 else UserError
        raise kind(f"{what}: {_explain_status(status, error)}; {OWN_COPY}") from None
    except requests.RequestException as error:  # before OSError, which it is one of
        raise UserError(
            f"{what}: no connection to Kaggle, or it broke off ({_name_cause(error)}); check the network and run the "
            f"same command again, which goes on from what has come; {OWN_COPY}"
        ) from None
    except OSError as error:
        raise UserError(f"{what}: {_explain_os_error(error)}") from None
    except (
        DataCorruptionError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, UnicodeDecodeError,
        NotImplementedError,
    ) as error:  # fmt: skip
        raise _report_broken(handle, path, what, error) from None
    except ValueError as error:
        if "Unsupported archive type" in str(error):  # neither zip nor tar: cut short, or a web page
            raise _report_broken(handle, path, what, error) from None
        raise UserError(f"{what}: {_first_line(error)}; {OWN_COPY}") from None  # a kaggle.json that can't be read
    except (BackendError, NotFoundError, CredentialError, KaggleEnvironmentError, ColabEnvironmentError) as error:
        raise UserError(f"{what}: {_first_line(error)}; {OWN_COPY}") from None  # of Kaggle's and Google's notebooks


def _explain_status(status: int, error: requests.HTTPError) -> str:
    if status in (401, 403):
        return (
            f"Kaggle refuses it (HTTP {status}): it is private, its name is misspelt, or the account is wrong; check "
            "--kaggle-dataset, and for a private set KAGGLE_USERNAME and KAGGLE_KEY, or KAGGLE_API_TOKEN"
        )
    if status == 404:
        return "Kaggle has no such data set, version or file (HTTP 404): check --kaggle-dataset"
    if status == 429 or status >= 500:
        return f"Kaggle can't serve it now (HTTP {status}): run the same command again later"
    return _first_line(error)


def _explain_os_error(error: OSError) -> str:
    folder = get_cache_folder()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {folder} is full; make room and run the same command again, or set KAGGLEHUB_CACHE to a "
            "folder on another disk, or give your own copy with --labels and --images"
        )
    return (
        f"{error.filename or folder} can't be used ({error.strerror or _first_line(error)}); mend that, or set "
        "KAGGLEHUB_CACHE to a folder that can be written, or give your own copy with --labels and --images"
    )


def _report_broken(handle: DatasetHandle, path: str | None, what: str, error: Exception) -> BrokenDownload:
    _discard(handle, path)
    return BrokenDownload(
        f"{what}: what was downloaded is broken ({_first_line(error)}) and has been deleted; run the same command "
        f"again to fetch it anew; {OWN_COPY}"
    )


def _name_cause(error: requests.RequestException) -> str:
    """NameResolutionError, SSLError, … : requests wraps it in a line that is mostly addresses."""
    return type(getattr(error.args[0] if error.args else None, "reason", None) or error).__name__


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()[:200]
