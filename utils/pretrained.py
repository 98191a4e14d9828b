"""Find weights by name, path or URL; bytes are verified before they are loaded, wherever they come from."""

import json
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

from utils.cli import UserError
from utils.download import download
from utils.files import checksum

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"


def read_index() -> dict:
    """pretrained/index.json: `default`, and under `weights` by name: file, sha256, url (null: ships with the code).

    `detector` is such an entry, too.
    """
    path = PRETRAINED / "index.json"
    try:
        index = json.loads(path.read_text())
        assert index["default"] in index["weights"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{path} is missing or damaged: restore it with `git checkout {path.parent}`") from None
    return index


def find_weights(name: str | None, allow_download: bool = True) -> Path:
    """The file of weights called `name`.

    Args:
        name: a name in pretrained/index.json (None: its default), the path of a weights file or run folder, or an
            http(s) URL that ends in `#sha256=<hex>`.
        allow_download: whether the network may be used.

    Raises: UserError for weights that are not there, or whose bytes are not what the checksum says.
    """
    if name and urlsplit(name).scheme in ("http", "https"):
        url, fragment = urldefrag(name)
        if not fragment.startswith("sha256="):
            raise UserError(
                f"{name} has no checksum: add #sha256=<the file's sha256> to the URL, or download it and give its path"
            )
        return _from_cache(
            Path(urlsplit(url).path).name or "weights", fragment.removeprefix("sha256="), url, allow_download
        )
    if name and Path(name).exists():
        path = Path(name) / "model.safetensors" if Path(name).is_dir() else Path(name)
        if not path.is_file():
            raise UserError(f"no weights at {path}: name a weights file or the folder of a finished run")
        return path
    index = read_index()
    entry = index["weights"].get(name or index["default"])
    if entry is None:
        raise UserError(f"no weights at {name}: name a file or run folder, or one of {', '.join(index['weights'])}")
    return _from_index(entry, allow_download)


def find_detector(allow_download: bool = True) -> Path:
    """The file of the detector's weights; raises UserError as `find_weights` does."""
    entry = read_index().get("detector")
    if entry is None:
        raise UserError(f"{PRETRAINED / 'index.json'} names no detector: restore it with `git checkout {PRETRAINED}`")
    return _from_index(entry, allow_download)


def _from_index(entry: dict, allow_download: bool) -> Path:
    shipped = PRETRAINED / entry["file"]
    if shipped.is_file():
        if checksum(shipped, "sha256") != entry["sha256"].lower():
            raise UserError(f"{shipped} is damaged (wrong sha256): restore it with `git checkout {shipped}`")
        return shipped
    return _from_cache(entry["file"], entry["sha256"], entry["url"], allow_download)


def _from_cache(file: str, sha256: str, url: str | None, allow_download: bool) -> Path:
    import torch.hub  # imported where it is needed

    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256[:12]}-{file}"
    for cached in (path.with_name(file), path):  # torch hub's own name, then ours
        if cached.is_file() and checksum(cached, "sha256") == sha256.lower():
            return cached
    if url is None:
        raise UserError(f"{PRETRAINED / file} is missing: restore it with `git checkout {PRETRAINED / file}`")
    if not allow_download:
        raise UserError(f"{file} is neither in {PRETRAINED} nor in {path.parent}: run again without --no-download")
    download([url], path, f"sha256:{sha256}")
    return path
