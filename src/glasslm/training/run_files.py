"""RunFiles: the files that a run in training relies on, and that no other program may change."""

from __future__ import annotations

from pathlib import Path

from glasslm import files
from glasslm.data.dataset import Dataset
from glasslm.data.file_stamp import FileStamp, read_stamp
from glasslm.data.token_file import TokenFile
from glasslm.errors import DamagedError
from glasslm.runs import checkpoint
from glasslm.runs.metrics import MetricsLog
from glasslm.runs.run_folder import Run
from glasslm.runs.run_lock import LOCK_FILE

CURE = "put the original back, then continue with `glasslm resume`"


class RunFiles:
    """The run folder, its lock, run.json, tokenizer.json, the log and the tokens in the cache.

    Files are read again only where their stamp has changed, so a check takes microseconds.
    """

    def __init__(self, run: Run, dataset: Dataset, metrics: MetricsLog) -> None:
        """The files as they are now."""
        self._metrics = metrics
        self._folders = _stamps([run.path, run.path / checkpoint.FOLDER, run.path / LOCK_FILE])
        folder = run.path.absolute()
        self._hashes = {
            folder / "run.json": run.identity.record_sha256,
            folder / "tokenizer.json": run.identity.tokenizer_sha256,
        }
        self._stamps = _stamps([*self._hashes])
        splits = (dataset.train, dataset.val, dataset.test)
        arrays = [split.tokens for split in splits if split is not None]
        self._tokens = _stamps([array.path for array in arrays if isinstance(array, TokenFile)])

    def require_unchanged(self) -> None:
        """Raise DamagedError, with the cure, where another program has changed or removed a file.

        Tokens that were removed from the cache, or replaced there, stay readable in this process.
        """
        for path, start in self._folders.items():
            stamp = read_stamp(path)
            if stamp is None or stamp.inode != start.inode:
                raise DamagedError(f"{path} was {_describe(stamp)} while the run trained: {CURE}")
        self._metrics.require_unchanged()
        for path, start in self._stamps.items():
            stamp = read_stamp(path)
            if stamp is None or (stamp != start and files.file_sha256(path) != self._hashes[path]):
                raise DamagedError(
                    f"{path} was {'altered' if stamp else 'removed'} while the run trained: {CURE}"
                )
            self._stamps[path] = stamp
        for path, start in self._tokens.items():
            stamp = read_stamp(path)
            if stamp is not None and stamp.inode == start.inode and stamp != start:
                self._require_tokens(path)
                self._tokens[path] = stamp

    def _require_tokens(self, path: Path) -> None:
        try:
            files.verify_folder(path.parent)
        except DamagedError as error:
            raise DamagedError(
                f"{error}. The tokens in the cache were altered while the run trained: `glasslm "
                "resume` makes them again, and continues from the latest checkpoint"
            ) from None


def _stamps(paths: list[Path]) -> dict[Path, FileStamp]:
    """The stamps of the files and folders that exist, by their absolute paths."""
    stamps = {path.absolute(): read_stamp(path) for path in paths}
    return {path: stamp for path, stamp in stamps.items() if stamp is not None}


def _describe(stamp: FileStamp | None) -> str:
    return "removed" if stamp is None else "replaced by another one"
