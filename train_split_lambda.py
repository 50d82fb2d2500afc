"""Stage 1: train on labelled source images, with the transductive bias term on unlabelled target images.

    L = CE(source) + lambda [ (1 - w) B(source) + w B(target) ]
    B = mean over valid pixels of -log( sum over unseen c of softmax_c + 1e-5 )

CE teaches the seen classes. B keeps probability on the unseen classes, which have no labels: a little on every source
image, and more on target images, which show them. "Learning unbiased zero-shot semantic segmentation networks via
transductive transfer", arXiv 2007.00515.

    python train_split_lambda.py --split 1 --dry-run                           # check everything, print time and memory
    python train_split_lambda.py --split 1 --restore-from-where pretrained
    python train_split_lambda.py --split 1 --restore-from-where continue       # resume after a stop
    python train_split_lambda.py --split 1 --lambda 0                          # source only: the baseline

Writes runs/split1/stage1/latest.pth (the checkpoint to report), best.pth, log.jsonl, args.json, evaluation.json and
images/; then run train_st_split.py. With --target-pixels all, the default, no mask of a target image is opened.
"""

import sys

import torch

from model.losses import bias_loss, cross_entropy
from utils.config import parse_settings
from utils.errors import one_line_errors
from utils.trainer import Trainer, optimizer_step

STAGE = 1


def train_step(network, optimizer, source, target, num_seen: int, args) -> dict[str, torch.Tensor]:
    """One optimiser step; returns the losses as scalars on the device.

    Args:
        network: in training mode.
        optimizer: over its parameters.
        source: image uint8 [N, 3, S, S] and label uint8 [N, S, S], unseen and unlabelled pixels void.
        target: image uint8 [M, 3, S, S], valid bool [M, S, S] and may_show_seen bool [M], see `TargetDataset`.
        num_seen: the first so many of the K classes are seen.
        args: the settings.

    With several processes each gets its part of the batch and returns its part of the losses: the sum is the batch's.
    """
    source_image, label = source
    target_image, valid, *_ = target
    stride = args.loss_stride
    label, valid = label[:, ::stride, ::stride], valid[:, ::stride, ::stride]  # [N, S, S] -> [N, s, s]
    logits = network(torch.cat([source_image, target_image]))  # [N + M, K, s, s]
    source_logits, target_logits = logits.split([len(source_image), len(target_image)])

    ce = cross_entropy(source_logits, label)
    losses = {"total": ce, "ce": ce}
    if args.lambda_:
        w = args.weak_proportion
        bias_source = bias_loss(source_logits, num_seen, label < num_seen)
        bias_target = bias_loss(target_logits, num_seen, valid)
        total = ce + args.lambda_ * ((1 - w) * bias_source + w * bias_target)
        losses = {"total": total, "ce": ce, "bias_source": bias_source, "bias_target": bias_target}
    optimizer_step(losses["total"], optimizer)
    return losses


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_settings(argv, STAGE, __doc__)
    trainer = Trainer(STAGE, args)  # data, network, optimiser, run folder
    trainer.restore()
    num_seen = trainer.split.trained.num_seen
    for source, target in trainer.steps():
        losses = train_step(trainer.replica, trainer.optimizer, source, target, num_seen, args)
        trainer.end_step(losses)  # logs, saves, evaluates
    return trainer.finish()


if __name__ == "__main__":
    sys.exit(main())
