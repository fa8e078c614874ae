"""Sources -> documents -> rows of tokens -> shards. A plan depends on corpus, tokenizer and settings, never on workers.

A source is ``file.txt``, ``file.jsonl[:field]``, ``file.parquet[:column]`` (local, ``s3://``, ``gs://``, ``hdfs://``
or ``file://``; or a glob of them), ``hf:NAME[:config][:split][:column]``, or ``builtin:pydoc``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from itertools import islice, zip_longest
from typing import Any, Protocol
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray
from pyarrow import ArrowException, fs, parquet

from avss_dist.config import Settings, fingerprint
from avss_dist.errors import CorpusError, nearest, require_known

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

TEXT_PIECE_BYTES = 4 << 20  # tokenizers need over 100 bytes of memory for each byte of a document
GROUP_DOCUMENTS, GROUP_CHARACTERS = 64, 1 << 20
FORMS = "file.txt, file.jsonl[:field], file.parquet[:column], hf:NAME[:config][:split][:column], builtin:pydoc"

_FILE = re.compile(r"(?P<path>.+?\.(?P<suffix>txt|jsonl|parquet))(?::(?P<field>.*))?", re.IGNORECASE)
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_READ_BYTES = 8 << 20
_FILE_ERRORS = (OSError, ArrowException, UnicodeDecodeError)
_FILE_HINT = "Check that the file is there, whole, and yours to read."
_HUB_HINT = "Check the name, configuration, split and network; a private dataset needs `hf auth login`."


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer. A call gives a mapping whose ``input_ids`` is a list[list[int]]."""

    eos_token_id: int | None
    pad_token_id: int | None

    def __call__(self, text: list[str], **kwargs: Any) -> Any: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows for one forward pass, as wide as the longest of them."""

    input_ids: Ids  # int32[rows, width], padded on the right
    attention_mask: Mask  # bool[rows, width], True where a token is real
    observed: Mask  # bool[rows, width], True where a token counts in the statistics: real, and not skipped


@dataclass(frozen=True, eq=False, kw_only=True)
class Shard:
    """Consecutive rows of the corpus: the unit of work, retry and resampling."""

    shard_id: int  # its index in the plan, from 0
    input_ids: Ids  # int32[rows, sequence_length], padded on the right
    lengths: Ids  # int32[rows], real tokens of each row, 1 or more
    skip_first_tokens: int  # leading tokens of every row that the statistics leave out
    content_hash: str  # SHA-256 in hex of skip, lengths and real tokens; padding does not enter

    @property
    def num_sequences(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens that count in the statistics."""
        return int(np.maximum(self.lengths.astype(np.int64) - self.skip_first_tokens, 0).sum())

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, in order, ``batch_size`` at a time, in arrays that are the caller's own."""
        for start in range(0, self.num_sequences, batch_size):
            lengths = self.lengths[start : start + batch_size]
            positions = np.arange(lengths.max())
            real = positions < lengths[:, None]
            input_ids = self.input_ids[start : start + batch_size, : len(positions)].copy()
            yield Batch(input_ids=input_ids, attention_mask=real, observed=real & (positions >= self.skip_first_tokens))


@dataclass(frozen=True, eq=False, kw_only=True)
class CorpusPlan:
    """A corpus cut into shards, ``shards[i].shard_id == i``; two sums over them; and how many documents they took."""

    source: str  # as the user named it
    corpus_fingerprint: str
    tokens_fingerprint: str  # SHA-256 in hex of the shards' content hashes and the sequence length
    shards: tuple[Shard, ...]
    num_sequences: int
    num_tokens: int
    num_documents: int


def plan(
    source: str, tokenizer: Tokenizer, settings: Settings, *, progress: Callable[[int], None] | None = None
) -> CorpusPlan:
    """Read, tokenize and cut a corpus, no further than ``settings.max_sequences`` rows need.

    ``progress`` is called after each shard with the number of sequences so far.

    Raises:
        CorpusError: the source cannot be read, holds no text, or is too short for one sequence.
    """
    opened, tally, length = _open(source), _Tally(), settings.sequence_length
    eos = tokenizer.eos_token_id
    ids = _tokenize(opened.documents(), tokenizer, tally)
    rows = _pack(ids, eos, length, tally) if settings.layout == "packed" else _truncate(ids, length)
    rows = islice(rows, settings.max_sequences)
    pad = next((i for i in (tokenizer.pad_token_id, eos) if i is not None), 0)
    shards: list[Shard] = []
    num_sequences = num_tokens = 0
    while block := list(islice(rows, settings.sequences_per_shard)):
        shards.append(_shard(len(shards), block, pad, settings))
        num_sequences += len(block)
        num_tokens += shards[-1].num_tokens
        if progress:
            progress(num_sequences)
    _require_enough(source, num_sequences, num_tokens, tally, settings)
    return CorpusPlan(
        source=source,
        corpus_fingerprint=opened.fingerprint(),
        tokens_fingerprint=fingerprint(shards=[shard.content_hash for shard in shards], sequence_length=length),
        shards=tuple(shards),
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        num_documents=tally.documents,
    )


def documents(source: str) -> Iterator[str]:
    """Stream the texts of a source in order, the files of a glob by sorted path.

    A ``.txt`` file is one document (none if empty); above 4 MiB it is read in pieces of about that size, cut at line
    ends, each a document. Memory is bounded by such a piece, the longest line, or a Parquet row group's column.

    Raises:
        CorpusError: the source is unknown, missing, unreadable, malformed or not UTF-8; names file and line.
    """
    return _open(source).documents()


def corpus_fingerprint(source: str) -> str:
    """Identity of a source's content in 64 hex digits, whatever the tokenizer and however much of it is read.

    Local files count by their bytes, wherever they lie; remote ones by path, size and time of change; Hub datasets by
    name and revision (a local dataset folder by the times of its files). Field, column, config and split count too.

    Raises:
        CorpusError: the source is unknown, missing or unreadable.
    """
    return _open(source).fingerprint()


@dataclass
class _Tally:
    documents: int = 0
    tokens: int = 0
    has_text: bool = False


def _tokenize(texts: Iterator[str], tokenizer: Tokenizer, tally: _Tally) -> Iterator[Ids]:
    options = {"add_special_tokens": True, "truncation": False, "padding": False, "verbose": False}
    for group in _groups(texts):
        encoded = tokenizer(group, return_attention_mask=False, return_token_type_ids=False, **options)
        for text, ids in zip(group, encoded["input_ids"], strict=True):
            tally.documents += 1
            tally.tokens += len(ids)
            tally.has_text |= bool(text) and not text.isspace()
            yield np.asarray(ids, np.int32)


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    failure: Exception | None = None
    while not failure:
        try:
            group.append(next(texts))
        except (StopIteration, CorpusError) as error:
            failure = error  # raised below: the texts before a bad line may be all that is wanted
        if group and (failure or len(group) == GROUP_DOCUMENTS or sum(map(len, group)) >= GROUP_CHARACTERS):
            yield group
            group = []
    if isinstance(failure, CorpusError):
        raise failure


def _pack(documents: Iterator[Ids], eos: int | None, length: int, tally: _Tally) -> Iterator[Ids]:
    rest = np.zeros(0, np.int32)
    for ids in documents:
        end = [] if eos is None or (len(ids) and ids[-1] == eos) else [eos]
        tally.tokens += len(end)
        rest = np.concatenate([rest, ids, np.array(end, np.int32)])
        whole = len(rest) // length * length
        yield from rest[:whole].reshape(-1, length)
        rest = rest[whole:].copy()


def _truncate(documents: Iterator[Ids], length: int) -> Iterator[Ids]:
    return (ids[:length].copy() for ids in documents if len(ids))


def _shard(shard_id: int, rows: list[Ids], pad: int, settings: Settings) -> Shard:
    skip = settings.skip_first_tokens
    lengths = np.array([len(row) for row in rows], np.int32)
    input_ids = np.full((len(rows), settings.sequence_length), pad, np.int32)
    digest = hashlib.sha256(np.array([skip, len(rows), *lengths], "<i8").tobytes())
    for target, row in zip(input_ids, rows, strict=True):
        target[: len(row)] = row
        digest.update(row.astype("<i4").tobytes())
    hashed = digest.hexdigest()
    return Shard(shard_id=shard_id, input_ids=input_ids, lengths=lengths, skip_first_tokens=skip, content_hash=hashed)


def _require_enough(source: str, num_sequences: int, num_tokens: int, tally: _Tally, settings: Settings) -> None:
    length, skip = settings.sequence_length, settings.skip_first_tokens
    if not tally.has_text:
        raise CorpusError(f"{source} holds no text (documents read: {tally.documents}).", "Name one that holds some.")
    if not num_sequences and settings.layout == "packed":
        message = f"{source} is {tally.tokens} tokens long, too short for one sequence of {length}."
        raise CorpusError(message, "Choose a smaller --sequence-length, or --layout padded.")
    if not num_tokens:
        message = f"No document of {source} is longer than --skip-first-tokens {skip} (tokens in all: {tally.tokens})."
        raise CorpusError(message, "Lower --skip-first-tokens, or choose --layout packed.")


@dataclass(frozen=True)
class _Source:
    documents: Callable[[], Iterator[str]]
    fingerprint: Callable[[], str]


def _open(source: str) -> _Source:
    kind, _, name = source.partition(":")
    return _builtin(name) if kind == "builtin" else _hub(source) if kind == "hf" else _files(source)


def _builtin(name: str) -> _Source:
    from pydoc_data.topics import topics

    require_known("builtin corpus", name, ("pydoc",), CorpusError)
    texts = [topics[key] for key in sorted(topics)]
    return _Source(lambda: iter(texts), lambda: fingerprint(kind="builtin", documents=texts))


def _files(source: str) -> _Source:
    match = _FILE.fullmatch(source)
    if not match:
        ending = re.search(r"\.\w+(?=:|$)", source.rpartition("/")[2])
        near = nearest(ending[0], [f".{name}" for name in _READERS]) if ending else ""
        raise CorpusError(f"'{source}' is not a corpus source.", f"{near} Sources: {FORMS}.".strip())
    path, suffix = match["path"], match["suffix"].lower()
    if suffix == "txt" and match["field"] is not None:
        raise CorpusError(f"'{source}': a text file has no field.", f"Write {path} alone.")
    field = "" if suffix == "txt" else match["field"] or "text"
    filesystem, paths = _find(path)
    return _Source(
        lambda: _read(filesystem, paths, suffix, field),
        lambda: fingerprint(kind=suffix, field=field, files=[_identity(filesystem, path) for path in paths]),
    )


def _find(path: str) -> tuple[fs.FileSystem, list[str]]:
    """The file system of a path, URI or glob, and the files it means, sorted; a glob passes over hidden ones."""
    from fsspec.implementations.arrow import ArrowFSWrapper

    with _explained(path, _FILE_ERRORS, _FILE_HINT):
        filesystem, name = _filesystem(path)
        found = [filesystem.get_file_info(name)]
        if has_magic(name) and not found[0].is_file:
            found = filesystem.get_file_info(sorted(ArrowFSWrapper(filesystem).glob(name)))
            found = [info for info in found if info.is_file and not info.base_name.startswith(".")]
    if found and found[0].type == fs.FileType.Directory:
        raise CorpusError(f"{path} is a directory.", f"Name its files: '{path}/*{os.path.splitext(path)[1]}'.")
    if not found or not found[0].is_file:
        raise CorpusError(f"{path}: no such file.", "Check the name; a relative one starts in the working directory.")
    return filesystem, [info.path for info in found]


def _filesystem(path: str) -> tuple[fs.FileSystem, str]:
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    uri = re.split(r"[*?\[]", path)[0].rpartition("/")[0] + "/"  # a glob's pattern is no URI
    filesystem, folder = fs.FileSystem.from_uri(uri)
    return filesystem, f"{folder.rstrip('/')}/{unquote(path.removeprefix(uri))}"


def _identity(filesystem: fs.FileSystem, path: str) -> object:
    with _explained(path, _FILE_ERRORS, _FILE_HINT):
        if filesystem.type_name != "local":
            info = filesystem.get_file_info(path)
            return [path, info.size, info.mtime_ns]
        with filesystem.open_input_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _read(filesystem: fs.FileSystem, paths: list[str], suffix: str, field: str) -> Iterator[str]:
    for path in paths:
        with _explained(path, _FILE_ERRORS, _FILE_HINT), filesystem.open_input_file(path) as file:
            yield from _READERS[suffix](file, path, field)


def _read_txt(file: Any, path: str, _field: str) -> Iterator[str]:
    stream = io.BufferedReader(file, _READ_BYTES)
    while data := stream.read(TEXT_PIECE_BYTES) + stream.readline():
        yield _decode(data, path, stream.tell() - len(data))


def _read_jsonl(file: Any, path: str, field: str) -> Iterator[str]:
    for number, line in enumerate(io.BufferedReader(file, _READ_BYTES), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(line, where))
        except (ValueError, RecursionError) as error:
            reason = str(error).replace("line 1 ", "")
            raise CorpusError(f"{where} is not JSON: {reason}.", "Write one JSON object on each line.") from error
        if not isinstance(record, dict):
            raise CorpusError(f"{where} is not a JSON object.", f'Write it as {{"{field}": "..."}}.')
        yield _text(record, field, where)


def _read_parquet(file: Any, path: str, column: str) -> Iterator[str]:
    table = parquet.ParquetFile(file)
    names = table.schema_arrow.names
    if column not in names:
        raise CorpusError(f"{path}: no column '{column}'.", nearest(column, names))
    batches = table.iter_batches(batch_size=256, columns=[column])
    for row, value in enumerate((value for batch in batches for value in batch.column(0).to_pylist()), 1):
        yield _text({column: value}, column, f"{path}, row {row}")


_READERS = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet}


def _hub(source: str) -> _Source:
    parts = source.split(":")[1:]
    if not parts[0] or len(parts) > 4:
        raise CorpusError(f"'{source}' is not a corpus source.", f"Sources: {FORMS}.")
    name, config, split, column = (p or d for p, d in zip_longest(parts, ("", "", "train", "text")))
    try:
        from datasets import load_dataset_builder
    except ImportError as error:
        raise CorpusError(f"{source} needs the package datasets.", "pip install 'avss_dist[hf]'") from error
    with _explained(source, (Exception,), _HUB_HINT):
        builder = load_dataset_builder(name, config or None)

    def rows() -> Iterator[Mapping[str, Any]]:
        with _explained(source, (Exception,), _HUB_HINT):
            yield from builder.as_streaming_dataset(split=split)

    return _Source(
        lambda: (_text(row, column, f"{source}, row {number}") for number, row in enumerate(rows(), 1)),
        lambda: fingerprint(kind="hf", name=name, config=config, split=split, column=column, revision=builder.hash),
    )


def _decode(data: bytes, where: str, offset: int = 0) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        message = f"{where}: byte {offset + error.start} is not UTF-8."
        raise CorpusError(message, "Convert the file to UTF-8.") from error


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise CorpusError(f"{where}: no field '{field}'.", nearest(field, record))
    value = record[field]
    if not isinstance(value, str) or _HALF_CHARACTER.search(value):
        raise CorpusError(f"{where}: '{field}' is not text but {value!r:.60}.", "Mend the line, or name another field.")
    return value


@contextmanager
def _explained(where: str, errors: tuple[type[Exception], ...], hint: str) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise CorpusError(f"{where} cannot be read: {error}", hint) from error
