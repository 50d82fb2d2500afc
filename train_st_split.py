"""Stage 2: self-training on the unlabelled target pictures, from the checkpoint of stage 1.

    L = CE(source) + w * st_lambda * CE(target, pseudo)
    pseudo = argmax over the unseen logits, kept for the pixels with the highest unseen logit

CE(source) keeps the seen classes. The network's own best unseen class of each target pixel is its label, kept for the
`--keep` share of the batch's valid target pixels that are surest. "Learning unbiased zero-shot semantic segmentation
networks via transductive transfer", arXiv 2007.00515.

    python train_st_split.py --split 1 --restore-from-where saved              # from runs/split1/stage1/latest.pth
    python train_st_split.py --split 1 --restore-from-where continue           # go on after a stop

Writes runs/split1/stage2/latest.pth (the checkpoint to report), best.pth, log.jsonl, args.json, evaluation.json (for
utils.report) and pictures/; then run eval.py. With --target-pixels all, the default, no mask of a target picture is
opened.
"""

import argparse
import sys
from pathlib import Path

import torch

from dataset.loaders import evaluation_loader, training_loader
from dataset.splits import SPLITS, VOID
from dataset.transforms import training_transform
from dataset.voc import choose_split, evaluation_dataset, training_datasets
from embeddings import imagenet_similarity, load_class_embeddings
from model.backbone import BACKBONES, IMAGENET_CLASSES, build_backbone, imagenet_head
from model.discovery import Discovery
from model.imagenet_names import ImageNetNames
from model.pixel_losses import cross_entropy, pseudo_labels
from model.segmenter import Segmenter
from utils.distributed import broadcast, connect, is_main, joined, main_first, replicated, share
from utils.errors import one_line_errors
from utils.evaluation import evaluate, pictures_at_once
from utils.metrics import ZeroShotMetrics
from utils.options import (
    Parser,
    fraction,
    parse_with_recipe,
    self_training_options,
    shared_options,
    weight,
)
from utils.run import UNSCALED, Run, choose_amp, choose_device, count_steps, setting, stage_folder

STAGE = 2

LOOKED_AT = 5000
"""Pictures of each kind that a teacher looks at before a round, at most: enough for its clusters and cuts."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    shared = shared_options(SPLITS, BACKBONES, restore=("saved", "continue", "pretrained"), batch_size=10)
    parser = Parser(description=__doc__, parents=[shared])
    method = parser.add_argument_group("method")
    method.add_argument(
        "--stage1-checkpoint",
        type=Path,
        metavar="PATH",
        help="where `saved` starts (default: latest.pth of stage 1 of the same split below --output-dir)",
    )
    method.add_argument("--st-lambda", type=weight, default=0.4, help="weight of the self-training term")
    method.add_argument(
        "--weak-proportion", type=fraction, default=0.2, metavar="W", help="w, the target's share of the loss"
    )
    method.add_argument(
        "--keep", type=fraction, default=0.6, help="share of the batch's valid target pixels that get a pseudo-label"
    )
    method.add_argument(
        "--balance-classes",
        action="store_true",
        help="keep the surest --keep of each unseen class's pixels, not of all together: no class is starved",
    )
    beyond = parser.add_argument_group("beyond the paper")
    self_training_options(beyond)
    return parse_with_recipe(parser, argv, STAGE)


def train_step(
    model, optimizer, source, target, num_seen: int, args, teacher=None, scaler=UNSCALED
) -> dict[str, torch.Tensor]:
    """One optimiser step; returns the losses as scalars on the device.

    Args:
        source: image uint8 [N, 3, S, S] and label uint8 [N, S, S], unseen and unlabelled pixels void.
        target: image uint8 [M, 3, S, S] and valid bool [M, S, S].
        teacher: what labels the target; None: the network itself, as published.
        scaler: of the loss, with --amp fp16; does nothing by default.

    Of several processes each gets its share of the batch, and its part of the losses: their sum is the batch's.
    """
    source_image, label = source
    target_image, valid = target
    step = slice(None, None, args.loss_stride)  # [N, S, S] -> [N, s, s]
    if teacher is not None:
        pseudo_label = teacher(target_image, valid)[:, step, step]  # int64 [M, s, s]
    label, valid = label[:, step, step], valid[:, step, step]
    logits = model(torch.cat([source_image, target_image]))  # [N + M, K, s, s]
    source_logits, target_logits = logits.split([len(source_image), len(target_image)])

    ce = cross_entropy(source_logits, label, joined=joined)
    if teacher is None:
        chosen = {"balanced": args.balance_classes, "joined": joined}
        pseudo_label = pseudo_labels(target_logits, num_seen, valid, args.keep, **chosen)
        self_training = cross_entropy(target_logits, pseudo_label, joined=joined)
    else:
        weight = teacher.class_weight[pseudo_label.masked_fill(pseudo_label == VOID, 0)]
        self_training = cross_entropy(target_logits, pseudo_label, weight, joined=joined)
    loss = ce + args.weak_proportion * args.st_lambda * self_training

    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return {"total": loss, "ce": ce, "self_training": self_training}


def build_teacher(model, split, args, device: torch.device) -> Discovery | None:
    """The teacher of `--teacher`; None for the published self-training."""
    if args.teacher == "self":
        return None
    names = None
    if args.imagenet_names:
        similarity = imagenet_similarity(IMAGENET_CLASSES, split.unseen, args.name_similarity)
        names = ImageNetNames(imagenet_head(args.backbone, args.backbone_weights), torch.from_numpy(similarity))
    eyes = None  # ImageNet's features, which stage 1 has not moved
    if not args.freeze_backbone and args.backbone_weights != "none":
        weights = "none" if args.restore_from_where == "continue" else args.backbone_weights  # the checkpoint has them
        with main_first():
            eyes = build_backbone(args.backbone, weights)
    return Discovery(
        model, split.num_trained_seen, args.num_clusters, names, args.one_name, args.picture_gate, eyes
    ).to(device)


def guide(teacher: Discovery, model, source, target, step: int, num_steps: int, args) -> None:
    """Begins a round where one is due.

    Of several processes one looks at the pictures for a round, while the others wait, and tells them what it found.
    """
    round_steps = -(-num_steps // args.rounds)
    if step // round_steps >= teacher.round:
        size = args.target_batch_size or args.batch_size
        pictures = target, target.others(source), source
        targets, others, labelled = (
            training_loader(some, size, 0, -(-min(len(some), LOOKED_AT) // size), args.seed, args.num_workers)
            for some in pictures
        )
        if is_main():
            teacher.begin_round(model, targets, others, labelled, args.keep, args.keep_known, args.rare_power)
        broadcast(teacher)


def watched_labels(watched, teacher, split, args) -> tuple:
    """Pseudo-labels of a few target pictures, to be drawn: the pictures, {heading: labels}, and the labels' split."""
    image, valid, logits = watched
    if teacher is not None:
        return image, {"pseudo-labels": teacher(image.to(valid.device), valid)}, split.trained
    laid = pseudo_labels(logits, split.num_seen, valid, keep=1)
    kept = pseudo_labels(logits, split.num_seen, valid, args.keep, balanced=args.balance_classes)
    return image, {"pseudo-labels laid": laid, "kept": kept}, split


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    connect()
    device = choose_device(args.device, args.deterministic)
    args.amp = choose_amp(args.amp, device)
    torch.manual_seed(args.seed)

    # Data: labelled source pictures, unlabelled target pictures, evaluation pictures
    background = "score" if args.background else "auxiliary" if args.auxiliary_background else "ignore"
    split = choose_split(args.data_path, args.split, args.unseen, background)
    args.split, args.background = split.name, split.background == "score"
    transform = training_transform(args.input_size, tuple(args.scale), args.rotation, args.flip)
    with main_first():  # it lists once what classes the pictures show
        source, target = training_datasets(
            args.data_path, split, transform, args.target_images, args.target_pixels, args.train_list
        )
    evaluation_pictures = evaluation_dataset(args.data_path, split, args.evaluation_list)
    at_once = pictures_at_once(args.evaluation_batch_size, device)
    evaluation = evaluation_loader(evaluation_pictures, args.num_workers, at_once, share())

    # Network, optimiser and what is kept of them
    class_embeddings, embedding = load_class_embeddings(split.names, args.embedding, args.embedding_path)
    weights = args.backbone_weights if args.restore_from_where == "pretrained" else "none"
    with main_first():  # it downloads the weights, once
        model = Segmenter(
            args.backbone, torch.from_numpy(class_embeddings), weights, args.freeze_backbone, args.cache_features,
            args.loss_stride, split.num_auxiliary, args.amp, args.compile, args.accumulate,
        ).to(device)  # fmt: skip
    teacher = build_teacher(model, split, args, device)
    num_steps = count_steps(len(source), args.batch_size, args.num_epochs, args.max_steps)
    run = Run(STAGE, args, setting(args, split.as_dict(), embedding), model, num_steps, teacher)
    if args.restore_from_where == "continue":
        run.resume()
    elif args.restore_from_where == "saved":
        run.start_from(args.stage1_checkpoint or stage_folder(args.output_dir, args.split, STAGE - 1) / "latest.pth")
    else:
        run.begin()
    print(f"{len(source)} source and {len(target)} target pictures, {num_steps} steps, kept in {run.folder}")

    # Training: every batch depends on seed and step alone, and each process takes its share of it
    replica = replicated(model)
    target_size = args.target_batch_size or args.batch_size
    source_batches = training_loader(source, args.batch_size, run.step, num_steps, args.seed, args.num_workers, share())
    target_batches = training_loader(target, target_size, run.step, num_steps, args.seed + 1, args.num_workers, share())
    for batches in run.steps(source_batches, target_batches, device):
        if teacher is not None:
            guide(teacher, model, source, target, run.step, num_steps, args)
        losses = train_step(replica, run.optimizer, *batches, split.num_trained_seen, args, teacher, run.scaler)
        run.note(losses)
        if run.due(args.evaluate_every):
            run.record(evaluate(model, evaluation, ZeroShotMetrics(split.names, split.num_seen), device))
            run.draw(evaluation.dataset, split)
            run.draw_labels(*watched_labels(run.watch(target), teacher, split, args))
        if run.due(args.save_every):
            run.save()
    if args.dry_run:
        run.forecast(evaluation, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
