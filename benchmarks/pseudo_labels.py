"""How good the pseudo-labels of a finished stage 2 are, by the masks of the target images, which training never opened.

    python -m benchmarks.pseudo_labels --checkpoint runs/split4/stage2/latest.pth --data-path DATA

A row an unseen class, in percent: how many images show it, how many of these were assigned it (its pseudo-labels occur
in them), and precision and recall of the pixels. For checkpoints of `--pseudo-labels episodes`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.runs import format_table
from dataset.splits import VOID, Split
from dataset.voc import EvaluationDataset, training_datasets
from train_st_split import episode_pseudo_labeler
from utils.checkpoint import load_checkpoint
from utils.config import Parser
from utils.errors import UserError, one_line_errors
from utils.metrics import count_pixels, percent


def label_images(checkpoint: dict, data_path: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Mask and pseudo-label of each target image, int64 [1, H, W] of the classes that are trained on."""
    args, split = argparse.Namespace(**checkpoint["settings"]), Split.from_dict(checkpoint["metadata"])
    args.restore_from_where, args.cache_features = "continue", None  # the trunk's weights are in the checkpoint
    labeler = episode_pseudo_labeler(args, split, torch.device("cpu"))
    labeler.load_state_dict(checkpoint["pseudo_labeler"])
    _, target = training_datasets(
        data_path, split, None, args.target_images, "all", args.train_list, complete_labels=args.complete_labels
    )
    for image, mask, index in tqdm(EvaluationDataset(target.folder, target.ids, split.trained), disable=None):
        valid, may_show_seen = torch.ones(1, *mask.shape, dtype=torch.bool), target.ids[index] in target.labelled
        yield mask[None].long(), labeler(image[None], valid, torch.tensor([may_show_seen]))


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="latest.pth of stage 2")
    parser.add_argument("--data-path", type=Path, required=True, help="the folder that it was trained on")
    args = parser.parse_args(argv)
    checkpoint = load_checkpoint(args.checkpoint)
    if not checkpoint["pseudo_labeler"]:
        raise UserError(f"{args.checkpoint} has no pseudo-labeller: give latest.pth of a run with episodes")
    trained = Split.from_dict(checkpoint["metadata"]).trained
    unseen = torch.arange(trained.num_seen, len(trained.names))
    pixels = torch.zeros(len(trained.names), len(trained.names), dtype=torch.int64)
    shown, assigned = torch.zeros(2, len(unseen), dtype=torch.int64)
    for mask, label in label_images(checkpoint, args.data_path):
        pixels += count_pixels(torch.where(mask == VOID, -1, mask), label, len(trained.names))
        shows = torch.isin(unseen, mask)
        shown += shows
        assigned += shows & torch.isin(unseen, label)
    rows = [["", "images", "assigned", "precision", "recall"]]
    for n, c in enumerate(unseen.tolist()):
        shares = assigned[n] / shown[n], pixels[c, c] / pixels[:, c].sum(), pixels[c, c] / pixels[c].sum()
        shares = [None if share.isnan() else float(share) for share in shares]  # no such image or pixel
        rows.append([trained.names[c], str(int(shown[n])), *map(percent, shares)])
    print(format_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
