"""How are the files of a data set on the Hugging Face Hub fetched?

With huggingface_hub, an optional extra. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean there;
files are kept in our cache, and a file that is there already is not fetched again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.errors import DataError, DiskFull

INSTALL = 'pip install ".[huggingface]"'


@dataclass(frozen=True)
class Fetched:
    root: Path  # the repository's files as they lie there, as far as they were fetched
    paths: list[Path]
    commit: str
    licence: str


def fetch_dataset(
    repo: str,
    path: str,
    revision: str,
    cache_dir: Path,
    say: Callable[[str], None],
    *,
    choose: Callable[[list[str]], list[str]],
) -> Fetched:
    """Fetch those files of `repo` (at `revision`, at or below `path`) that `choose` takes from their names."""
    hub = _library()
    # Read when a request is made or, at the latest, here: the hub may be a mirror on the local network.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    token = os.environ.get("HF_TOKEN") or None
    api = hub.HfApi(endpoint=endpoint, token=token)
    address = f"hf://datasets/{repo}"
    try:
        info = api.dataset_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        taken = choose(_below(path, list(sizes)))
        if not taken:
            raise DataError(_nothing(address, path, list(sizes)))
        say(f"fetching {len(taken):,} files ({sum(sizes[name] for name in taken) / 1e6:,.1f} MB) of {address} ...")
        root = hub.snapshot_download(
            repo,
            repo_type="dataset",
            revision=info.sha,
            cache_dir=cache_dir,
            allow_patterns=[_literal(name) for name in taken],
            endpoint=endpoint,
            token=token,
        )
    except DataError:
        raise
    except hub.errors.GatedRepoError as error:
        raise DataError(f"{address} asks you to agree to its terms: do so on its page, then set HF_TOKEN") from error
    except hub.errors.RevisionNotFoundError as error:
        raise DataError(f"{address} has no revision {revision}") from error
    except hub.errors.RepositoryNotFoundError as error:
        raise DataError(
            f"there is no data set {repo} on {endpoint or 'the Hugging Face Hub'}, or it is private: check the name, "
            "and set HF_TOKEN if it is private"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(f"no space is left for {address} in {cache_dir}: free some") from error
        raise DataError(_unreachable(address, endpoint, error)) from error
    except Exception as error:
        # huggingface_hub lets its HTTP library's errors through, and which library that is changes with its version
        raise DataError(_unreachable(address, endpoint, error)) from error
    fetched = [Path(root, name) for name in taken]
    missing = [file.name for file in fetched if not file.is_file()]
    if missing:
        raise DataError(f"{address} was fetched without {', '.join(missing[:3])}: try again")
    return Fetched(Path(root), fetched, info.sha or revision, _licence(info))


def _library() -> Any:
    # xet, the Hub's own transfer protocol, is not spoken by mirrors; the variable is read when the library is imported
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise DataError(f"data from the Hugging Face Hub needs huggingface_hub: {INSTALL}") from error
    return huggingface_hub


def _below(path: str, names: Sequence[str]) -> list[str]:
    folder = path.strip("/")
    return [name for name in names if not folder or name == folder or name.startswith(folder + "/")]


def _literal(name: str) -> str:
    """A pattern that matches `name` alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _nothing(address: str, path: str, names: Sequence[str]) -> str:
    if not _below(path, names):
        return f"{address} has no {path}; it has {', '.join(names[:8]) or 'no files'}"
    return (
        f"{address} has nothing to train on there: pictures, .parquet, .zip, .npz or .safetensors files are wanted, "
        f"and it has {', '.join(_below(path, names)[:8])}"
    )


def _unreachable(address: str, endpoint: str | None, error: Exception) -> str:
    words = " ".join(str(error).split())[:400] or type(error).__name__
    return (
        f"{address} could not be fetched from {endpoint or 'the Hugging Face Hub'}: {words}. Is this machine online? "
        "HF_ENDPOINT names a mirror, HF_TOKEN a credential."
    )


def _licence(info: Any) -> str:
    card = info.card_data
    stated = None if card is None else card.get("license_name") or card.get("license")
    return ", ".join(stated) if isinstance(stated, list) else str(stated or "")
