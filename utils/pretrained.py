"""Find weights by name, path or URL; bytes are verified before they are loaded, wherever they come from."""

import json
import re
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

from utils.cli import UserError
from utils.download import download
from utils.files import checksum

NAME, SHA256 = r"[A-Za-z0-9][\w.+-]*", r"[0-9a-fA-F]{64}"  # of files: no separator, no "..", not hidden
LOCAL = ("localhost", "127.0.0.1", "::1")
PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"


def read_index() -> dict:
    """pretrained/index.json: `default`, and under `weights` by name: file, sha256, url (null: ships with the code).

    `detector` is such an entry, too.

    Raises: UserError where it is missing or damaged, or a file's name leads out of its folder.
    """
    path = PRETRAINED / "index.json"
    try:
        index = json.loads(path.read_text())
        entries = [*index["weights"].values(), *([index["detector"]] if "detector" in index else [])]
        named = all(re.fullmatch(NAME, entry["file"]) and re.fullmatch(SHA256, entry["sha256"]) for entry in entries)
        if not (named and index["default"] in index["weights"]):
            raise ValueError
        if not all(entry["url"] is None or isinstance(entry["url"], str) for entry in entries):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
        if not re.fullmatch(f"sha256={SHA256}", fragment):
            raise UserError(
                f"{name} has no checksum: add #sha256=<the file's sha256> to the URL, or download it and give its path"
            )
        file = Path(urlsplit(url).path).name
        file = file if re.fullmatch(NAME, file) else "weights"
        return _from_cache(file, fragment.removeprefix("sha256="), url, allow_download)
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
    if urlsplit(url).scheme != "https" and urlsplit(url).hostname not in LOCAL:
        raise UserError(f"{url} is no https address: use one, or download the file and give its path")
    download([url], path, f"sha256:{sha256}")
    return path
