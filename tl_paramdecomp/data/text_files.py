"""Local files of text and of JSON lines, read piece by piece; a place in them is a file and a byte.

`datasets` would cut a text file into its lines and drop what ends them, and would guess at a type for every field of JSON
lines, so these two are read here.
"""

import codecs
import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tl_paramdecomp.data.cursors import Cursor, Items, Place
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
    """The files that paths and globs name, globs in alphabetical order.

    Raises:
        DataError: One names no file.
    """
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
    return found


def refuse_empty(files: Sequence[Path]) -> None:
    """See that there is something to read.

    Raises:
        DataError: There is no file, or every one is empty.
    """
    if not any(file.stat().st_size for file in files):
        names = ", ".join(map(str, files[:3])) + (" ..." if len(files) > 3 else "")
        raise DataError(f"{names or 'The list of files'} is empty; give files with text in them.")


def refuse_bad_bytes(files: Sequence[Path], limit: int | None = None) -> None:
    """See that files are UTF-8, up to so many bytes of all together.

    Raises:
        DataError: One is not, or cannot be read.
    """
    left = CHECKED if limit is None else limit
    for path in files:
        decoder, passed = codecs.getincrementaldecoder("utf-8")(), 0
        with _opened(path) as file:
            while left > 0 and (raw := file.read(min(PIECE, left))):
                left -= len(raw)
                pending = len(decoder.getstate()[0])
                try:
                    decoder.decode(raw)
                except UnicodeDecodeError as error:
                    raise _bad_bytes(path, passed - pending + error.start, error) from error
                passed += len(raw)
            pending = len(decoder.getstate()[0])
            if pending and passed == path.stat().st_size:
                raise DataError(f"{path} ends within a character, at byte {passed - pending}. {_ENCODING}")


class TextFiles(Items):
    """Documents of text files: each file is one, or, with a separator, each part between two of them."""

    def __init__(self, files: Sequence[Path], separator: str | None = None) -> None:
        self.files, self.separator = list(files), separator

    def open(self) -> Cursor:
        """A new pass from the beginning."""
        return _TextCursor(self.files, self.separator)

    def describe(self) -> dict[str, Any]:
        """Names and sizes of the files, and what parts their documents."""
        return {"kind": "text", **names_and_sizes(self.files), "separator": self.separator}


class JsonLineFiles(Items):
    """Records of JSON-lines files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def open(self) -> Cursor:
        """A new pass from the beginning."""
        return _JsonCursor(self.files)

    def describe(self) -> dict[str, Any]:
        """Names and sizes of the files."""
        return {"kind": "json lines", **names_and_sizes(self.files)}


class _FileCursor(Cursor):
    """A place in a list of files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._file: BinaryIO | None = None
        self._stand(0, 0)

    def _stand(self, index: int, byte: int) -> None:
        if self._file is not None:
            self._file.close()
        self._index, self._byte, self._file = index, byte, None

    def _current(self) -> BinaryIO | None:
        """The file to read on in, at the cursor's byte; None behind the last one."""
        if self._file is None and self._index < len(self._files):
            self._file = _opened(self._files[self._index])
            self._file.seek(self._byte)
        return self._file

    def place(self) -> Place:
        return {"file": self._index, "byte": self._byte}

    def go_to(self, place: Mapping[str, Any], reread: bool = False) -> None:
        self._stand(place["file"], place["byte"])

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _bad_bytes(self._files[self._index], self._byte + error.start, error) from error

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()  # type: ignore[union-attr]


class _JsonCursor(_FileCursor):
    def __next__(self) -> Any:
        while (file := self._current()) is not None:
            raw = file.readline()
            if not raw:
                self._stand(self._index + 1, 0)
                continue
            text, begun = self._decode(raw), self._byte
            self._byte += len(raw)
            if text.strip():
                return self._record(text, begun)
        raise StopIteration

    def _record(self, text: str, byte: int) -> Any:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self._files[self._index]} holds no JSON object in the line that begins at byte {byte} ({error}); expected "
                'one object a line, such as {"text": "..."}.'
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{self._files[self._index]} holds {type(record).__name__} in the line that begins at byte {byte}; expected "
                'one object a line, such as {"text": "..."}.'
            )
        return record


class _TextCursor(_FileCursor):
    """Reads ahead by pieces: `_ahead[_from:]` are the bytes of the file from the cursor's byte on."""

    def __init__(self, files: Sequence[Path], separator: str | None) -> None:
        self._mark = None if separator is None else separator.encode("utf-8")
        super().__init__(files)

    def _stand(self, index: int, byte: int) -> None:
        super()._stand(index, byte)
        self._ahead, self._from, self._whole = b"", 0, False
        self._within = False

    def place(self) -> Place:
        return super().place() | {"within": self._within}

    def go_to(self, place: Mapping[str, Any], reread: bool = False) -> None:
        super().go_to(place, reread)
        self._within = place["within"]

    def __next__(self) -> Piece:
        while (file := self._current()) is not None:
            found = None if self._mark is None else self._find(file)
            if self._mark is None:
                self._fill(file, PIECE + 1)
            left = len(self._ahead) - self._from
            if found is None and left > PIECE:
                return self._take(self._cut(), 0, False)
            if found is None and left == 0:
                self._stand(self._index + 1, 0)
                continue
            if found is None:
                return self._take(left, 0, True)
            return self._take(found, len(self._mark or b""), True)
        raise StopIteration

    def _find(self, file: BinaryIO) -> int | None:
        """Bytes up to the next separator; None where there is none within a piece."""
        assert self._mark is not None
        found = self._ahead.find(self._mark, self._from)
        if found < 0:
            self._fill(file, PIECE + len(self._mark))
            found = self._ahead.find(self._mark, self._from)
        found -= self._from
        return found if 0 <= found <= PIECE else None  # no further, however much of the file happens to be read ahead

    def _fill(self, file: BinaryIO, wanted: int) -> None:
        """Read ahead until there are so many bytes, or the file is at its end."""
        if self._whole or len(self._ahead) - self._from >= wanted:
            return
        more = [self._ahead[self._from :]]
        missing = wanted - len(more[0])
        while missing > 0:
            raw = file.read(max(missing, PIECE))
            if not raw:
                self._whole = True
                break
            more.append(raw)
            missing -= len(raw)
        self._ahead, self._from = b"".join(more), 0

    def _cut(self) -> int:
        """Bytes of the piece to take of a document that is longer: to the end of its last line, else of its last character."""
        piece = self._ahead[self._from : self._from + PIECE]
        line = piece.rfind(b"\n") + 1
        if line:
            return line
        end = PIECE
        while end > PIECE - 4 and self._ahead[self._from + end] & 0xC0 == 0x80:
            end -= 1
        return end

    def _take(self, n: int, separator: int, ends: bool) -> Piece:
        text = self._decode(self._ahead[self._from : self._from + n]).replace("\r\n", "\n").replace("\r", "\n")
        if self._mark is not None:  # what stands between a document and its separator belongs to neither
            text = text if self._within else text.lstrip()
            text = text.rstrip() if ends else text
        self._from += n + separator
        self._byte += n + separator
        begins, self._within = not self._within, not ends
        return Piece(text, ends, begins)


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


_ENCODING = "Text must be UTF-8; convert the file first, as with: iconv -f latin1 -t utf-8."


def _bad_bytes(path: Path, byte: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path} is not UTF-8: byte {byte} (0x{error.object[error.start]:02x}) begins no character. {_ENCODING}"
    )
