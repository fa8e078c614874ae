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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from glob import has_magic
from itertools import zip_longest
from typing import Any
from urllib.parse import unquote

from pyarrow import ArrowException, fs, parquet

from avss_dist.core.errors import AvssError, ConfigError, CorpusError, nearest, require_known
from avss_dist.core.extras import require_package
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.documents import (
    MAX_LINE_BYTES,
    Answer,
    Chat,
    Document,
    Records,
    field_document,
    labelled_answers,
    render,
    too_long,
    truthfulqa_answers,
)

TEXT_PIECE_BYTES = 4 << 20  # size of the pieces that a large text file is read in
MAX_REST_BYTES = 1 << 20  # of a line beyond the end of a piece; a longer one is cut at whitespace
NAMED = {
    "wikitext2": (
        "Salesforce/wikitext@b08601e04326c79dfdd32d625aee71d232d685c3",
        "wikitext-2-raw-v1",
        "train",
        "text",
    ),
    "c4": ("allenai/c4@1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "en", "train", "text"),
    "pile10k": ("NeelNanda/pile-10k@127bfedcd5047750df5ccf3a12979a47bfa0bafa", "", "train", "text"),
    "fineweb-edu": (
        "HuggingFaceFW/fineweb-edu@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        "sample-10BT",
        "train",
        "text",
    ),
    "ultrachat": (
        "HuggingFaceH4/ultrachat_200k@8049631c405ae6576f93f445c6b8166f76f5505a",
        "",
        "train_sft",
        "messages",
    ),
    "open-platypus": (
        "garage-bAInd/Open-Platypus@37141edbdb7826378cce118c46a109b813e1f038",
        "",
        "train",
        "output",
    ),
    "cnn-dailymail": (
        "abisee/cnn_dailymail@96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
        "3.0.0",
        "train",
        "article",
    ),
    "alpaca": ("tatsu-lab/alpaca@dce01c9b08f87459cf36a430d809084718273017", "", "train", "text"),
}
"""Data sets of the hub by short name, at a fixed commit: repository, config, split and column of their text.

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
_READ_BYTES = 8 << 20
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
        repository, config, own_split, column = NAMED[name]
        source = f"hf:{repository}:{config}:{split or own_split}:{column}"
    return _KINDS.get(source.partition(":")[0], _files)(source)


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
    if os.path.isdir(path):
        return [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    return _find(path)[1]


def corpus_problems(corpora: Sequence[str], chat_templates: set[bool]) -> Iterator[tuple[int | None, AvssError]]:
    """Read the first document of each corpus, and yield each problem with the index of its corpus.

    The index of a problem of all corpora is None.

    Args:
        chat_templates: values of the setting ``chat_template`` among the runs.
    """
    first: list[Document] = []
    for index, corpus in enumerate(corpora):
        try:
            first.append(next(documents(corpus), ""))
            if chat_templates == {False}:
                render(first[-1], None, chats=False)  # refuses a conversation
        except AvssError as error:
            yield index, error
    if chat_templates == {True} and first and not any(isinstance(document, Chat) for document in first):
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
        ending = re.search(r"\.\w+(?=:|$)", source.rpartition("/")[2])
        valid = [f".{name}" for name in _READERS] if ending else [*NAMED]
        near = nearest(ending[0] if ending else source.partition(":")[0], valid) if source else ""
        raise CorpusError(f"'{source}' is not a corpus source.", f"{near} Sources: {FORMS}.".strip())
    path, suffix = match["path"], (match["suffix"] or match["parquet"]).lower()
    if suffix == "txt" and match["field"] is not None:
        raise CorpusError(f"'{source}': a text file has no field.", f"Write {path} alone.")
    field = "" if suffix == "txt" else match["field"] or "text"
    names = _PAIRED.fullmatch(field) if suffix in ("jsonl", "csv") else None
    if names:
        fields = names["prompt"], names["answer"], names["label"] or "label"
        return _paired(path, lambda records: labelled_answers(records, *fields), fields=fields)
    find = cache(partial(_find, path))

    def texts() -> Iterator[Document]:
        records = _records(*find(), suffix, field)
        return records if suffix == "txt" else (field_document(record, field, where) for record, where in records)

    return Source(texts, lambda: _fingerprint(*find(), kind=suffix, field=field), path=path)


def _truthfulqa(source: str) -> Source:
    match = _FILE.fullmatch(source.partition(":")[2])
    seed = (match["field"] or "0") if match else ""
    if not match or (match["suffix"] or "").lower() != "jsonl" or not (seed.isascii() and seed.isdecimal()):
        raise CorpusError(f"'{source}' is not a file of TruthfulQA.", "Write truthfulqa:file.jsonl[:seed].")
    return _paired(match["path"], lambda records: truthfulqa_answers(records, int(seed)), seed=int(seed))


def _paired(path: str, read: Callable[[Records], Iterator[Answer]], **identity: Any) -> Source:
    """Return a source of the answers in the records of files."""
    find = cache(partial(_find, path))

    def answers() -> Iterator[Answer]:
        return read(_records(*find(), "", "prompt"))

    return Source(
        lambda: (answer.prompt + answer.text for answer in answers()),
        lambda: _fingerprint(*find(), kind="paired", **identity),
        answers,
        path,
    )


def json_records(path: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the JSON objects of a file or a glob of files, with file and line of each.

    Raises:
        CorpusError: as `documents`.
    """
    return _records(*_find(path), "", "prompt")


def _records(filesystem: fs.FileSystem, paths: list[str], suffix: str, field: str) -> Iterator[Any]:
    """Yield the pieces of text files, or the records of other files, each with its place.

    Args:
        suffix: format of the files; by default that of their names, or else jsonl.
    """
    for path in paths:
        match = _FILE.fullmatch(path)
        read = _READERS[suffix or ((match["suffix"] or "") if match else "").lower() or "jsonl"]
        opened = filesystem.open_input_file if suffix == "parquet" else filesystem.open_input_stream  # which unpacks
        with _explaining(path, _FILE_ERRORS, _FILE_HINT), opened(path) as file:
            yield from read(file, path, field)


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
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    uri = re.split(r"[*?\[]", path)[0].rpartition("/")[0] + "/"  # a glob's pattern is no URI
    filesystem, folder = fs.FileSystem.from_uri(uri)
    return filesystem, f"{folder.rstrip('/')}/{unquote(path.removeprefix(uri))}"


def _fingerprint(filesystem: fs.FileSystem, paths: list[str], **identity: Any) -> str:
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


def _read_txt(file: Any, path: str, _field: str) -> Iterator[str]:
    stream = io.BufferedReader(file, _READ_BYTES)
    carried, offset = b"", 0
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
        carried, offset = data[end:], offset + end


def _read_jsonl(file: Any, path: str, field: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    stream = io.BufferedReader(file, _READ_BYTES)
    for number, line in enumerate(iter(partial(stream.readline, MAX_LINE_BYTES + 1), b""), 1):
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


def _read_csv(file: Any, path: str, _column: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the rows after the first, which names the columns, with file and line of each."""
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = csv.DictReader(io.TextIOWrapper(io.BufferedReader(file, _READ_BYTES), "utf-8-sig", newline=""))
    try:
        for row in rows:
            yield row, f"{path}, line {rows.line_num}"
    except csv.Error as error:
        raise CorpusError(f"{path}, line {rows.line_num} is not CSV: {error}.", "Fix the line.") from error


def _read_parquet(file: Any, path: str, column: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    table = parquet.ParquetFile(file)
    names = table.schema_arrow.names
    if column not in names:
        raise CorpusError(f"{path}: no column '{column}'.", nearest(column, names))
    batches = table.iter_batches(batch_size=256, columns=[column])
    for row, value in enumerate((value for batch in batches for value in batch.column(0).to_pylist()), 1):
        yield {column: value}, f"{path}, row {row}"


_READERS: dict[str, Callable[..., Iterator[Any]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


def _hub(source: str) -> Source:
    parts = source.split(":")[1:] or [""]
    if not parts[0] or len(parts) > 4:
        raise CorpusError(f"'{source}' is not a corpus source.", f"Sources: {FORMS}.")
    versioned, config, split, column = (p or d for p, d in zip_longest(parts, ("", "", "train", "text")))
    name, _, revision = (versioned, "", "") if os.path.exists(versioned) else versioned.partition("@")

    @cache
    def builder() -> Any:
        require_package("datasets", source)
        from datasets import load_dataset_builder

        with _explaining(source, (Exception,), _HUB_HINT):
            return load_dataset_builder(name, config or None, revision=revision or None)

    def rows() -> Iterator[Mapping[str, Any]]:
        opened = builder()
        with _explaining(source, (Exception,), _HUB_HINT):
            yield from opened.as_streaming_dataset(split=split)

    return Source(
        lambda: (field_document(row, column, f"{source}, row {number}") for number, row in enumerate(rows(), 1)),
        lambda: fingerprint(kind="hf", name=name, config=config, split=split, column=column, revision=builder().hash),
        path=name if os.path.exists(name) else "",
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
