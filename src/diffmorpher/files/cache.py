"""What took long to make, kept on the disk until it is wanted again: fitted LoRAs, half-finished fits, inversions, latents.

The key of an entry is the content of all that its bytes depend on, so that nothing is ever found for another picture, model,
setting or version, and what is found is what would be made. A cache that fails is done without.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from .atomic import cannot_write, replacing
from .places import expanded, is_address

#: Seconds between two savings of a fit that is under way.
SAVE_EVERY = 60.0
#: What a cache may hold where $DIFFMORPHER_CACHE_GB says nothing.
LIMIT_GB = 10.0
_SUFFIX = ".safetensors"

Tensors = dict[str, Tensor]


def cache_folder() -> Path:
    """$DIFFMORPHER_CACHE, or the user's cache folder of the platform. Raises `ConfigError` for an address."""
    import platformdirs

    said = os.environ.get("DIFFMORPHER_CACHE")
    if said and is_address(said):
        raise ConfigError(f"DIFFMORPHER_CACHE is {said!r}, an address: give a folder on this machine.")
    return expanded(said or platformdirs.user_cache_dir("diffmorpher", appauthor=False))


def cache_limit() -> int:
    """$DIFFMORPHER_CACHE_GB in bytes, or 10 GB; 0 does without a cache. Raises `ConfigError` for what is no size."""
    said = os.environ.get("DIFFMORPHER_CACHE_GB") or str(LIMIT_GB)
    try:
        limit = float(said) * 1e9
        if not 0 <= limit < float("inf"):
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"DIFFMORPHER_CACHE_GB is {said!r}, but must be a size in gigabytes, such as 10.") from error
    return int(limit)


def digest(*parts: Any) -> str:
    """SHA-256 of tensors, numbers, texts, None, and mappings and sequences of them; 64 hex digits."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"tensor {part.dtype} {tuple(part.shape)}".encode())
            found.update(_bytes(part))
        elif isinstance(part, Mapping):
            found.update(f"mapping {len(part)}".encode())
            for name in sorted(part):
                found.update(digest(str(name), part[name]).encode())
        elif isinstance(part, Sequence) and not isinstance(part, str):
            found.update(f"sequence {len(part)}".encode())
            for item in part:
                found.update(digest(item).encode())
        else:
            found.update(f"value {json.dumps(part)}".encode())
    return found.hexdigest()


def default_cache() -> Cache | None:
    """The user's; None where $DIFFMORPHER_CACHE_GB is 0. Raises `ConfigError` where what the environment says cannot be."""
    if not cache_limit():
        return None
    cache_folder()  # an address is said before the work
    return Cache()


@dataclass(frozen=True)
class Cache:
    """A folder of entries, each a safetensors file with a checksum; several processes may share it.

    folder: None takes `cache_folder()`; it is made with the first entry. limit: in bytes, None takes `cache_limit()`; beyond
    it those go that were not used for longest. save_every: seconds between two savings of a fit that is under way.
    """

    folder: Path | None = None
    limit: int | None = None
    save_every: float = SAVE_EVERY

    @property
    def root(self) -> Path:
        return (self.folder or cache_folder()) / "made"

    def load(self, key: str) -> Tensors | None:
        """The entry, on the CPU; None where there is none, or it is damaged."""
        file = self.root / f"{key}{_SUFFIX}"
        try:
            with safe_open(file, "pt") as opened:
                # Copied out of the mapped file: kernels round differently on memory that is not aligned.
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
                whole = (opened.metadata() or {}).get("sha256") == digest(tensors)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError):
            whole = False
        if not whole:
            return None
        with suppress(OSError):
            os.utime(file)  # used just now
        return tensors

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry, or say in a warning why not."""
        kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        try:
            with replacing(self.root / f"{key}{_SUFFIX}") as part:
                save_file(kept, part, {"sha256": digest(kept)})
            self._trim()
        except (OSError, SafetensorError) as error:
            self._warn(error)

    def remove(self, key: str) -> None:
        with suppress(OSError):
            (self.root / f"{key}{_SUFFIX}").unlink(missing_ok=True)

    @contextmanager
    def alone(self, key: str, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
        """While open, no other process makes that entry; `waiting` is called now and then until its turn has come."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.root / f"{key}.lock")
        held = False
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            while not held:
                with suppress(Timeout):
                    lock.acquire(timeout=0.5, poll_interval=0.05)
                    held = True
                if not held:
                    waiting()
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            self._warn(error)
        try:
            yield
        finally:
            if held:
                lock.release()
                with suppress(OSError):  # another process that waits for it holds it open
                    Path(lock.lock_file).unlink(missing_ok=True)

    def entries(self) -> list[tuple[Path, int, float]]:
        """(file, bytes, when it was last used) of each, the longest unused first."""
        found = []
        with suppress(OSError), os.scandir(self.root) as files:
            for file in files:
                if file.name.endswith(_SUFFIX):
                    with suppress(OSError):  # another process removed it
                        about = file.stat()
                        found.append((Path(file.path), about.st_size, about.st_mtime))
        return sorted(found, key=lambda entry: entry[2])

    def _trim(self) -> None:
        limit = cache_limit() if self.limit is None else self.limit
        entries = self.entries()
        total = sum(size for _, size, _ in entries)
        for file, size, _ in entries:
            if total <= limit:
                return
            with suppress(OSError):
                file.unlink(missing_ok=True)
                total -= size

    def _warn(self, error: Exception) -> None:
        about = str(cannot_write("an entry", error)) if isinstance(error, (OSError, SafetensorError)) else str(error)
        warnings.warn(f"the cache in {self.root.parent} is not used: {about}", stacklevel=4)


@dataclass(frozen=True)
class Kept:
    """A cache, and the digest of what everything that is made there depends on."""

    cache: Cache | None
    about: str = ""

    @classmethod
    def of(cls, cache: Cache | None, *parts: Any) -> Kept:
        return cls(cache, digest(*parts) if cache else "")

    def also(self, *parts: Any) -> Kept:
        """That which depends on these besides."""
        return Kept.of(self.cache, self.about, *parts)

    def tensor(self, make: Callable[[], Tensor], like: Tensor, *parts: Any) -> Tensor:
        """What was made of these parts before, else what `make` makes of them, kept from now on; on the device of `like`."""
        if self.cache is None:
            return make()
        key = digest(self.about, *parts)
        found = self.cache.load(key)
        if found is not None and found.keys() == {"made"}:
            return found["made"].to(like.device)
        made = make()
        if bool(made.isfinite().all()):
            self.cache.save(key, {"made": made})
        return made


#: Nothing is looked for, nothing kept.
NOT_KEPT = Kept(None)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
