"""Real text -> token ids: which files, what in them is text, and which tokenizer, the same on every rank."""

from __future__ import annotations

import codecs
import glob
import os
import sysconfig
import zlib
from array import array
from dataclasses import dataclass, field
from typing import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nemo_dist_conf.errors import ConfigError, DataError, Problem
from nemo_dist_conf.names import nearest
from nemo_dist_conf.recipe.value_checks import PATH_ALLOWED, TOKENIZER_ALLOWED
from nemo_dist_conf.wording import assigned, typed_path

__all__ = [
    "BYTE_VOCABULARY",
    "Corpus",
    "check_vocabulary",
    "data_error",
    "load_corpus",
]

#: Token ids of the byte-level tokenizer: the byte's own value.
BYTE_VOCABULARY = 256

#: How much of the standard library's sources is read where data.max_mb is null: enough that 1,000 small steps
#: see no window twice, and read in well under a second.
_STANDARD_LIBRARY_MB = 8

#: Byte 0 occurs in no text file (a file that has it counts as binary), so it can stand between two documents.
_SEPARATOR_BYTE = 0

#: Folders of the standard library that hold no source of its own, or deliberately broken ones.
_STANDARD_LIBRARY_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass
class _Found:
    """The files that a ``data.path`` stands for, in an order that depends on their names only."""

    description: str
    files: list[str]
    named_by_user: bool = False  # one file that the user named: whatever is wrong with it is an error


def _sorted_files(folder: str, left_out: Callable[[str], bool]) -> Iterator[str]:
    """Regular files below a folder; the order is that of the names, not of the file system."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not left_out(name))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if not left_out(name) and os.path.isfile(path):
                yield path


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _standard_library() -> _Found:
    folder = sysconfig.get_path("stdlib")

    def left_out(name: str) -> bool:
        return name in _STANDARD_LIBRARY_LEFT_OUT or name.startswith(".")

    files = [path for path in _sorted_files(folder, left_out) if path.endswith(".py")]
    return _Found("the sources of Python's standard library", files)


def data_error(what: str, asked: str, allowed: str, type_: str) -> DataError:
    return DataError(Problem(what=what, asked=asked, allowed=allowed, instead=type_))


def _path_error(what: str, path: str | None) -> DataError:
    return data_error(f"data.path: {what}", assigned("data.path", path), PATH_ALLOWED, "data.path=null")


def _find_files(path: str | None) -> _Found:
    if path is None:
        found = _standard_library()
        if not found.files:
            raise data_error(
                "data.path=null: this Python comes without the sources of its standard library",
                "data.path=null",
                "a text file, a folder of text files, or a glob",
                assigned("data.path", "*"),
            )
        return found
    if not path.strip():
        raise _path_error("an empty path names nothing", path)
    full = str(typed_path(path))
    if os.path.isfile(full):
        return _Found(path, [full], named_by_user=True)
    if os.path.isdir(full):
        if not os.access(full, os.R_OK | os.X_OK):
            raise _path_error(f"the folder {path} cannot be read (permission denied)", path)
        files = list(_sorted_files(full, _hidden))
        if not files:
            raise _path_error(f"the folder {path} holds no files", path)
        return _Found(path, files)
    if os.path.lexists(full):
        raise _path_error(f"{path} is neither a regular file nor a folder", path)
    if glob.has_magic(full):
        files_: set[str] = set()
        for match in glob.glob(full, recursive=True):
            files_.update(_sorted_files(match, _hidden) if os.path.isdir(match) else [match])
        files = sorted(file for file in files_ if os.path.isfile(file))
        if not files:
            raise _path_error(f"no file matches {path}", path)
        return _Found(path, files)
    raise _path_error(f"there is no file or folder {path}{_similar(full)}", path)


def _similar(path: str) -> str:
    parent, name = os.path.split(path.rstrip(os.sep))
    try:
        alike = nearest(name, sorted(os.listdir(parent)))
    except OSError:
        return ""
    return f" (there is {', '.join(alike)})" if alike else ""


@dataclass
class _Reader:
    """Reads documents one by one; counts what it leaves out instead of failing on the first odd file."""

    found: _Found
    max_bytes: float
    read_files: int = 0
    read_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    cut: bool = False

    def documents(self) -> Iterator[str]:
        for path in self.found.files:
            room = self.max_bytes - self.read_bytes
            if room <= 0:
                self.cut = True
                return
            text = self._document(path, room)
            if text is not None:
                yield text

    def _document(self, path: str, room: float) -> str | None:
        try:
            with open(path, "rb") as file:
                raw = file.read(int(room) + 1) if room != float("inf") else file.read()
        except OSError as error:
            self._skip("unreadable", f"cannot be read ({error.strerror or type(error).__name__})")
            return None
        cut = len(raw) > room
        raw = raw[: int(room)] if cut else raw
        if b"\0" in raw:
            self._skip("binary", "is binary: it holds zero bytes")
            return None
        try:  # a cut may fall inside a character: then its first bytes are dropped
            text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=not cut)
        except UnicodeDecodeError as error:
            self._skip("not UTF-8", f"is not UTF-8 text (byte {raw[error.start]:#04x} at offset {error.start})")
            return None
        text = text.removeprefix("\ufeff")
        if not text:
            self._skip("empty", "is empty")
            return None
        self.cut |= cut
        self.read_files += 1
        self.read_bytes += len(raw)
        return text

    def _skip(self, kind: str, why: str) -> None:
        if self.found.named_by_user:
            raise _path_error(f"the file {self.found.description} {why}", self.found.description)
        self.skipped[kind] = self.skipped.get(kind, 0) + 1


def _counts(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(skipped.items()))


@dataclass(frozen=True)
class Corpus:
    """Token ids of all documents in a row, and where they came from.

    tokens: [tokens], uint8 for bytes and int32 for a tokenizer. vocabulary: how many ids the tokenizer knows.
    skipped: files left out, by reason. cut: data.max_mb ended the reading. fingerprint: checksum of the tokens.
    """

    tokens: Tensor
    vocabulary: int
    description: str
    files: int
    text_bytes: int
    skipped: Mapping[str, int]
    cut: bool
    fingerprint: int
    tokenizer: str | None = None

    def __str__(self) -> str:
        words = [self.description, f"{self.files:,} files" if self.files != 1 else "1 file"]
        words.append(f"{'the first ' if self.cut else ''}{self.text_bytes / 1e6:.1f} MB")
        unit = "bytes" if self.tokenizer is None else f"tokens of {self.tokenizer}"
        words.append(f"{self.tokens.numel():,} {unit}")
        odd = {kind: count for kind, count in self.skipped.items() if kind != "empty"}
        if odd:
            words.append(f"files left out: {_counts(odd)}")
        return ", ".join(words)


def load_corpus(path: str | None = None, tokenizer: str | None = None, max_mb: float | None = None) -> Corpus:
    """The text that ``path`` stands for, as token ids.

    Files are taken in the order of their names, hidden ones left out; those that are not UTF-8 text are skipped
    and counted. Documents are separated by byte 0, or by the tokenizer's end-of-text token where it has one.

    path: a file, a folder (recursive), a glob; None: the sources of Python's standard library.
    tokenizer: a folder that transformers can load, a ``tokenizer.json``; None: bytes, 256 ids.
    max_mb: stop after so many MB (10^6 bytes) of text; None: everything, 8 MB of the standard library.
    Raises DataError where nothing is there, nothing can be read, or the tokenizer cannot be loaded.
    """
    encode, vocabulary = _byte_encoder() if tokenizer is None else _load_tokenizer(tokenizer)
    found = _find_files(path)
    if max_mb is None:
        max_mb = _STANDARD_LIBRARY_MB if path is None else float("inf")
    reader = _Reader(found, max_mb * 1e6)
    ids = encode(reader.documents())
    if not reader.read_files:
        raise _path_error(
            f"none of the {len(found.files):,} files of {found.description} holds text ({_counts(reader.skipped)})",
            path,
        )
    dtype = torch.uint8 if isinstance(ids, bytearray) else torch.int32
    return Corpus(
        tokens=torch.frombuffer(ids, dtype=dtype) if len(ids) else torch.empty(0, dtype=dtype),
        vocabulary=vocabulary,
        description=found.description,
        files=reader.read_files,
        text_bytes=reader.read_bytes,
        skipped=dict(reader.skipped),
        cut=reader.cut,
        fingerprint=zlib.crc32(ids),
        tokenizer=tokenizer,
    )


_Encoder = Callable[[Iterable[str]], "bytearray | array[int]"]


def _byte_encoder() -> tuple[_Encoder, int]:
    def encode(documents: Iterable[str]) -> bytearray:
        ids = bytearray()
        for text in documents:
            ids += text.encode("utf-8")
            ids.append(_SEPARATOR_BYTE)
        return ids

    return encode, BYTE_VOCABULARY


def _load_tokenizer(tokenizer: str) -> tuple[_Encoder, int]:
    """An encoder from a local folder or file; nothing is downloaded."""
    if not tokenizer.strip():
        raise _tokenizer_error("an empty path names nothing", tokenizer)
    full = str(typed_path(tokenizer))
    try:
        if os.path.isfile(full):
            encode_many, vocabulary, end = _tokenizer_file(full)
        else:  # a name is fine where transformers finds it in its local cache
            encode_many, vocabulary, end = _tokenizer_folder(full if os.path.isdir(full) else tokenizer)
    except ConfigError:
        raise
    except Exception as error:  # whatever the libraries raise on a bad folder: OSError, ValueError, TypeError, ...
        if not os.path.exists(full):
            raise _tokenizer_error(f"there is no file or folder {tokenizer}{_similar(full)}", tokenizer) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _tokenizer_error(f"{tokenizer} cannot be loaded as a tokenizer ({reason})", tokenizer) from error

    def encode(documents: Iterable[str]) -> array[int]:
        ids = array("i")
        for texts in _by_size(documents, 1_000_000):
            for document in encode_many(texts):
                ids.extend(document)
                if end is not None:
                    ids.append(end)
        return ids

    return encode, vocabulary


def _tokenizer_error(what: str, tokenizer: str) -> DataError:
    asked = assigned("data.tokenizer", tokenizer)
    return data_error(f"data.tokenizer: {what}", asked, TOKENIZER_ALLOWED, "data.tokenizer=null")


def _missing_package(package: str, tokenizer: str) -> ConfigError:
    return ConfigError(
        Problem(
            what=f"data.tokenizer needs the package {package}, which is not installed",
            asked=assigned("data.tokenizer", tokenizer),
            allowed=f"any tokenizer once {package} is installed (pip install {package}); null: bytes",
            instead="data.tokenizer=null",
        )
    )


def _tokenizer_file(path: str) -> tuple[Callable[[list[str]], Iterable[Sequence[int]]], int, int | None]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise _missing_package("tokenizers", path) from error
    loaded = Tokenizer.from_file(path)
    # The file does not say which token ends a text: take the first that families are known to use.
    ends = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[SEP]")
    end = next((i for i in map(loaded.token_to_id, ends) if i is not None), None)

    def encode_many(texts: list[str]) -> Iterable[Sequence[int]]:
        return (encoding.ids for encoding in loaded.encode_batch(texts, add_special_tokens=False))

    return encode_many, loaded.get_vocab_size(), end


def _tokenizer_folder(folder: str) -> tuple[Callable[[list[str]], Iterable[Sequence[int]]], int, int | None]:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _missing_package("transformers", folder) from error
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not len(loaded):
        raise ValueError("its vocabulary is empty")

    def encode_many(texts: list[str]) -> Iterable[Sequence[int]]:
        return loaded(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    return encode_many, len(loaded), loaded.eos_token_id


def _by_size(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Groups of documents of about so many characters: large enough for threads, small enough for memory."""
    group: list[str] = []
    room = characters
    for text in documents:
        group.append(text)
        room -= len(text)
        if room <= 0:
            yield group
            group, room = [], characters
    if group:
        yield group


def check_vocabulary(corpus: Corpus, vocabulary: int, *, checkpoint: str | None = None) -> None:
    """Refuse token ids that the model has no embedding for, before they are an index error deep in a kernel.

    vocabulary: rows of the model's embedding. checkpoint: the folder the model was loaded from, None where it is
    built from a config. Only ids that occur in the text matter; unused ones at the end are fine.
    Raises DataError.
    """
    largest = int(corpus.tokens.max())
    if largest < vocabulary:
        return
    if corpus.tokenizer is None:
        what = f"data.tokenizer=null: the text has bytes up to {largest}, the model only {vocabulary} ids"
        need = BYTE_VOCABULARY
    else:
        what = (
            f"data.tokenizer: {corpus.tokenizer} has {corpus.vocabulary:,} ids, and the text uses them up to "
            f"{largest:,}; the model has {vocabulary:,}"
        )
        need = max(corpus.vocabulary, largest + 1)
    asked = assigned("data.tokenizer", corpus.tokenizer)
    if checkpoint is None:
        raise data_error(what, asked, f"a model with at least {need} ids", f"model.config.vocab_size={need}")
    allowed = f"a tokenizer with at most {vocabulary:,} ids"
    raise data_error(what, asked, allowed, assigned("data.tokenizer", checkpoint))
