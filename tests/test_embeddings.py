"""Word vectors: readers on files written here, averages by hand, the builder, and the shipped vectors."""

import gzip
import hashlib
import io
import json
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import embeddings
from embeddings import build, load_class_embeddings, loading, packages, readers
from embeddings.words import WORDS, spellings, words_for
from utils.errors import UserError

SHIPPED = Path(embeddings.__file__).parent
VECTORS = {
    "cat": [3.0, 4.0, 0.0],
    "dining": [0.0, 2.0, 0.0],
    "table": [5.0, 0.0, 0.0],
    "Sheep": [1.0, 1.0, 1.0],
}
NAMES = ["diningtable", "sheep", "cat"]
EXPECTED = np.array(  # by hand: mean of (0,1,0) and (1,0,0), made unit; (1,1,1) made unit; (3,4,0) / 5
    [[0.5**0.5, 0.5**0.5, 0.0], [3**-0.5] * 3, [0.6, 0.8, 0.0]], np.float64
)


def word2vec_bytes(vectors=VECTORS, newline=b"", first=b""):
    """A word2vec binary file; its own writer puts a `newline` after each vector; `first`: a word's bytes."""
    dim = len(next(iter(vectors.values())))
    entries = [(first, [0.5] * dim)] if first else []
    entries += [(word.encode(), vector) for word, vector in vectors.items()]
    body = b"".join(word + b" " + struct.pack(f"<{dim}f", *vector) + newline for word, vector in entries)
    return b"%d %d\n" % (len(entries), dim) + body


def text_bytes(vectors=VECTORS, header=False, end="\n"):
    dim = len(next(iter(vectors.values())))
    lines = [f"{len(vectors)} {dim}"] if header else []
    lines += [" ".join([word, *map(str, vector)]) for word, vector in vectors.items()]
    return "".join(line + end for line in lines).encode()


def wink_bytes(vectors=VECTORS, norm=np.linalg.norm):
    dim = len(next(iter(vectors.values())))
    rows = {w: [*v, round(float(norm(v)), 6), i] for i, (w, v) in enumerate(vectors.items())}
    head = {
        "l2NormIndex": dim,
        "wordIndex": dim + 1,
        "size": len(rows),
        "dimensions": dim,
        "words": list(rows),
    }
    return json.dumps(head | {"vectors": rows, "unkVector": [0] * dim + [-1]}, separators=(",", ":")).encode()


def npm_package(path, data, name="wink-embeddings-test"):
    facts = json.dumps({"name": name, "version": "1.2.3", "license": "MIT"}).encode()
    with tarfile.open(path, "w:gz") as package:
        for member, content in (("package/package.json", facts), ("package/vectors.json", data)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            package.addfile(info, io.BytesIO(content))


def write_table(folder, stem, names, vectors, listing=None):
    np.save(folder / f"{stem}.npy", np.asarray(vectors, np.float32))
    (folder / "classes.txt").write_text("\n".join(names) + "\n" if listing is None else listing, newline="")


def put(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def fails(*parts):
    """Expects an UserError, on one line, that holds every one of `parts`."""
    pattern = "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(UserError, match=rf"\A{pattern}[^\n]+\Z")


# ---------------------------------------------------------------- readers

FILES = {
    "S.bin": word2vec_bytes(),
    "S.bin.gz": word2vec_bytes(newline=b"\n"),
    "S.vec": text_bytes(header=True),
    "S.vec.gz": text_bytes(header=True, end=" \n"),  # fastText leaves a space at the end of a line
    "S.txt": text_bytes(),
    "S.txt.gz": text_bytes(end="\r\n"),
}


@pytest.mark.parametrize("file", FILES)
def test_every_form_of_a_named_source_gives_the_vectors_made_by_hand(tmp_path, file):
    put(tmp_path / file, FILES[file])
    rows, sources = load_class_embeddings(NAMES, ["S"], tmp_path)
    assert rows.dtype == np.float32 and sources == ("S",)
    np.testing.assert_allclose(rows, EXPECTED, atol=1e-6)


def test_a_path_is_a_source_too(tmp_path):
    path = str(put(tmp_path / "any name.vec", FILES["S.vec"]))
    rows, sources = load_class_embeddings(NAMES, [path])
    np.testing.assert_allclose(rows, EXPECTED, atol=1e-6)
    assert sources == (path,)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("file", ["a.bin", "b.bin", "a.vec", "a.txt", "a.json"])
def test_readers_do_not_depend_on_where_a_read_ends(tmp_path, monkeypatch, file, chunk):
    data = {"a.bin": word2vec_bytes(), "b.bin": word2vec_bytes(newline=b"\n"), "a.json": wink_bytes()}
    path = put(tmp_path / file, data.get(file) or FILES["S" + Path(file).suffix])
    if file.endswith(".bin"):
        chunk = max(chunk, 7)  # the header must be in the first read
    for module in (readers, packages):
        monkeypatch.setattr(module, "CHUNK", chunk)
    np.testing.assert_allclose(loading.class_vectors(path, NAMES), EXPECTED, atol=1e-6)


@pytest.mark.parametrize("suffix", [".bin", ".vec", ".txt"])
def test_malformed_utf8_and_a_byte_order_mark_do_not_crash(tmp_path, suffix):
    bad = b"\xff\xfe\xe9\xc3"
    data = {
        ".bin": word2vec_bytes(first=bad),
        ".vec": b"\xef\xbb\xbf5 3\n" + bad + b" 1 2 3\n" + text_bytes(),
        ".txt": b"\xef\xbb\xbf" + text_bytes() + bad + b" 1 2 3\n",
    }[suffix]
    path = put(tmp_path / f"bad{suffix}", data)
    np.testing.assert_allclose(loading.class_vectors(path, NAMES), EXPECTED, atol=1e-6)


def test_reading_stops_when_every_word_was_found(tmp_path):
    path = put(tmp_path / "long.txt", text_bytes({"cat": VECTORS["cat"]}) + b"Cat broken\n")
    assert loading.class_vectors(path, ["cat"]).shape == (1, 3)
    with fails("long.txt, line 2", "'Cat'"):
        loading.class_vectors(path, ["cat", "dog"])


def test_of_a_repeated_word_the_first_counts_and_a_phrase_is_no_word(tmp_path):
    data = b"the 1 0 0\nthe 0 0 1\ncat at home 9 9 9\ncat 0 1 0\ncat 0 0 1\n"
    path = put(tmp_path / "twice.txt", data)
    np.testing.assert_array_equal(loading.class_vectors(path, ["cat", "the"]), [[0, 1, 0], [1, 0, 0]])


def test_spelling_as_it_is_then_lower_then_title(tmp_path):
    assert spellings("BUS") == ("BUS", "bus", "Bus") and spellings("cat") == ("cat", "Cat")
    path = put(tmp_path / "w.txt", b"Cat 1 0\ncat 0 1\nBus 1 0\nbus 0 1\n")
    np.testing.assert_array_equal(loading.class_vectors(path, ["cat", "Bus", "BUS"]), [[0, 1], [1, 0], [0, 1]])


def test_npm_package_and_its_json_drop_norm_and_index(tmp_path):
    path, odd = tmp_path / "p.tgz", 'a"b\\'  # a word that JSON has to escape
    npm_package(path, wink_bytes({odd: [0.0, 9.0, 0.0]} | VECTORS))
    rows = loading.class_vectors(path, [*NAMES, odd])
    np.testing.assert_allclose(rows, [*EXPECTED, [0, 1, 0]], atol=1e-6)
    path = put(tmp_path / "p.json", wink_bytes())
    np.testing.assert_allclose(loading.class_vectors(path, NAMES), EXPECTED, atol=1e-6)


def test_wheel_needs_pyarrow_and_says_so_and_reads_with_it(tmp_path, monkeypatch):
    path, array = tmp_path / "glove.whl", io.BytesIO()
    np.save(array, np.asfortranarray(np.array(list(VECTORS.values()), np.float32)))
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("k/emb.npy", array.getvalue())
        wheel.writestr("k/index.parquet", b"words")
        wheel.writestr("k.dist-info/METADATA", "Name: k\nVersion: 2.0\nLicense-Expression: PDDL-1.0\n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with fails("glove.whl", "pip install pyarrow"):
        loading.class_vectors(path, NAMES)
    monkeypatch.setattr(packages, "_wheel_words", lambda data, path: list(VECTORS))
    np.testing.assert_allclose(loading.class_vectors(path, NAMES), EXPECTED, atol=1e-6)
    assert packages.describe(path) == {
        "description": "PyPI package k 2.0", "version": "2.0", "licence": "PDDL-1.0",
    }  # fmt: skip


# ---------------------------------------------------------------- what a file may have wrong


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("cut.bin", word2vec_bytes()[:-30], "cut short"),
        ("cut.bin.gz", word2vec_bytes()[:-8], "after 3 of 4 words"),
        ("cut2.bin", word2vec_bytes()[:-3], "after 3 of 4 words"),
        ("big.bin", b"3000000000 300\ncat \0\0\0\0", "3000000000 words of 300 numbers"),
        ("wide.bin", b"1 999999999999999\ncat \0\0\0\0", "cannot hold"),
        ("wide.bin.gz", b"1 999999999999999\ncat \0\0\0\0", "cannot hold"),
        ("none.bin", b"0 0\n", "cannot hold"),
        ("fasttext.bin", b"\xba\x16\x4f\x2f\x0c\0\0\0" * 40, "not word2vec's binary format"),
        ("nan.bin", word2vec_bytes(VECTORS | {"cat": [1.0, np.nan, 0.0]}), "'cat'.*NaN"),
        ("zero.bin", word2vec_bytes(VECTORS | {"cat": [0.0, 0.0, 0.0]}), "'cat'.*zero"),
        ("inf.txt", text_bytes(VECTORS | {"cat": [1.0, np.inf, 0.0]}), "line 1.*'cat'.*infinity"),
        ("big.vec", b"2000000 300\ncat 1 2 3\n", "2000000 words of 300 numbers"),
        ("cut.vec", b"9 1\ndog 1\ncow 1\nhorse 1\n", "3 words where the header says 9"),
        ("short.vec", text_bytes(header=True).replace(b"table 5.0 ", b"table "), "line 4 .'table'.: 2 "),
        ("long.txt", text_bytes().replace(b"cat 3.0", b"dog 1 1 1\ncat 1 3.0"), "line 2 .'cat'.: 4 .* 3 "),
        ("word.txt", text_bytes().replace(b"table 5.0", b"table 5,0"), "line 3"),
        ("bare.txt", b"cat\n", "line 1"),
        ("empty.txt", b"", "empty"),
        ("cut.json", wink_bytes()[:-90], "cut short"),
        ("norm.json", wink_bytes(norm=lambda v: 77.0), "is not the norm"),
        ("other.json", b'{"cat": [1, 2]}', "no 'vectors'"),
        ("junk.tgz", b"not a package", "junk.tgz"),
        ("junk.whl", b"not a wheel", "junk.whl"),
        ("odd.zip", b"", "unknown kind of file"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_by_name_on_one_line(tmp_path, file, data, message):
    path = put(tmp_path / file, data)
    with fails(file, message):
        loading.class_vectors(path, NAMES)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "cut.vec.gz"
    path.write_bytes(gzip.compress(text_bytes({"dog": [1.0, 2.0]} | {f"w{i}": [i, 1] for i in range(99)}))[:-40])
    with fails("cut.vec.gz", "cannot be read"):
        loading.class_vectors(path, ["cat"])


def test_missing_words_are_named_all_with_their_classes(tmp_path):
    path = put(tmp_path / "w.txt", b"cat 1 0\ntable 0 1\n")
    with fails("w.txt", "'dining' .class 'diningtable'.", "'red' .class 'red-panda'.", "--words") as caught:
        loading.class_vectors(path, ["cat", "diningtable", "red-panda"])
    assert "'table'" not in str(caught.value) and "'cat'" not in str(caught.value)


def test_words_that_cancel_out_are_refused(tmp_path):
    path = put(tmp_path / "w.txt", b"dining 1 0\ntable -2 0\n")
    with fails("class 'diningtable'", "zero"):
        loading.class_vectors(path, ["diningtable"])


# ---------------------------------------------------------------- tables of class vectors


def test_table_rows_by_name_with_windows_line_ends_mark_and_blank_lines(tmp_path):
    write_table(tmp_path, "S", [], [[0, 2], [3, 0]], "\ufeffcat\r\n\r\npotted plant \r\n")
    rows, _ = load_class_embeddings(["potted plant", "cat"], ["S"], tmp_path)
    np.testing.assert_array_equal(rows, [[1, 0], [0, 1]])


def test_table_may_be_packed_or_in_fortran_order_or_half_precision(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(np.array([[0, 2, 0], [3, 0, 0]], np.float16)))
    put(tmp_path / "S.npy.gz", buffer.getvalue())
    (tmp_path / "classes.txt").write_text("a\nb\n")
    np.testing.assert_array_equal(load_class_embeddings(["b", "a"], ["S"], tmp_path)[0], [[1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("array", "names", "parts"),
    [
        ([[1, 0], [0, 1]], "a\n", ("classes.txt", "1 names for the 2 rows")),
        ([[1, 0], [0, 1]], "a\na\n", ("classes.txt", "'a' twice")),
        ([[1, 0], [0, 1]], "b\nc\n", ("classes.txt", "no row for 'a'", "--classes")),
        ([[1, 0], [0, 1]], "\n", ("classes.txt", "no names")),
        ([[1, 0], [0, 1]], None, ("classes.txt", "no class names")),
        ([[1, np.nan], [0, 1]], "a\nb\n", ("S.npy", "class 'a'", "NaN")),
        ([[0, 0], [0, 1]], "a\nb\n", ("S.npy", "class 'a'", "zero")),
        ([1, 0], "a\nb\n", ("S.npy", "shape")),
        (np.array([[1, 0], [0, 1]]), "a\nb\n", ("S.npy", "int64")),
        (np.array([[1, {}]], object), "a\n", ("S.npy", "object")),
        (np.zeros((0, 3), np.float32), "a\n", ("S.npy", "shape")),
    ],
)
def test_bad_tables(tmp_path, array, names, parts):
    array = array if isinstance(array, np.ndarray) else np.array(array, np.float32)
    np.save(tmp_path / "S.npy", array, allow_pickle=True)
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    with fails(*parts):
        load_class_embeddings(["a"], ["S"], tmp_path)


def test_array_header_larger_than_the_file_is_refused_unallocated(tmp_path):
    write_table(tmp_path, "S", ["a"], [[1, 0]])
    data = (tmp_path / "S.npy").read_bytes()
    (tmp_path / "S.npy").write_bytes(data.replace(b"(1, 2), }" + b" " * 12, b"(1000000000000, 2), }"))
    with fails("S.npy", "1000000000000"):
        load_class_embeddings(["a"], ["S"], tmp_path)
    (tmp_path / "S.npy").write_bytes(b"hello")
    with fails("S.npy", "not a NumPy"):
        load_class_embeddings(["a"], ["S"], tmp_path)


# ---------------------------------------------------------------- sources


def test_each_source_is_normalised_before_they_are_concatenated(tmp_path):
    write_table(tmp_path, "long", ["a", "b"], [[1000, 0], [0, 1000]])
    write_table(tmp_path, "short", ["a", "b"], [[0.003, 0.004, 0], [0, 0, 0.001]])
    rows, sources = load_class_embeddings(["b", "a"], ["long", "short"], tmp_path)
    half = 0.5**0.5
    np.testing.assert_allclose(rows, [[0, half, 0, 0, half], [half, 0, 0.6 * half, 0.8 * half, 0]], atol=1e-6)
    assert sources == ("long", "short")


def test_default_is_both_sources_where_both_are_and_else_the_shipped_one_said_aloud(tmp_path, capsys):
    rows, sources = load_class_embeddings(["cat", "dog"], None, tmp_path)
    said = capsys.readouterr().err
    assert sources == ("glove",) and rows.shape == (2, 100)
    assert said.count("\n") == 1 and "no word2vec and fasttext vectors" in said and str(tmp_path) in said
    write_table(tmp_path, "word2vec", ["cat", "dog"], np.eye(2))
    assert load_class_embeddings(["cat", "dog"], None, tmp_path)[1] == ("glove",)
    assert "no fasttext vectors" in capsys.readouterr().err
    write_table(tmp_path, "fasttext", ["cat", "dog"], np.eye(2, 5))
    rows, sources = load_class_embeddings(["cat", "dog"], None, tmp_path)
    assert sources == ("word2vec", "fasttext") and rows.shape == (2, 7)
    assert capsys.readouterr().err == ""


def test_only_the_shipped_source_is_found_outside_the_folder(tmp_path, monkeypatch):
    package, folder = tmp_path / "package", tmp_path / "folder"
    package.mkdir(), folder.mkdir()
    monkeypatch.setattr(loading, "PACKAGE", package)
    for name, vector in (("glove", [1, 0]), ("word2vec", [0, 1]), ("fasttext", [0, 1])):
        write_table(package, name, ["a"], [vector])
    assert load_class_embeddings(["a"])[1] == ("word2vec", "fasttext")
    assert load_class_embeddings(["a"], None, folder)[1] == ("glove",)
    write_table(folder, "glove", ["a"], [[0, 0, 1]])
    np.testing.assert_array_equal(load_class_embeddings(["a"], ["glove"], folder)[0], [[0, 0, 1]])
    with fails("--embedding word2vec"):
        load_class_embeddings(["a"], ["word2vec"], folder)


def test_unknown_source_names_flag_folder_and_what_there_is(tmp_path):
    put(tmp_path / "mine.vec.gz", b"")
    write_table(tmp_path, "other", ["a"], [[1]])
    with fails("--embedding word2vec", str(tmp_path), "glove, mine, other;"):
        load_class_embeddings(["a"], ["word2vec"], tmp_path)
    with fails("--embedding nothing", "nowhere", "glove"):
        load_class_embeddings(["a"], ["nothing"], tmp_path / "nowhere")


@pytest.mark.parametrize("sources", [[], ["glove", "glove"]])
def test_sources_must_be_given_once_each(sources):
    with fails("--embedding"):
        load_class_embeddings(["cat"], sources)


@pytest.mark.parametrize("names", [[], ["cat", "dog", "cat"]])
def test_names_must_be_given_once_each(names):
    with fails("class names"):
        load_class_embeddings(names, ["glove"])


# ---------------------------------------------------------------- words


def test_every_voc_class_and_background_has_words_and_others_are_split():
    assert len(WORDS) == 21 and all(WORDS.values())
    assert words_for("pottedplant") == ("potted", "plant")
    assert words_for("traffic-light_red  lamp") == ("traffic", "light", "red", "lamp")
    assert words_for("wombat") == ("wombat",)
    assert words_for("cat", {"cat": ("feline",)}) == ("feline",)


# ---------------------------------------------------------------- the builder


def everything_in(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, folder, *argv):
    """Run the builder, which must exit with 2, say one line and leave `folder` alone; the line."""
    before = everything_in(folder)
    with pytest.raises(SystemExit) as caught:
        build.main([str(arg) for arg in argv])
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("python -m embeddings.build: error: ")
    assert everything_in(folder) == before
    return said.err


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(NAMES))
    return path


def test_build_then_load_is_a_round_trip_and_the_record_is_true(tmp_path, classes):
    source = put(tmp_path / "GoogleNews.bin.gz", FILES["S.bin.gz"])
    out = tmp_path / "new" / "folder"
    argv = ["--source", source, "--classes", classes, "--licence", "free", "--output", out / "word2vec"]
    build.main([str(arg) for arg in argv])
    rows, _ = load_class_embeddings(["cat", "diningtable"], ["word2vec"], out)
    np.testing.assert_allclose(rows, EXPECTED[[2, 0]], atol=1e-6)
    assert sorted(path.name for path in out.iterdir()) == ["classes.txt", "word2vec.json", "word2vec.npy"]
    stored = np.load(out / "word2vec.npy")
    assert stored.dtype == np.float32 and (out / "classes.txt").read_text().split() == NAMES
    facts = json.loads((out / "word2vec.json").read_text())
    assert facts["sha256"] == hashlib.sha256((out / "word2vec.npy").read_bytes()).hexdigest()
    assert facts["sources"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert facts["sources"][0]["licence"] == "free" and facts["dimensions"] == 3
    assert facts["words"] == {"diningtable": ["dining", "table"], "sheep": ["sheep"], "cat": ["cat"]}
    assert str(tmp_path) not in json.dumps(facts)  # nobody else has these folders
    assert facts["command"].startswith("python -m embeddings.build --source GoogleNews.bin.gz ")


def test_build_again_gives_the_same_bytes_and_sources_share_a_folder(tmp_path, classes):
    source = put(tmp_path / "a.vec", FILES["S.vec"])
    out = tmp_path / "out"
    for name in ("one", "two", "one"):
        build.main(["--source", str(source), "--classes", str(classes), "--output", str(out / f"{name}.npy")])
    assert (out / "one.npy").read_bytes() == (out / "two.npy").read_bytes()


def test_build_concatenates_several_sources_and_takes_words(tmp_path, classes):
    first = put(tmp_path / "a.txt", b"cat 900 0\nfoo 0 900\nsheep 900 0\n")
    second = put(tmp_path / "b.txt", b"cat 0 0 1\nfoo 1 0 0\nsheep 0 1 0\n")
    words = tmp_path / "words.json"
    words.write_text('{"diningtable": ["foo"]}')
    argv = ["--source", first, "--source", second, "--classes", classes, "--words", words]
    build.main([str(arg) for arg in [*argv, "--output", tmp_path / "out" / "both"]])
    half = 0.5**0.5
    wanted = [[0, half, half, 0, 0], [half, 0, 0, half, 0], [half, 0, 0, 0, half]]
    np.testing.assert_allclose(np.load(tmp_path / "out" / "both.npy"), wanted, atol=1e-6)
    facts = json.loads((tmp_path / "out" / "both.json").read_text())
    assert [source["file"] for source in facts["sources"]] == ["a.txt", "b.txt"]
    assert facts["words"]["diningtable"] == ["foo"]


def test_build_from_a_package_and_from_a_table_and_by_default_for_voc(tmp_path):
    package = tmp_path / "p.tgz"
    words = sorted({word for each in WORDS.values() for word in each})
    npm_package(package, wink_bytes({word: [1.0, float(i), 2.0] for i, word in enumerate(words)}))
    build.main(["--source", str(package), "--output", str(tmp_path / "a" / "x")])
    facts = json.loads((tmp_path / "a" / "x.json").read_text())["sources"][0]
    assert (facts["description"], facts["version"]) == ("npm package wink-embeddings-test 1.2.3", "1.2.3")
    assert facts["licence"] == "MIT"
    assert (tmp_path / "a" / "classes.txt").read_text().split() == list(WORDS)
    build.main(["--source", str(tmp_path / "a" / "x.npy"), "--output", str(tmp_path / "b" / "y")])
    np.testing.assert_allclose(np.load(tmp_path / "b" / "y.npy"), np.load(tmp_path / "a" / "x.npy"), atol=1e-7)


def test_build_refuses_and_writes_nothing(tmp_path, classes, capsys):
    source = put(tmp_path / "w.vec", FILES["S.vec"])
    out = tmp_path / "out" / "name"
    run = ["--classes", classes, "--output", out, "--source"]
    said = refused(capsys, tmp_path, "--output", out, "--source", source)
    assert "'bicycle' (class 'bicycle')" in said and "'television' (class 'tvmonitor')" in said
    assert "cut.bin" in refused(capsys, tmp_path, *run, put(tmp_path / "cut.bin", word2vec_bytes()[:-9]))
    assert "none.vec: cannot be read" in refused(capsys, tmp_path, *run, tmp_path / "none.vec")
    assert "unknown kind of file" in refused(capsys, tmp_path, *run, put(tmp_path / "w.pdf", b""))
    classes.write_text("cat\ncat\n")
    assert "'cat' twice" in refused(capsys, tmp_path, *run, source)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{broken", "--words {broken"),
        ("no such file", "--words no such file"),
        ('{"cat": "feline"}', "object of lists"),
        ('{"cat": []}', "object of lists"),
        ('{"wombat": ["horse"]}', "'wombat' is no class here"),
        ('{"cat": ["feline", "kitten"]}', "'feline' (class 'cat'), 'kitten' (class 'cat')"),
    ],
)
def test_build_refuses_bad_words(tmp_path, classes, capsys, words, message):
    source = put(tmp_path / "w.vec", FILES["S.vec"])
    argv = ["--source", source, "--classes", classes, "--words", words, "--output", tmp_path / "name"]
    assert message in refused(capsys, tmp_path, *argv)


def test_build_does_not_spoil_other_classes_nor_its_own_source(tmp_path, classes, capsys):
    source = put(tmp_path / "w.vec", FILES["S.vec"])
    write_table(tmp_path, "old", ["dog", "cat"], np.eye(2))
    argv = ["--source", source, "--classes", classes, "--output"]
    assert "classes.txt: lists other classes" in refused(capsys, tmp_path, *argv, tmp_path / "name")
    own = [
        "--source",
        tmp_path / "old.npy",
        "--classes",
        tmp_path / "classes.txt",
        "--output",
        tmp_path / "old",
    ]
    assert "overwrite its own source" in refused(capsys, tmp_path, *own)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, tmp_path, *argv, tmp_path / "file" / "name")


def test_every_flag_has_help():
    for action in build.get_parser()._actions:
        assert action.help


# ---------------------------------------------------------------- what is shipped


def test_shipped_file_is_what_its_record_says():
    facts = json.loads((SHIPPED / "glove.json").read_text())
    assert hashlib.sha256((SHIPPED / "glove.npy").read_bytes()).hexdigest() == facts["sha256"]
    names = (SHIPPED / "classes.txt").read_text().split()
    assert names == list(WORDS)
    assert facts["words"] == {name: list(words) for name, words in WORDS.items()}
    assert facts["command"].split(" --licence")[0] in (SHIPPED / "README.md").read_text()
    assert "://" not in json.dumps(facts)
    stored = np.load(SHIPPED / "glove.npy")
    assert stored.dtype == np.float32 and stored.shape == (len(names), facts["dimensions"])


def test_shipped_vectors_are_unit_and_in_the_order_asked_for():
    names = sorted(WORDS)
    rows, sources = load_class_embeddings(names, ["glove"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    again, _ = load_class_embeddings(names[::-1], ["glove"])
    np.testing.assert_array_equal(rows, again[::-1])
    assert sources == ("glove",)


@pytest.mark.parametrize(
    ("name", "near", "far"),
    [
        ("sheep", "cow", "sofa"),
        ("sofa", "chair", "sheep"),
        ("train", "bus", "cat"),
        ("motorbike", "bicycle", "bottle"),
        ("cat", "dog", "aeroplane"),
        ("diningtable", "chair", "horse"),
    ],
)
def test_shipped_neighbours_make_sense(name, near, far):
    rows, _ = load_class_embeddings([name, near, far], ["glove"])
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.1


@pytest.mark.parametrize("dataset", ["pascal_context", "coco_stuff"])
def test_the_other_data_sets_have_vectors_too(dataset):
    folder = SHIPPED / dataset
    facts = json.loads((folder / "glove.json").read_text())
    assert hashlib.sha256((folder / "glove.npy").read_bytes()).hexdigest() == facts["sha256"]
    names = (folder / "classes.txt").read_text().splitlines()
    assert facts["words"] == {name: list(words_for(name)) for name in names}
    rows, sources = load_class_embeddings(names, ["glove"])
    assert sources == ("glove",) and rows.shape == (len(names), 100)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    alike = rows @ rows.T - np.eye(len(names))
    assert alike.max() < 0.999  # no two classes have one vector
    assert dataset in loading.home(names).name


def test_a_class_has_one_vector_in_every_data_set():
    """Also where the sets call it otherwise, and where one asks for classes of several sets."""
    pairs = {"aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv", "pottedplant": "potted plant"}
    for one, other in pairs.items():
        rows, _ = load_class_embeddings([one, other, "traffic light", "bedclothes"], ["glove"])
        np.testing.assert_array_equal(rows[0], rows[1])
    assert words_for("wall-concrete") == ("wall", "concrete") and words_for("sky-other") == ("sky",)


def test_shipped_source_lacks_other_classes_and_says_what_to_do():
    with fails("classes.txt", "'wombat'", "python -m embeddings.build --classes"):
        load_class_embeddings(["cat", "wombat"], ["glove"])
