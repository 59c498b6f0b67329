"""Reading documents: every format gives the same texts, and what is no text is named."""

import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from hf_sparse_attention.data import DataError, iterate_texts, load_documents

TEXTS = ["One document.\n\nIts second paragraph.", "Zwei: größer, 長い, 🙂", "three"]
JSONL = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(TEXTS)).encode()


def write_txt(folder):
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def write_jsonl(folder):
    (folder / "a.jsonl").write_bytes(JSONL)
    return folder / "a.jsonl"


def write_xz(folder):
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(JSONL))
    return folder / "a.jsonl.xz"


def write_gz(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(JSONL))
    return folder / "a.jsonl.gz"


def write_parquet(folder):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "a.parquet")
    return folder / "a.parquet"


def write_glob(folder):
    write_txt(folder)
    return folder / "*.txt"


@pytest.mark.parametrize("streaming", [False, True], ids=["copied", "streamed"])
@pytest.mark.parametrize(
    "write", [write_txt, write_glob, write_jsonl, write_xz, write_gz, write_parquet], ids=lambda f: f.__name__[6:]
)
def test_formats(tmp_path, write, streaming):
    documents = load_documents(str(write(tmp_path)), streaming=streaming)
    assert [record["text"] for record in documents] == TEXTS


@pytest.mark.parametrize("streaming", [False, True], ids=["copied", "streamed"])
def test_other_field_and_mixed_formats(tmp_path, streaming):
    (tmp_path / "b.jsonl").write_text('{"body": "four", "text": 7}\n')
    pyarrow.parquet.write_table(
        pyarrow.table({"body": pyarrow.array(["five"], pyarrow.large_string())}), tmp_path / "c.parquet"
    )
    sources = [str(tmp_path / "b.jsonl"), str(tmp_path / "c.parquet")]
    documents = load_documents(sources, text_field="body", streaming=streaming)
    assert list(documents) == [{"text": "four"}, {"text": "five"}]


@pytest.mark.parametrize("streaming", [False, True], ids=["copied", "streamed"])
def test_a_record_without_text_is_a_blank_document(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one"}\n{"other": 2}\n')
    documents = load_documents(str(tmp_path / "a.jsonl"), streaming=streaming)
    assert list(iterate_texts(documents)) == ["", "one", ""]


BROKEN = {
    "empty.txt": (b"", "the file is empty"),
    "blank.txt": (b" \n\n ", "only white space"),
    "binary.txt": (bytes(range(256)), "not UTF-8 text"),
    "zeros.txt": (b"abc\0def", "binary file.*zero byte at 3"),
    "late.txt": (b"a" * 70000 + b"\xff\xfe", "cannot be read.*70000"),
    "broken.jsonl": (b'{"text": "a"}\n{"text":\n', "cannot be read"),
    "field.jsonl": (b'{"a": 1}\n', "no field 'text'; it has 'a'"),
    "nulls.jsonl": (b'{"text": null}\n{"text": null}\n', "field 'text' is null in all records"),
    "number.jsonl": (b'{"text": 1}\n', "field 'text' holds int, not text"),
    "cut.jsonl.xz": (lzma.compress(JSONL * 99)[:-20], "cannot be read"),
    "fake.jsonl.xz": (b"no archive", "cannot be read"),
    "fake.parquet": (b"no parquet", "not a parquet file"),
    "cut.parquet": (b"PAR1 and no more", "cannot be read as parquet|cannot be read"),
    "model.bin": (b"abc", "unknown ending"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["copied", "streamed"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path, name, streaming):
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_documents(str(path), streaming=streaming)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("nothing/*.txt", "nothing/\\*.txt: no file matches"),
        ([], "no text files"),
        (["someone/no-such-data"], "someone/no-such-data: neither a local file nor a data set"),
        (["someone/no-such-data", "a.txt"], "someone/no-such-data: no such file"),
    ],
    ids=["file", "glob", "none", "hub", "hub-among-files"],
)
def test_missing_sources_are_named(source, message):
    with pytest.raises(DataError, match=message):
        load_documents(source)
