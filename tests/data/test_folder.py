"""A folder of pictures: every layout, format and mode, what is said of each fault, the cache, and what is held out."""

import importlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tinydiff import Rng, backend, nn, ops, optim
from tinydiff.data import captions, folder, glyphs, hold_out, to_float, validation_mask
from tinydiff.training import train

module = importlib.import_module("tinydiff.data.folder")  # the package's `folder` is the function

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def put(path, colour=RED, size=(8, 8), **options):
    """A picture of one colour; size is (width, height), as Pillow has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path, **options)


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def one(path, **options):
    """The pixels of the only picture in a folder, (H, W, C)."""
    data = folder(path, cache=False, **options)
    assert len(data) == 1
    return data.images[0]


def refused(path, **options):
    with pytest.raises(ValueError) as caught:
        folder(path, cache=False, **options)
    return str(caught.value)


def skipping(path, **options):
    with pytest.warns(UserWarning, match="cannot be used") as caught:
        data = folder(path, cache=False, on_error="skip", **options)
    return data, str(caught[0].message)


# ---- layouts and captions


def test_a_flat_folder_has_empty_captions_and_no_classes(tmp_path):
    put(tmp_path / "b.png", BLUE)
    put(tmp_path / "a.png", RED)
    data = folder(tmp_path)
    assert data.files == ["a.png", "b.png"] and data.captions == ["", ""]
    assert data.labels == {} and data.classes == () and data.skipped == [] and len(data) == 2
    assert data.images.shape == (2, 8, 8, 3) and data.images.dtype == np.uint8
    np.testing.assert_array_equal(data.images[:, 0, 0], [RED, BLUE])
    assert repr(data) == "<2 pictures of 8x8x3, 0 left out>"


def test_folders_are_classes(tmp_path):
    for file in ("wild_cat/1.png", "wild_cat/more/2.png", "dog/1.png"):
        put(tmp_path / file)
    data = folder(tmp_path)
    assert data.files == ["dog/1.png", "wild_cat/1.png", "wild_cat/more/2.png"]
    assert data.classes == ("dog", "wild_cat") and data.captions == ["dog", "wild cat", "wild cat"]
    assert data.labels["class"].tolist() == [0, 1, 1] and data.labels["class"].dtype == np.int64
    assert "2 classes" in repr(data)
    put(tmp_path / "stray.png")
    assert "stray.png: lies beside the folders of the classes, so it has no caption" in refused(tmp_path)
    plain = folder(tmp_path, captions=False)
    assert len(plain) == 4 and set(plain.captions) == {""} and plain.labels == {}


TABLES = {
    "captions.csv": 'file,caption\nb.png,"a blue, a ""very"" blue\nsquare"\na.png,a red square\n',
    "metadata.csv": 'id;Text;File Name\n7;"a blue, a ""very"" blue\nsquare";b.png\n\n8;a red square;a.png\n',
    "captions.tsv": 'prompt\tfilename\n"a blue, a ""very"" blue\nsquare"\tb.png\t\na red square\t./a.png\n',
    "metadata.jsonl": json.dumps({"file_name": "b.png", "text": 'a blue, a "very" blue\nsquare'})
    + "\n\n"
    + json.dumps({"text": "a red square", "file_name": "a.png", "width": 8}),
}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_captions(tmp_path, name, bom, line_end):
    put(tmp_path / "a.png", RED)
    put(tmp_path / "b.png", BLUE)
    write(tmp_path / name, bom + TABLES[name].replace("\n", line_end))
    captions = folder(tmp_path).captions
    square = "\n" if name.endswith("jsonl") else line_end  # a quoted line end stays as it is
    assert captions == ["a red square", f'a blue, a "very" blue{square}square']


def test_a_table_elsewhere_or_by_another_name(tmp_path):
    put(tmp_path / "pets/in/cat.png")
    write(tmp_path / "pets/mine.csv", "image, caption\nin/cat.png, a cat\n")
    write(tmp_path / "other.csv", "image,caption\nin\\cat.png,another\n")
    assert folder(tmp_path / "pets", captions="mine.csv").captions == ["a cat"]
    data = folder(tmp_path / "pets", captions=tmp_path / "other.csv")
    assert data.captions == ["another"] and data.classes == ("in",)
    with pytest.raises(FileNotFoundError, match="captions='no.csv' is no file"):
        folder(tmp_path / "pets", captions="no.csv")
    with pytest.raises(ValueError, match="captions must be the path of a table, False or None, not True"):
        folder(tmp_path / "pets", captions=True)


def test_a_table_that_would_be_overlooked_is_an_error(tmp_path):
    put(tmp_path / "cat.png")
    write(tmp_path / "mine.csv", "image,caption\ncat.png,a cat\n")
    assert "has no captions.csv, but mine.csv: say captions='mine.csv'" in refused(tmp_path)
    assert folder(tmp_path, captions=False).captions == [""]
    write(tmp_path / "captions.csv", "image,caption\ncat.png,a cat\n")
    assert folder(tmp_path).captions == ["a cat"]
    write(tmp_path / "metadata.jsonl", '{"file_name": "cat.png", "text": "the cat"}')
    assert "has captions.csv and metadata.jsonl: say which, captions='captions.csv'" in refused(tmp_path)


CLASSES = {
    "captions.csv": "file,Species,age\n1.png,grey_cat,3\n2.png,dog,4\n3.png, grey_cat ,5\n",
    "metadata.csv": "file;age;species\n3.png;;grey_cat\n2.png;;dog\n1.png;;grey_cat\n",
    "captions.jsonl": "".join(
        json.dumps({"species": kind, "file": file, "age": None}) + "\n"
        for file, kind in (("1.png", "grey_cat"), ("2.png", "dog"), ("3.png", "grey_cat"))
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_column_has_the_classes(tmp_path, name):
    for file in ("1.png", "2.png", "3.png"):
        put(tmp_path / file)
    write(tmp_path / name, CLASSES[name])
    data = folder(tmp_path, classes="species")
    assert data.classes == ("dog", "grey_cat") and data.labels["class"].tolist() == [1, 0, 1]
    assert data.captions == ["grey cat", "dog", "grey cat"] and data.skipped == []  # as of folders of these names


def test_captions_may_stand_beside_the_classes_and_folders_are_none_then(tmp_path):
    put(tmp_path / "in/1.png")
    put(tmp_path / "2.png")
    write(tmp_path / "captions.csv", "file,caption,kind\nin/1.png,asleep,cat\n2.png,,dog\n")
    data = folder(tmp_path, classes="kind")
    assert data.captions == ["", "asleep"] and data.classes == ("cat", "dog")
    assert folder(tmp_path).classes == ()
    write(tmp_path / "metadata.jsonl", '{"image": "in/1.png", "label": 10}\n{"image": "2.png", "label": 2}\n')
    numbers = folder(tmp_path, captions="metadata.jsonl", classes="label")
    assert numbers.classes == ("10", "2") and numbers.captions == ["2", "10"]


def test_classes_that_are_not_there_are_an_error(tmp_path):
    put(tmp_path / "1.png")
    put(tmp_path / "2.png")
    assert "classes='kind' names a column, and there is no table: it is to be one of" in refused(
        tmp_path, classes="kind"
    )
    write(tmp_path / "captions.csv", "file,species,age\n1.png,cat,3\n2.png,,4\n")
    assert (
        "no column of captions (caption, text, prompt), but ['file', 'species', 'age']; if 'species' is the class of "
        in (refused(tmp_path))
    )
    said = refused(tmp_path, classes="specie")
    assert "has no column 'specie' (is 'species' meant?), but ['file', 'species', 'age']" in said
    assert "no column 'colour', but ['file'" in refused(tmp_path, classes="colour")
    assert "2.png: captions.csv, line 3: its species is empty" in refused(tmp_path, classes="species")
    assert skipping(tmp_path, classes="species")[0].classes == ("cat",)
    assert "classes='species' names a column, and there is no" in refused(tmp_path, classes="species", captions=False)
    assert "classes must be the name of a column, or None, not 1" in refused(tmp_path, classes=1)
    write(tmp_path / "captions.csv", "file,species\n1.png,cat\n")
    assert "2.png: it has no species in captions.csv\n" in refused(tmp_path, classes="species")
    write(tmp_path / "captions.csv", "file,species,species\n1.png,cat,dog\n")
    assert "names the column 'species' twice" in refused(tmp_path, classes="species")
    (tmp_path / "captions.csv").unlink()
    write(tmp_path / "captions.jsonl", '{"file": "1.png", "kind": "cat"}\n{"file": "2.png", "kind": 0.5}')
    said = refused(tmp_path, classes="kind")
    assert said.startswith(f"folder: 1 in {tmp_path} cannot be used:\n  2.png: captions.jsonl, line 2: its 'kind' must")


def test_a_caption_may_be_null_where_there_are_classes(tmp_path):
    put(tmp_path / "1.png")
    write(tmp_path / "captions.jsonl", '{"file": "1.png", "text": null, "kind": "grey_cat"}')
    assert folder(tmp_path, classes="kind").captions == ["grey cat"]
    assert "its 'text' must be a string, not None" in refused(tmp_path)


def test_a_column_that_no_line_has_is_told_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(captions.difflib, "get_close_matches", lambda word, names, n: asked.extend(names) or names[:n])
    put(tmp_path / "1.png")
    line = json.dumps({"file": "1.png", **{f"column {i}": i for i in range(100)}}) + "\n"
    write(tmp_path / "captions.jsonl", line * 50)
    said = refused(tmp_path, classes="colunm 7")
    assert "captions.jsonl: line 1 has no column 'colunm 7' (is 'file' meant?), but ['file', 'column 0'," in said
    assert said.endswith("'column 8'] and 91 more, and no other line has all that it needs")
    assert said.count("has no column") == 1 and len(asked) == 101


def test_empty_captions_are_the_null_prompt(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "b.png")
    write(tmp_path / "captions.csv", 'file,caption\na.png,\nb.png,"  "\n')
    assert folder(tmp_path).captions == ["", ""]


def test_text_files_beside_the_pictures(tmp_path):
    put(tmp_path / "x/cat.png")
    put(tmp_path / "y/dog.jpeg")
    write(tmp_path / "x/cat.txt", "\ufeffa cat,\nasleep\n")
    write(tmp_path / "y/dog.txt", "")
    write(tmp_path / "README.txt", "about these")
    data = folder(tmp_path)
    assert data.captions == ["a cat,\nasleep", ""] and data.classes == ("x", "y")
    put(tmp_path / "y/owl.png")
    write(tmp_path / "y/fox.txt", "a fox")
    write(tmp_path / "y/dog.txt", "caf\u00e9", "latin-1")
    said = refused(tmp_path)
    assert "y/owl.png: has no owl.txt beside it; an empty one is the null prompt" in said
    assert "y/fox.txt: there is no picture of the same name beside it" in said
    assert "dog.txt, line 1: the byte 0xe9 is not utf-8" in said and ": 3 in" in said
    assert skipping(tmp_path)[0].files == ["x/cat.png"]


@pytest.mark.parametrize(
    "table, message",
    [
        ("file,caption\na.png,x\nb.png,y\nc.png,z\n", "c.png: captions.csv, line 4: there is no such file"),
        ("file,caption\na.png,x\n\n", "b.png: it has no caption in captions.csv"),
        (
            'file,caption\na.png,"x\n\n"\nb.png,y\na.png,z\n',
            "a.png: captions.csv, line 6: it has a caption already, in captions.csv, line 2",
        ),
        ("file,caption\nA.PNG,x\nb.png,y\n", "line 2: there is no such file; is 'a.png' meant?"),
        ("file,caption\na,x\nb.png,y\n", "line 2: there is no such file; is 'a.png' meant?"),
        ("file,caption\ndata/a.png,x\nb.png,y\n", "line 2: there is no such file; is 'a.png' meant?"),
        ("file,caption\n/a.png,x\nb.png,y\n", "line 2: a path must lead from the folder into it"),
        ("file,caption\n../a.png,x\nb.png,y\n", "absolute ones and '..' are refused"),
        ("file,caption\nin\\..\\..\\a.png,x\nb.png,y\n", "absolute ones and '..' are refused"),
        ("file,caption\nC:\\a.png,x\nb.png,y\n", "absolute ones and '..' are refused"),
        ("file,caption\n,x\na.png,x\nb.png,y\n", "captions.csv, line 2: captions.csv, line 2: it names no file"),
        ("file,caption\na.png,a cat, asleep\nb.png,y\n", "line 2: 3 values for the 2 columns: a caption with ',' in"),
        ("file,caption\na.png\nb.png,y\n", "captions.csv, line 2: 1 values for the 2 columns"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, table, message):
    put(tmp_path / "a.png", RED)
    put(tmp_path / "b.png", BLUE)
    write(tmp_path / "captions.csv", table)
    said = refused(tmp_path)
    assert message in said and "on_error='skip' leaves out what cannot be used" in said
    data, warned = skipping(tmp_path)
    assert message in warned and data.skipped and 1 <= len(data) <= 2
    assert len(data.images) == len(data.captions) == len(data.files)


def test_nothing_outside_the_folder_is_read(tmp_path):
    put(tmp_path / "secret.png")
    put(tmp_path / "pets/a.png")
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        write(tmp_path / "pets/captions.csv", f"file,caption\na.png,x\n{name},y\n")
        assert "are refused" in refused(tmp_path / "pets")
        assert skipping(tmp_path / "pets")[0].files == ["a.png"]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    "name, table, message",
    [
        ("captions.csv", b"", "has no column of files .* and no column of captions .*, but nothing"),
        ("captions.csv", b"a.png,a cat\n", r"no column of files .*, but \['a.png', 'a cat'\]"),
        ("captions.csv", b"name;caption\na.png;x", r"no column of files \(file_name, .*\), but \['name', 'caption'\]"),
        ("captions.csv", b"file,title\na.png,x", r"no column of captions \(caption, text, prompt\), but \['file', 't"),
        ("captions.csv", b'file,caption\na.png,x\nb.png,"y\nz\n', "captions.csv, line 3: .*is a quote not closed"),
        ("captions.csv", b'file,caption\na.png,"x"y\n', "captions.csv, line 2: .*is a quote not closed, or not doub"),
        ("captions.csv", b'"file,caption\na.png,xy\n', "captions.csv: its first line cannot be read"),
        (
            "captions.csv",
            "file,caption\na.png,x\nb.png,caf\u00e9\n".encode("latin-1"),
            "captions.csv, line 3: the byte 0xe9 is not utf-8. Save the file as UTF-8, or .* encoding='cp1252'",
        ),
        ("captions.csv", "file,caption\n".encode("utf-16"), "line 1: the byte 0xff is not utf-8.* encoding='utf-16'"),
        ("captions.csv", b"file,caption,caption\na.png,x,y\n", "its first line names the column 'caption' twice"),
        ("captions.csv", "file,caption\na".encode("utf-16-le"), "line 1: there is a NUL in the text"),
    ],
)
def test_a_table_that_cannot_be_read_is_an_error_also_when_skipping(tmp_path, name, table, message, on_error):
    put(tmp_path / "a.png")
    put(tmp_path / "b.png")
    (tmp_path / name).write_bytes(table)
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, cache=False, on_error=on_error)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_other_encodings(tmp_path, encoding):
    put(tmp_path / "a.png")
    write(tmp_path / "captions.csv", "file,caption\na.png,caf\u00e9\n", encoding)
    assert folder(tmp_path, encoding=encoding).captions == ["caf\u00e9"]
    assert "encoding must be one that Python knows, such as 'utf-8' or 'cp1252', not 'x'" in refused(
        tmp_path, encoding="x"
    )


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "metadata.jsonl, line 2: is not JSON"),
        ("[1]", "metadata.jsonl, line 2: must be an object"),
        ('{"text": "x"}', r"metadata.jsonl, line 2: has no column of files .* but \['text'\]"),
        ('{"file_name": "b.png", "title": "x"}', "metadata.jsonl, line 2: has no column of captions"),
        ("[" * 100_000, "metadata.jsonl, line 2: is not JSON: maximum recursion depth"),
        ('{"file_name": "b.png", "text": "x", "text": "y"}', "metadata.jsonl, line 2: has 'text' twice"),
        (r'{"file_name": "b.png", "text": "half a \ud83d"}', "metadata.jsonl, line 2: has .* which is no character"),
        (r'{"file_name": "b.png", "text": "\u0000"}', "metadata.jsonl, line 2: has .* which is no character"),
        ('{"file_name": "b.png", "text": null}', "line 2: its 'text' must be a string, not None"),
    ],
)
def test_a_bad_line_of_json(tmp_path, line, message):
    put(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n' + line)
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, cache=False)
    assert skipping(tmp_path)[0].captions == ["x"]


def test_lines_too_long_and_faults_too_many_are_told(tmp_path, monkeypatch):
    """Brackets, faults and columns take a hundred bytes of memory for two or three of the file."""
    monkeypatch.setattr(captions, "TEXT", 50)
    monkeypatch.setattr(captions, "MOST_FAULTS", 3)
    put(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n' + "[" * 60)
    assert "metadata.jsonl, line 2: has 60 characters, more than the limit of 50" in refused(tmp_path)
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n' + "1\n" * 4)
    assert "metadata.jsonl has more than 3 faults, the first in metadata.jsonl, line 2: must be" in refused(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    write(tmp_path / "captions.csv", "file,caption\na.png,x\nb.png," + "y" * 60)
    assert "captions.csv has a line of 66 characters, more than the limit of 50" in refused(tmp_path)
    write(tmp_path / "captions.csv", "file,caption" + "," * 50 + "\na.png,x")
    assert "captions.csv: its first line must name its columns, and is longer than 50" in refused(tmp_path)


def test_names_with_accents_taken_apart_are_found(tmp_path):
    put(tmp_path / "cafe\u0301.png")  # as macOS may write it
    write(tmp_path / "captions.csv", "file,caption\ncaf\u00e9.png,x\n")
    assert folder(tmp_path).captions == ["x"]


# ---- which files


def test_hidden_files_and_others_are_left_out_in_silence(tmp_path):
    put(tmp_path / "a.PNG")
    for name in (".DS_Store", "Thumbs.db", "._a.png", "notes.md", "a.py", ".git/x.png", "__MACOSX/a.png"):
        write(tmp_path / name, "no picture")
    assert folder(tmp_path).files == ["a.PNG"]


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    names = ["b.png", "a/z.png", "a.png", "B.png", "a/b/c.png", "10.png", "9.png"]
    for name in names:
        put(tmp_path / name)
    scandir = os.scandir
    for turn in (list, lambda found: list(found)[::-1]):
        monkeypatch.setattr(os, "scandir", lambda path, turn=turn: turn(scandir(path)))
        assert folder(tmp_path, captions=False).files == sorted(names)


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / "elsewhere/a.png", RED)
    put(tmp_path / "pets/b.png", BLUE)
    try:
        os.symlink(tmp_path / "elsewhere", tmp_path / "pets/more", target_is_directory=True)
        os.symlink(tmp_path / "elsewhere/a.png", tmp_path / "pets/c.png")
        os.symlink(tmp_path / "pets", tmp_path / "pets/more/round", target_is_directory=True)
    except OSError:  # Windows asks for a privilege; there are no such links then
        return
    assert folder(tmp_path / "pets", captions=False).files == ["b.png", "c.png", "more/a.png"]
    os.symlink(tmp_path / "gone.png", tmp_path / "pets/d.png")
    assert "d.png: cannot be opened: No such file" in refused(tmp_path / "pets", captions=False)


def test_a_named_pipe_is_not_waited_for(tmp_path):
    put(tmp_path / "a.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "b.png")
        assert "b.png: is not a file" in refused(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="this system has no such files")
@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "a.txt", "a.png"])
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
def test_files_without_an_end_are_not_read(tmp_path, name, kind):
    if name != "a.png":
        put(tmp_path / "a.png")
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "device":
        os.symlink("/dev/zero", tmp_path / name)
    else:
        with open(tmp_path / name, "wb") as file:
            file.truncate(10 * 2**30)
    reason = "has 10737418240 bytes, more than the limit" if kind == "sparse" else "is not a file, but"
    message = refused(tmp_path)
    assert name in message and reason in message


@pytest.mark.skipif(os.name != "posix", reason="Windows asks for a privilege to make links")
def test_links_in_all_directions_and_to_themselves(tmp_path):
    names = [str(i) for i in range(9)]
    for name in names:
        put(tmp_path / name / "a.png")
        for other in names:
            if other != name:
                os.symlink(tmp_path / other, tmp_path / name / f"to{other}")
    assert "links lead to this folder in more than 100 ways" in refused(tmp_path, captions=False)
    put(tmp_path / "pets/a.png")
    os.symlink("b.png", tmp_path / "pets/b.png")
    assert "b.png: cannot be opened: Too many levels" in refused(tmp_path / "pets", captions=False)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no paths as long as this")
def test_folders_deeper_than_a_stack(tmp_path, monkeypatch):
    put(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    try:
        assert folder(tmp_path, captions=False).files == ["a.png"]
    finally:
        for _ in range(1200):  # what pytest's own way of removing it cannot do
            os.chdir("..")
            os.rmdir("d")


def test_a_huge_field_of_a_table_is_named_with_its_line(tmp_path):
    put(tmp_path / "a.png")
    write(tmp_path / "captions.csv", "file,caption\na.png," + "x" * 200_000)
    assert "captions.csv, line 2: field larger than field limit" in refused(tmp_path)


def test_no_folder_and_nothing_in_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' is not there"):
        folder(tmp_path / "nowhere")
    assert "there is no picture in" in refused(tmp_path) and "There: nothing" in refused(tmp_path)
    write(tmp_path / "notes.md", "")
    assert "There: notes.md" in refused(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
        folder(tmp_path / "notes.md")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 0}, "size must be an integer of 1 or more, not 0"),
        ({"size": (8, 2.5)}, "size must be an integer of 1 or more, not 2.5"),
        ({"size": (1, 2, 3)}, r"a number of pixels or \(height, width\), not \(1, 2, 3\)"),
        ({"colour": "L"}, "colour must be True, False or None, not 'L'"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', not 'ignore'"),
        ({"background": "sky"}, "background must be a colour such as 'white' or '#ffffff', not 'sky'"),
        ({"background": (0, 0)}, r"background must be a colour, \(red, green, blue\), not \(0, 0\)"),
        ({"background": (0, 0, 256)}, "background must be an integer from 0 to 255, not 256"),
    ],
)
def test_arguments_out_of_range_are_quoted(tmp_path, options, message):
    put(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **options)


# ---- bad pictures

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def bomb():
    """A PNG of which the header promises 30,000 x 30,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BAD = {
    "empty.png": (b"", "is empty (0 bytes)"),
    "page.jpg": (b"<!DOCTYPE html><html>", "is no picture that Pillow can read (it begins with b'<!DOCTYPE ht')"),
    "new.heic": (b"\0\0\0\x18ftypheic....", "HEIC, SVG and raw photographs must be converted, to PNG or JPEG"),
    "post.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is no picture that Pillow can"),
    "bomb.png": (bomb(), "more than Pillow's limit"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_named(tmp_path, name):
    blob, reason = BAD[name]
    put(tmp_path / "good.png")
    (tmp_path / name).write_bytes(blob)
    assert f"{name}: {reason}" in refused(tmp_path) or reason in refused(tmp_path)
    data, warned = skipping(tmp_path)
    assert data.files == ["good.png"] and [file for file, _ in data.skipped] == [name] and reason in warned


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.gif", "x.bmp", "x.tif", "x.ppm"])
@pytest.mark.parametrize("left", [0.5, 0.02])
def test_a_truncated_picture_is_damaged(tmp_path, name, left):
    Image.fromarray(NOISE).save(tmp_path / name)
    assert one(tmp_path).shape == (64, 64, 3)
    blob = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(blob[: int(left * len(blob))])
    for size in (None, 16):
        assert f"{name}: is " in refused(tmp_path, size=size)


def test_a_picture_just_above_pillows_limit_is_refused(tmp_path, monkeypatch):
    """Pillow warns from its limit on, and raises from twice its limit on."""
    put(tmp_path / "a.png", size=(10, 10))
    for limit, loaded in ((100, True), (99, False), (40, False)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        if loaded:
            assert one(tmp_path).shape == (10, 10, 3)
        else:
            assert f"Pillow's limit of {limit} (is it a decompression bomb?)" in refused(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert one(tmp_path).shape == (10, 10, 3)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "tif", "tga", "ppm"])
def test_whatever_the_damage_a_file_gives_pixels_or_a_reason(tmp_path, ending):
    path, rng = tmp_path / f"x.{ending}", np.random.default_rng(0)
    Image.fromarray(NOISE).save(path)
    sound = np.frombuffer(path.read_bytes(), np.uint8)
    for i in range(30):
        damaged = sound.copy()
        start = min(len(sound), 200) if i % 2 else len(sound)  # in the header every second time
        damaged[rng.integers(0, start, 10)] = rng.integers(0, 256, 10)
        path.write_bytes(damaged.tobytes())
        try:
            assert one(tmp_path, size=16).shape[:2] == (16, 16)
        except ValueError as error:
            assert f"x.{ending}: " in str(error)


def test_a_long_list_is_cut_and_all_of_it_is_in_skipped(tmp_path):
    put(tmp_path / "z.png")
    for i in range(13):
        write(tmp_path / f"{i:02}.png", "")
    data, warned = skipping(tmp_path)
    assert "13 in " in warned and warned.count("is empty") == 10 and "and 3 more" in warned
    assert len(data.skipped) == 13
    (tmp_path / "z.png").unlink()
    assert "and no picture is left" in refused(tmp_path, on_error="skip")


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_different_sizes_need_a_size(tmp_path, on_error):
    for i in range(3):
        put(tmp_path / f"a{i}.png", size=(8, 6))
    put(tmp_path / "b.png", size=(5, 7))
    put(tmp_path / "c.jpg", size=(6, 8), exif=oriented(6))  # stands upright like the first three
    said = refused(tmp_path, on_error=on_error)
    assert "have 2 sizes (height x width): 4 of 6x8, 1 of 7x5. size=64 resizes" in said
    assert folder(tmp_path, size=4).images.shape == (5, 4, 4, 3)


# ---- formats and modes


@pytest.mark.parametrize(
    "ending", ["png", "bmp", "tif", "tiff", "ppm", "tga", "gif", "webp", "jpg", "jpeg", "avif", "jp2"]
)
def test_formats(tmp_path, ending):
    pixels = np.zeros((12, 16, 3), np.uint8)
    pixels[:6, :8], pixels[6:, 8:], pixels[6:, :8] = RED, BLUE, WHITE
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}, "jpeg": {"quality": 100}}
    try:
        Image.fromarray(pixels).save(tmp_path / f"x.{ending}", **lossless.get(ending, {}))
    except (KeyError, OSError):  # this Pillow was built without the codec
        assert ending in ("avif", "jp2")
        return
    found = one(tmp_path)
    assert found.shape == (12, 16, 3)
    inside = np.ix_([1, 2, 9, 10], [2, 3, 12, 13])
    off = abs(found[inside].astype(int) - pixels[inside])
    assert off.max() <= (30 if ending in ("jpg", "jpeg", "avif") else 0)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (GREEN, RED, BLUE)]
    for name in ("x.gif", "y.png", "z.webp", "w.tif"):
        options = {"lossless": True} if name == "z.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 3
    assert (folder(tmp_path).images == GREEN).all()


def test_grey_of_16_bits_is_not_clipped(tmp_path):
    """Pillow's own conversion makes everything above 255 white."""
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert np.asarray(Image.fromarray(values).convert("L"))[0, 1:].min() == 255
    for name in ("x.png", "y.tif"):
        Image.fromarray(values).save(tmp_path / name)
    (tmp_path / "z.pgm").write_bytes(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())
    data = folder(tmp_path)
    assert data.images.shape == (3, 16, 16, 1)
    for image in data.images:
        np.testing.assert_array_equal(image.ravel(), np.arange(256))
    resized = folder(tmp_path, size=8).images[0, :, :, 0]
    assert resized.min() < 20 and resized.max() > 235 and (np.diff(resized[:, 4].astype(int)) > 20).all()


def test_a_transparent_value_of_16_bits(tmp_path):
    values = np.full((4, 4), 20_000, np.uint16)
    values[0] = 7
    Image.fromarray(values).save(tmp_path / "x.png", transparency=7)
    assert one(tmp_path)[:, 0, 0].tolist() == [255, 78, 78, 78]


def test_a_tiff_whose_zero_is_white(tmp_path):
    values = np.array([[0, 257], [20 * 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.tif", tiffinfo={262: 0})
    assert one(tmp_path).ravel().tolist() == [255, 254, 235, 0]


def test_samples_of_32_bits_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tif")
    assert "x.tif: has samples of 32 bits (mode F), which do not say what is white" in refused(tmp_path)


@pytest.mark.parametrize("mode, name", [("RGBA", "x.png"), ("RGBA", "x.webp"), ("LA", "x.png"), ("PA", "x.png")])
def test_transparency_shows_the_background(tmp_path, tmp_path_factory, mode, name):
    beside = tmp_path_factory.mktemp("opaque")
    image = Image.new("LA" if mode == "LA" else "RGBA", (8, 8), (0, 0) if mode == "LA" else (0, 0, 0, 0))
    image.paste((0, 255) if mode == "LA" else (0, 0, 0, 255), (0, 0, 4, 8))
    image.paste((0, 128) if mode == "LA" else (0, 0, 0, 128), (4, 4, 8, 8))
    if mode == "PA":
        image = image.quantize(8)  # to a palette in which some colours are transparent
        assert image.mode == "P"
    image.save(tmp_path / name, **({"lossless": True} if name == "x.webp" else {}))
    np.testing.assert_array_equal(one(tmp_path)[[0, 0, 7], [0, 7, 7], 0], [0, 255, 127])
    blue = one(tmp_path, background="blue")
    np.testing.assert_array_equal(blue[[0, 0, 7], [0, 7, 7]], [(0, 0, 0), BLUE, (0, 0, 127)])
    np.testing.assert_array_equal(one(tmp_path, background=(9, 9, 9))[0, 7], [9])
    # The black of transparent pixels does not come through at the edges when it is made smaller.
    Image.fromarray(one(tmp_path)[..., 0]).save(beside / "x.png")
    np.testing.assert_array_equal(one(beside, size=3), one(tmp_path, size=3)[..., :1])


def test_palettes_with_transparency(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 8, 4))
    for name in ("x.png", "y.gif"):
        image.save(tmp_path / name, transparency=0)
    data = folder(tmp_path)
    np.testing.assert_array_equal(data.images[:, 0, 0], [WHITE, WHITE])
    np.testing.assert_array_equal(data.images[:, 7, 0], [GREEN, GREEN])
    image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(folder(tmp_path).images[0, 0, 0], RED)


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "y.tif")
    assert abs(folder(tmp_path).images.astype(int) - RED).max() <= 3
    assert folder(tmp_path, size=2).images.shape == (2, 2, 2, 3)


def test_black_and_white(tmp_path):
    image = Image.new("1", (8, 8), 1)
    image.paste(0, (0, 0, 8, 4))
    image.save(tmp_path / "x.png")
    assert one(tmp_path)[:, 0, 0].tolist() == [0] * 4 + [255] * 4


# ---- colour


def test_grey_unless_any_picture_has_colour(tmp_path):
    put(tmp_path / "a.png", 200)
    put(tmp_path / "b.png", (90, 90, 90))  # stored as RGB
    data = folder(tmp_path)
    assert data.images.shape == (2, 8, 8, 1) and data.images[:, 0, 0, 0].tolist() == [200, 90]
    assert folder(tmp_path, colour=True).images.shape == (2, 8, 8, 3)
    put(tmp_path / "c.png", (90, 90, 91))
    put(tmp_path / "d.png", 7)
    data = folder(tmp_path)
    assert data.images[:, 3, 3].tolist() == [[200] * 3, [90] * 3, [90, 90, 91], [7] * 3]
    put(tmp_path / "c.png", GREEN)
    assert folder(tmp_path, colour=False).images[:, 0, 0].tolist() == [[200], [90], [150], [7]]  # 0.587 x 255


# ---- sizes


def test_the_middle_is_kept(tmp_path):
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, 10:40] = GREEN  # the middle square
    pixels[:, :10] = RED
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.swapaxes(0, 1)).save(tmp_path / "tall.png")
    for image in folder(tmp_path, size=30).images:
        assert (image == GREEN).all()
    wide = folder(tmp_path, size=(30, 50)).images[1]
    np.testing.assert_array_equal(wide, pixels)
    assert folder(tmp_path, size=(10, 20)).images.shape == (2, 10, 20, 3)
    assert folder(tmp_path, size=100).images.shape == (2, 100, 100, 3)  # larger, too


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_fine_stripes_become_grey_and_not_coarse_stripes(tmp_path, name):
    stripes = np.zeros((400, 400), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / name, **({"quality": 95} if name == "x.jpg" else {}))
    small = one(tmp_path, size=60)[3:-3, 3:-3].astype(int)
    assert abs(small - 127.5).max() < 4
    aliased = np.asarray(Image.fromarray(stripes).resize((60, 60), Image.Resampling.NEAREST)).astype(int)
    assert abs(aliased - 127.5).max() > 100


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_the_quick_reductions_do_not_show(tmp_path, name):
    """Against one Lanczos filter over all pixels, on a photograph."""
    photograph = Image.open(sample("grace_hopper.jpg")).convert("RGB").resize((1536, 1800), Image.Resampling.BICUBIC)
    photograph.save(tmp_path / name, **({"quality": 98, "subsampling": 0} if name == "x.jpg" else {}))
    with Image.open(tmp_path / name) as image:
        exact = image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS, (0, 132, 1536, 1668))
    off = abs(one(tmp_path, size=64) - np.asarray(exact).astype(int))
    assert 0 < off.mean() < 0.3 and off.max() <= 4


def test_a_very_long_picture_needs_no_memory(tmp_path):
    put(tmp_path / "x.png", size=(60_000, 1))
    assert (one(tmp_path, size=64) == RED).all()


# ---- orientation


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# The picture F, and how it must be stored so that each EXIF orientation turns it upright.
UPRIGHT = np.kron([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]], np.ones((16, 16))).astype(np.uint8) * 255
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", [0, *STORED, 9])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_orientation(tmp_path, orientation, ending):
    stored = STORED.get(orientation, UPRIGHT)
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"x.{ending}", exif=oriented(orientation))
    found = one(tmp_path)[..., 0].astype(int)
    assert found.shape == (64, 48) and abs(found - UPRIGHT).max() < 40
    small = one(tmp_path, size=(8, 6))[..., 0].astype(int)
    assert small.shape == (8, 6) and ((small > 127) == (UPRIGHT[4::8, 4::8] > 127)).all()
    square = one(tmp_path, size=6)[..., 0].astype(int)  # the middle 48 rows of 64
    assert ((square > 127) == (UPRIGHT[12:60:8, 4::8] > 127)).all()


def test_damaged_exif_is_ignored(tmp_path):
    put(tmp_path / "x.png", exif=b"Exif\0\0not what it should be")
    with Image.open(tmp_path / "x.png") as image, pytest.raises(SyntaxError):
        image.getexif()
    put(tmp_path / "y.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xffcut short")
    assert folder(tmp_path).images.shape == (2, 8, 8, 3)


# ---- real pictures


def sample(name):
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / name


def test_pictures_that_matplotlib_ships(tmp_path):
    for name in ("grace_hopper.jpg", "logo2.png", "Minduka_Present_Blue_Pack.png"):
        (tmp_path / name).write_bytes(sample(name).read_bytes())
    data = folder(tmp_path, size=64)
    assert data.images.shape == (3, 64, 64, 3)
    gift, portrait, logo = data.images.astype(float)
    assert (gift[0, 0] > 250).all() and (logo[0, 0] > 250).all()  # were transparent
    assert portrait[40:].mean() < portrait[:10].mean()  # a dark uniform below a light background
    whole = np.asarray(Image.open(sample("grace_hopper.jpg")).convert("RGB")).astype(float)  # (600, 512, 3)
    np.testing.assert_allclose(portrait.mean((0, 1)), whole[44:556].mean((0, 1)), atol=1.5)


# ---- the cache


def cache_files():
    directory = module.cache_dir("pictures")
    return sorted(directory.iterdir()) if directory.exists() else []


@pytest.fixture
def pets(tmp_path):
    for i in range(4):
        put(tmp_path / f"pets/{i}.png", (i, 50, 200))
    return tmp_path / "pets"


@pytest.fixture
def no_decoding(monkeypatch):
    def decoded(*arguments):
        raise AssertionError("decoded")

    def forbid():
        monkeypatch.setattr(module, "_decoded", decoded)

    return forbid


def same(a, b):
    np.testing.assert_array_equal(a.images, b.images)
    assert a.files == b.files and a.captions == b.captions and a.skipped == b.skipped


def test_the_second_call_reads_the_cache(pets, no_decoding):
    first = folder(pets, size=6)
    no_decoding()
    same(folder(pets, size=6), first)
    assert len(cache_files()) == 1
    for other in ({}, {"size": 5}, {"size": 6, "colour": True}, {"size": 6, "background": "red"}):
        with pytest.raises(AssertionError, match="decoded"):
            folder(pets, **other)
    with pytest.raises(AssertionError, match="decoded"):
        folder(pets, size=6, cache=False)


@pytest.mark.parametrize("change", ["content", "time", "added", "removed", "renamed", "version", "decoding"])
def test_a_change_is_noticed(pets, no_decoding, change, monkeypatch):
    folder(pets)
    (path,) = cache_files()
    file = pets / "1.png"
    status = file.stat()
    if change == "content":
        put(file, GREEN, size=(9, 9))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":  # as little as the file system can tell
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    elif change == "added":
        put(pets / "9.png")
    elif change == "removed":
        file.unlink()
    elif change == "renamed":
        file.rename(pets / "11.png")
    elif change == "version":
        monkeypatch.setattr(module, "version", lambda package: "0.1")
    else:
        monkeypatch.setattr(module, "DECODING", 0)
    data = folder(pets, size=8)  # another file
    same(folder(pets, captions=False, size=8), data)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="again"):
        patch.setattr(module, "_decoded", lambda *_: pytest.fail("again"))
        try:
            folder(pets)
        except BaseException as error:
            raise AssertionError(str(error)) from error
    if change != "content":
        folder(pets)
        assert path in cache_files() and len(cache_files()) == 2  # the old one was replaced


def test_without_cache_nothing_is_written(pets):
    folder(pets, cache=False)
    assert cache_files() == []


def test_captions_are_not_cached(pets, no_decoding):
    folder(pets)
    no_decoding()
    write(pets / "captions.csv", "file,caption\n" + "".join(f"{i}.png,number {i}\n" for i in range(4)))
    assert folder(pets).captions == [f"number {i}" for i in range(4)]


def test_what_was_left_out_is_remembered(pets, no_decoding):
    write(pets / "bad.png", "no picture")
    with pytest.warns(UserWarning, match="bad.png: is no picture"):
        first = folder(pets, on_error="skip")
    no_decoding()
    with pytest.warns(UserWarning, match="bad.png: is no picture"):
        same(folder(pets, on_error="skip"), first)
    with pytest.raises(ValueError, match="bad.png: is no picture"):
        folder(pets)


def test_a_failure_of_the_disk_is_not_remembered(pets, monkeypatch):
    read = Path.read_bytes

    def broken(path):
        if path.name == "2.png":
            raise OSError(5, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="2.png: cannot be opened: Input/output error"):
        patch.setattr(Path, "read_bytes", broken)
        assert len(folder(pets, on_error="skip")) == 3
    assert cache_files() == []
    assert len(folder(pets, on_error="skip")) == 4


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "flipped", "other shape", "other entry"])
def test_a_damaged_cache_is_decoded_again(pets, damage):
    sound = folder(pets)
    (path,) = cache_files()
    blob = path.read_bytes()
    with np.load(path) as file:
        entries = dict(file)
    if damage == "other shape":
        np.savez(path, **{**entries, "images": sound.images[:3]})
    elif damage == "other entry":
        np.savez(path, pictures=sound.images)
    else:
        at = blob.index(sound.images.tobytes()) + 5
        flipped = blob[:at] + bytes([blob[at] ^ 255]) + blob[at + 1 :]
        path.write_bytes({"empty": b"", "garbage": b"x" * 99, "truncated": blob[:-300], "flipped": flipped}[damage])
    same(folder(pets), sound)
    assert cache_files() == [path]
    with np.load(path) as file:
        np.testing.assert_array_equal(file["images"], sound.images)


def test_a_cache_that_cannot_be_written_is_a_warning(pets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tinydiff").write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="the pictures are not cached in"):
        assert len(folder(pets)) == 4


def test_neither_importing_nor_reading_the_cache_imports_pillow(pets):
    folder(pets, size=4)
    code = (
        "import sys, tinydiff.data; before = 'PIL' in sys.modules;"
        f"tinydiff.data.folder({str(pets)!r}, size=4, background=(255, 255, 255)); print(before, 'PIL' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ---- many of them


def test_more_than_one_block_stays_in_order(pets, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    assert folder(pets, cache=False).images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("live", [True, False])
def test_progress_is_shown_only_of_what_takes_long(pets, monkeypatch, live):
    stream = io.StringIO()
    stream.isatty = lambda: live
    folder(pets, cache=False, stream=stream)
    assert stream.getvalue() == ""
    seconds = iter(range(0, 1000, 2))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    folder(pets, cache=False, stream=stream)
    lines = stream.getvalue().replace("\r\033[K", "\n").split("\n")
    shown = [line for line in lines if line]
    assert shown[0] == "decoding pictures: 2 of 4  0/s  4 s left"
    assert shown[-1] == "decoding pictures: 4 of 4  0/s  8 s"
    assert ("\r\033[K" in stream.getvalue()) == live and stream.getvalue().endswith("\n")


def test_all_bad_pictures_are_named_at_once_and_ten_of_them_end_the_work(pets, monkeypatch):
    for i in range(100):
        put(pets / f"{i + 10}.png")
    for name in ("11", "50", "99"):
        write(pets / f"{name}.png", "")
    said = refused(pets)
    assert "3 in" in said and all(f"{name}.png" in said for name in ("11", "50", "99"))
    write(
        pets / "captions.csv",
        "\n".join(["file,caption", "gone.png,x", *(f"{path.name},x" for path in pets.glob("*g"))]),
    )
    for said in (refused(pets), skipping(pets)[1]):  # what is wrong with the table and with the pictures, once each
        assert "4 in" in said and all(said.count(f"\n  {name}.png: ") == 1 for name in ("gone", "11", "50", "99"))
    put(pets / "98.png", size=(9, 8))
    assert "2 sizes" in (said := refused(pets)) and "\n  gone.png: " in said and "\n  11.png: " in said
    (pets / "captions.csv").unlink()
    for i in range(20):
        write(pets / f"{i + 10}.png", "")
    read, seen = module.read_picture, []
    monkeypatch.setattr(module, "read_picture", lambda path, *rest: (seen.append(path), read(path, *rest))[1])
    monkeypatch.setattr(module, "BLOCK", 5)
    assert "10 in" in refused(pets)
    assert len(seen) <= 40  # of 103; by name the others lie between them


def test_a_mistake_in_the_table_is_told_soon(tmp_path, monkeypatch):
    for i in range(10):
        put(tmp_path / f"{i}.png")
    write(tmp_path / "1.png", "")
    write(tmp_path / "captions.csv", "\n".join(["file,caption", "gone.png,x", *(f"{i}.png,x" for i in range(10))]))
    read, seen = module.read_picture, []
    monkeypatch.setattr(module, "read_picture", lambda path, *rest: (seen.append(path.name), read(path, *rest))[1])
    monkeypatch.setattr(module, "LOOKED_AT", 3)
    assert "2 in" in (said := refused(tmp_path)) and "\n  gone.png: " in said and "\n  1.png: " in said
    assert sorted(seen) == ["0.png", "1.png", "2.png"]


# ---- parts of it


def test_a_part_by_slice_mask_or_indices(tmp_path):
    for i, name in enumerate(["a/0.png", "a/1.png", "b/2.png", "b/3.png"]):
        put(tmp_path / name, (i, 9, 9))
    data = folder(tmp_path)
    for rows in (slice(1, 3), np.array([False, True, True, False]), [1, 2]):
        part = data[rows]
        assert part.files == ["a/1.png", "b/2.png"] and part.captions == ["a", "b"] and part.classes == ("a", "b")
        assert part.images[:, 0, 0, 0].tolist() == [1, 2] and part.labels["class"].tolist() == [0, 1]
    with pytest.raises(TypeError, match="by a slice, a mask or several indices, not by 2"):
        data[2]


def test_split(tmp_path):
    for i in range(40):
        put(tmp_path / f"{i}.png", (i, 9, 9))
    data = folder(tmp_path)
    training, validation = data.split(0.2, seed=1)
    assert sorted(training.files + validation.files) == data.files and 3 <= len(validation) <= 15
    assert [int(file[:-4]) for file in validation.files] == validation.images[:, 0, 0, 0].tolist()
    assert data.split(0.2, seed=1)[1].files == validation.files != data.split(0.2, seed=2)[1].files
    assert set(validation.files) < set(data.split(0.5, seed=1)[1].files)
    put(tmp_path / "15b.png")
    put(tmp_path / "0a.png")
    more = folder(tmp_path).split(0.2, seed=1)
    assert set(training.files) <= set(more[0].files) and set(validation.files) <= set(more[1].files)


def test_the_split_of_seed_0_is_fixed_for_good():
    """If this changes, a model is validated on pictures that it was trained on."""
    names = [f"{i}.png" for i in range(20)]
    assert np.flatnonzero(validation_mask(names, 0.3)).tolist() == [3, 5, 6, 11, 13, 14, 16, 17]
    whole, apart = ([f"{accented}{i}" for i in range(20)] for accented in ("caf\u00e9", "cafe\u0301"))
    assert (validation_mask(whole, 0.5) == validation_mask(apart, 0.5)).all()


def test_the_share_is_about_right():
    assert abs(validation_mask([f"{i}.png" for i in range(20_000)], 0.1).mean() - 0.1) < 0.011  # five deviations


def test_an_empty_part_is_an_error():
    for share, part in ((1e-9, "validation"), (1 - 1e-9, "training")):
        with pytest.raises(ValueError, match=f"of 3 pictures none is left for {part}, with share .* and seed 0"):
            validation_mask(["a", "b", "c"], share)
    for share in (0, 1, -0.1, 2, "x"):
        with pytest.raises(ValueError, match=r"share for validation must be a number in \(0, 1\)"):
            validation_mask(["a", "b"], share)
    with pytest.raises(ValueError, match="seed must be an integer of 0 or more, not -1"):
        validation_mask(["a", "b"], 0.5, -1)


# ---- captions that are held out

COLOURED = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("ball", "box", "cone")]


def words(captions):
    return {word for caption in captions for word in caption.lower().replace(",", " ").replace(".", " ").split()}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.34, 0.5, 0.66])
@pytest.mark.parametrize("seed", range(5))
def test_held_out_captions_are_new_but_their_words_are_known(share, seed):
    captions = COLOURED * 3 + [""] * 4
    held = hold_out(captions, share, seed)
    assert held.dtype == bool and held.shape == (31,)
    out = {caption for caption, h in zip(captions, held) if h}
    kept = {caption for caption, h in zip(captions, held) if not h}
    assert not out & kept and "" in kept and words(out) <= words(kept)
    assert len(out) == int(np.ceil(9 * share))
    np.testing.assert_array_equal(held, hold_out(captions, share, seed))


def test_seeds_hold_out_others_and_the_order_does_not_matter():
    found = {tuple(hold_out(COLOURED, 0.2, seed)) for seed in range(10)}
    assert len(found) > 4
    for seed in range(3):
        backwards = hold_out(COLOURED[::-1], 0.2, seed)
        np.testing.assert_array_equal(backwards[::-1], hold_out(COLOURED, 0.2, seed))


def test_capitals_and_punctuation_make_no_new_caption():
    captions = [*COLOURED, *(caption.upper() + "." for caption in COLOURED)]
    held = hold_out(captions, 0.4)
    np.testing.assert_array_equal(held[:9], held[9:])
    assert held[:9].sum() == 4


@pytest.mark.parametrize(
    "captions, share, message",
    [
        (["a cat", "the dog"], 0.1, "1 of 2 captions were to be held out, but only 0 have no word of their own"),
        (COLOURED, 0.7, "7 of 9 captions were to be held out, but only 6"),
        (["", ""], 0.1, "some of 0 captions were"),
        ([], 0.1, "some of 0 captions were"),
    ],
)
def test_what_cannot_be_held_out_is_an_error(captions, share, message):
    with pytest.raises(ValueError, match=message):
        hold_out(captions, share)


def test_arguments_of_hold_out():
    with pytest.raises(ValueError, match=r"share to hold out must be a number in \(0, 1\), not 1"):
        hold_out(COLOURED, 1)
    with pytest.raises(ValueError, match="seed must be an integer of 0 or more, not -1"):
        hold_out(COLOURED, 0.1, -1)


def test_glyph_captions_can_be_held_out():
    data = glyphs(3000, cache=False)
    held = hold_out(data.captions, 0.1)
    out, kept = ({c for c, h in zip(data.captions, held) if h == which} for which in (True, False))
    assert not out & kept and words(out) <= words(kept) and 0.1 <= len(out) / len(out | kept) < 0.101
    assert 0.05 < held.mean() < 0.15


# ---- training on bytes


def test_to_float_takes_pictures_on_every_backend(each_backend):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    host = to_float(images, -1, 1)
    assert host.shape == (1, 16, 16, 3) and host.dtype == np.float32 and host.min() == -1 and host.max() == 1
    there = to_float(backend.to_device(images), -1, 1)
    assert backend.active().is_array(there)
    np.testing.assert_array_equal(backend.to_host(there), host)


def test_training_on_bytes_is_training_on_floats(pets, numpy_backend):
    images = folder(pets, cache=False).images
    weights = []
    for given, convert in ((images, lambda x: to_float(x, -1, 1)), (to_float(images, -1, 1), lambda x: x)):
        model = nn.Linear(3, 3, rng=Rng(0))

        def loss(x, *, rng, sample_offset, model=model, convert=convert):
            return ops.square(model(convert(x)) - 1.0).mean()

        train(model, loss, given, optim.SGD(model.parameters(), lr=0.1), epochs=2, batch_size=2, stream=io.StringIO())
        weights.append(model.weight.numpy())
    np.testing.assert_array_equal(*weights)
    assert not np.array_equal(weights[0], nn.Linear(3, 3, rng=Rng(0)).weight.numpy())


def test_no_warning_is_left_behind(pets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder(pets)


# ---- the page about it


def test_the_code_and_the_error_of_the_page(tmp_path, monkeypatch, capsys, numpy_backend):
    page = (Path(module.__file__).parents[2] / "docs" / "own_pictures.md").read_text(encoding="utf-8")
    for name in ("cat1.jpg", "cat2.png", "dog1.jpg", "dog2.png"):
        put(tmp_path / "pets" / name, size=(80, 70))
    table = 'file,caption\ncat1.jpg,"a cat, asleep on a sofa"\ncat2.png,two cats\ndog1.jpg,a dog\ndog2.png,a dog\n'
    write(tmp_path / "pets/captions.csv", table)
    for name in ("cat1.jpg", "dog1.jpg"):
        put(tmp_path / "animals" / name)
    (shown,) = re.findall(r"```\n(file,species,age\n.*?)```", page, re.S)
    write(tmp_path / "animals/captions.csv", shown)
    monkeypatch.chdir(tmp_path)
    np.save("photos.npy", np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), "uint8"))
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, "own_pictures.md", "exec"), names)
    shown = re.findall(r"print\(.*\) +# (.*)", page)
    assert len(shown) == 4 and capsys.readouterr().out.splitlines() == shown
    assert str(names["pets"].files) in page and names["held"].sum() == 1
    (tmp_path / "pets/dog1.jpg").rename(tmp_path / "pets/dog1.jpeg")
    assert f"```\n{refused('pets')}\n```" in page
