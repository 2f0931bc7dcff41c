"""Local files of text and of JSON lines, read piece by piece; a place in them is a file and a byte.

`datasets` would cut a text file into its lines and drop what ends them, and would guess at a type for every field of JSON
lines, so these two are read here.
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tl_paramdecomp.data.streams import Items, Place
from tl_paramdecomp.errors import DataError

PIECE = 1 << 20
"""Bytes of a document that are in memory at once: a longer one comes in pieces, each tokenised by itself."""
CHECKED = 1 << 30
"""Bytes of files that are read through for bad UTF-8 before a run begins; what is beyond is found when it is reached."""


class Piece(NamedTuple):
    """A document, or part of a long one."""

    text: str
    ends: bool
    """Whether the document ends here."""
    begins: bool = True
    """Whether it begins here."""


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that paths and globs name, globs in alphabetical order; DataError where one names no file, or all are empty."""
    found: list[Path] = []
    for path in paths:
        if Path(path).is_file():
            found.append(Path(path))
            continue
        files = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            what = "matches no file" if glob.has_magic(str(path)) else "is no file"
            raise DataError(
                f"{str(path)!r} {what} here (in {Path.cwd()}); give the path of a file, or a glob such as 'text/*.txt'; texts "
                "themselves are read from records: [{'text': ...}]."
            )
        found += [Path(p) for p in files]
    if not any(file.stat().st_size for file in found):
        names = ", ".join(map(str, found[:3])) + (" ..." if len(found) > 3 else "")
        raise DataError(f"{names} is empty; give files with text in them.")
    return found


def refuse_bad_bytes(files: Sequence[Path]) -> None:
    """DataError where a file is not UTF-8, up to `CHECKED` bytes of all together, or cannot be read."""
    passed = 0
    for piece, _ in TextFiles(files).read():
        passed += len(piece.text)
        if passed >= CHECKED:
            return


class TextFiles(Items):
    """Documents of text files: each file is one, or, with a separator, each part between two of them; long ones in pieces."""

    def __init__(self, files: Sequence[Path], separator: str | None = None) -> None:
        self.files, self.separator = list(files), separator

    def read(self, place: Mapping[str, Any] | None = None, reread: bool = False) -> Iterator[tuple[Piece, Place]]:
        first, byte, within = (place["file"], place["byte"], place["within"]) if place else (0, 0, False)
        for number in range(first, len(self.files)):
            for piece, behind in self._pieces(self.files[number], byte, within):
                yield piece, {"file": number, "byte": behind, "within": not piece.ends}
            byte, within = 0, False

    def _pieces(self, path: Path, byte: int, within: bool) -> Iterator[tuple[Piece, int]]:
        """Pieces of one file from a byte on, each with the byte behind it; read ahead by what one of them may take."""
        mark = None if self.separator is None else self.separator.encode("utf-8")
        wanted = PIECE + len(mark or b"-")
        ahead, start, more = b"", 0, True
        with _opened(path) as file:
            file.seek(byte)
            while True:
                while more and len(ahead) - start < wanted:
                    raw = file.read(wanted)
                    ahead, start, more = ahead[start:] + raw, 0, bool(raw)
                found = -1 if mark is None else ahead.find(mark, start, start + wanted)
                if found < 0 and start == len(ahead):
                    return
                if found >= 0:
                    end, behind = found, found + len(mark or b"")
                else:
                    end = behind = len(ahead) if len(ahead) - start <= PIECE else _cut(ahead, start)
                ends = found >= 0 or end == len(ahead)
                text = _decoded(path, ahead[start:end], byte).replace("\r\n", "\n").replace("\r", "\n")
                if mark is not None:  # what stands between a document and its separator belongs to neither
                    text = text if within else text.lstrip()
                    text = text.rstrip() if ends else text
                byte, start = byte + behind - start, behind
                yield Piece(text, ends, not within), byte
                within = not ends

    def describe(self) -> dict[str, Any]:
        return {"kind": "text", **names_and_sizes(self.files), "separator": self.separator}


class JsonLineFiles(Items):
    """Records of JSON-lines files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def read(self, place: Mapping[str, Any] | None = None, reread: bool = False) -> Iterator[tuple[Any, Place]]:
        first, byte = (place["file"], place["byte"]) if place else (0, 0)
        for number in range(first, len(self.files)):
            with _opened(self.files[number]) as file:
                file.seek(byte)
                for raw in file:
                    text, begun = _decoded(self.files[number], raw, byte), byte
                    byte += len(raw)
                    if text.strip():
                        yield _record(self.files[number], text, begun), {"file": number, "byte": byte}
            byte = 0

    def describe(self) -> dict[str, Any]:
        return {"kind": "json lines", **names_and_sizes(self.files)}


def _record(path: Path, text: str, byte: int) -> Any:
    try:
        record = json.loads(text)
        told = f"holds {type(record).__name__}"
    except (ValueError, RecursionError) as error:
        record, told = None, f"holds no JSON object ({error})"
    if not isinstance(record, dict):
        raise DataError(
            f'{path} {told} in the line that begins at byte {byte}; expected one object a line, such as {{"text": "..."}}.'
        )
    return record


def _cut(ahead: bytes, start: int) -> int:
    """Where a piece ends of a document that is longer: behind its last line, else behind its last character."""
    line = ahead.rfind(b"\n", start, start + PIECE) + 1
    if line > 0:
        return line
    end = start + PIECE
    while end > start + PIECE - 4 and ahead[end] & 0xC0 == 0x80:
        end -= 1
    return end


def names_and_sizes(files: Sequence[Path]) -> dict[str, Any]:
    """What tells files from others, however many they are, and wherever they lie."""
    told = [[file.name, file.stat().st_size] for file in files]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    return {"first": files[0].name, "files": len(files), "bytes": sum(size for _, size in told), "digest": digest}


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _decoded(path: Path, raw: bytes, byte: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = byte + error.start
        if error.reason.startswith("unexpected end") and byte + len(raw) == path.stat().st_size:
            what = f"ends within a character, at byte {at}"
        else:
            what = f"is not UTF-8: byte {at} (0x{raw[error.start]:02x}) begins no character"
        raise DataError(
            f"{path} {what}. Text must be UTF-8; convert the file first, as with: iconv -f latin1 -t utf-8."
        ) from error
