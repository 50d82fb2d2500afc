"""The data sets, made by the real commands from archives in their publishers' own formats; and images of one's own."""

import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

from dataset import prepare
from dataset.splits import NAMES, VOID, Split, read_classes
from dataset.voc import VOCFolder
from helpers import STAGES, arguments, contents, evaluate, failure, load, same, stored, train, weights
from masks import read_values
from utils.visualize import voc_palette

SIZE = (24, 20)  # width, height
VOC_TAR, SBD_TGZ = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
VOC2010_TAR, CONTEXT_TGZ = "VOCtrainval_03-May-2010.tar", "trainval.tar.gz"
CONTEXT_LABELS = prepare.PUBLISHED["pascal_context"]["labels"]


# --- archives as the publishers pack them ---------------------------------------------------------------


def stripes(values, size=SIZE) -> np.ndarray:
    """A mask, uint8 [H, W], whose columns show the values in turn."""
    return np.tile(np.array(values, np.uint8)[np.arange(size[0]) * len(values) // size[0]], (size[1], 1))


def jpeg(seed: int, size=SIZE) -> bytes:
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))
    return stored(lambda stream: noise.save(stream, "JPEG"))


def png(mask: np.ndarray, colours: bool = True) -> bytes:
    image = Image.fromarray(mask)
    if colours:
        image.putpalette(voc_palette().tobytes())
    return stored(lambda stream: image.save(stream, "PNG"))


def mat(**variables) -> bytes:
    return stored(lambda stream: savemat(stream, variables))


def pack(path: Path, files: dict[str, bytes]) -> None:
    """Makes an archive of the kind that its name says."""
    kind = {".tar": "tar", ".zip": "zip"}.get(path.suffix, "gztar")
    with tempfile.TemporaryDirectory() as tree:
        for name, data in files.items():
            (Path(tree) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(tree) / name).write_bytes(data)
        Path(shutil.make_archive(str(path) + ".new", kind, tree)).rename(path)


def lines(ids) -> bytes:
    return "".join(f"{image}\n" for image in ids).encode()


# VOC: 4 training and 3 evaluation images have masks; SBD has 6 others, one of VOC's training images and two of its
# evaluation images, and divides them otherwise.
OF_VOC = {"train": [f"2007_{n:06}" for n in range(4)], "val": [f"2007_{n:06}" for n in range(10, 13)]}
OF_SBD = {
    "train": ["2008_000001", "2008_000002", "2008_000003", "2007_000011"],
    "val": ["2008_000004", "2008_000005", "2008_000006", "2007_000000", "2007_000012"],
}
TRAIN_AUG = sorted([*OF_VOC["train"], *(f"2008_{n:06}" for n in range(1, 7))])
SHOWN = {image: [0, VOID, 1 + n % 15, 16 + n % 5] for n, image in enumerate([*TRAIN_AUG, *OF_VOC["val"]])}


def voc_mask(image: str) -> np.ndarray:
    """SBD's have no void."""
    return stripes([0 if value == VOID and image.startswith("2008") else value for value in SHOWN[image]])


def make_voc(folder: Path) -> None:
    top, files = "VOCdevkit/VOC2012", {}
    for number, image in enumerate([*TRAIN_AUG, *OF_VOC["val"], "2007_999999"]):  # the last is nobody's
        files[f"{top}/JPEGImages/{image}.jpg"] = jpeg(number)
    for subset, ids in {**OF_VOC, "trainval": OF_VOC["train"] + OF_VOC["val"]}.items():
        files[f"{top}/ImageSets/Segmentation/{subset}.txt"] = lines(ids)
        for image in ids:
            files[f"{top}/SegmentationClass/{image}.png"] = png(stripes(SHOWN[image]))
    files[f"{top}/Annotations/2007_000000.xml"] = b"<annotation/>"
    pack(folder / VOC_TAR, files)

    top, files = "benchmark_RELEASE/dataset", {}
    for subset, ids in OF_SBD.items():
        files[f"{top}/{subset}.txt"] = lines(ids)
        for image in ids:
            segmentation = voc_mask(image) if image.startswith("2008") else stripes([0, 3])  # not to replace VOC's own
            boundaries = np.array([[np.zeros((2, 2))]], dtype=object)
            files[f"{top}/cls/{image}.mat"] = mat(GTcls={"Boundaries": boundaries, "Segmentation": segmentation})
            files[f"{top}/inst/{image}.mat"] = b"another format"
    pack(folder / SBD_TGZ, files)


CONTEXT = {"train": [f"2008_{n:06}" for n in range(6)], "val": [f"2009_{n:06}" for n in range(3)]}
CONTEXT_SHOWN = {p: [0, 1 + n, 8 + n % 3, 14, 50 - n] for n, p in enumerate([*CONTEXT["train"], *CONTEXT["val"]])}


def make_context(folder: Path) -> None:
    top, files = "VOCdevkit/VOC2010", {}
    for subset, ids in CONTEXT.items():
        files[f"{top}/ImageSets/Main/{subset}.txt"] = lines(ids)
        files[f"{top}/ImageSets/Main/cat_{subset}.txt"] = lines(f"{image} -1" for image in ids)
        files |= {f"{top}/JPEGImages/{image}.jpg": jpeg(7) for image in ids}
    pack(folder / VOC2010_TAR, files)
    files = {"labels.txt": b"1: accordion\n2: aeroplane\n23: bicycle\n397: table\n308: pottedplant\n"}
    for image, values in CONTEXT_SHOWN.items():
        labels = np.array([431, *CONTEXT_LABELS], np.uint16)[stripes(values)]  # 431 is none of the 59
        files[f"trainval/{image}.mat"] = mat(LabelMap=labels)
    pack(folder / CONTEXT_TGZ, files)


COCO_VALUES = list(read_classes(NAMES / "coco_stuff.txt").values())
COCO_SIZE = (57, 48)
COCO = {"train": [f"{n:012}" for n in range(1, 6)], "val": [f"{n:012}" for n in range(100, 102)]}


def coco_map(image: str) -> np.ndarray:
    """Every class in one image, in blocks of 4 x 4 pixels that differ from image to image, and void."""
    values = np.array([*np.roll(COCO_VALUES, int(image)), *([VOID] * 9)], np.uint8).reshape(12, 15)
    return np.kron(values, np.ones((4, 4), np.uint8))[:, : COCO_SIZE[0]]


def make_coco(folder: Path) -> None:
    maps = {}
    for subset, ids in COCO.items():
        pack(folder / f"{subset}2017.zip", {f"{subset}2017/{p}.jpg": jpeg(int(p), COCO_SIZE) for p in ids})
        maps |= {f"{subset}2017/{image}.png": png(coco_map(image), colours=False) for image in ids}
    pack(folder / "stuffthingmaps_trainval2017.zip", maps)


MAKE = {"voc": make_voc, "pascal_context": make_context, "coco_stuff": make_coco}
MASKS = {"voc": voc_mask, "pascal_context": lambda image: stripes(CONTEXT_SHOWN[image]), "coco_stuff": coco_map}
LISTS = {"voc": {"train": TRAIN_AUG, "val": OF_VOC["val"]}, "pascal_context": CONTEXT, "coco_stuff": COCO}


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Path:
    """A folder with the archives of all three data sets."""
    folder = tmp_path_factory.mktemp("served")
    for make in MAKE.values():
        make(folder)
    return folder


def of(dataset: str) -> list[str]:
    """The names of its archives."""
    return [archive["url"].rpartition("/")[2] for archive in prepare.PUBLISHED[dataset]["archives"]]


def expect(served: Path, patch: pytest.MonkeyPatch) -> None:
    """The commands expect these archives and their counts; none can be fetched. Who has no checksum gets none."""
    for dataset, facts in prepare.PUBLISHED.items():
        archives = []
        for archive, name in zip(facts["archives"], of(dataset)):
            md5 = archive["md5"] and hashlib.md5((served / name).read_bytes()).hexdigest()
            archives.append(archive | {"url": f"http://127.0.0.1:9/{name}", "md5": md5})
        counts = {subset: len(ids) for subset, ids in LISTS[dataset].items()}
        patch.setitem(prepare.PUBLISHED, dataset, facts | counts | {"archives": archives})


@pytest.fixture
def local(served, monkeypatch) -> Path:
    expect(served, monkeypatch)
    return served


def with_archives(root: Path, served: Path, *names: str) -> Path:
    """The folder of a data set with archives that were fetched by other means."""
    (root / "archives").mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(served / name, root / "archives")
    return root


def run(dataset, folder, *flags) -> None:
    assert prepare.main([dataset, "--data-path", str(folder), *flags]) == 0


def bad(capsys, dataset, folder, *flags) -> str:
    return failure(capsys, prepare.main, [dataset, "--data-path", folder, *flags])


# --- what the commands make -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def made(served, tmp_path_factory):
    """The three data sets, made once by the commands. Read only."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        expect(served, patch)
        for dataset in MAKE:
            run(dataset, with_archives(folder / dataset, served, *of(dataset)))
    return folder


@pytest.mark.parametrize("dataset", MAKE)
def test_lists_and_masks_are_as_published(made, dataset):
    """VOC's with those of SBD; PASCAL Context's of 59 classes, with void for the others."""
    folder = VOCFolder.open(made / dataset)
    for subset, ids in LISTS[dataset].items():
        assert folder.read_list(None if subset == "train" else subset) == ids
        for image in ids:
            np.testing.assert_array_equal(read_values(folder.mask_path(image)), MASKS[dataset](image))
    with Image.open(folder.mask_path(LISTS[dataset]["train"][-1])) as mask:
        assert dataset == "coco_stuff" or (mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0])


@pytest.mark.parametrize(
    "dataset, split, classes",
    [("voc", "spnet", 20), ("pascal_context", "context-33", 33), ("pascal_context", "context-zs3-10", 60),
     ("coco_stuff", "coco-stuff", 171)],
)  # fmt: skip
def test_both_stages_and_evaluation_on_each(made, tmp_path, capsys, dataset, split, classes):
    plan = {"split": split, "max_steps": "1", "batch_size": "2"}
    train(1, made / dataset, tmp_path, **plan)
    folder = train(2, made / dataset, tmp_path, restore_from_where="saved", **plan)
    metadata = load(folder / "latest.pth")["metadata"]
    assert metadata["split"] == split and len(metadata["seen"]) + len(metadata["unseen"]) == classes
    assert metadata["background"] == ("score" if "zs3" in split else "ignore")
    capsys.readouterr()
    assert evaluate(folder / "latest.pth", made / dataset, "--split", split, "--save-dir", tmp_path / "images") == 0
    table = capsys.readouterr().out
    assert all(name + "*" in table for name in metadata["unseen"]) and f"split {split}" in table
    saved = sorted((tmp_path / "images/masks").iterdir())
    assert len(saved) == len(LISTS[dataset]["val"]) == len(list((tmp_path / "images/overlays").iterdir()))
    assert set(np.unique(read_values(saved[0])).tolist()) <= set(Split.named(split).mask_values)


def test_a_split_of_another_data_set_is_refused(made, tmp_path, capsys):
    line = failure(capsys, STAGES[1].main, arguments(made / "voc", tmp_path, split="coco-stuff"))
    assert "other classes" in line and "--split" in line
    line = failure(capsys, STAGES[1].main, arguments(made / "coco_stuff", tmp_path, split="1"))
    assert "classes.txt" in line


# --- again, after a stop, from elsewhere ----------------------------------------------------------------


def test_a_rerun_does_nothing_again(local, tmp_path):
    run("voc", with_archives(tmp_path, local, SBD_TGZ, VOC_TAR))
    before = contents(tmp_path)
    for path in (tmp_path / "archives").iterdir():
        path.unlink()  # they may be deleted, and nothing else is there
    run("voc", tmp_path)
    assert contents(tmp_path) == {name: data for name, data in before.items() if not name.startswith("archives/")}


@pytest.mark.parametrize("place, name", [(Path, "replace"), (prepare, "save_index_png")])
def test_killed_as_files_are_moved_or_converted_and_run_again(local, made, tmp_path, place, name):
    with_archives(tmp_path, local, SBD_TGZ, VOC_TAR)
    if (child := os.fork()) == 0:
        setattr(place, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        run("voc", tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    run("voc", tmp_path)
    after = contents(tmp_path)
    whole = {name: data for name, data in contents(made / "voc").items() if name.endswith((".jpg", ".png", ".txt"))}
    assert whole.items() <= after.items()


def test_a_fetch_that_fails_is_one_line(local, tmp_path, monkeypatch, capsys):
    line = bad(capsys, "voc", tmp_path)
    assert f"{VOC_TAR} can't be fetched" in line and "curl -C - -O http" in line
    monkeypatch.setitem(prepare.PUBLISHED["voc"]["archives"][0], "md5", "0" * 32)  # what lies there is not taken for it
    assert f"{VOC_TAR} can't be fetched" in bad(capsys, "voc", with_archives(tmp_path, local, VOC_TAR))


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def replaced(name, content=b"", link=None):
    """An archive of one file, or of one link."""

    def spoil(path):
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if link is not None:
                info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info, io.BytesIO(content))

    return spoil


UNSAFE = f"{CONTEXT_TGZ} can't be fetched and unpacked"
BAD_ARCHIVES = {
    "cut in the middle": (cut(0.5), UNSAFE),
    "cut near its end": (cut(0.95), UNSAFE),
    "a file outside": (replaced("../x"), UNSAFE),
    "a link to a folder": (replaced("a", link="/etc"), UNSAFE),
    "a link outside": (replaced("b/a", link="../../x"), UNSAFE),
    "no annotation": (replaced("trainval/x.mat", b"no MATLAB file"), "x.mat can't be made a mask"),
    "another label": (replaced("x.mat", mat(LabelMap=np.full((2, 2), 460, np.uint16))), "460 is out of bounds"),
}


@pytest.mark.parametrize("spoil, words", BAD_ARCHIVES.values(), ids=BAD_ARCHIVES)
def test_a_bad_archive_is_refused(local, monkeypatch, tmp_path, capsys, spoil, words):
    """PASCAL Context's, without its images."""
    facts = prepare.PUBLISHED["pascal_context"]
    monkeypatch.setitem(facts, "archives", facts["archives"][1:])
    root = with_archives(tmp_path / "new", local, CONTEXT_TGZ)
    spoil(root / "archives" / CONTEXT_TGZ)
    assert words in bad(capsys, "pascal_context", root)


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "train2017/../../evil.jpg", "..\\evil.jpg"])
def test_zips_write_nothing_outside(monkeypatch, tmp_path, name):
    path = tmp_path / "new/archives/val2017.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"evil")
    archive = {"url": f"http://127.0.0.1:9/{path.name}", "md5": None}
    monkeypatch.setitem(prepare.PUBLISHED["coco_stuff"], "archives", [archive])
    prepare.prepare("coco_stuff", tmp_path / "new")
    assert not [*tmp_path.rglob("evil*")] and not Path("/evil.jpg").exists()


def test_folders_and_flags_that_do_not_fit_are_refused(made, tmp_path, capsys):
    assert "is not there" in bad(capsys, "voc", tmp_path / "no", "--check")
    assert "--check, which changes nothing" in bad(capsys, "voc", tmp_path, "--check", "--convert-colour-masks")
    assert "other classes" in bad(capsys, "pascal_context", made / "voc")
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages").mkdir(parents=True)
    assert "other classes" in bad(capsys, "pascal_context", tmp_path)


@pytest.fixture
def by_hand(made, tmp_path) -> VOCFolder:
    """A copy of VOC as somebody else would have made it: without our own files."""
    ours = shutil.ignore_patterns("*.json", "classes.txt", "archives")
    shutil.copytree(made / "voc", tmp_path / "VOC2012", ignore=ours)
    return VOCFolder.open(tmp_path)


def test_a_good_tree_made_by_hand_passes_and_stays_as_it_is(by_hand, local, capsys):
    before = contents(by_hand.root)
    run("voc", by_hand.root.parent, "--check")
    assert contents(by_hand.root) == before
    text = capsys.readouterr().out
    assert "train: 10 images" in text and "val: 3 images" in text and "is ready" in text
    counts = {name: sum(number in SHOWN[p] for p in TRAIN_AUG) for number, name in ((1, "aeroplane"), (17, "sheep"))}
    assert all(f"{name} {count}" in text for name, count in counts.items())


def test_the_check_tells_everything_that_is_wrong(by_hand, local, capsys):
    train_aug = by_hand.lists / "train_aug.txt"
    train_aug.write_text(train_aug.read_text() + OF_VOC["val"][0] + "\n")
    wrong_size, colour, missing, value, cut = TRAIN_AUG[:5]
    Image.fromarray(stripes([0, 3], (10, 20))).save(by_hand.mask_path(wrong_size))
    Image.new("RGB", SIZE, (1, 2, 3)).save(by_hand.mask_path(colour))
    by_hand.mask_path(missing).unlink()
    Image.fromarray(stripes([0, 99])).save(by_hand.mask_path(value))
    by_hand.image_path(cut).write_bytes(by_hand.image_path(cut).read_bytes()[:-99])
    with pytest.raises(SystemExit) as caught:
        run("voc", by_hand.root, "--check")
    out, err = capsys.readouterr()
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert caught.value.code == 2 and "and 6 more problems" in err and err.count("\n") == 1 and len(problems) == 7
    wanted = [
        "11 images; published tables use 10", f"the lists overlap: 1 evaluation images are among the training images, "
        f"{OF_VOC['val'][0]}", f"{wrong_size}.jpg has the size (24, 20) but its mask (10, 20)",
        f"{colour}.png is a colour mask", f"{missing}.png is missing", f"{value}.png holds the value 99",
        f"{cut}.jpg can't be read",
    ]  # fmt: skip
    assert all(any(words in problem for problem in problems) for words in wanted), problems


# --- one's own images -----------------------------------------------------------------------------------

OWN = ["background", "grass", "sheep", "sofa", "traffic light"]
ONE_STEP = {"split": None, "max_steps": "1", "unseen": "sheep", "target_images": "all"}


@pytest.fixture
def own(tmp_path) -> Path:
    """Ten PNG images, nine with masks, and a file of names."""
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


def test_own_images_need_no_code(own, tmp_path, capsys):
    for name in (".DS_Store", "._photo 1.png", "notes.txt"):
        (own / "images" / name).write_bytes(b"x")
    Image.new("L", (3, 3)).save(own / "masks/nobody.png")
    run("own", own)
    text = capsys.readouterr().out
    assert "train: 8 images, 7 with a mask" in text and "1 of 8 training images have no mask, photo 9" in text
    assert "left out: 3 files" in text and "._photo 1.png" in text and "masks, nobody.png" in text
    assert (own / "val.txt").read_text().split("\n") == ["photo 0", "photo 5", ""]
    plan = ONE_STEP | {"unseen": "Sheep, sofa"}
    STAGES[1].main(arguments(own, tmp_path, **plan))
    STAGES[2].main(arguments(own, tmp_path, **plan | {"restore_from_where": "saved"}))
    checkpoint = tmp_path / "splitunseen-sheep-sofa/stage2/latest.pth"
    metadata = load(checkpoint)["metadata"]
    assert metadata["seen"] == ["grass", "traffic light"] and metadata["unseen"] == ["sheep", "sofa"]
    assert evaluate(checkpoint, own, "--json", tmp_path / "result.json") == 0
    per_class = json.loads((tmp_path / "result.json").read_text())["per_class"]
    assert set(per_class) == {*metadata["seen"], *metadata["unseen"]}


@pytest.mark.parametrize("name", ["class_names.txt", "labels.txt"])
def test_exports_of_labelme_are_read(own, name):
    (own / "classes.txt").rename(own / name)
    (own / "images").rename(own / "JPEGImages")
    (own / "masks").rename(own / "SegmentationClass")
    run("own", own)
    classes = {name: value for value, name in enumerate(OWN)}
    assert VOCFolder.open(own).classes == classes and len((own / "train.txt").read_text().split("\n")) == 9


@pytest.mark.parametrize("subsets", [("train", "valid"), ("train",)])
def test_an_export_of_roboflow_is_copied_to_the_layout(own, tmp_path, subsets):
    root = tmp_path / "export"
    for number in range(9):
        folder = root / subsets[number % 3 // 2 % len(subsets)]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(own / f"images/photo {number}.png", folder / f"p{number}_jpg.rf.1.png")
        shutil.copy(own / f"masks/photo {number}.png", folder / f"p{number}_jpg.rf.1_mask.png")
        (folder / "_classes.csv").write_text("Pixel Value, Class\n" + "".join(f"{n}, {c}\n" for n, c in enumerate(OWN)))
    run("own", root)
    made = VOCFolder.open(root)
    train, val = (made.read_list(name) for name in ("train", "val"))
    assert made.classes == dict(zip(OWN, range(5))) and len(train) + len(val) == 9
    if len(subsets) == 2:
        assert val == [f"p{number}_jpg.rf.1" for number in (2, 5, 8)]
    before = contents(root)
    run("own", root)
    assert before.keys() == contents(root).keys()


def test_a_project_of_supervisely_is_read(own, tmp_path):
    """Grey levels in RGB, below the folder with the classes' file."""
    (own / "classes.txt").unlink()
    for path in (own / "masks").iterdir():
        Image.fromarray(read_values(path)).convert("RGB").save(path.with_suffix(".png"))
    (own / "images").rename(own / "img")
    (own / "masks").rename(own / "masks_machine")
    levels = {name: [value] * 3 for value, name in enumerate(OWN) if value}
    (tmp_path / "obj_class_to_machine_color.json").write_text(json.dumps(levels))
    run("own", tmp_path)
    assert VOCFolder.open(tmp_path).classes == dict(zip(OWN, range(5)))


def test_a_mask_that_was_lost_is_not_remembered(own, tmp_path, capsys):
    run("own", own)
    (own / "masks/photo 1.png").unlink()
    assert "photo 1.png is missing" in failure(capsys, STAGES[1].main, arguments(own, tmp_path, **ONE_STEP))
    run("own", own)
    assert STAGES[1].main(arguments(own, tmp_path, **ONE_STEP)) == 0


def lists_of_voc(own):
    """As VOC's without SBD's masks."""
    (own / "train_aug.txt").write_text("photo 1\nphoto 9\n")
    (own / "val.txt").write_text("photo 0\n")


def masks_of_0_and_255(own):
    for path in (own / "masks").iterdir():
        Image.fromarray(stripes([0, 255])).save(path)


def other_names(own):
    for path in (own / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}-labels.png"))


NOT_READY = {
    "no image": (lambda own: (own / "images/photo 7.png").write_bytes(b"x"), ["photo 7.png can't be read"]),
    "no classes": (lambda own: (own / "classes.txt").unlink(), ["needs classes.txt or class_names.txt or"]),
    "one class": (lambda own: (own / "classes.txt").write_text("background\ngrass\n"), ["has one class"]),
    "no mask": (lists_of_voc, ["1 of 2 training images have no mask, photo 9 first: get the masks"]),
    "no class in the masks": (masks_of_0_and_255, ["all masks in"]),
    "masks by other names": (other_names, ["masks of 0 of the 10 images", "x_mask.png", "photo 0-labels.png"]),
}


@pytest.mark.parametrize("spoil, words", NOT_READY.values(), ids=NOT_READY)
def test_nothing_is_written_for_images_that_are_not_ready(own, capsys, spoil, words):
    spoil(own)
    before = {path: path.read_bytes() for path in own.glob("*.txt")}
    line = bad(capsys, "own", own)
    assert all(word in line for word in words), line
    assert {path: path.read_bytes() for path in own.glob("*.txt")} == before


def test_colour_masks_are_read_and_converted(own, tmp_path, capsys):
    """In VOC's colours they train as their indices do."""
    run("own", own)
    STAGES[1].main(arguments(own, tmp_path / "indices", **ONE_STEP))
    before = {path.name: read_values(path) for path in (own / "masks").iterdir()}
    for name, mask in before.items():
        Image.fromarray(voc_palette()[mask]).save(own / "masks" / name)
    STAGES[1].main(arguments(own, tmp_path / "colours", **ONE_STEP))
    indices, colours = (weights(tmp_path / name / "splitunseen-sheep/stage1") for name in ("indices", "colours"))
    assert same(indices, colours)
    run("own", own, "--convert-colour-masks")
    assert "9 masks were colour masks" in capsys.readouterr().out
    for name, mask in before.items():
        np.testing.assert_array_equal(read_values(own / "masks" / name), mask)
        np.testing.assert_array_equal(read_values(own / "masks_colour" / name), voc_palette()[mask])
    run("own", own, "--convert-colour-masks")  # nothing is left to convert
    assert "0 masks were" in capsys.readouterr().out


def test_colours_of_a_labelmap_are_converted(own):
    """As CVAT exports them: in any order of classes, and without a classes.txt."""
    (own / "classes.txt").unlink()
    colours = np.array([(0, 0, 0), (48, 112, 32), (250, 50, 83), (51, 221, 255), (9, 8, 7)], np.uint8)
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in zip(OWN, colours)][::-1]
    (own / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))
    before = {path: read_values(path) for path in (own / "masks").iterdir()}
    for number, (path, mask) in enumerate(before.items()):
        image = Image.fromarray(colours[mask])
        (image.quantize(5) if number % 2 else image).save(path)  # a palette in another order
    run("own", own, "--convert-colour-masks")
    assert all((read_values(path) == 4 - mask).all() for path, mask in before.items())
    assert VOCFolder.open(own).classes == dict(zip(OWN[::-1], range(5)))
    run("own", own)


def test_the_table_is_torchvisions_where_it_has_one():
    facts = [row for dataset in prepare.PUBLISHED.values() for row in dataset["archives"]]
    table = {Path(row["url"]).name: row["md5"] for row in facts}  # versions of torchvision name other hosts
    assert table[Path(SBDataset.url).name] == SBDataset.md5
    voc = [DATASET_YEAR_DICT[year] for year in ("2010", "2012")]
    assert all(table[Path(archive["url"]).name] == archive["md5"] for archive in voc)
    assert len(set(CONTEXT_LABELS)) == 59
