"""Sources of text: streams of documents, with a fingerprint of their content.

A source is ``file.txt``, ``file.jsonl[:field]``, ``file.csv[:column]``, ``file.parquet[:column]`` (local, ``s3://``,
``gs://``, ``hdfs://`` or ``file://``; or a glob of them), ``hf:NAME[@revision][:config][:split][:column]``, the short
name of a data set of the hub (see `NAMED`), or ``builtin:pydoc``. A column holds texts, or conversations.
Sources of paired text are ``file.jsonl:prompt+answer[:label]``, by the names of fields, of CSV too, and
``truthfulqa:file.jsonl[:seed]``. All files but Parquet may end in ``.gz`` or ``.zst``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from glob import has_magic
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from pyarrow import ArrowException, NativeFile, fs, parquet

from avss_dist.core.errors import AvssError, ConfigError, CorpusError, nearest, require_known
from avss_dist.core.extras import require_package
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.text import RedactedURI
from avss_dist.core.values import JsonObject
from avss_dist.corpus.documents import (
    MAX_LINE_BYTES,
    Answer,
    Chat,
    Document,
    Record,
    Records,
    field_document,
    labelled_answers,
    render,
    too_long,
    truthfulqa_answers,
)

if TYPE_CHECKING:
    from datasets import DatasetBuilder

TEXT_PIECE_BYTES = 4 << 20  # size of the pieces that a large text file is read in
MAX_REST_BYTES = 1 << 20  # of a line beyond the end of a piece; a longer one is cut at whitespace


class NamedText(NamedTuple):
    """Text of a data set of the hub that has a short name.

    Attributes:
        repository: name of the repository and commit, ``NAME@COMMIT``.
        config: configuration; empty for the default one.
        split: split that is read by default.
        column: column of texts, or of conversations.
    """

    repository: str
    config: str
    split: str
    column: str


NAMED = {
    "wikitext2": NamedText(
        repository="Salesforce/wikitext@b08601e04326c79dfdd32d625aee71d232d685c3",
        config="wikitext-2-raw-v1",
        split="train",
        column="text",
    ),
    "c4": NamedText(
        repository="allenai/c4@1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        config="en",
        split="train",
        column="text",
    ),
    "pile10k": NamedText(
        repository="NeelNanda/pile-10k@127bfedcd5047750df5ccf3a12979a47bfa0bafa",
        config="",
        split="train",
        column="text",
    ),
    "fineweb-edu": NamedText(
        repository="HuggingFaceFW/fineweb-edu@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        config="sample-10BT",
        split="train",
        column="text",
    ),
    "ultrachat": NamedText(
        repository="HuggingFaceH4/ultrachat_200k@8049631c405ae6576f93f445c6b8166f76f5505a",
        config="",
        split="train_sft",
        column="messages",
    ),
    "open-platypus": NamedText(
        repository="garage-bAInd/Open-Platypus@37141edbdb7826378cce118c46a109b813e1f038",
        config="",
        split="train",
        column="output",
    ),
    "cnn-dailymail": NamedText(
        repository="abisee/cnn_dailymail@96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
        config="3.0.0",
        split="train",
        column="article",
    ),
    "alpaca": NamedText(
        repository="tatsu-lab/alpaca@dce01c9b08f87459cf36a430d809084718273017",
        config="",
        split="train",
        column="text",
    ),
}
"""Data sets of the hub by short name, at a fixed commit.

Users write ``NAME[:split]``.
"""
FORMS = (
    "file.txt, file.jsonl[:field], file.csv[:column], file.parquet[:column], "
    f"hf:NAME[@revision][:config][:split][:column], {', '.join(NAMED)}, builtin:pydoc"
)

_FILE = re.compile(
    r"(?P<path>.+?\.(?:(?P<suffix>txt|jsonl|csv)(?:\.(?:gz|zst))?|(?P<parquet>parquet)))(?::(?P<field>.*))?",
    re.IGNORECASE,
)
_PAIRED = re.compile(r"(?P<prompt>[^+:]+)\+(?P<answer>[^+:]+)(?::(?P<label>.+))?")
_LAST_WORD = re.compile(rb".+(?= \S)", re.DOTALL)
"""Text up to the last word and its space, where most tokenizers make the same tokens of both parts."""
_READ_BYTES = 8 << 20  # read from a file at once
_PARQUET_ROWS = 256  # rows of a column in memory at once
_BY_NAME = ""  # the format of a file is that of its name
_FILE_ERRORS = (OSError, ArrowException, UnicodeDecodeError)
_FILE_HINT = "Check that the file exists, is complete and readable."
_HUB_HINT = "Check the name, configuration, split and network; a private dataset needs `hf auth login`."


def documents(source: str) -> Iterator[Document]:
    """Stream the texts or conversations of a source in order, the files of a glob by sorted path.

    A ``.txt`` file is one document (none if empty); above 4 MiB it is read in pieces of about that size, each a
    document: cut at line ends, or before a word where a line is longer. Memory is bounded by such a piece, the longest
    line, or a Parquet row group's column.

    Raises:
        CorpusError: the source is unknown, missing, unreadable, malformed or not UTF-8, or has a line or a text above
            16 MiB; names file and line.
    """
    return open_source(source).documents()


@dataclass(frozen=True)
class Source:
    """A source. Nothing is opened before it is read.

    Attributes:
        documents: streams its texts, or conversations.
        fingerprint: identity of its content in 64 hex digits, independent of the tokenizer and of how much is read.
            Local files count by their bytes, wherever they lie; remote ones by path, size and time of change; Hub
            datasets by name and revision (a local dataset folder by the times of its files). Field, column, config and
            split count too.
        answers: streams the answers of paired text, whose documents are prompts with answers; None for other text.
        path: path, glob or URI of its files; empty if it reads no file.
    """

    documents: Callable[[], Iterator[Document]]
    fingerprint: Callable[[], str]
    answers: Callable[[], Iterator[Answer]] | None = None
    path: str = ""


def open_source(source: str) -> Source:
    """Return a source by its name.

    Raises:
        CorpusError: the kind of source is unknown.
    """
    source = RedactedURI(source).full
    name, _, split = source.partition(":")
    if name in NAMED and ":" not in split:
        text = NAMED[name]
        source = f"hf:{text.repository}:{text.config}:{split or text.split}:{text.column}"
    kind = source.partition(":")[0]
    open_kind = _KINDS.get(kind, _files)
    return open_kind(source)


def local_files(source: str) -> list[str]:
    """Return the files that a source names by relative paths, sorted, without opening it.

    A source on the hub, at a URI or with an absolute path has none.

    Raises:
        CorpusError: the kind of source is unknown, or a file does not exist.
    """
    path = open_source(source).path
    if not path or "://" in path or os.path.isabs(os.path.expanduser(path)):
        return []
    return sorted(os.path.relpath(file) for file in _files_at(path))


def require_files(source: str) -> None:
    """Refuse a source of an unknown kind, or whose files are not on this machine. They are not opened.

    Nothing on the hub or at a URI is looked for.

    Raises:
        CorpusError: the kind of source is unknown, or a file does not exist.
    """
    path = open_source(source).path
    if path and "://" not in path:
        _files_at(path)


def _files_at(path: str) -> list[str]:
    """Return the files of a path on this machine: those of a glob, or all in a folder."""
    if not os.path.isdir(path):
        return _find(path)[1]
    files: list[str] = []
    for folder, _, names in os.walk(path):
        files += [os.path.join(folder, name) for name in names]
    return files


def corpus_problems(corpora: Sequence[str], chat_templates: set[bool]) -> Iterator[tuple[int | None, AvssError]]:
    """Read the first document of each corpus, and yield each problem with the index of its corpus.

    The index of a problem of all corpora is None.

    Args:
        chat_templates: values of the setting ``chat_template`` among the runs.
    """
    first_documents: list[Document] = []
    for index, corpus in enumerate(corpora):
        try:
            document = next(documents(corpus), "")
            first_documents.append(document)
            if chat_templates == {False}:
                render(document, None, chats=False)  # refuses a conversation
        except AvssError as error:
            yield index, error
    has_chats = any(isinstance(document, Chat) for document in first_documents)
    if chat_templates == {True} and first_documents and not has_chats:
        names = " and ".join(map(RedactedURI, corpora))
        message = f"`chat_template` has no effect: there are no conversations in {names}."
        yield None, ConfigError(message, "Leave it out, or name a column of messages: file.jsonl:messages.")


def _builtin(source: str) -> Source:
    from pydoc_data.topics import topics

    require_known("builtin corpus", source.partition(":")[2], ("pydoc",), CorpusError)
    texts = [topics[key] for key in sorted(topics)]
    return Source(lambda: iter(texts), lambda: fingerprint(kind="builtin", documents=texts))


def _files(source: str) -> Source:
    match = _FILE.fullmatch(source)
    if not match:
        raise _unknown_source(source)
    path = match["path"]
    suffix = (match["suffix"] or match["parquet"]).lower()
    if suffix == "txt":
        if match["field"] is not None:
            raise CorpusError(f"'{source}': a text file has no field.", f"Write {path} alone.")
        return _text_files(path)
    field = match["field"] or "text"
    names = _PAIRED.fullmatch(field)
    if not names or suffix == "parquet":
        return _record_files(path, suffix, field)
    prompt = names["prompt"]
    answer = names["answer"]
    label = names["label"] or "label"
    return _paired(
        path,
        lambda records: labelled_answers(records, prompt, answer, label),
        fields=(prompt, answer, label),
    )


def _unknown_source(source: str) -> CorpusError:
    """Return the error for a source of no kind, with the most similar file name's ending or short name."""
    file_name = source.rpartition("/")[2]
    ending = re.search(r"\.\w+(?=:|$)", file_name)
    if not source:
        hint = ""
    elif ending:
        hint = nearest(ending[0], [".txt", *(f".{suffix}" for suffix in _READERS)])
    else:
        hint = nearest(source.partition(":")[0], NAMED)
    return CorpusError(f"'{source}' is not a corpus source.", f"{hint} Sources: {FORMS}.".strip())


class _Files:
    """Files at a path, URI or glob. They are looked for once, when they are first read."""

    def __init__(self, path: str) -> None:
        self._path = path

    @cached_property
    def _location(self) -> tuple[fs.FileSystem, list[str]]:
        """File system and paths of the files."""
        return _find(self._path)

    def texts(self) -> Iterator[str]:
        """Return the pieces of text files. Files that do not exist are refused at once."""
        filesystem, paths = self._location
        return _texts(filesystem, paths)

    def records(self, suffix: str, field: str) -> Records:
        """Return the records of files of a format. Files that do not exist are refused at once."""
        filesystem, paths = self._location
        return _records(filesystem, paths, suffix, field)

    def fingerprint(self, **identity: object) -> str:
        """Return the fingerprint of the files, and of what else identifies the text in them."""
        filesystem, paths = self._location
        return _fingerprint(filesystem, paths, **identity)


def _text_files(path: str) -> Source:
    files = _Files(path)
    return Source(files.texts, lambda: files.fingerprint(kind="txt", field=""), path=path)


def _record_files(path: str, suffix: str, field: str) -> Source:
    files = _Files(path)
    return Source(
        lambda: _field_documents(files.records(suffix, field), field),
        lambda: files.fingerprint(kind=suffix, field=field),
        path=path,
    )


def _field_documents(records: Records, field: str) -> Iterator[Document]:
    for record, where in records:
        yield field_document(record, field, where)


def _truthfulqa(source: str) -> Source:
    error = CorpusError(f"'{source}' is not a file of TruthfulQA.", "Write truthfulqa:file.jsonl[:seed].")
    match = _FILE.fullmatch(source.partition(":")[2])
    if not match or not match["suffix"] or match["suffix"].lower() != "jsonl":
        raise error
    seed = match["field"] or "0"
    if not (seed.isascii() and seed.isdecimal()):
        raise error
    return _paired(match["path"], lambda records: truthfulqa_answers(records, int(seed)), seed=int(seed))


def _paired(path: str, read: Callable[[Records], Iterator[Answer]], **identity: object) -> Source:
    """Return a source of the answers in the records of files."""
    files = _Files(path)

    def answers() -> Iterator[Answer]:
        return read(files.records(_BY_NAME, "prompt"))

    return Source(
        lambda: (answer.prompt + answer.text for answer in answers()),
        lambda: files.fingerprint(kind="paired", **identity),
        answers,
        path,
    )


def json_records(path: str) -> Records:
    """Yield the JSON objects of a file or a glob of files, with file and line of each.

    Raises:
        CorpusError: as `documents`.
    """
    return _Files(path).records(_BY_NAME, "prompt")


def _texts(filesystem: fs.FileSystem, paths: list[str]) -> Iterator[str]:
    """Yield the pieces of text files."""
    for path in paths:
        with _explaining(path, _FILE_ERRORS, _FILE_HINT), filesystem.open_input_stream(path) as file:
            yield from _read_txt(file, path)


def _records(filesystem: fs.FileSystem, paths: list[str], suffix: str, field: str) -> Iterator[Record]:
    """Yield the records of files, each with its place.

    Args:
        suffix: format of the files, or `_BY_NAME`.
    """
    for path in paths:
        read = _READERS[_suffix_of(path) if suffix == _BY_NAME else suffix]
        # A stream of Arrow unpacks what is compressed. Parquet has to be read in any order.
        opened = filesystem.open_input_file if suffix == "parquet" else filesystem.open_input_stream
        with _explaining(path, _FILE_ERRORS, _FILE_HINT), opened(path) as file:
            yield from read(file, path, field)


def _suffix_of(path: str) -> str:
    """Return the format of a file of records: csv if it is called so, or else jsonl."""
    match = _FILE.fullmatch(path)
    if match and match["suffix"] and match["suffix"].lower() == "csv":
        return "csv"
    return "jsonl"


def _find(path: str) -> tuple[fs.FileSystem, list[str]]:
    """Return the file system of a path, URI or glob, and its files, sorted. A glob skips hidden files."""
    from fsspec.implementations.arrow import ArrowFSWrapper

    with _explaining(path, _FILE_ERRORS, _FILE_HINT):
        filesystem, name = _filesystem(path)
        infos = [filesystem.get_file_info(name)]
        if has_magic(name) and not infos[0].is_file:
            infos = filesystem.get_file_info(sorted(ArrowFSWrapper(filesystem).glob(name)))
            infos = [info for info in infos if info.is_file and not info.base_name.startswith(".")]
    if infos and infos[0].type == fs.FileType.Directory:
        raise CorpusError(f"{path} is a directory.", f"Name its files: '{path}/*{os.path.splitext(path)[1]}'.")
    if not infos or not infos[0].is_file:
        raise CorpusError(f"{path}: no such file.", "Check the name; a relative one starts in the working directory.")
    return filesystem, [info.path for info in infos]


def _filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path, URI or glob, and its name there."""
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    # A pattern of a glob is no URI, so the file system is that of the folder before it.
    before_pattern = re.split(r"[*?\[]", path)[0]
    uri = before_pattern.rpartition("/")[0] + "/"
    filesystem, folder = fs.FileSystem.from_uri(uri)
    return filesystem, f"{folder.rstrip('/')}/{unquote(path.removeprefix(uri))}"


def _fingerprint(filesystem: fs.FileSystem, paths: list[str], **identity: object) -> str:
    """Return the fingerprint of files: local ones by their bytes, others by path, size and time of change."""
    files: list[object] = []
    for path in paths:
        with _explaining(path, _FILE_ERRORS, _FILE_HINT):
            if filesystem.type_name == "local":
                with filesystem.open_input_file(path) as file:
                    files.append(hashlib.file_digest(file, "sha256").hexdigest())
            else:
                info = filesystem.get_file_info(path)
                files.append([path, info.size, info.mtime_ns])
    return fingerprint(files=files, **identity)


def _read_txt(file: NativeFile, path: str) -> Iterator[str]:
    """Yield a text in pieces of about `TEXT_PIECE_BYTES`, which end with a line, or before a word of a long line."""
    stream = io.BufferedReader(file, _READ_BYTES)
    carried = b""
    offset = 0
    while data := carried + stream.read(max(0, TEXT_PIECE_BYTES - len(carried))):
        data += stream.readline(MAX_REST_BYTES)
        end = len(data)
        if not data.endswith(b"\n") and stream.peek(1):
            if word := _LAST_WORD.match(data):
                end = word.end()
            else:
                data += stream.readline(MAX_LINE_BYTES + 1)
                end = len(data)
        if end > MAX_LINE_BYTES:
            raise too_long(f"{path}, byte {offset}")
        yield _decode(data[:end], path, offset)
        carried = data[end:]
        offset += end


def _read_jsonl(file: NativeFile, path: str, field: str) -> Iterator[Record]:
    stream = io.BufferedReader(file, _READ_BYTES)
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise too_long(where)
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(line, where))
        except (ValueError, RecursionError) as error:
            reason = str(error).replace("line 1 ", "")
            raise CorpusError(f"{where} is not JSON: {reason}.", "Write one JSON object on each line.") from error
        if not isinstance(record, dict):
            raise CorpusError(f"{where} is not a JSON object.", f'Write it as {{"{field}": "..."}}.')
        yield record, where


def _read_csv(file: NativeFile, path: str, _column: str) -> Iterator[Record]:
    """Yield the rows after the first, which names the columns, with file and line of each."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = io.TextIOWrapper(io.BufferedReader(file, _READ_BYTES), "utf-8-sig", newline="")
    rows = csv.DictReader(lines)
    try:
        for row in rows:
            yield row, f"{path}, line {rows.line_num}"
    except csv.Error as error:
        raise CorpusError(f"{path}, line {rows.line_num} is not CSV: {error}.", "Fix the line.") from error


def _read_parquet(file: NativeFile, path: str, column: str) -> Iterator[Record]:
    table = parquet.ParquetFile(file)
    names = table.schema_arrow.names
    if column not in names:
        raise CorpusError(f"{path}: no column '{column}'.", nearest(column, names))
    number = 0
    for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield {column: value}, f"{path}, row {number}"


_READERS: dict[str, Callable[[NativeFile, str, str], Iterator[Record]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
"""Readers of records by the format of a file."""


def _hub(source: str) -> Source:
    parts = source.split(":")[1:]
    if not parts or not parts[0] or len(parts) > 4:
        raise CorpusError(f"'{source}' is not a corpus source.", f"Sources: {FORMS}.")
    name, config, split, column = _with_defaults(parts, ["", "", "train", "text"])
    if os.path.exists(name):
        folder = _HubText(source, name, "", config, split, column)
        return Source(folder.documents, folder.fingerprint, path=name)
    repository, _, revision = name.partition("@")
    text = _HubText(source, repository, revision, config, split, column)
    return Source(text.documents, text.fingerprint)


def _with_defaults(parts: Sequence[str], defaults: Sequence[str]) -> list[str]:
    """Return the parts of a name, with a default in place of each that is empty or left out."""
    values = list(defaults)
    for place, part in enumerate(parts):
        if part:
            values[place] = part
    return values


@dataclass(frozen=True)
class _HubText:
    """A column of a split of a data set: of the hub, or in a folder of its form."""

    source: str
    name: str
    revision: str
    config: str
    split: str
    column: str

    @cached_property
    def _builder(self) -> DatasetBuilder:
        """Builder of the data set, which knows its revision. Nothing but its description is downloaded."""
        require_package("datasets", self.source)
        from datasets import load_dataset_builder

        with _explaining(self.source, (Exception,), _HUB_HINT):
            return load_dataset_builder(self.name, self.config or None, revision=self.revision or None)

    def documents(self) -> Iterator[Document]:
        """Stream the texts, or conversations."""
        for number, row in enumerate(self._rows(), 1):
            yield field_document(row, self.column, f"{self.source}, row {number}")

    def _rows(self) -> Iterator[JsonObject]:
        builder = self._builder
        with _explaining(self.source, (Exception,), _HUB_HINT):
            yield from builder.as_streaming_dataset(split=self.split)

    def fingerprint(self) -> str:
        """Return the fingerprint of the text's name and the revision of the data set."""
        return fingerprint(
            kind="hf",
            name=self.name,
            config=self.config,
            split=self.split,
            column=self.column,
            revision=self._builder.hash,
        )


_KINDS = {"builtin": _builtin, "hf": _hub, "truthfulqa": _truthfulqa}
"""Kinds of sources by the name before the first colon. All other sources are files."""


def _decode(data: bytes, where: str, offset: int = 0) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: byte {offset + error.start} is not UTF-8.", "Convert the file to UTF-8."
        ) from error


@contextmanager
def _explaining(where: str, errors: tuple[type[Exception], ...], hint: str) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise CorpusError(f"{where} cannot be read: {error}", hint) from error
