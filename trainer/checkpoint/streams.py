"""DCP's file writer on streams that hash their data and report the disk's errors unchanged."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta


class Writer(dcp.FileSystemWriter):
    """Writes a plan's items into `staging`; `files.digests` then describes every file. Calls `progress` as it goes."""

    def __init__(self, staging: Path, progress: Callable[[], None]) -> None:
        # Our streams sync themselves. Copying ahead is for tensors on a GPU, and would wait for training's stream.
        super().__init__(staging, sync_files=False, thread_count=1, per_thread_copy_ahead=0)
        self.files = self.fs = _HashingFiles(progress)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # without paths, so that a checkpoint may be moved


class _HashingFiles(FileSystem):
    def __init__(self, progress: Callable[[], None]) -> None:
        self.digests: dict[str, dict[str, Any]] = {}
        """{bytes, sha256} of the data given to each file; reading back finds a disk that wrote something else."""
        self._progress = progress

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        assert mode == "wb"
        with Path(path).open("xb", buffering=0) as raw:
            stream = _HashingStream(raw, self._progress)
            yield stream
            stream.end()
        self.digests[Path(path).name] = {"bytes": stream.tell(), "sha256": stream.sha256.hexdigest()}

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _HashingStream:
    """A file that is written once and in order. Small pieces are gathered; large ones go in chunks, without the GIL.

    It syncs piece by piece, because one sync at the end reports no progress, on a slow disk for minutes.
    """

    # Not a BufferedWriter: the faults of a disk (trainer/faults/disk.py) stand in for the file, above its buffer, and
    # would meet every small piece instead of what is really written.
    _GATHERED = 2**20
    _CHUNK: int = 4 * 2**20
    _SYNCED: int = 64 * 2**20

    def __init__(self, raw: IO[bytes], progress: Callable[[], None]) -> None:
        self._raw, self._progress = raw, progress
        self._gathered = bytearray()
        self._written = self._unsynced = 0
        self._error: BaseException | None = None
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._written += len(view)
        if self._error is None:  # raised at the end, because torch's zip writer would hide the reason
            try:
                self._put(view)
            except BaseException as error:
                self._error = error
        return len(view)

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def end(self) -> None:
        """Make everything durable. Raises the first error since the beginning."""
        if self._error is None:
            self._flush()
        if self._error is not None:
            raise self._error
        self._sync()

    def _put(self, view: memoryview) -> None:
        if len(view) < self._GATHERED:
            self._gathered += view
            if len(self._gathered) < self._GATHERED:
                return
            view = memoryview(b"")
        self._flush()
        self._write_out(view)

    def _flush(self) -> None:
        gathered, self._gathered = self._gathered, bytearray()
        self._write_out(memoryview(gathered))

    def _write_out(self, view: memoryview) -> None:
        for start in range(0, len(view), self._CHUNK):
            chunk = view[start : start + self._CHUNK]
            self.sha256.update(chunk)
            while chunk:
                done = self._raw.write(chunk)  # may be less than asked for
                chunk, self._unsynced = chunk[done:], self._unsynced + done
                self._progress()
            if self._unsynced >= self._SYNCED:
                self._sync()

    def _sync(self) -> None:
        os.fsync(self._raw.fileno())
        self._unsynced = 0
        self._progress()
