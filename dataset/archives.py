"""Archives as their publishers serve them: fetched (or taken up where a fetch broke off), verified, and read safely.

URLs, names and checksums of VOC and SBD are those of torchvision. Its own downloader begins an interrupted file again
from the first byte; 19 GB of COCO ask for one that goes on.
"""

import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from utils.errors import UserError

CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Archive:
    """A publisher's file.

    Args:
        url: where it is fetched.
        md5: its checksum; None where no source for one was found: then reading it through to its end must do.
        size: bytes to fetch, about.
        unpacked: bytes that are kept of it, about.
        unpack: (archive, folder of the data set) -> what it leaves there.
    """

    url: str
    md5: str | None
    size: int
    unpacked: int
    unpack: Callable[[Path, Path], None]

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def check_space(folder: Path, needed: int) -> None:
    """Refuses to begin what would not fit.

    Raises:
        UserError: if the disk of `folder` has less than `needed` bytes free.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"--data-path {folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: make room, or "
            "choose another disk"
        )


def verify(path: Path, archive: Archive) -> None:
    """Refuses a file that is not what its publisher serves. Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"--archive {path} is not a file: give {archive.name} as fetched from {archive.url}")
    if not check_integrity(path, archive.md5):
        raise UserError(f"{path} is damaged (its MD5 is not {archive.md5}): fetch it again from {archive.url}")


def fetch(archive: Archive, folder: Path) -> Path:
    """The archive in `folder`, fetched if it is not there yet; what an earlier call got of it is kept.

    Raises:
        UserError: if it can't be fetched, or is not what its publisher serves.
    """
    path, partial = folder / archive.name, folder / f"{archive.name}.part"
    if path.is_file():
        verify(path, archive)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _receive(archive, partial)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{archive.url} can't be fetched ({getattr(error, 'reason', None) or error}): run the command again to go "
            f"on where it stopped, or fetch {archive.name} by other means and give --archive"
        ) from error
    if not check_integrity(partial, archive.md5):
        partial.unlink()
        raise UserError(f"{archive.url} arrived damaged (its MD5 is not {archive.md5}): run the command again")
    partial.rename(path)
    return path


def _receive(archive: Archive, partial: Path) -> None:
    """Appends to `partial` what it lacks of the archive, where the server can begin in the middle."""
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after what is there: it is whole, or it is another file
            return
        raise
    with response:
        have = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(total=total, initial=have, desc=archive.name, unit="B", unit_scale=True, disable=None)
        with open(partial, "ab" if have else "wb") as file, bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)
        if total is not None and have < total:
            raise ConnectionError(f"the connection closed after {have} of {total} bytes")


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files in an archive (.tar, .tar.gz, .tgz or .zip) that are `wanted` by name.

    Nothing is written here, and no link is ever made or followed. An archive with a member, wanted or not, that would
    land outside of the folder it is unpacked in, or link there, is refused.

    Raises:
        UserError: for an archive that is broken, or unsafe.
    """
    reader = _zip_members if path.suffix == ".zip" else _tar_members
    try:
        with tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
            yield from reader(path, wanted, bar)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} is broken ({error}): fetch it again") from error


def _tar_members(path: Path, wanted: Callable[[str], bool], bar: tqdm) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as file, tarfile.open(fileobj=file) as archive:
        for member in archive:
            _check_name(member.name, path)
            if member.issym() or member.islnk():  # a hard link's target counts from the top, a symbolic one's does not
                folder = PurePosixPath(member.name).parent if member.issym() else PurePosixPath()
                _check_name(os.path.normpath(folder / member.linkname), path)
            if member.isfile() and wanted(member.name):
                yield member.name, archive.extractfile(member).read()
            bar.update(file.tell() - bar.n)


def _zip_members(path: Path, wanted: Callable[[str], bool], bar: tqdm) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _check_name(member.filename, path)
        for member in archive.infolist():
            if not member.is_dir() and wanted(member.filename):
                yield member.filename, archive.read(member)
            bar.update(member.compress_size)


def _check_name(name: str, path: Path) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or str(parts)[1:2] == ":":  # C:/... is absolute elsewhere
        raise UserError(
            f"{path} would write outside of the folder ({name!r}): it is not what its publisher serves, don't use it"
        )
