"""Asks the Hub, through ``huggingface_hub``, for what a repository holds and for the beginnings of its files. Never for a whole weights
file.

Endpoint, token, proxy and offline mode are ``huggingface_hub``'s own (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE). Nothing is tried twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import NoReturn

from overflowml_core.errors import NotAModel, OverflowmlError

_TIMEOUT_S = 10.0
"""Until a connection stands or the next bytes come: the default of ``huggingface_hub`` (HF_HUB_DOWNLOAD_TIMEOUT)."""

_LONGEST_REQUEST_S = 60.0
"""For one file's beginning, however slowly its bytes come."""

_REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w][\w./-]{0,199}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOTAL = re.compile(r"bytes \d+-\d+/(\d{1,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Repository:
    """What the Hub says about a repository at a revision.

    Attributes:
        repo_id: "owner/name".
        commit: 40 hex digits.
        sizes: bytes of each file by its path; 0 where the Hub did not say.
    """

    repo_id: str
    commit: str
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Beginning:
    """The first bytes of a file, and the size of all of it; 0 where the server did not say."""

    raw: bytes
    size_bytes: int


class HubClient:
    """Requests to one repository.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or commit; None for the default branch.

    Raises:
        NotAModel: this cannot be the name of a repository or a revision.
        OverflowmlError: ``huggingface_hub`` is not installed.
    """

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        if not _REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith((".git", "-", ".")):
            raise NotAModel(repo_id[:120], "the Hub has no such names; give owner/name, or the path of a folder")
        if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise NotAModel(f"{repo_id}@{revision[:120]}", "the Hub has no such revisions; give a branch, a tag or a commit")
        self.repo_id, self.revision = repo_id, revision
        self._hub = _library()

    @property
    def endpoint(self) -> str:
        """Where requests go."""
        return str(self._hub.constants.ENDPOINT)

    @property
    def offline(self) -> bool:
        """Whether ``huggingface_hub`` was told to ask nobody."""
        constants = self._hub.constants
        return bool(getattr(constants, "is_offline_mode", lambda: constants.HF_HUB_OFFLINE)())  # the function is of version 2

    def repository(self) -> Repository:
        """Commit and files.

        Raises:
            NotAModel: there is no such repository or revision, or it is gated, or the machine is offline.
            OverflowmlError: the Hub cannot be reached, or answers with nonsense.
        """
        try:
            api = self._hub.HfApi()
            found = api.model_info(self.repo_id, revision=self.revision, timeout=_TIMEOUT_S, files_metadata=True)
        except Exception as error:  # noqa: BLE001 -- the client behind huggingface_hub, and its exceptions, change from version to version
            self._explain(error)
        commit = str(found.sha)
        if not _COMMIT.fullmatch(commit):
            raise OverflowmlError(f"{self.repo_id}: {self.endpoint} names {commit[:60]!r} as its commit; check HF_ENDPOINT")
        sizes = {str(sibling.rfilename): sibling.size if isinstance(sibling.size, int) else 0 for sibling in found.siblings or ()}
        return Repository(self.repo_id, commit, MappingProxyType(sizes))

    def beginning(self, name: str, commit: str, nbytes: int) -> Beginning:
        """The first bytes of a file, fewer where it is shorter. No more is read, even where a server sends it.

        Args:
            name: of the file, inside the repository.
            commit: which version.
            nbytes: how many.

        Raises:
            NotAModel, OverflowmlError: as for :meth:`repository`.
        """
        utils = self._hub.utils
        url = self._hub.hf_hub_url(self.repo_id, name, revision=commit)
        headers = {**utils.build_hf_headers(), "range": f"bytes=0-{nbytes - 1}", "accept-encoding": "identity"}
        raw = bytearray()
        deadline = time.monotonic() + _LONGEST_REQUEST_S
        try:
            with utils.get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
                utils.hf_raise_for_status(response)
                for chunk in response.iter_bytes(2**16):
                    raw += chunk
                    if len(raw) >= nbytes:
                        break
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{len(raw)} of {nbytes} bytes came in {_LONGEST_REQUEST_S:.0f} s")
                total = _TOTAL.fullmatch(response.headers.get("content-range", ""))
                length = response.headers.get("content-length", "")
        except Exception as error:  # noqa: BLE001 -- as above
            self._explain(error, name)
        whole = int(total[1]) if total else int(length) if length.isascii() and length.isdigit() and len(length) < 19 else 0
        return Beginning(bytes(raw[:nbytes]), whole)

    def snapshot(self) -> Path | None:
        """The folder of the repository in huggingface_hub's own cache, None where it was never downloaded. Asks nobody."""
        try:
            return Path(self._hub.snapshot_download(self.repo_id, revision=self.revision, local_files_only=True))
        except Exception:  # noqa: BLE001 -- a missing, partial or damaged cache has an exception each, and means the same here
            return None

    def _explain(self, error: Exception, name: str = "") -> NoReturn:
        """One line for what went wrong, and the way out."""
        known = self._hub.errors
        asked = self.repo_id + (f"@{self.revision}" if self.revision else "")
        if isinstance(error, known.OfflineModeIsEnabled):
            raise NotAModel(asked, "the Hub was not asked, as HF_HUB_OFFLINE is set; unset it, or give a local folder") from error
        if isinstance(error, known.GatedRepoError):
            raise NotAModel(asked, f"gated: accept its conditions at {self.endpoint}/{self.repo_id}, then run 'hf auth login'") from error
        if isinstance(error, known.RevisionNotFoundError):
            raise NotAModel(asked, f"{self.endpoint} has no such revision of it; leave it out or correct it") from error
        if isinstance(error, known.RepositoryNotFoundError):
            raise NotAModel(
                asked, f"{self.endpoint} has no such repository, or it is private: correct it, or run 'hf auth login'"
            ) from error
        if isinstance(error, known.EntryNotFoundError):
            raise NotAModel(asked, f"it lists {name}, which {self.endpoint} does not have; try again later") from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 429:
            raise OverflowmlError(f"{asked}: {self.endpoint} asks for fewer requests (429); wait, or run 'hf auth login'") from error
        if status is not None:
            raise OverflowmlError(
                f"{asked}: {self.endpoint} answers with status {status}; try again later, or give a local folder"
            ) from error
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        raise OverflowmlError(
            f"{asked}: {self.endpoint} cannot be reached ({type(error).__name__}: {reason}); check the network, or give a local folder"
        ) from error


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise OverflowmlError("a Hub id needs huggingface_hub; pip install 'overflowml[transformers]', or give a local folder") from None
    return huggingface_hub
