"""Segment your own images, with the checkpoint's classes or with words of your own.

    python predict.py --checkpoint runs/split1/stage2/latest.pth --images photo.jpg
    python predict.py --checkpoint runs/split1/stage2/latest.pth --images holiday/ --classes "cat, dog, zebra, sofa"
    python predict.py --checkpoint runs/split1/stage2/latest.pth --images photo.jpg --confidence --min-confidence 0.5

A network that scores pixels against word vectors takes any word that has one. Every pixel gets one of the classes that
compete: give those that the image may show, and the ground it shows them on.

Writes into --output-dir: masks/ (palette PNG, a value a class), overlays/ (image and prediction, with a legend of the
classes and their share of the pixels), confidence/ if asked for, and predictions.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.splits import BACKGROUND, VOID, Split
from embeddings import embed_words, fold_name
from model.loading import load_segmenter
from model.segmenter import MIN_SIDE, Segmenter
from utils.checkpoint import describe_protocol
from utils.config import Parser, add_settings, fraction, number
from utils.distributed import choose_device
from utils.errors import UserError, one_line_errors, write_text
from utils.logging import progress
from utils.metrics import check_finite
from utils.visualize import contact_sheet, read_image, save_image, save_index_png

MAX_CLASSES = 200
KINDS = {"seen": "labelled", "unseen": "shown without labels", "new": "never shown, only words"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    data, words = parser.add_argument_group("data"), parser.add_argument_group("words")
    model, running = parser.add_argument_group("network"), parser.add_argument_group("running")
    # fmt: off
    data.add_argument("--images", type=Path, nargs="+", required=True, metavar="PATH",
                      help="images, or folders of images, of any size and format that Pillow reads")
    words.add_argument("--classes", nargs="+", metavar="WORD", help="what the images may show, separated by commas: "
                       '"cat, dog, traffic light" (default: the classes of the checkpoint)')
    words.add_argument("--vocabulary", type=Path, nargs="+", default=[], metavar="FILE", help="files of the word "
                       "vectors that the checkpoint was trained with, for words that are no class of it (default: "
                       "the shipped common words)")
    words.add_argument("--embedding-path", type=Path, metavar="FOLDER", help="as in training (default: embeddings/)")
    model.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="latest.pth or best.pth of a run")
    model.add_argument("--longest-side", type=number(int, MIN_SIDE), default=640, metavar="PIXELS", help="larger "
                       "images are resized to this; near the size of the training images is best")
    running.add_argument("--output-dir", type=Path, default=Path("predictions"), metavar="FOLDER",
                         help="where the results go")
    running.add_argument("--confidence", action="store_true", help="write confidence/<image>.png too, white is certain")
    running.add_argument("--min-confidence", type=fraction, default=0.0, metavar="P",
                         help="no class (255 in the mask) for pixels below this probability: try 0.5")
    # fmt: on
    add_settings(running, ["device"])
    return parser.parse_args(argv)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The images named by `paths`, and those in the folders among them, in order.

    Raises:
        UserError: if there is none, or a path does not exist.
    """
    suffixes = set(Image.registered_extensions())
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
            if not inside:
                raise UserError(f"--images {path} holds no images: give a folder of JPEG or PNG files")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--images {path} is missing: give images, or a folder of them")
    return list(dict.fromkeys(found))


def choose_classes(text: Sequence[str] | None, split: Split) -> dict[str, int]:
    """Class name -> mask value. A class of the checkpoint keeps its value, new words get unused ones.

    Raises:
        UserError: for fewer than two classes, one named twice, or too many.
    """
    values = dict(zip(split.names, split.mask_values))
    if text is None:
        return values
    names = [" ".join(name.split()) for name in " ".join(text).split(",") if name.strip()]
    folded = [fold_name(name) for name in names]
    doubled = sorted({name for name in folded if folded.count(name) > 1})
    if len(names) < 2 or len(names) > MAX_CLASSES or doubled:
        fault = f"{', '.join(doubled)} twice" if doubled else f"{len(names)} of them"
        raise UserError(f'--classes: {fault}; give 2 to {MAX_CLASSES} words, separated by commas: "cat, dog, zebra"')
    own = {fold_name(name): name for name in split.names}
    unused = iter(sorted(set(range(1, VOID)) - set(split.known_values)))
    names = [own.get(key, name) for key, name in zip(folded, names)]
    return {name: values[name] if name in values else next(unused) for name in names}


def class_kind(name: str, split: Split) -> str:
    """What a class is to the network: one of `KINDS`."""
    return "seen" if name in split.seen else "unseen" if name in split.unseen else "new"


@torch.inference_mode()
def segment(model: Segmenter, image: np.ndarray, longest_side: int) -> tuple[np.ndarray, np.ndarray]:
    """The best class of each pixel and its probability, int64 and float32 [H, W], of an image uint8 [H, W, 3]."""
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].to(next(model.parameters()).device)
    logits = model.pixel_logits(batch, longest_side)
    check_finite(~logits.coarse.isfinite().all())
    confidence, best = logits.map_pixels(lambda block: block.softmax(dim=1).max(dim=1))
    return best[0].cpu().numpy(), confidence[0].cpu().numpy()


def predict_image(
    model: Segmenter, path: Path, name: str, classes: dict[str, int], kinds: dict[str, str], args
) -> dict:
    """Segments one image, writes its files as `name`, and returns its entry of predictions.json.

    Raises:
        UserError: if the image can't be read.
    """
    image = read_image(path)
    index, confidence = segment(model, image, args.longest_side)
    mask = np.array(list(classes.values()), np.uint8)[index]
    mask = np.where(confidence < args.min_confidence, VOID, mask).astype(np.uint8)
    shares = {n: float((mask == value).mean()) for n, value in classes.items()}
    shares = dict(sorted(((n, share) for n, share in shares.items() if share), key=lambda item: -item[1]))
    marks = {"seen": "", "unseen": "*", "new": " (new)"}
    legend = {classes[n]: f"{n}{marks[kinds[n]]} {share:.1%}" for n, share in shares.items()}
    ignore = (0, VOID) if BACKGROUND in classes else (VOID,)
    sheet = contact_sheet([(image, None, mask)], legend, path.name, ignore, sides=(320, 900))
    save_image(sheet, args.output_dir / "overlays" / f"{name}.png")
    save_index_png(mask, args.output_dir / "masks" / f"{name}.png")
    if args.confidence:
        grey = Image.fromarray((255 * confidence).round().astype(np.uint8))
        save_image(grey, args.output_dir / "confidence" / f"{name}.png")
    return {"file": str(path), "shares": shares}


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = choose_device(args.device)
    paths = find_images(args.images)

    # Network, and the word vectors that its pixels are scored against
    model, split, checkpoint = load_segmenter(args.checkpoint)
    classes = choose_classes(args.classes, split)
    own = dict(zip(split.names, model.projection.class_embeddings.numpy()))
    embedding = checkpoint["metadata"]["embedding"]
    vectors = embed_words(list(classes), own, embedding, args.embedding_path, args.vocabulary)
    model.projection.class_embeddings = torch.from_numpy(vectors)
    model.to(device).eval()
    kinds = {name: class_kind(name, split) for name in classes}
    protocol = describe_protocol(checkpoint["metadata"])
    print(f"{args.checkpoint}: {protocol}")
    for kind, meaning in KINDS.items():
        print(f"{f'{kind} ({meaning})':<32}{', '.join(n for n, k in kinds.items() if k == kind) or '-'}")

    # Images
    entries, broken = {}, []
    for path in progress(paths, desc="predict", unit="image"):
        name = path.stem if path.stem not in entries else path.name
        try:
            entries[name] = predict_image(model, path, name, classes, kinds, args)
        except UserError as error:
            broken.append(str(error))
            continue
        print(f"{path.name}: " + ", ".join(f"{n} {share:.1%}" for n, share in entries[name]["shares"].items()))
    if entries:
        described = {name: {"value": value, "kind": kinds[name]} for name, value in classes.items()}
        content = {"checkpoint": str(args.checkpoint), "protocol": protocol, "classes": described, "images": entries}
        write_text(args.output_dir / "predictions.json", json.dumps(content, indent=2) + "\n")
        print(f"{len(entries)} images: {args.output_dir / 'overlays'}, {args.output_dir / 'masks'}")
    if broken:
        raise UserError(f"{len(broken)} of {len(paths)} images can't be used: {'; '.join(broken)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
