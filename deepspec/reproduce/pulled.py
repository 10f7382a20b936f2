"""What a DVC remote sent, held to the digests of dvc.lock."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from deepspec.reproduce.milestones import FOLDER_MD5


def not_as_locked(root: Path, path: str, md5: str) -> list[str]:
    """Return the files of an output, pulled into the clone, that are not those of dvc.lock; the clone forgets them.

    DVC believes what a remote of its own sends. A folder whose list of files is another one is returned by its name.
    """
    from dvc.repo import Repo

    with Repo(root) as repo:
        cache = Path(repo.cache.local.path)

        def kept(digest: str) -> Path:
            return cache / digest[:2] / digest[2:]

        files = {path: md5}
        if md5.endswith(FOLDER_MD5):
            listing = kept(md5).read_bytes()
            if hashlib.md5(listing, usedforsecurity=False).hexdigest() + FOLDER_MD5 != md5:
                kept(md5).unlink()
                return [path]
            files = {f"{path}/{file['relpath']}": file["md5"] for file in json.loads(listing)}
        wrong = [name for name, digest in files.items() if _md5_of(root / name) != digest]
        for name in wrong:
            kept(files[name]).unlink(missing_ok=True)
            (root / name).unlink(missing_ok=True)
    return wrong


def _md5_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return None
