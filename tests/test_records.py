import bz2
import gzip
import json
import lzma

import pytest

from tokenlabel.feature import Feature

FRUIT = {"apple": 1.0, "fig": 1.0, "chair": 0.0, "river": 0.25}
LINES = "".join(json.dumps({"word": word, "activation": a}) + "\n" for word, a in FRUIT.items())
FEATURE = Feature.from_words("fruit", FRUIT)


def read(folder, content, name="fruit.jsonl"):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Feature.from_jsonl(path)


@pytest.mark.parametrize("content", [
    json.dumps([json.loads(line) for line in LINES.splitlines()]),
    json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1),
    "\n".join(json.dumps(json.loads(line), indent=1) for line in LINES.splitlines()),  # each object on several lines
    "\ufeff" + LINES.replace("\n", "\r\n\ufeff"),  # joined files
    gzip.compress(LINES.encode(), mtime=0), bz2.compress(LINES.encode()), lzma.compress(LINES.encode()),
    "word,activation\n" + "".join(f"{word},{a}\n" for word, a in FRUIT.items()),
    "Word;Active\r\n" + "".join(f'"{word}"; {a}\r\n' for word, a in FRUIT.items()),
    ",note,activation,word\n" + "".join(f"0,,{a},{word}\n" for word, a in FRUIT.items()),
    "".join(f"{word}\t{a}\n" for word, a in FRUIT.items()),  # two columns without names
], ids=lambda value: ascii(value)[:30])
@pytest.mark.parametrize("name", ["fruit.jsonl", "fruit.json.gz", "fruit.txt"])  # the content decides
def test_a_file_is_known_by_its_content(tmp_path, content, name): assert read(tmp_path, content, name) == FEATURE


def test_cells_are_words_as_they_stand(tmp_path):
    words = ["NA", "null", "nan", "None", "true", "a,b", 'say "x"', "1.50", "#x", "two\nlines"]
    table = "word,activation\n" + "".join('"{}",1\n'.format(word.replace('"', '""')) for word in words) + "tree,0\n"
    assert read(tmp_path, table).texts == (*words, "tree")


def test_a_table_of_texts_has_a_row_for_each_span(tmp_path):
    table = "text,start,end,activation\nA saw and an axe,2,5,1\nrain,,,\nA saw and an axe,13,16,.5\n"
    assert read(tmp_path, table) == Feature.from_texts(
        "fruit", ["A saw and an axe", "rain"], [[(2, 5, 1), (13, 16, 0.5)], []])


@pytest.mark.parametrize("content, message", [
    (LINES.encode("utf-16"), "the file is in UTF-16;"), (LINES.encode("utf-16-le"), "the file is in UTF-16LE;"),
    (LINES.encode("utf-16-be"), "the file is in UTF-16BE;"), (LINES.encode("utf-32"), "the file is in UTF-32;"),
    *((LINES.replace("fig", word).encode(encoding), r"not in UTF-8 \(line 2, near '.*'\); save it as UTF-8")
      for encoding, word in [("windows-1252", "über"), ("koi8-r", "яблоко"), ("gb18030", "苹果"), ("shift_jis", "りんご")]),
    (LINES.encode() + b"x" * 5000 + b"\xfc" * 5000, r"not in UTF-8 \(line 5, near"), (b"\x80" * 10**6, r"not in UTF-8 \(line 1, near"),
    (b"PAR1" + bytes(9), "the file is a Parquet file"), (b"PK\x03\x04" + bytes(9), "a ZIP archive or an Excel file"),
    (b"<!DOCTYPE html><html>" + bytes(9), "a web page"), (b"\x80\x04\x95", "a pickle"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS .* git lfs pull"),
    (gzip.compress(LINES.encode(), mtime=0)[:-9], "compressed, and cut off or damaged"),
    (gzip.compress(LINES.encode(), mtime=0)[:12] + b"x" * 50, "compressed, and cut off or damaged"),
    (gzip.compress(b"", mtime=0), "the file is empty"), (b"\xef\xbb\xbf\r\n", "the file is empty"),
    (bytes(4096), "the file has zero bytes in the place of a text"), (b"\x93NUMPY\1\0", "the file is a NumPy array"),
    (b"[]", "the file has no records"), (b"saw\x00", "not text, it has zero bytes"),
    ("apple\nfig\n", "neither JSON nor a table, the first line is 'apple'; give JSON lines, or columns word and activation"),
    ("term,score\nsaw,1\n", r"a table with columns \['term', 'score'\]; give columns word and activation, or text, start, end"),
    ("word,label\nsaw,1\n", r"a table with columns \['word', 'label'\]"),
    ("text,activation\nA saw,1\n", r"a table with columns \['text', 'activation'\]"),
    ("saw,1,2\ntree,0,3\n", r"a table with columns \['saw', '1', '2'\]"),
    ("word,word,activation\nsaw,a,1\n", "the column word is there twice"),
    ("word,activation\nsaw\n", "row 2: activation '' is not a number"),
    ("word,activation\nsaw,1,2\n", r"not a table \(2 columns, and 3 cells in row 2\); give columns word"),
    ('word,activation\n"saw,1\n', r"not a table \(unexpected end of data in line 2\); give columns word"),
    ("word,activation\nsaw,high\n", "row 2: activation 'high' is not a number"),
    ("word,activation\nsaw,\n", "row 2: activation '' is not a number"),
    ("word,activation\nsaw,1_0\n", "row 2: activation '1_0' is not a number"),
    ("word,activation\nsaw,nan\n", "row 2: activation 'nan' is not a number"),
    ("word,activation\nsaw,7\n", "row 2: activation 7 is not in"), ("word,activation\n", "the file has no records"),
    ("text,start,end,activation\nA saw,2,,1\n", r"row 2: span \[2, '', 1\] is not"),
    ("[" + LINES.replace("\n", ",")[:-9], "line 1: not JSON"), ("[1, 2]", "record 1: expected an object"),
    ("[" * 100_000, "nested too deep"), ('{"a":' * 100_000, "nested too deep"), ("{" * 100_000, "not JSON"),
    ('{"tokens": "%s"}' % ("x" * 10**6), r"line 1: expected an object .* got \['tokens'\]"),
    ("x" * 10**6, "neither JSON nor a table"), ("x," * 10**4, "a table with columns"),
    (json.dumps({f"key{n}": n for n in range(9999)}), "line 1: expected an object"),
    ('{"\x1b[2J": 1}', "not JSON, Invalid control character"), (r'{"\u001b[2J": 1}', r"got \['\\x1b\[2J'\]"),
], ids=lambda value: ascii(value)[:30])
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error: read(tmp_path, content)
    assert str(error.value).startswith("fruit.jsonl: ") and len(str(error.value)) < 280 and str(error.value).isprintable()


def test_a_name_of_a_file_is_printed_without_control_characters(tmp_path):
    with pytest.raises(ValueError, match="the file is empty") as error: read(tmp_path, "", "a\x1b[2Jb" + "c" * 200)
    assert str(error.value).isprintable() and len(str(error.value)) < 100
