"""Segment your own images, with the checkpoint's classes or with words of your own.

    python predict.py --images photo.jpg
    python predict.py --images holiday/ --classes "cat, dog, zebra, sofa" --confidence --min-confidence 0.5
    python predict.py --images photo.jpg --checkpoint runs/split1/stage2/latest.pth
    python predict.py --export model.onnx --classes "cat, dog, zebra"

A network that scores pixels against word vectors takes any word that has one. Every pixel gets one of the classes that
compete: give those that the image may show. What none of them fits is background, if the checkpoint knows it.

Writes into --output-dir: masks/ (palette PNG, a value a class), overlays/ (image and prediction, with a legend of the
classes and their share of the pixels), confidence/ if asked for, and predictions.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.images import IMAGE_SUFFIXES, read_image
from dataset.splits import BACKGROUND, VOID
from model.predictor import SHIPPED, Predictor, export
from model.segmenter import MIN_SIDE
from utils.checkpoint import describe_protocol
from utils.config import Parser, add_settings, fraction, number, positive
from utils.distributed import choose_device
from utils.errors import UserError, one_line_errors, write_text
from utils.visualize import contact_sheet, save_image, save_index_png

KIND = {"seen": ("labelled", ""), "unseen": ("shown without labels", "*"), "new": ("never shown, only words", " (new)")}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    task, words, model, output = map(parser.add_argument_group, ("what to do", "words", "network", "output"))
    switch = argparse.BooleanOptionalAction
    # fmt: off
    task.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="images of any size, or folders of images")
    task.add_argument("--export", type=Path, metavar="FILE", help="write the network with its classes as FILE: .pt2 "
                      "(torch.export), .onnx (pip install onnx onnxscript), or .pth (without a frozen trunk)")
    words.add_argument("--classes", nargs="+", metavar="WORD", help="what the images may show, separated by commas: "
                       '"cat, dog, traffic light" (default: the classes of the checkpoint)')
    words.add_argument("--vocabulary", type=Path, nargs="+", default=[], metavar="FILE", help="word vectors of the "
                       "checkpoint's training, for words that are no class of it (default: the shipped common words)")
    words.add_argument("--embedding-path", type=Path, metavar="FOLDER", help="as in training (default: embeddings/)")
    model.add_argument("--checkpoint", type=Path, default=SHIPPED, metavar="PATH", help="latest.pth or best.pth of a "
                       "run (default: the shipped one, docs/CHECKPOINT.md)")
    model.add_argument("--scale-to", "--longest-side", type=number(int, MIN_SIDE), metavar="PIXELS", help="larger "
                       "images are resized to this for the network (default: the size of the training images)")
    model.add_argument("--scales", type=positive, nargs="+", default=[1.0], metavar="SCALE",
                       help="mean of the softmax over the image at these sizes, such as 0.75 1 1.25")
    model.add_argument("--flip", action=switch, default=True, help="likewise with the mirror image (default)")
    model.add_argument("--edges", action=switch, default=True, help="let borders follow the image's edges (default)")
    output.add_argument("--output-dir", type=Path, default=Path("predictions"), metavar="FOLDER", help="for results")
    output.add_argument("--confidence", action="store_true", help="write confidence/<image>.png too, white is certain")
    output.add_argument("--min-confidence", type=fraction, default=0.0, metavar="P", help="no class (255 in the "
                        "mask) for pixels below this probability: try 0.5")
    # fmt: on
    add_settings(output, ["device"])
    args = parser.parse_args(argv)
    if not args.images and args.export is None:
        parser.error("give --images to segment, or --export")
    return args


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The images named by `paths`, and those in the folders among them, in order. Raises `UserError` for none."""
    found = []
    for path in paths:
        inside = sorted(p for p in path.glob("[!.]*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not inside and not path.is_file():
            raise UserError(f"--images {path} is missing or holds no images: give JPEG or PNG files, or their folder")
        found += inside or [path]
    return list(dict.fromkeys(found))


def result_names(paths: Sequence[Path]) -> list[str]:
    """The name of each image's results: its stem, with a number where an image before has the same."""
    names: list[str] = []
    for path in paths:
        stem = path.stem.encode("utf-8", "replace").decode()
        candidates = (stem if number == 1 else f"{stem}_{number}" for number in range(1, len(paths) + 1))
        names.append(next(name for name in candidates if name.lower() not in map(str.lower, names)))
    return names


def predict_image(predictor: Predictor, path: Path, name: str, args: argparse.Namespace) -> dict:
    """Segments one image, writes its files as `name`, and returns its entry of predictions.json.

    Raises `UserError` if the image can't be read.
    """
    began, classes, image = time.perf_counter(), predictor.classes, read_image(path)
    mask, confidence = predictor.segment(image, None, args.scale_to, args.scales, args.flip, args.edges)
    seconds = time.perf_counter() - began
    mask[confidence < args.min_confidence] = VOID
    share = np.bincount(mask.ravel(), minlength=256) / mask.size
    shown = sorted((n for n, value in classes.items() if share[value]), key=lambda n: -share[classes[n]])
    legend = {classes[n]: f"{n}{KIND[predictor.kinds[n]][1]} {share[classes[n]]:.1%}" for n in shown}
    ignore = (0, VOID) if BACKGROUND in classes else (VOID,)
    sheet = contact_sheet([(image, {"prediction": mask})], legend, name, ignore, longest=900)
    save_image(sheet, args.output_dir / "overlays" / f"{name}.png")
    save_index_png(mask, args.output_dir / "masks" / f"{name}.png")
    if args.confidence:
        grey = Image.fromarray((255 * confidence).round().astype(np.uint8))
        save_image(grey, args.output_dir / "confidence" / f"{name}.png")
    tqdm.write(f"{name}, {seconds:.1f} s: {', '.join(legend.values())}")
    return {"file": str(path), "seconds": round(seconds, 3), "shares": {n: float(share[classes[n]]) for n in shown}}


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal can't print
    args = parse_arguments(argv)
    device = choose_device(args.device)
    paths = find_images(args.images or [])
    predictor = Predictor(args.checkpoint)
    if args.classes is not None:
        words = [word for word in " ".join(args.classes).split(",") if word.strip()]
        predictor.set_classes(words, args.vocabulary, args.embedding_path)
    protocol = describe_protocol(predictor.checkpoint["metadata"])
    print(f"{args.checkpoint}: {protocol}")
    for kind, (meaning, _) in KIND.items():
        names = ", ".join(name for name, its_kind in predictor.kinds.items() if its_kind == kind)
        print(f"{f'{kind} ({meaning})':<32}{names or '-'}")
    if args.export is not None:
        export(predictor, args.checkpoint, args.export)
        print(f"{args.export}, {args.export.stat().st_size / 1e6:.1f} MB")
    predictor.to(device)
    entries, broken = {}, []
    for path, name in zip(tqdm(paths, desc="predict", unit="image", disable=None), result_names(paths)):
        try:
            entries[name] = predict_image(predictor, path, name, args)
        except UserError as error:  # the others are segmented all the same
            broken.append(str(error))
    if entries:
        classes = {n: {"value": value, "kind": predictor.kinds[n]} for n, value in predictor.classes.items()}
        content = {"checkpoint": str(args.checkpoint), "protocol": protocol, "classes": classes, "images": entries}
        write_text(args.output_dir / "predictions.json", json.dumps(content, indent=2) + "\n")
        print(f"{len(entries)} images: {args.output_dir / 'overlays'}, {args.output_dir / 'masks'}")
    if broken:
        raise UserError(f"{len(broken)} of {len(paths)} images can't be used: {'; '.join(broken)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
