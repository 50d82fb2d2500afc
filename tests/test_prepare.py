"""The data sets, made by the real commands from archives in their publishers' own formats."""

import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dataset import check, prepare
from dataset.masks import colours_to_values, voc_palette
from dataset.splits import NAMES, VOID, Split, read_classes
from dataset.voc import VOCFolder, index_classes
from helpers import ROOT, STAGES, arguments, evaluate, failure, load, read_values, train
from utils.errors import UserError

SIZE = (24, 20)  # width, height
VOC_TAR, SBD_TGZ = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
VOC2010_TAR, CONTEXT_TGZ = "VOCtrainval_03-May-2010.tar", "trainval.tar.gz"
MAPS_ZIP = "stuffthingmaps_trainval2017.zip"


# --- archives as the publishers pack them ---------------------------------------------------------------


def stripes(values, size=SIZE) -> np.ndarray:
    """A mask, uint8 [H, W], whose columns show the values in turn."""
    return np.tile(np.array(values, np.uint8)[np.arange(size[0]) * len(values) // size[0]], (size[1], 1))


def jpeg(seed: int, size=SIZE) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(stream, format="JPEG")
    return stream.getvalue()


def png(mask: np.ndarray, colours: bool = True) -> bytes:
    stream, image = io.BytesIO(), Image.fromarray(mask)
    if colours:
        image.putpalette(voc_palette())
    image.save(stream, format="PNG")
    return stream.getvalue()


def mat(**variables) -> bytes:
    stream = io.BytesIO()
    savemat(stream, variables)
    return stream.getvalue()


def pack_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pack_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def lines(ids) -> bytes:
    return "".join(f"{picture}\n" for picture in ids).encode()


# VOC: 4 training and 3 evaluation pictures have masks; SBD has 6 others, one of VOC's training pictures and two of its
# evaluation pictures, and divides them otherwise.
OF_VOC = {"train": [f"2007_{n:06}" for n in range(4)], "val": [f"2007_{n:06}" for n in range(10, 13)]}
OF_SBD = {
    "train": ["2008_000001", "2008_000002", "2008_000003", "2007_000011"],
    "val": ["2008_000004", "2008_000005", "2008_000006", "2007_000000", "2007_000012"],
}
TRAIN_AUG = sorted([*OF_VOC["train"], *(f"2008_{n:06}" for n in range(1, 7))])
SHOWN = {picture: [0, VOID, 1 + n % 15, 16 + n % 5] for n, picture in enumerate([*TRAIN_AUG, *OF_VOC["val"]])}


def make_voc(folder: Path) -> None:
    top, files = "VOCdevkit/VOC2012", {}
    for number, picture in enumerate([*TRAIN_AUG, *OF_VOC["val"], "2007_999999"]):  # the last is nobody's
        files[f"{top}/JPEGImages/{picture}.jpg"] = jpeg(number)
    for subset, ids in {**OF_VOC, "trainval": OF_VOC["train"] + OF_VOC["val"]}.items():
        files[f"{top}/ImageSets/Segmentation/{subset}.txt"] = lines(ids)
        for picture in ids:
            files[f"{top}/SegmentationClass/{picture}.png"] = png(stripes(SHOWN[picture]))
    files[f"{top}/Annotations/2007_000000.xml"] = b"<annotation/>"
    pack_tar(folder / VOC_TAR, files)

    top, files = "benchmark_RELEASE/dataset", {}
    for subset, ids in OF_SBD.items():
        files[f"{top}/{subset}.txt"] = lines(ids)
        for picture in ids:
            values = [0 if value == VOID else value for value in SHOWN[picture]]
            segmentation = stripes(values if picture.startswith("2008") else [0, 3])  # never to replace VOC's own
            boundaries = np.array([[np.zeros((2, 2))]], dtype=object)
            files[f"{top}/cls/{picture}.mat"] = mat(
                GTcls={"Boundaries": boundaries, "Segmentation": segmentation, "CategoriesPresent": np.unique(values)}
            )
            files[f"{top}/inst/{picture}.mat"] = b"another format"
    pack_tar(folder / SBD_TGZ, files)


CONTEXT = {"train": [f"2008_{n:06}" for n in range(6)], "val": [f"2009_{n:06}" for n in range(3)]}
CONTEXT_SHOWN = {
    picture: [0, 1 + n, 8 + n % 3, 14, 50 - n] for n, picture in enumerate([*CONTEXT["train"], *CONTEXT["val"]])
}


def make_context(folder: Path) -> None:
    top, files = "VOCdevkit/VOC2010", {}
    for subset, ids in CONTEXT.items():
        files[f"{top}/ImageSets/Main/{subset}.txt"] = lines(ids)
        files[f"{top}/ImageSets/Main/cat_{subset}.txt"] = lines(f"{picture} -1" for picture in ids)
        files |= {f"{top}/JPEGImages/{picture}.jpg": jpeg(7) for picture in ids}
    files[f"{top}/JPEGImages/2010_000001.jpg"] = jpeg(8)  # of no list
    pack_tar(folder / VOC2010_TAR, files)
    files = {"labels.txt": b"1: accordion\n2: aeroplane\n23: bicycle\n397: table\n308: pottedplant\n"}
    for picture, values in CONTEXT_SHOWN.items():
        labels = np.array([431, *prepare.CONTEXT_LABELS], np.uint16)[stripes(values)]  # 431 is none of the 59
        files[f"trainval/{picture}.mat"] = mat(LabelMap=labels)
    pack_tar(folder / CONTEXT_TGZ, files)


COCO_VALUES = list(read_classes(NAMES / "coco_stuff.txt").values())
COCO_SIZE = (57, 48)
COCO = {"train": [f"{n:012}" for n in range(1, 6)], "val": [f"{n:012}" for n in range(100, 102)]}


def coco_map(number: int) -> np.ndarray:
    """Every class in one picture, in blocks of 4 x 4 pixels that differ from picture to picture, and void."""
    values = np.array([*np.roll(COCO_VALUES, number), *([VOID] * 9)], np.uint8).reshape(12, 15)
    return np.kron(values, np.ones((4, 4), np.uint8))[:, : COCO_SIZE[0]]


def make_coco(folder: Path) -> None:
    maps = {}
    for subset, ids in COCO.items():
        pack_zip(folder / f"{subset}2017.zip", {f"{subset}2017/{p}.jpg": jpeg(int(p), COCO_SIZE) for p in ids})
        maps |= {f"{subset}2017/{picture}.png": png(coco_map(int(picture)), colours=False) for picture in ids}
    pack_zip(folder / MAPS_ZIP, maps)


MAKE = {"voc": make_voc, "pascal_context": make_context, "coco_stuff": make_coco}
COUNTS = {
    "voc": {"train": 10, "val": 3},
    "pascal_context": {"train": 6, "val": 3},
    "coco_stuff": {"train": 5, "val": 2},
}


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Path:
    """A folder with the archives of all three data sets."""
    folder = tmp_path_factory.mktemp("served")
    for make in MAKE.values():
        make(folder)
    return folder


def table(folder: Path, base: str) -> dict:
    """The publishers' table with the URLs and checksums of the archives in `folder`; who has no checksum gets none."""

    def local(archive):
        digest = hashlib.md5((folder / archive.name).read_bytes()).hexdigest()
        return replace(archive, url=f"{base}/{archive.name}", md5=archive.md5 and digest, size=10_000, unpacked=100_000)

    return {dataset: tuple(map(local, archives)) for dataset, archives in prepare.ARCHIVES.items()}


@pytest.fixture
def local(served, monkeypatch):
    """The commands fetch from disk and expect the drawn pictures' counts."""
    for dataset, archives in table(served, served.as_uri()).items():
        monkeypatch.setitem(prepare.ARCHIVES, dataset, archives)
        monkeypatch.setitem(check.EXPECTED, dataset, COUNTS[dataset])


def command(dataset, folder, *flags) -> list[str]:
    return [dataset, "--data-path", str(folder), *map(str, flags)]


def bad(capsys, dataset, folder, *flags) -> str:
    return failure(capsys, prepare.main, command(dataset, folder, *flags))


def every_file(folder: Path) -> dict[str, tuple[bytes, int]]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


# --- what the commands make -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def made(served, tmp_path_factory):
    """The three data sets, made once by the commands. Read only."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        for dataset, archives in table(served, served.as_uri()).items():
            patch.setitem(prepare.ARCHIVES, dataset, archives)
            patch.setitem(check.EXPECTED, dataset, COUNTS[dataset])
            assert prepare.main(command(dataset, folder / dataset)) == 0
    return folder


def test_voc_is_joined_with_sbd(made):
    folder = VOCFolder.open(made / "voc")
    assert folder.masks.name == "SegmentationClassAug"
    assert folder.read_list(None, ("train_aug",)) == TRAIN_AUG
    assert folder.read_list(None, ("val",)) == OF_VOC["val"]
    for picture, values in SHOWN.items():
        kept = [0 if value == VOID else value for value in values] if picture.startswith("2008") else values
        np.testing.assert_array_equal(read_values(folder.mask_path(picture)), stripes(kept))
    with Image.open(folder.mask_path("2008_000001")) as mask:
        assert mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0]


def test_context_has_the_59_classes_and_void_of_none(made):
    folder = VOCFolder.open(made / "pascal_context")
    assert folder.read_list(None, ("train",)) == CONTEXT["train"] and folder.read_list(None, ("val",)) == CONTEXT["val"]
    for picture, values in CONTEXT_SHOWN.items():
        np.testing.assert_array_equal(read_values(folder.mask_path(picture)), stripes(values))
    assert not folder.image_path("2010_000001").exists()


def test_coco_maps_are_as_published(made):
    folder = VOCFolder.open(made / "coco_stuff")
    assert folder.read_list(None, ("train",)) == COCO["train"]
    for picture in COCO["val"]:
        np.testing.assert_array_equal(read_values(folder.mask_path(picture)), coco_map(int(picture)))
    split = Split.named("coco-stuff")
    shown = index_classes(folder, COCO["train"], split.known_values)
    assert all(values == set(COCO_VALUES) and len(values) == 171 for values in shown.values())


def test_the_class_index_is_ready_for_training(made):
    """The check has read every mask: training need not."""
    index = json.loads((made / "voc/class_index_SegmentationClassAug.json").read_text())
    assert set(index) == set(SHOWN) and index["2008_000001"]["values"] == sorted({0, *SHOWN["2008_000001"]} - {VOID})


def test_what_was_made_is_told(made, local, capsys):
    assert prepare.main(command("voc", made / "voc", "--check")) == 0
    text = capsys.readouterr().out
    assert "train: 10 pictures" in text and "val: 3 pictures" in text and "is ready" in text
    counts = {name: sum(number in SHOWN[p] for p in TRAIN_AUG) for number, name in ((1, "aeroplane"), (17, "sheep"))}
    assert all(f"{name} {count}" in text for name, count in counts.items())


@pytest.mark.parametrize(
    "dataset, split, classes",
    [("voc", "spnet", 20), ("pascal_context", "context-33", 33), ("pascal_context", "context-zs3-10", 60),
     ("coco_stuff", "coco-stuff", 171)],
)  # fmt: skip
def test_both_stages_and_evaluation_on_each(made, tmp_path, capsys, dataset, split, classes):
    plan = {"split": split, "max_steps": "1", "batch_size": "2"}
    train(1, made / dataset, tmp_path, **plan)
    folder = train(2, made / dataset, tmp_path, restore_from_where="saved", **plan)
    setting = load(folder / "latest.pth")["setting"]
    assert setting["split"] == split and len(setting["seen"]) + len(setting["unseen"]) == classes
    assert setting["background"] is ("zs3" in split)
    capsys.readouterr()
    assert evaluate(folder / "latest.pth", made / dataset, "--split", split, "--save-dir", tmp_path / "pictures") == 0
    table = capsys.readouterr().out
    assert all(name + "*" in table for name in setting["unseen"]) and f"split {split}" in table
    saved = sorted((tmp_path / "pictures/masks").iterdir())
    assert len(saved) == COUNTS[dataset]["val"] and len(list((tmp_path / "pictures/overlays").iterdir())) == len(saved)
    assert set(np.unique(read_values(saved[0])).tolist()) <= set(Split.named(split).mask_values)


def test_a_split_of_another_data_set_is_refused(made, tmp_path, capsys):
    line = failure(capsys, STAGES[1].main, arguments(made / "voc", tmp_path, split="coco-stuff"))
    assert "other classes" in line and "--split" in line
    line = failure(capsys, STAGES[1].main, arguments(made / "coco_stuff", tmp_path, split="1"))
    assert "classes.txt" in line


# --- again, after a stop, from elsewhere ----------------------------------------------------------------


def test_a_rerun_does_nothing_again(local, tmp_path):
    assert prepare.main(command("voc", tmp_path)) == 0
    before = every_file(tmp_path)
    for path in (tmp_path / "archives").iterdir():
        path.unlink()  # they may go
    assert prepare.main(command("voc", tmp_path)) == 0
    changed = {name for name, seen in every_file(tmp_path).items() if seen != before[name]}
    assert changed <= {"classes.txt", "class_index_SegmentationClassAug.json"}


IN_ANOTHER_PROCESS = """
import os, pickle, resource, signal, sys
from dataset import check, prepare, files
prepare.ARCHIVES["voc"] = tuple(
    type(a)(url, md5, 1, 1, a.unpack) for a, (url, md5) in zip(prepare.ARCHIVES["voc"], {table!r})
)
check.EXPECTED["voc"] = {counts!r}
{before}
prepare.main(["voc", "--data-path", {folder!r}])
"""


def elsewhere(served: Path, folder: Path, before: str) -> subprocess.CompletedProcess:
    archives = [(a.url, a.md5) for a in table(served, served.as_uri())["voc"]]
    code = IN_ANOTHER_PROCESS.format(
        table=archives, counts=COUNTS["voc"], folder=str(folder), before=textwrap.dedent(before)
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_killed_half_way_and_run_again(served, local, made, tmp_path):
    killed = elsewhere(
        served, tmp_path,
        """
        write, left = files.write_bytes, iter(range(9))
        def write_nine(path, data):
            if next(left, None) is None:
                path.with_name("." + path.name).write_bytes(data[:10])  # half a file, as a kill leaves it
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, data)
        prepare.write_bytes = write_nine
        """,
    )  # fmt: skip
    assert killed.returncode == -9
    done = {n: seen for n, seen in every_file(tmp_path).items() if "JPEGImages/2" in n}
    assert len(done) == 9
    assert prepare.main(command("voc", tmp_path)) == 0
    after = every_file(tmp_path)
    assert all(after[name] == seen for name, seen in done.items())
    whole = {n: data for n, (data, _) in every_file(made / "voc").items() if n.endswith((".jpg", ".png", ".txt"))}
    assert all(after[name][0] == data for name, data in whole.items())


def test_a_full_disk_ends_in_one_line_and_keeps_what_is_done(served, local, tmp_path):
    """A limit on the size of a file is what a process without a disk of its own can have filled up."""
    full = elsewhere(served, tmp_path, "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))")
    assert full.returncode == 2 and full.stderr.startswith("error: ") and full.stderr.count("\n") == 1, full.stderr
    assert "make room" in full.stderr
    assert prepare.main(command("voc", tmp_path)) == 0


def test_free_disk_is_looked_at_first(local, tmp_path, monkeypatch, capsys):
    huge = replace(prepare.ARCHIVES["voc"][0], unpacked=10**16)
    monkeypatch.setitem(prepare.ARCHIVES, "voc", (huge, *prepare.ARCHIVES["voc"][1:]))
    line = bad(capsys, "voc", tmp_path / "new")
    assert "10000000.0 GB are needed" in line and "free" in line
    assert not (tmp_path / "new").exists()


def test_archives_on_disk_are_taken(local, served, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "fetch", None)  # nothing is fetched
    assert prepare.main(command("voc", tmp_path, "--archive", served / SBD_TGZ, served / VOC_TAR)) == 0
    assert not (tmp_path / "archives").exists()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a folder, from the byte that is asked for; breaks off the first answer half way."""

    protocol_version = "HTTP/1.0"
    asked: list

    def __init__(self, folder, asked, *rest):
        self.folder, self.asked = folder, asked
        super().__init__(*rest)

    def do_GET(self):
        data = (self.folder / self.path.lstrip("/")).read_bytes()
        wanted = self.headers.get("Range")
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.asked.append((self.path, begin))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self.wfile.write(data[begin : len(data) // 2] if len(self.asked) == 1 else data[begin:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(served):
    """The address of a server of the archives, and what it was asked for."""
    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, served, asked)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_a_fetch_that_broke_off_goes_on(local, served, server, tmp_path, monkeypatch, capsys):
    address, asked = server
    monkeypatch.setitem(prepare.ARCHIVES, "voc", table(served, address)["voc"])
    line = bad(capsys, "voc", tmp_path)
    assert "can't be fetched" in line and "--archive" in line
    assert prepare.main(command("voc", tmp_path)) == 0
    size = (served / VOC_TAR).stat().st_size
    assert asked == [(f"/{VOC_TAR}", 0), (f"/{VOC_TAR}", size // 2), (f"/{SBD_TGZ}", 0)]
    assert (tmp_path / "archives" / VOC_TAR).read_bytes() == (served / VOC_TAR).read_bytes()


def test_a_server_out_of_reach_is_one_line(local, tmp_path, monkeypatch, capsys):
    gone = replace(prepare.ARCHIVES["voc"][0], url=f"http://127.0.0.1:9/{VOC_TAR}")
    monkeypatch.setitem(prepare.ARCHIVES, "voc", (gone,))
    assert f"127.0.0.1:9/{VOC_TAR} can't be fetched" in bad(capsys, "voc", tmp_path)


# --- bad archives ---------------------------------------------------------------------------------------


def test_a_damaged_archive_is_known_by_its_checksum(local, served, tmp_path, capsys):
    spoilt = tmp_path / VOC_TAR
    data = bytearray((served / VOC_TAR).read_bytes())
    data[700] ^= 1
    spoilt.write_bytes(data)
    line = bad(capsys, "voc", tmp_path / "new", "--archive", spoilt)
    assert str(spoilt) in line and "MD5" in line and "fetch it again" in line


def test_a_spoilt_download_is_thrown_away(local, tmp_path, monkeypatch, capsys):
    wrong = replace(prepare.ARCHIVES["voc"][0], md5="0" * 32)
    monkeypatch.setitem(prepare.ARCHIVES, "voc", (wrong,))
    assert "arrived damaged" in bad(capsys, "voc", tmp_path)
    assert list((tmp_path / "archives").iterdir()) == []


@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_a_cut_archive_without_checksum_is_broken(local, served, tmp_path, capsys, keep):
    data = (served / CONTEXT_TGZ).read_bytes()
    (tmp_path / CONTEXT_TGZ).write_bytes(data[: int(len(data) * keep)])
    flags = ["--archive", tmp_path / CONTEXT_TGZ, served / VOC2010_TAR]
    line = bad(capsys, "pascal_context", tmp_path / "new", *flags)
    assert f"{CONTEXT_TGZ} is broken" in line
    (tmp_path / CONTEXT_TGZ).write_bytes(data)
    assert prepare.main(command("pascal_context", tmp_path / "new", *flags)) == 0  # nothing of it is left


def unsafe_archives(folder: Path) -> list[Path]:
    """Archives that would write outside of the folder, each in another way."""
    made = []
    for number, name in enumerate(
        ["../evil.jpg", "/evil.jpg", "train2017/../../evil.jpg", "..\\evil.jpg", "C:/evil.jpg"]
    ):
        (folder / str(number)).mkdir()
        made.append(pack_zip(folder / str(number) / "val2017.zip", {"val2017/a.jpg": b"a", name: b"evil"}))
    return made


def test_zips_that_would_write_outside_are_refused(local, served, tmp_path, monkeypatch, capsys):
    archives = {archive.name: archive for archive in prepare.ARCHIVES["coco_stuff"]}
    monkeypatch.setitem(prepare.ARCHIVES, "coco_stuff", (replace(archives["val2017.zip"], md5=None),))
    for path in unsafe_archives(tmp_path):
        line = bad(capsys, "coco_stuff", path.parent / "inside/new", "--archive", path)
        assert "outside of the folder" in line and str(path) in line
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("name, link", [("../x", None), ("/x", None), ("a", "/etc"), ("b/a", "../../x"), ("a", "..")])
def test_tars_that_would_write_or_link_outside_are_refused(local, tmp_path, monkeypatch, capsys, name, link):
    (context,) = (a for a in prepare.ARCHIVES["pascal_context"] if a.name == CONTEXT_TGZ)
    monkeypatch.setitem(prepare.ARCHIVES, "pascal_context", (context,))
    with tarfile.open(tmp_path / CONTEXT_TGZ, "w:gz") as archive:
        info = tarfile.TarInfo(name)
        if link is not None:
            info.type, info.linkname = tarfile.SYMTYPE, link
        archive.addfile(info, io.BytesIO(b""))
    line = bad(capsys, "pascal_context", tmp_path / "new", "--archive", tmp_path / CONTEXT_TGZ)
    assert "outside of the folder" in line


@pytest.mark.parametrize(
    "files, words",
    [
        ({"trainval/x.mat": b"no MATLAB file"}, ["x.mat", "MATLAB"]),
        ({"trainval/x.mat": mat(Other=np.zeros((2, 2)))}, ["x.mat", "MATLAB"]),
        ({"trainval/x.mat": mat(LabelMap=np.full((2, 2), 460, np.uint16))}, ["x.mat", "460"]),
        ({"labels.txt": b"2: accordion\n"}, ["labels.txt", "label 2 'accordion'", "'aeroplane'"]),
    ],
    ids=["no mat", "another mat", "another label", "another list"],
)
def test_annotations_of_another_kind_are_refused(local, tmp_path, monkeypatch, capsys, files, words):
    (context,) = (a for a in prepare.ARCHIVES["pascal_context"] if a.name == CONTEXT_TGZ)
    monkeypatch.setitem(prepare.ARCHIVES, "pascal_context", (context,))
    pack_tar(tmp_path / CONTEXT_TGZ, files)
    line = bad(capsys, "pascal_context", tmp_path / "new", "--archive", tmp_path / CONTEXT_TGZ)
    assert all(word in line for word in words), line


def test_other_archives_and_other_folders_are_refused(local, served, made, tmp_path, capsys):
    line = bad(capsys, "voc", tmp_path, "--archive", served / MAPS_ZIP)
    assert MAPS_ZIP in line and VOC_TAR in line
    assert "not a file" in bad(capsys, "voc", tmp_path, "--archive", tmp_path / VOC_TAR)
    assert "other classes" in bad(capsys, "pascal_context", made / "voc")
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages").mkdir(parents=True)
    assert "like VOC's" in bad(capsys, "pascal_context", tmp_path)


# --- the check ------------------------------------------------------------------------------------------


@pytest.fixture
def by_hand(made, tmp_path) -> VOCFolder:
    """A copy of VOC as somebody else would have made it: without our own files."""
    shutil.copytree(
        made / "voc", tmp_path / "VOC2012", ignore=shutil.ignore_patterns("*.json", "classes.txt", "archives")
    )
    return VOCFolder.open(tmp_path)


def test_a_good_tree_made_by_hand_passes_and_stays_as_it_is(by_hand, local):
    before = every_file(by_hand.root)
    assert prepare.main(command("voc", by_hand.root.parent, "--check")) == 0
    assert every_file(by_hand.root) == before


def test_the_check_tells_everything_that_is_wrong(by_hand, local, capsys):
    train_aug = by_hand.lists / "train_aug.txt"
    train_aug.write_text(train_aug.read_text() + OF_VOC["val"][0] + "\n")
    wrong_size, colour, missing, value, no_picture = TRAIN_AUG[:5]
    Image.fromarray(stripes([0, 3], (10, 20))).save(by_hand.mask_path(wrong_size))
    with Image.open(by_hand.mask_path(colour)) as mask:
        mask.convert("RGB").save(by_hand.mask_path(colour))
    by_hand.mask_path(missing).unlink()
    Image.fromarray(stripes([0, 99])).save(by_hand.mask_path(value))
    by_hand.image_path(no_picture).unlink()
    with pytest.raises(SystemExit) as caught:
        prepare.main(command("voc", by_hand.root, "--check"))
    out, err = capsys.readouterr()
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert caught.value.code == 2 and "has 7 problems" in err and err.count("\n") == 1 and len(problems) == 7
    wanted = [
        "11 pictures; published tables use 10", f"among the training pictures, {OF_VOC['val'][0]}",
        f"{wrong_size}.png is 10 x 20 but", f"{colour}.png is a colour mask", f"{missing}.png is missing",
        f"{value}.png holds the value 99", f"{no_picture}.jpg is missing",
    ]  # fmt: skip
    assert all(any(words in problem for problem in problems) for words in wanted), problems


def test_the_check_names_what_published_tables_use(by_hand, capsys):
    """With the publishers' own counts; a tree of VOC alone has 1,464 training pictures."""
    with pytest.raises(SystemExit):
        prepare.main(command("voc", by_hand.root, "--check"))
    out = capsys.readouterr().out
    assert "published tables use 10,582" in out and "published tables use 1,449" in out


def test_the_check_of_nothing_is_one_line(tmp_path, capsys):
    assert "is not a folder" in bad(capsys, "voc", tmp_path / "no", "--check")
    assert "--check changes nothing" in bad(capsys, "voc", tmp_path, "--check", "--convert-colour-masks")


# --- one's own pictures ---------------------------------------------------------------------------------

OWN = ["background", "meadow", "sheep", "sofa", "traffic light"]


@pytest.fixture
def own(tmp_path) -> Path:
    """Ten PNG pictures, nine with masks, and a file of names."""
    folder = tmp_path / "own"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(10):
        Image.open(io.BytesIO(jpeg(number))).save(folder / "images" / f"photo {number}.png")
        if number < 9:
            values = [0, 1, 2 + number % 3, 4]
            Image.fromarray(stripes(values)).save(folder / "masks" / f"photo {number}.png")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in OWN))
    return folder


def test_own_pictures_need_no_code(own, tmp_path, capsys):
    assert prepare.main(command("own", own)) == 0
    text = capsys.readouterr().out
    assert "train: 7 pictures with masks, 1 without" in text and "--target-images all" in text
    assert (own / "val.txt").read_text().split("\n") == ["photo 0", "photo 5", ""]
    (own / "classes.txt").write_text("".join(f"{name}\n" for name in ["background", "grass", *OWN[2:]]))
    plan = {"split": None, "max_steps": "1", "unseen": "sheep, sofa"}
    output = tmp_path / "runs"
    STAGES[1].main(arguments(own, output, target_images="all", **plan))
    STAGES[2].main(arguments(own, output, target_images="all", restore_from_where="saved", **plan))
    checkpoint = output / "splitunseen-sheep-sofa/stage2/latest.pth"
    setting = load(checkpoint)["setting"]
    assert setting["seen"] == ["grass", "traffic light"] and setting["unseen"] == ["sheep", "sofa"]
    assert evaluate(checkpoint, own, "--json", tmp_path / "result.json") == 0
    assert set(json.loads((tmp_path / "result.json").read_text())["per_class"]) == {
        *setting["seen"],
        *setting["unseen"],
    }


def test_lists_of_ones_own_stay(own):
    (own / "train.txt").write_text("photo 1\nphoto 2\n")
    (own / "val.txt").write_text("photo 3\n")
    before = (own / "train.txt").read_bytes()
    assert prepare.main(command("own", own)) == 0 and (own / "train.txt").read_bytes() == before


def test_an_empty_list_is_told(own, capsys):
    (own / "train.txt").write_text("photo 1\n")
    (own / "val.txt").write_text("\n")
    assert "val.txt is empty" in bad(capsys, "own", own)


def test_unseen_classes_that_are_none_are_refused(own, tmp_path, capsys):
    plan = {"split": None, "max_steps": "1"}
    line = failure(capsys, STAGES[1].main, arguments(own, tmp_path, unseen="sheeps", **plan))
    assert "'sheeps'" in line and "did you mean sheep?" in line
    line = failure(capsys, STAGES[1].main, arguments(own, tmp_path, unseen=",".join(OWN[1:]), **plan))
    assert "at least one seen" in line
    assert "not allowed with" in failure(capsys, STAGES[1].main, arguments(own, tmp_path, unseen="sheep", split="2"))


@pytest.mark.parametrize(
    "text, words",
    [("", "empty"), ("a\na\n", "'a'"), ("255: a\n", "'255: a'"), ("1: a\n1: b\n", "'1: b'"), ("2:\n", "'2:'")],
)
def test_class_files_that_make_no_sense_are_refused(own, capsys, text, words):
    (own / "classes.txt").write_text(text)
    line = bad(capsys, "own", own)
    assert "classes.txt" in line and words in line


def test_a_missing_class_file_is_named(own, capsys):
    (own / "classes.txt").unlink()
    assert "classes.txt is missing" in bad(capsys, "own", own)


# --- colour masks ---------------------------------------------------------------------------------------


def test_colour_masks_are_refused_and_converted(own, tmp_path, capsys):
    assert prepare.main(command("own", own)) == 0
    before = {path.name: read_values(path) for path in (own / "masks").iterdir()}
    palette = np.array(voc_palette(), np.uint8).reshape(256, 3)
    for name, mask in before.items():
        mask[0] = VOID
        Image.fromarray(palette[mask]).save(own / "masks" / name)
    plan = {"split": None, "max_steps": "1", "unseen": "sheep", "target_images": "all"}
    line = failure(capsys, STAGES[1].main, arguments(own, tmp_path / "runs", **plan))
    assert "colour mask" in line and "--convert-colour-masks" in line
    assert prepare.main(command("own", own, "--convert-colour-masks")) == 0
    assert "9 of 9 masks were colour masks" in capsys.readouterr().out
    for name, mask in before.items():
        np.testing.assert_array_equal(read_values(own / "masks" / name), mask)
        np.testing.assert_array_equal(read_values(own / "masks_colour" / name), palette[mask])
    assert prepare.main(command("own", own, "--convert-colour-masks")) == 0  # nothing is left to convert
    assert "0 of 9" in capsys.readouterr().out


def test_a_colour_of_no_class_changes_nothing(own, capsys):
    path = own / "masks/photo 3.png"
    Image.fromarray(np.full((20, 24, 3), (1, 2, 3), np.uint8)).save(path)
    before = every_file(own / "masks")
    line = bad(capsys, "own", own, "--convert-colour-masks")
    assert "(1, 2, 3)" in line and "photo 3.png" in line
    assert every_file(own / "masks") == before and not (own / "masks_colour").exists()


def test_indices_saved_as_grey_colours_are_indices():
    mask = stripes([0, 3, 20, VOID])
    known = range(21)
    np.testing.assert_array_equal(colours_to_values(np.stack([mask] * 3, axis=-1), known, Path("x")), mask)
    grey = np.full((2, 2, 3), 128, np.uint8)  # the colour of VOC's class 7, and no index
    np.testing.assert_array_equal(colours_to_values(grey, known, Path("x")), np.full((2, 2), 7))
    with pytest.raises(UserError, match=r"\(99, 99, 99\)"):
        colours_to_values(np.full((2, 2, 3), 99, np.uint8), known, Path("x"))


# --- the publishers' table ------------------------------------------------------------------------------


def test_the_table_is_torchvisions_where_it_has_one():
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    voc, sbd = prepare.ARCHIVES["voc"]
    assert (voc.name, voc.md5) == (VOC_TAR, DATASET_YEAR_DICT["2012"]["md5"]) and sbd.md5 == SBDataset.md5
    names = [archive.name for archives in prepare.ARCHIVES.values() for archive in archives]
    assert names == [
        VOC_TAR, SBD_TGZ, VOC2010_TAR, CONTEXT_TGZ, MAPS_ZIP, "val2017.zip", "train2017.zip",
    ]  # fmt: skip
    assert all(archive.url.startswith("http") for archives in prepare.ARCHIVES.values() for archive in archives)
    assert len(set(prepare.CONTEXT_LABELS)) == 59 and os.path.basename(MAPS_ZIP) in names
