"""Stage 2: self-training on the unlabelled target images, from the checkpoint of stage 1.

    L = CE(source) + w * 0.4 * CE(target, pseudo)
    pseudo = argmax over the unseen logits, kept for the pixels with the highest unseen logit

CE(source) keeps the seen classes. The network's own best unseen class of each target pixel is its label, kept for the
share --keep of the batch's valid target pixels. "Learning unbiased zero-shot semantic segmentation networks via
transductive transfer", arXiv 2007.00515.

    python train_st_split.py --split 1 --restore-from-where saved              # from runs/split1/stage1/latest.pth
    python train_st_split.py --split 1 --restore-from-where continue           # resume after a stop

Writes runs/split1/stage2/latest.pth (the checkpoint to report), best.pth, log.jsonl, args.json, evaluation.json and
images/; then run eval.py. With --target-pixels all, the default, no mask of a target image is opened.
"""

import sys

import torch

from embeddings import imagenet_similarity
from model.backbone import IMAGENET_CLASSES, build_backbone, imagenet_head
from model.losses import cross_entropy, pseudo_labels
from model.pseudo_labels import EpisodePseudoLabeler
from utils.config import parse_settings
from utils.distributed import rank_zero_first
from utils.errors import one_line_errors
from utils.trainer import Trainer, optimizer_step

STAGE = 2
HIGHEST_SIMILARITY = 0.6  # cosine to an unseen class; ImageNet classes above it are left out as evidence


def train_step(network, optimizer, source, target, num_seen: int, args, pseudo_labeler=None) -> dict[str, torch.Tensor]:
    """One optimiser step; returns the losses as scalars on the device.

    The arguments are those of stage 1's `train_step`, and what labels the target images: `pseudo_labeler`, or, as
    published, the network's own unseen logits.
    """
    source_image, label = source
    target_image, valid, may_show_seen = target
    stride = args.loss_stride
    if pseudo_labeler is not None:
        pseudo_label = pseudo_labeler(target_image, valid, may_show_seen)[:, ::stride, ::stride]
    label, valid = label[:, ::stride, ::stride], valid[:, ::stride, ::stride]  # [N, S, S] -> [N, s, s]
    logits = network(torch.cat([source_image, target_image]))  # [N + M, K, s, s]
    source_logits, target_logits = logits.split([len(source_image), len(target_image)])

    if pseudo_labeler is None:
        pseudo_label = pseudo_labels(target_logits, num_seen, valid, args.keep, balanced=args.balance_classes)
    ce = cross_entropy(source_logits, label)
    self_training = cross_entropy(target_logits, pseudo_label)
    total = ce + args.weak_proportion * args.self_training_weight * self_training
    optimizer_step(total, optimizer)
    return {"total": total, "ce": ce, "self_training": self_training}


def episode_pseudo_labeler(args, split, device: torch.device) -> EpisodePseudoLabeler:
    """The labeller of `--pseudo-labels episodes`, with a trunk of its own that keeps ImageNet's weights."""
    weights = "none" if args.restore_from_where == "continue" else args.backbone_weights  # else the checkpoint's
    cache = args.cache_features if args.freeze_backbone else None
    with rank_zero_first():
        extractor = build_backbone(args.backbone, weights, frozen=True, cache=cache)

    def similarity(classes: list[int]) -> torch.Tensor:
        names = [split.trained.names[c] for c in classes]
        return torch.from_numpy(imagenet_similarity(IMAGENET_CLASSES, names, HIGHEST_SIMILARITY))

    imagenet, num_seen = imagenet_head(args.backbone, args.backbone_weights).to(device), split.trained.num_seen
    return EpisodePseudoLabeler(
        extractor, num_seen, len(split.unseen), split.background != "ignore", (imagenet, similarity)
    ).to(device)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_settings(argv, STAGE, __doc__)
    trainer = Trainer(STAGE, args)  # data, network, optimiser, run folder
    episodes = args.pseudo_labels == "episodes"
    labeler = episode_pseudo_labeler(args, trainer.split, trainer.device) if episodes else None
    trainer.restore(labeler)
    num_seen = trainer.split.trained.num_seen
    for source, target in trainer.steps():
        losses = train_step(trainer.replica, trainer.optimizer, source, target, num_seen, args, labeler)
        trainer.end_step(losses)  # logs, saves, evaluates
    return trainer.finish()


if __name__ == "__main__":
    sys.exit(main())
