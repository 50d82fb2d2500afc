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
from dataset.checks import ClassIndex
from dataset.splits import NAMES, VOID, Split, read_classes
from dataset.voc import VOCFolder
from helpers import STAGES, arguments, contents, evaluate, failure, load, read_values, same, train, weights
from utils.visualize import voc_palette

SIZE = (24, 20)  # width, height
VOC_TAR, SBD_TGZ = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
VOC2010_TAR, CONTEXT_TGZ = "VOCtrainval_03-May-2010.tar", "trainval.tar.gz"
CONTEXT_LABELS = prepare.PUBLISHED["pascal_context"]["labels"]
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
        image.putpalette(voc_palette().tobytes())
    image.save(stream, format="PNG")
    return stream.getvalue()


def mat(**variables) -> bytes:
    stream = io.BytesIO()
    savemat(stream, variables)
    return stream.getvalue()


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
            values = [0 if value == VOID else value for value in SHOWN[image]]
            segmentation = stripes(values if image.startswith("2008") else [0, 3])  # never to replace VOC's own
            boundaries = np.array([[np.zeros((2, 2))]], dtype=object)
            files[f"{top}/cls/{image}.mat"] = mat(
                GTcls={"Boundaries": boundaries, "Segmentation": segmentation, "CategoriesPresent": np.unique(values)}
            )
            files[f"{top}/inst/{image}.mat"] = b"another format"
    pack(folder / SBD_TGZ, files)


CONTEXT = {"train": [f"2008_{n:06}" for n in range(6)], "val": [f"2009_{n:06}" for n in range(3)]}
CONTEXT_SHOWN = {
    image: [0, 1 + n, 8 + n % 3, 14, 50 - n] for n, image in enumerate([*CONTEXT["train"], *CONTEXT["val"]])
}


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


def coco_map(number: int) -> np.ndarray:
    """Every class in one image, in blocks of 4 x 4 pixels that differ from image to image, and void."""
    values = np.array([*np.roll(COCO_VALUES, number), *([VOID] * 9)], np.uint8).reshape(12, 15)
    return np.kron(values, np.ones((4, 4), np.uint8))[:, : COCO_SIZE[0]]


def make_coco(folder: Path) -> None:
    maps = {}
    for subset, ids in COCO.items():
        pack(folder / f"{subset}2017.zip", {f"{subset}2017/{p}.jpg": jpeg(int(p), COCO_SIZE) for p in ids})
        maps |= {f"{subset}2017/{image}.png": png(coco_map(int(image)), colours=False) for image in ids}
    pack(folder / MAPS_ZIP, maps)


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


def of(dataset: str) -> list[str]:
    """The names of its archives."""
    return [archive["url"].rpartition("/")[2] for archive in prepare.PUBLISHED[dataset]["archives"]]


def expect(served: Path, patch: pytest.MonkeyPatch) -> None:
    """The commands expect these archives and their counts; none can be fetched. Who has no checksum gets none."""
    for dataset, facts in prepare.PUBLISHED.items():
        archives = [
            archive | {"url": f"http://127.0.0.1:9/{name}", "md5": archive["md5"] and md5(served / name)}
            for archive, name in zip(facts["archives"], of(dataset))
        ]
        patch.setitem(prepare.PUBLISHED, dataset, facts | COUNTS[dataset] | {"archives": archives})


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


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


def command(dataset, folder, *flags) -> list[str]:
    return [dataset, "--data-path", str(folder), *map(str, flags)]


def bad(capsys, dataset, folder, *flags) -> str:
    return failure(capsys, prepare.main, command(dataset, folder, *flags))


# --- what the commands make -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def made(served, tmp_path_factory):
    """The three data sets, made once by the commands. Read only."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        expect(served, patch)
        for dataset in MAKE:
            with_archives(folder / dataset, served, *of(dataset))
            assert prepare.main(command(dataset, folder / dataset)) == 0
    return folder


def test_voc_is_joined_with_sbd(made):
    folder = VOCFolder.open(made / "voc")
    assert folder.masks.name == "SegmentationClassAug"
    assert folder.read_list(None, ("train_aug",)) == TRAIN_AUG
    assert folder.read_list(None, ("val",)) == OF_VOC["val"]
    for image, values in SHOWN.items():
        kept = [0 if value == VOID else value for value in values] if image.startswith("2008") else values
        np.testing.assert_array_equal(read_values(folder.mask_path(image)), stripes(kept))
    with Image.open(folder.mask_path("2008_000001")) as mask:
        assert mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0]


def test_context_has_the_59_classes_and_void_of_none(made):
    folder = VOCFolder.open(made / "pascal_context")
    assert folder.read_list(None, ("train",)) == CONTEXT["train"] and folder.read_list(None, ("val",)) == CONTEXT["val"]
    for image, values in CONTEXT_SHOWN.items():
        np.testing.assert_array_equal(read_values(folder.mask_path(image)), stripes(values))


def test_coco_maps_are_as_published(made):
    folder = VOCFolder.open(made / "coco_stuff")
    assert folder.read_list(None, ("train",)) == COCO["train"]
    for image in COCO["val"]:
        np.testing.assert_array_equal(read_values(folder.mask_path(image)), coco_map(int(image)))
    shown = ClassIndex(folder).classes(COCO["train"])
    assert all(values == set(COCO_VALUES) and len(values) == 171 for values in shown.values())


def test_what_was_made_is_told(made, local, capsys):
    assert prepare.main(command("voc", made / "voc", "--check")) == 0
    text = capsys.readouterr().out
    assert "train: 10 images" in text and "val: 3 images" in text and "is ready" in text
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
    metadata = load(folder / "latest.pth")["metadata"]
    assert metadata["split"] == split and len(metadata["seen"]) + len(metadata["unseen"]) == classes
    assert metadata["background"] == ("score" if "zs3" in split else "ignore")
    capsys.readouterr()
    assert evaluate(folder / "latest.pth", made / dataset, "--split", split, "--save-dir", tmp_path / "images") == 0
    table = capsys.readouterr().out
    assert all(name + "*" in table for name in metadata["unseen"]) and f"split {split}" in table
    saved = sorted((tmp_path / "images/masks").iterdir())
    assert len(saved) == COUNTS[dataset]["val"] and len(list((tmp_path / "images/overlays").iterdir())) == len(saved)
    assert set(np.unique(read_values(saved[0])).tolist()) <= set(Split.named(split).mask_values)


def test_a_split_of_another_data_set_is_refused(made, tmp_path, capsys):
    line = failure(capsys, STAGES[1].main, arguments(made / "voc", tmp_path, split="coco-stuff"))
    assert "other classes" in line and "--split" in line
    line = failure(capsys, STAGES[1].main, arguments(made / "coco_stuff", tmp_path, split="1"))
    assert "classes.txt" in line


# --- again, after a stop, from elsewhere ----------------------------------------------------------------


def test_a_rerun_does_nothing_again(local, tmp_path):
    with_archives(tmp_path, local, SBD_TGZ, VOC_TAR)
    assert prepare.main(command("voc", tmp_path)) == 0
    before = contents(tmp_path)
    for path in (tmp_path / "archives").iterdir():
        path.unlink()  # they may be deleted, and nothing else is there
    assert prepare.main(command("voc", tmp_path)) == 0
    assert contents(tmp_path) == {name: data for name, data in before.items() if not name.startswith("archives/")}


@pytest.mark.parametrize("place, name", [(Path, "replace"), (prepare, "save_index_png")])
def test_killed_as_files_are_moved_or_converted_and_run_again(local, made, tmp_path, place, name):
    with_archives(tmp_path, local, SBD_TGZ, VOC_TAR)
    if (child := os.fork()) == 0:
        setattr(place, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        prepare.main(command("voc", tmp_path))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert prepare.main(command("voc", tmp_path)) == 0
    after = contents(tmp_path)
    whole = {name: data for name, data in contents(made / "voc").items() if name.endswith((".jpg", ".png", ".txt"))}
    assert whole.items() <= after.items()


def test_a_fetch_that_fails_is_one_line(local, tmp_path, monkeypatch, capsys):
    line = bad(capsys, "voc", tmp_path)
    assert f"{VOC_TAR} can't be fetched" in line and "curl -C" in line
    monkeypatch.setitem(prepare.PUBLISHED["voc"]["archives"][0], "md5", "0" * 32)  # what lies there is not taken for it
    assert f"{VOC_TAR} can't be fetched" in bad(capsys, "voc", with_archives(tmp_path, local, VOC_TAR))


# --- bad archives ---------------------------------------------------------------------------------------


@pytest.fixture
def context_alone(local, monkeypatch):
    """PASCAL Context without its images."""
    monkeypatch.setitem(
        prepare.PUBLISHED["pascal_context"], "archives", prepare.PUBLISHED["pascal_context"]["archives"][1:]
    )


@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_a_cut_archive_is_broken(context_alone, served, tmp_path, capsys, keep):
    root = with_archives(tmp_path / "new", served, CONTEXT_TGZ)
    path = root / "archives" / CONTEXT_TGZ
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert f"{CONTEXT_TGZ} is broken" in bad(capsys, "pascal_context", root)


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "train2017/../../evil.jpg", "..\\evil.jpg"])
def test_zips_write_nothing_outside(tmp_path, name):
    path = tmp_path / "val2017.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"evil")
    prepare.extract(path, tmp_path / "inside/new")
    assert not [path for path in tmp_path.rglob("evil*") if not path.is_relative_to(tmp_path / "inside/new")]
    assert not Path("/evil.jpg").exists()


@pytest.mark.parametrize("name, link", [("../x", None), ("a", "/etc"), ("b/a", "../../x")])
def test_tars_that_would_write_or_link_outside_are_refused(context_alone, local, tmp_path, capsys, name, link):
    root = with_archives(tmp_path / "new", local)
    with tarfile.open(root / "archives" / CONTEXT_TGZ, "w:gz") as archive:
        info = tarfile.TarInfo(name)
        if link is not None:
            info.type, info.linkname = tarfile.SYMTYPE, link
        archive.addfile(info, io.BytesIO(b""))
    line = bad(capsys, "pascal_context", root)
    assert "don't use it" in line and CONTEXT_TGZ in line


ANNOTATIONS = {
    "no mat": (b"no MATLAB file", "MATLAB"),
    "another label": (mat(LabelMap=np.full((2, 2), 460, np.uint16)), "460"),
}


@pytest.mark.parametrize("content, word", ANNOTATIONS.values(), ids=ANNOTATIONS)
def test_annotations_of_another_kind_are_refused(context_alone, local, tmp_path, capsys, content, word):
    root = with_archives(tmp_path / "new", local)
    pack(root / "archives" / CONTEXT_TGZ, {"trainval/x.mat": content})
    line = bad(capsys, "pascal_context", root)
    assert "x.mat" in line and word in line


def test_folders_of_other_data_are_refused(made, tmp_path, capsys):
    assert "other classes" in bad(capsys, "pascal_context", made / "voc")
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages").mkdir(parents=True)
    assert "other classes" in bad(capsys, "pascal_context", tmp_path)


# --- the check ------------------------------------------------------------------------------------------


@pytest.fixture
def by_hand(made, tmp_path) -> VOCFolder:
    """A copy of VOC as somebody else would have made it: without our own files."""
    ours = shutil.ignore_patterns("*.json", "classes.txt", "archives")
    shutil.copytree(made / "voc", tmp_path / "VOC2012", ignore=ours)
    return VOCFolder.open(tmp_path)


def test_a_good_tree_made_by_hand_passes_and_stays_as_it_is(by_hand, local):
    before = contents(by_hand.root)
    assert prepare.main(command("voc", by_hand.root.parent, "--check")) == 0
    assert contents(by_hand.root) == before


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
        prepare.main(command("voc", by_hand.root, "--check"))
    out, err = capsys.readouterr()
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert caught.value.code == 2 and "and 6 more problems" in err and err.count("\n") == 1 and len(problems) == 7
    wanted = [
        "11 images; published tables use 10", f"the lists overlap: 1 evaluation images are among the training images, "
        f"{OF_VOC['val'][0]}", f"{wrong_size}.jpg is 24 x 20 but its mask is 10 x 20", f"{colour}.png is a colour mask",
        f"{missing}.png is missing", f"{value}.png holds the value 99", f"{cut}.jpg can't be read",
    ]  # fmt: skip
    assert all(any(words in problem for problem in problems) for words in wanted), problems


def test_the_check_of_nothing_is_one_line(tmp_path, capsys):
    assert "is not there" in bad(capsys, "voc", tmp_path / "no", "--check")
    assert "--check, which changes nothing" in bad(capsys, "voc", tmp_path, "--check", "--convert-colour-masks")


# --- one's own images -----------------------------------------------------------------------------------

OWN = ["background", "grass", "sheep", "sofa", "traffic light"]


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
    assert prepare.main(command("own", own)) == 0
    text = capsys.readouterr().out
    assert "train: 8 images, 7 with a mask" in text and "1 of 8 training images have no mask, photo 9" in text
    assert "left out: 3 files" in text and "._photo 1.png" in text and "masks, nobody.png" in text
    assert (own / "val.txt").read_text().split("\n") == ["photo 0", "photo 5", ""]
    plan = {"split": None, "max_steps": "1", "unseen": "Sheep, sofa"}
    output = tmp_path / "runs"
    STAGES[1].main(arguments(own, output, target_images="all", **plan))
    STAGES[2].main(arguments(own, output, target_images="all", restore_from_where="saved", **plan))
    checkpoint = output / "splitunseen-sheep-sofa/stage2/latest.pth"
    metadata = load(checkpoint)["metadata"]
    assert metadata["seen"] == ["grass", "traffic light"] and metadata["unseen"] == ["sheep", "sofa"]
    assert evaluate(checkpoint, own, "--json", tmp_path / "result.json") == 0
    per_class = json.loads((tmp_path / "result.json").read_text())["per_class"]
    assert set(per_class) == {*metadata["seen"], *metadata["unseen"]}


def test_lists_of_ones_own_stay(own):
    (own / "train.txt").write_text("photo 1\nphoto 2\n")
    (own / "val.txt").write_text("photo 3\n")
    before = (own / "train.txt").read_bytes()
    assert prepare.main(command("own", own)) == 0 and (own / "train.txt").read_bytes() == before


EXPORTS = {  # of labelme, CVAT and Roboflow: file of class names -> what it holds
    "class_names.txt": "_background_\ngrass\nsheep\nsofa\nlamp\n",
    "labels.txt": "__ignore__\n_background_\ngrass\nsheep\nsofa\nlamp\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ngrass:48,112,32::\nsheep:1,1,1::\n"
    "sofa:2,2,2::\nlamp:3,3,3::\n",
    "_classes.csv": "Pixel Value, Class\n0, background\n1, grass\n2, sheep\n3, sofa\n4, lamp\n",
}


@pytest.mark.parametrize("name, text", EXPORTS.items(), ids=EXPORTS)
def test_exports_of_labelling_tools_are_read(own, name, text):
    (own / "classes.txt").unlink()
    (own / name).write_text(text)
    (own / "images").rename(own / "JPEGImages")
    (own / "masks").rename(own / "SegmentationClass")
    assert prepare.main(command("own", own)) == 0
    classes = {"background": 0, "grass": 1, "sheep": 2, "sofa": 3, "lamp": 4}
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
    assert prepare.main(command("own", root)) == 0
    made = VOCFolder.open(root)
    train, val = (made.read_list(None, (name,)) for name in ("train", "val"))
    assert made.classes == dict(zip(OWN, range(5))) and len(train) + len(val) == 9
    if len(subsets) == 2:
        assert val == [f"p{number}_jpg.rf.1" for number in (2, 5, 8)]
    before = contents(root)
    assert prepare.main(command("own", root)) == 0 and before.keys() == contents(root).keys()


def test_a_project_of_supervisely_is_read(own, tmp_path):
    """Grey levels in RGB, below the folder with the classes' file."""
    (own / "classes.txt").unlink()
    for path in (own / "masks").iterdir():
        Image.fromarray(read_values(path)).convert("RGB").save(path.with_suffix(".png"))
    (own / "images").rename(own / "img")
    (own / "masks").rename(own / "masks_machine")
    levels = {name: [value] * 3 for value, name in enumerate(OWN) if value}
    (tmp_path / "obj_class_to_machine_color.json").write_text(json.dumps(levels))
    assert prepare.main(command("own", tmp_path)) == 0
    assert VOCFolder.open(tmp_path).classes == dict(zip(OWN, range(5)))


def test_nothing_is_written_for_images_that_are_not_ready(own, capsys):
    (own / "classes.txt").rename(own / "labels.txt")
    (own / "images/photo 7.png").write_bytes(b"x")
    assert "photo 7.png can't be read" in bad(capsys, "own", own)
    assert not list(own.glob("[ctv]*.txt"))


def test_a_mask_that_was_lost_is_not_remembered(own, tmp_path, capsys):
    assert prepare.main(command("own", own)) == 0
    (own / "masks/photo 1.png").unlink()
    plan = {"split": None, "max_steps": "1", "unseen": "sheep", "target_images": "all"}
    assert "photo 1.png is missing" in failure(capsys, STAGES[1].main, arguments(own, tmp_path, **plan))
    assert prepare.main(command("own", own)) == 0
    assert STAGES[1].main(arguments(own, tmp_path, **plan)) == 0


def test_what_training_needs_is_told(own, capsys):
    assert prepare.main(command("own", own)) == 0
    assert "note: 1 of 8 training images have no mask, photo 9 first" in capsys.readouterr().out
    (own / "train.txt").rename(own / "train_aug.txt")  # as VOC's without SBD's masks
    assert "1 of 8 training images have no mask, photo 9 first: get the masks" in bad(capsys, "own", own)
    (own / "train_aug.txt").write_text("photo 1\nphoto 2\n")
    (own / "classes.txt").write_text("0: background\n1: grass\n")
    assert "has one class" in bad(capsys, "own", own)


def test_masks_of_0_and_255_are_refused_as_a_whole(own, capsys):
    for path in (own / "masks").iterdir():
        Image.fromarray(stripes([0, 255])).save(path)
    assert "all masks in" in bad(capsys, "own", own)


def test_what_was_looked_for_is_named(own, capsys):
    (own / "classes.txt").unlink()
    assert "classes.txt is missing, and so are class_names.txt" in bad(capsys, "own", own)
    (own / "classes.txt").write_text("\n".join(OWN))
    for path in (own / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}-labels.png"))
    line = bad(capsys, "own", own)
    assert "masks of 0 of the 10 images" in line and "x_mask.png" in line and "photo 0-labels.png" in line


# --- colour masks ---------------------------------------------------------------------------------------


def test_colour_masks_are_read_and_converted(own, tmp_path, capsys):
    """In VOC's colours they train as their indices do."""
    assert prepare.main(command("own", own)) == 0
    plan = {"split": None, "max_steps": "1", "unseen": "sheep", "target_images": "all"}
    STAGES[1].main(arguments(own, tmp_path / "indices", **plan))
    before = {path.name: read_values(path) for path in (own / "masks").iterdir()}
    for name, mask in before.items():
        Image.fromarray(voc_palette()[mask]).save(own / "masks" / name)
    STAGES[1].main(arguments(own, tmp_path / "colours", **plan))
    run = "splitunseen-sheep/stage1"
    assert same(weights(tmp_path / "indices" / run), weights(tmp_path / "colours" / run))
    assert prepare.main(command("own", own, "--convert-colour-masks")) == 0
    assert "9 masks were colour masks" in capsys.readouterr().out
    for name, mask in before.items():
        np.testing.assert_array_equal(read_values(own / "masks" / name), mask)
        np.testing.assert_array_equal(read_values(own / "masks_colour" / name), voc_palette()[mask])
    assert prepare.main(command("own", own, "--convert-colour-masks")) == 0  # nothing is left to convert
    assert "0 masks were" in capsys.readouterr().out


def test_colours_of_a_labelmap_are_converted(own):
    """As CVAT exports them: in any order of classes, and without a classes.txt."""
    (own / "classes.txt").unlink()
    colours = np.array([(0, 0, 0), (48, 112, 32), (250, 50, 83), (51, 221, 255), (9, 8, 7)], np.uint8)
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in zip(OWN, colours)][::-1]
    (own / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))
    before = {path: read_values(path) for path in (own / "masks").iterdir()}
    for path, mask in before.items():
        Image.fromarray(colours[mask]).save(path)
    assert prepare.main(command("own", own, "--convert-colour-masks")) == 0
    assert all((read_values(path) == 4 - mask).all() for path, mask in before.items())
    assert VOCFolder.open(own).classes == dict(zip(OWN[::-1], range(5)))
    assert prepare.main(command("own", own)) == 0


# --- the publishers' table ------------------------------------------------------------------------------


def test_the_table_is_torchvisions_where_it_has_one():
    facts = [row for dataset in prepare.PUBLISHED.values() for row in dataset["archives"]]
    table = {row["url"]: row["md5"] for row in facts}
    assert table[SBDataset.url] == SBDataset.md5
    assert all(table[DATASET_YEAR_DICT[year]["url"]] == DATASET_YEAR_DICT[year]["md5"] for year in ("2010", "2012"))
    assert len(set(CONTEXT_LABELS)) == 59
