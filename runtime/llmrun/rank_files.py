"""The files that one rank answers for, and whether their digests were compared: each file once, as the user wants it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from llmrun import console, verified
from llmrun.artifact import Artifact


class RankFiles:
    """Verifies a rank's files, and remembers for the next start that they are right (`verified.py`)."""

    def __init__(self, artifact: Artifact, rank: int, *, is_first_of_host: bool, mode: str) -> None:
        """Answer for the rank's folder; a host's first rank also for what the ranks have in common.

        Args:
            artifact: opened for the rank.
            rank: in the job.
            is_first_of_host: no lower rank runs on this host.
            mode: "auto", "full", "size" or "off", as `Engine` explains.
        """
        self._artifact = artifact
        self._is_quiet = rank != 0
        self._mode = mode
        self._must_hash: bool | None = None  # not known yet
        self._hashed: set[str] = set()
        folder = artifact.manifest.ranks[rank].folder + "/"
        self.names = [name for name in artifact.files_of_rank(rank) if is_first_of_host or name.startswith(folder)]

    @property
    def must_hash(self) -> bool:
        """Whether digests are to be computed."""
        if self._must_hash is None:
            self._must_hash = self._mode == "full" or (
                self._mode == "auto"
                and not verified.is_stamped(self._artifact.digest, self._artifact.times_of(self.names))
            )
        return self._must_hash

    def verify(self, names: Sequence[str], num_threads: int = 1) -> None:
        """Compare the digests of files with the manifest's, unless that was done.

        Raises:
            IntegrityError: a file is not what was packed.
        """
        if self.must_hash:
            left = [name for name in names if name not in self._hashed]
            progress = console.Progress("verifying", is_quiet=self._is_quiet)
            self._artifact.verify(left, progress, num_threads=num_threads)
            self._hashed.update(left)

    @contextlib.contextmanager
    def verifying(self, names: Sequence[str], num_threads: int) -> Iterator[None]:
        """Verify files on other threads while the body runs; a damaged file explains more than what came of it."""
        if not self.must_hash:
            yield
            return
        import concurrent.futures

        with concurrent.futures.ThreadPoolExecutor(1) as background:
            digests = background.submit(self.verify, names, num_threads)
            try:
                yield
            finally:
                digests.result()

    def conclude(self) -> None:
        """Make sure that the files stayed the same while they were read, and remember that they are right.

        Raises:
            IntegrityError: one was changed.
        """
        self._artifact.recheck(self.names)
        if self._hashed:
            verified.stamp(self._artifact.digest, self._artifact.times_of(self.names), self._artifact.path)
