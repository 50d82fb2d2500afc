"""Class embeddings: readers on files written here, averages by hand, the builder, and the shipped words."""

import gzip
import hashlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

import embeddings
from dataset.splits import NAMES, read_classes
from embeddings import build, embed_words, imagenet_similarity, load_class_embeddings, loading
from embeddings.loading import find_class_vectors, unit_rows
from helpers import failure, stored
from utils.errors import UserError

PACKAGE = Path(embeddings.__file__).parent
VOC = list(read_classes(NAMES / "voc.txt"))
VECTORS = {"cat": [3.0, 4.0, 0.0], "playing": [0.0, 2.0, 0.0], "field": [5.0, 0.0, 0.0], "Sheep": [1.0, 1.0, 1.0]}
NAMES = ["playingfield", "sheep", "cat"]
EXPECTED = np.array(  # by hand: mean of (0,1,0) and (1,0,0), made unit; (1,1,1) made unit; (3,4,0) / 5
    [[0.5**0.5, 0.5**0.5, 0.0], [3**-0.5] * 3, [0.6, 0.8, 0.0]], np.float64
)


def word2vec_bytes(vectors=VECTORS, newline=b"", first=b""):
    """A word2vec binary file; its own writer puts a `newline` after each vector; `first`: the bytes of a word."""
    dim = len(next(iter(vectors.values())))
    entries = [(first, [0.5] * dim)] if first else []
    entries += [(word.encode(), vector) for word, vector in vectors.items()]
    body = b"".join(word + b" " + struct.pack(f"<{dim}f", *vector) + newline for word, vector in entries)
    return b"%d %d\n" % (len(entries), dim) + body


def text_bytes(vectors=VECTORS, header=False, end="\n", signs="  "):
    dim = len(next(iter(vectors.values())))
    lines = [f"{len(vectors)} {dim}"] if header else []
    lines += [word + signs[0] + signs[1].join(map(str, vector)) for word, vector in vectors.items()]
    return "".join(line + end for line in lines).encode()


def write_table(folder, stem, names, vectors):
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{stem}.npy", np.asarray(vectors, np.float32))
    (folder / "classes.txt").write_text("\n".join(names) + "\n")


def put(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def fails(*parts):
    """Expects a UserError, on one line, that holds every one of `parts`."""
    pattern = "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(UserError, match=rf"\A{pattern}[^\n]+\Z")


FILES = {
    "S.bin": word2vec_bytes(),
    "S.bin.gz": word2vec_bytes(newline=b"\n"),
    "S.vec": text_bytes(header=True),
    "S.vec.gz": text_bytes(header=True, end=" \n"),  # fastText leaves a space at the end of a line
    "S.txt": text_bytes(),
    "S.txt.gz": text_bytes(end="\r\n"),
    "tabs/S.txt": text_bytes(signs="\t\t"),
}


@pytest.mark.parametrize("file", FILES)
def test_every_format_gives_the_vectors_made_by_hand(tmp_path, file):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    put(path, FILES[file])
    rows, sources = load_class_embeddings(NAMES, ["S"], path.parent)
    assert rows.dtype == np.float32 and sources == ["S"]
    np.testing.assert_allclose(rows, EXPECTED, atol=1e-6)
    rows, sources = load_class_embeddings(NAMES, [str(path)])
    np.testing.assert_allclose(rows, EXPECTED, atol=1e-6)
    assert sources == [str(path)]


@pytest.mark.parametrize("suffix", [".bin", ".vec", ".txt"])
def test_malformed_utf8_and_a_byte_order_mark_are_read_past(tmp_path, suffix):
    bad = b"\xff\xfe\xe9\xc3"
    data = {
        ".bin": word2vec_bytes(first=bad),
        ".vec": b"\xef\xbb\xbf5 3\n" + bad + b" 1 2 3\n" + text_bytes(),
        ".txt": b"\xef\xbb\xbf" + text_bytes() + bad + b" 1 2 3\n",
    }[suffix]
    assert len(find_class_vectors(put(tmp_path / f"bad{suffix}", data), NAMES)) == 3


PARTS = b"traffic 2 0\nlight 0 2\n"


@pytest.mark.parametrize("lines, name, vector", [
    (b"the 1 0 0\nthe 0 0 1\n", "the", [1, 0, 0]),  # the first counts
    (b"the 1 0 0\ncat at home 9 9 9\ncat 0 1 0\n", "cat", [0, 1, 0]),
    (b"teddy 1 1 1\nteddy bear 0 0 7\n", "teddy-bear", [0, 0, 7]),
    (PARTS + b"traffic_light 3 4\n", "Traffic_light", [3, 4]),
    (PARTS + b"Traffic-Light 3 4\n", "Traffic_light", [3, 4]),
    (PARTS + b"trafficlight 3 4\n", "Traffic_light", [3, 4]),
    (PARTS, "Traffic_light", [2**0.5] * 2),
    (b"red 2 0\npanda 0 4\n", "red panda", [3 * 0.5**0.5] * 2),  # of their mean length
])  # fmt: skip
def test_a_phrase_is_taken_whole_where_a_file_has_it_else_by_its_words(tmp_path, lines, name, vector):
    found = find_class_vectors(put(tmp_path / "w.txt", lines), [name])
    np.testing.assert_allclose(found[name], vector)


ONE_ROW = stored(lambda stream: np.save(stream, np.ones((1, 2))))
BAD_FILES = {
    "page.txt": (b"<!DOCTYPE html><html>\n", "web page"),
    "pointer.vec": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer"),
    "points.txt": (b"a 0,5 1,25\n", "line 1: no word with 2 numbers"),
    "packed.vec": (b"PK\x03\x04" + b"\0" * 40, "zip archive"),
    "pickle.bin": (b"\x80\x04\x95" + b"\0" * 40, "pickle"),
    "fasttext.bin": (b"\xba\x16\x4f\x2f\x0c\0\0\0" * 40, r"give the \.vec"),
    "cut.bin": (word2vec_bytes()[:-3], "after 3 of 4 words"),
    "big.bin": (b"3000000000 300\ncat \0\0\0\0", "after 0 of 3000000000 words"),
    "none.bin": (b"0 0\n", "not in word2vec's binary format"),
    "wide.bin": (b"1 3000000000\ncat \0\0\0\0", "not in word2vec's binary format"),
    "nan.bin": (word2vec_bytes(VECTORS | {"cat": [1.0, np.nan, 0.0]}), "'cat'.*NaN"),
    "zero.bin": (word2vec_bytes(VECTORS | {"cat": [0.0, 0.0, 0.0]}), "'cat'.*zero"),
    "cut.vec": (b"9 1\ndog 1\ncow 1\nhorse 1\n", "3 words, but its header says 9"),
    "short.vec": (text_bytes(header=True).replace(b"field 5.0 ", b"field "), "line 4: no word with 3 numbers"),
    "long.txt": (text_bytes().replace(b"cat 3.0", b"dog 1 1 1\ncat 1 3.0"), "no vector for 'cat'"),
    "opposite.txt": (b"playing 1 0\nfield -2 0\nsheep 1 1\ncat 1 1\n", "class 'playingfield'.*zero"),
    "bare.txt": (b"cat\n", "line 1"),
    "empty.txt": (b"", "empty"),
    "cut.vec.gz": (gzip.compress(text_bytes({f"w{i}": [i, 1] for i in range(99)}))[:-40], "can't be read"),
    "header.npy": (b"\x93NUMPY\x01\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9, 9)}", "no array"),
    "big.npy": (ONE_ROW.replace(b"(1, 2), }" + b" " * 12, b"(1000000000000, 2), }"), "no array"),
    "objects.pkl": (pickle.dumps(np.array([[{}, 1]])), "no array of floats"),
}


@pytest.mark.parametrize("file", BAD_FILES)
def test_bad_files_are_named_with_what_they_are(tmp_path, file):
    data, message = BAD_FILES[file]
    (tmp_path / file).write_bytes(data)
    with fails(file, message):
        find_class_vectors(tmp_path / file, NAMES)


def test_a_pickle_runs_no_code(tmp_path):
    target = tmp_path / "made"
    code = b"cos\nsystem\n(S'touch %s'\ntR." % str(target).encode()
    with fails("trap.pkl"):
        find_class_vectors(put(tmp_path / "trap.pkl", code), ["cat"])
    assert not target.exists()


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("names", [VOC, VOC[1:]])
def test_a_pickled_array_has_the_classes_of_voc_in_order(tmp_path, names, protocol):
    rows = np.arange(len(names) * 3, dtype=np.float64).reshape(-1, 3) + 1
    put(tmp_path / "fasttext.pkl", pickle.dumps(rows, protocol))
    found, sources = load_class_embeddings(["tvmonitor", "aeroplane"], None, tmp_path)
    wanted = rows[[names.index("tvmonitor"), names.index("aeroplane")]]
    np.testing.assert_allclose(found, unit_rows(wanted), atol=1e-6)
    assert sources == ["fasttext"]


def test_rows_are_found_by_name_whatever_the_spelling_and_the_line_ends(tmp_path):
    write_table(tmp_path, "S", [], [[0, 2], [3, 0]])
    (tmp_path / "classes.txt").write_text("\ufeffCat\r\n\r\npotted plant \r\n", newline="")
    rows, _ = load_class_embeddings(["pottedplant", "cat"], ["S"], tmp_path)
    np.testing.assert_array_equal(rows, [[1, 0], [0, 1]])


@pytest.mark.parametrize(
    ("array", "names", "parts"),
    [
        ([[1, 0], [0, 1]], "a\n", ("classes.txt", "1 names for the 2 rows")),
        ([[1, 0], [0, 1]], "a\na\n", ("classes.txt", "'a' twice")),
        ([[1, 0], [0, 1]], "b\nc\n", ("S.npy", "no vector for 'a'", "--embedding")),
        ([[1, 0], [0, 1]], None, ("classes.txt", "can't be read as text")),
        ([1, 0], "a\nb\n", ("S.npy", "no array of floats")),
        (np.array([[1, {}]], object), "a\n", ("S.npy", "no array of floats")),
    ],
)
def test_bad_tables_are_refused(tmp_path, array, names, parts):
    array = array if isinstance(array, np.ndarray) else np.array(array, np.float32)
    np.save(tmp_path / "S.npy", array, allow_pickle=True)
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    with fails(*parts):
        load_class_embeddings(["a"], ["S"], tmp_path)


def test_sources_count_by_their_lengths_or_equally(tmp_path):
    put(tmp_path / "long.txt", b"a 3 0\nb 0 3\n")
    put(tmp_path / "short.vec", b"2 2\na 0 4\nb 4 0\n")
    raw, sources = load_class_embeddings(["b", "a"], ["long", "short"], tmp_path)
    np.testing.assert_allclose(raw, [[0, 0.6, 0.8, 0], [0.6, 0, 0, 0.8]], atol=1e-6)
    equal, _ = load_class_embeddings(["b", "a"], ["long", "short"], tmp_path, weighting="equal")
    half = 0.5**0.5
    np.testing.assert_allclose(equal, [[0, half, half, 0], [half, 0, 0, half]], atol=1e-6)
    assert sources == ["long", "short"]


def test_default_is_the_published_pair_else_the_shipped_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "PACKAGE", tmp_path / "package")
    rows, sources = load_class_embeddings(["cat", "dog"])
    assert sources == ["glove"] and rows.shape == (2, 100)
    assert capsys.readouterr().err.startswith("embedding: the shipped 100-d GloVe")
    for source, dim in (("word2vec", 2), ("fasttext", 5)):
        write_table(tmp_path / "package", source, ["cat", "dog"], np.eye(2, dim))
    rows, sources = load_class_embeddings(["cat", "dog"])
    assert sources == ["word2vec", "fasttext"] and rows.shape == (2, 7)
    assert capsys.readouterr().err == ""


def test_a_given_folder_is_never_replaced_by_the_shipped_words(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        for embedding in (None, ["glove"]):
            with fails("--embedding-path", "there: no word vectors"):
                load_class_embeddings(["cat"], embedding, folder)
    put(tmp_path / "glove.txt", b"cat 0 1\n")
    put(tmp_path / "._glove.txt", b"left by macOS")
    rows, sources = load_class_embeddings(["cat"], None, tmp_path)
    assert rows.tolist() == [[0, 1]] and sources == ["glove"]
    put(tmp_path / "mine.vec.gz", b"cat 0 1\n")
    with fails("--embedding-path", "there: glove, mine: give"):
        load_class_embeddings(["cat"], None, tmp_path)
    with fails("no 'word2vec' vectors", str(tmp_path), "there: glove, mine"):
        load_class_embeddings(["cat"], ["word2vec"], tmp_path)


@pytest.mark.parametrize(
    ("names", "sources", "parts"),
    [
        (["cat"], ["nowhere/w.vec"], ["nowhere/w.vec"]),
        (["cat"], ["nothing"], ["no 'nothing' vectors"]),
        (["cat", "wombatish"], ["glove"], ["the shipped words", "'wombatish'", "--embedding"]),
        (["cat", "dog", "red-panda"], ["w.txt"], ["w.txt", "no vector for 'dog', 'red-panda':", "--embedding"]),
    ],
)
def test_sources_that_are_missing_and_all_names_that_lack_a_vector_are_named(
    tmp_path, monkeypatch, names, sources, parts
):
    put(tmp_path / "w.txt", b"cat 1 0\nred 0 1\n")
    monkeypatch.chdir(tmp_path)
    with fails(*parts):
        load_class_embeddings(names, sources)


def test_own_files_have_the_published_words_and_lower_case_comes_first(tmp_path):
    words = ["airplane", "aeroplane", "table", "dining", "motorbike", "houseplant", "sofa", "couch", "monitor", "TV"]
    path = put(tmp_path / "w.txt", text_bytes(dict(zip([*words, "Cat", "cat"], np.eye(12).tolist()))))
    names = ["aeroplane", "diningtable", "motorbike", "pottedplant", "sofa", "tvmonitor", "Cat"]
    found = find_class_vectors(path, names)
    assert [int(found[name].argmax()) for name in names] == [0, 2, 4, 5, 6, 8, 11]


@pytest.fixture
def classes(tmp_path):
    return put(tmp_path / "names.txt", "\n".join(NAMES).encode())


def run_build(*argv):
    assert build.main([str(argument) for argument in argv]) == 0


def test_a_built_table_has_the_lengths_of_its_source(tmp_path, classes):
    source = put(tmp_path / "GoogleNews.bin.gz", FILES["S.bin.gz"])
    out = tmp_path / "new" / "folder"
    for name in ("word2vec", "again.npy"):
        run_build("--source", source, "--classes", classes, "--licence", "free", "--output", out / name)
    assert (out / "word2vec.npy").read_bytes() == (out / "again.npy").read_bytes()
    rows, _ = load_class_embeddings(["cat", "playingfield"], ["word2vec"], out)
    np.testing.assert_allclose(rows, EXPECTED[[2, 0]], atol=1e-6)
    stored = np.load(out / "word2vec.npy")
    assert stored.dtype == np.float32 and np.allclose(np.linalg.norm(stored, axis=1), [3.5, 3**0.5, 5])
    record = json.loads((out / "word2vec.json").read_text())
    assert record["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert record["source"] == "GoogleNews.bin.gz" and record["licence"] == "free" and record["shape"] == [3, 3]


def test_classes_are_built_from_the_shipped_words_by_default(tmp_path):
    (tmp_path / "classes.txt").write_text("background\nElephant\ntraffic light\nleaf\n")
    run_build("--classes", tmp_path / "classes.txt", "--output", tmp_path / "mine")
    rows, sources = load_class_embeddings(["elephant", "Traffic_Light"], None, tmp_path)
    np.testing.assert_allclose(rows, load_class_embeddings(["elephant", "traffic light"], ["glove"])[0], atol=1e-6)
    assert sources == ["mine"]
    run_build("--output", tmp_path / "voc" / "glove")
    assert (tmp_path / "voc" / "classes.txt").read_text().split() == VOC


def test_a_built_word_file_serves_any_class_of_its_words(tmp_path):
    (tmp_path / "list").write_text("traffic\nlight\nzebra\n")
    run_build("--vocabulary", tmp_path / "list", "--output", tmp_path / "out" / "small")
    rows, _ = load_class_embeddings(["zebra", "traffic light"], None, tmp_path / "out")
    np.testing.assert_allclose(rows, load_class_embeddings(["zebra", "traffic light"], ["glove"])[0], atol=1e-6)


def test_the_builder_refuses_in_one_line_and_writes_nothing(tmp_path, classes, capsys):
    source, out = put(tmp_path / "w.vec", FILES["S.vec"]), tmp_path / "out" / "name"
    write_table(tmp_path / "old", "old", ["dog", "cat"], np.eye(2))
    (tmp_path / "twice.txt").write_text("cat\ncat\n")
    (tmp_path / "list").write_text("cat\nwombat\n")
    cases = [
        (["--source", source, "--output", out], "no vector for 'background', 'aeroplane'"),
        (["--source", tmp_path / "none.vec", "--output", out], "none.vec': check that it is there"),
        (["--source", source, "--classes", tmp_path / "twice.txt", "--output", out], "'cat' twice"),
        (["--source", source, "--vocabulary", tmp_path / "list", "--output", out], "no vector for wombat"),
        (["--source", source, "--classes", classes, "--output", tmp_path / "old" / "x"], "lists other names"),
        (["--source", source, "--classes", classes], "--output"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for argv, message in cases:
        assert message in failure(capsys, build.main, argv)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("pair", [("aeroplane", "airplane"), ("tvmonitor", "tv"), ("desk-stuff", "desk")])
def test_a_class_has_one_shipped_vector_under_every_name(pair):
    np.testing.assert_array_equal(*(load_class_embeddings([name], ["glove"])[0] for name in pair))


def test_imagenet_similarity_leaves_out_the_unseen_classes_themselves():
    categories = ["sofa bed", "ram", "chihuahua", "komondor", "Egyptian cat", "studio couch"]
    similarity = imagenet_similarity(categories, ["sofa", "sheep"], limit=0.6)
    assert similarity.shape == (6, 2) and similarity.dtype == np.float32
    assert (similarity[[0, 3, 5]] == 0).all()  # a word of an unseen class, no vector, a word of its synonym
    assert similarity[2, 1] != 0 and abs(similarity).max() <= 0.6
    strict = imagenet_similarity(categories, ["sofa", "sheep"], limit=0.0)
    assert strict.max() <= 0


def test_a_class_is_as_near_as_the_nearest_of_its_nearby_words():
    categories = ["cowboy hat", "garden spider", "komondor"]
    near = imagenet_similarity(categories, ["person", "potted plant", "dog"], limit=0.6)
    table = loading.read_table(loading.VOCABULARY)
    hat = unit_rows(sum(unit_rows(table[word][None]) for word in ("cowboy", "hat")))[0]
    words = unit_rows(np.stack([table[word] for word in loading.WORDS["nearby"]["person"]]))
    assert near[0, 0] == pytest.approx((words @ hat).max(), abs=1e-6)
    assert near[0, 2] == pytest.approx(unit_rows(table["dog"][None])[0] @ hat, abs=1e-6)
    assert (near[1:] == 0).all()  # a nearby word is left out too, it may be the class itself; no vector


# Words beside a checkpoint's classes

WORDS = ["cat", "dog", "zebra", "traffic", "light", "sofa"]


def vectors(words, dim=6, seed=0):
    return dict(zip(words, np.random.default_rng(seed).normal(size=(len(words), dim)).round(4)))


def test_words_of_a_given_file(tmp_path):
    path = put(tmp_path / "words.vec", text_bytes(vectors(WORDS)))
    cat, dog, zebra, traffic, light, _ = unit_rows(np.stack(list(vectors(WORDS).values())))
    rows = embed_words(["zebra", "traffic light"], [path], known={"cat": cat, "dog": dog})
    phrase = (traffic + light) / np.linalg.norm(traffic + light)
    assert np.allclose([rows["zebra"], rows["traffic light"]], [zebra, phrase], atol=1e-6)


@pytest.mark.parametrize("weighting", ["raw", "equal"])
def test_several_sources_are_combined_as_in_training(tmp_path, weighting):
    tables = [vectors(WORDS, 4, 1), {word: 9 * vector for word, vector in vectors(WORDS, 3, 2).items()}]
    paths = [put(tmp_path / f"{number}.txt", text_bytes(table)) for number, table in enumerate(tables)]
    trained, _ = load_class_embeddings(["cat", "zebra", "dog"], ["0", "1"], tmp_path, weighting)
    rows = embed_words(["zebra"], paths, weighting, {"cat": trained[0], "dog": trained[2]})
    assert np.allclose(rows["zebra"], trained[1], atol=1e-6)


@pytest.mark.parametrize("other", [vectors(WORDS, seed=5), vectors(WORDS, 4)], ids=["seed", "dimensions"])
def test_other_vectors_than_the_checkpoints_are_refused(tmp_path, other):
    known = dict(zip(["cat", "dog"], unit_rows(np.stack(list(vectors(WORDS).values())))))
    with fails("other.txt: not the checkpoint's vectors: ", "--vocabulary"):
        embed_words(["zebra"], [put(tmp_path / "other.txt", text_bytes(other))], known=known)
