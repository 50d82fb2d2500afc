"""Stage 1: train on labelled source pictures, with the transductive bias term on unlabelled target pictures.

    L = CE(source) + lambda [ (1 - w) B(source) + w B(target) ]
    B = mean over valid pixels of -log( sum over unseen c of softmax_c + 1e-5 )

CE teaches the seen classes. B keeps probability on the unseen ones, which nothing labels: a little everywhere
(source), and more on pictures that show them (target). "Learning unbiased zero-shot semantic segmentation networks
via transductive transfer", arXiv 2007.00515.

    python train_split_lambda.py --split 1 --dry-run                           # check all, say how long it will take
    python train_split_lambda.py --split 1 --restore-from-where pretrained
    python train_split_lambda.py --split 1 --restore-from-where continue       # go on after a stop
    python train_split_lambda.py --split 1 --lambda 0                          # source only: the baseline

Writes runs/split1/stage1/latest.pth (the checkpoint to report), best.pth, log.jsonl, args.json, evaluation.json (for
utils.report) and pictures/; then run train_st_split.py. With --target-pixels all, the default, no mask of a target
picture is opened.
"""

import argparse
import sys

import torch

from dataset.loaders import empty_batches, evaluation_loader, training_loader
from dataset.splits import SPLITS
from dataset.transforms import training_transform
from dataset.voc import choose_split, evaluation_dataset, training_datasets
from embeddings import load_class_embeddings
from model.backbone import BACKBONES
from model.pixel_losses import bias_loss, cross_entropy
from model.segmenter import Segmenter
from utils.distributed import connect, joined, main_first, replicated, share
from utils.errors import one_line_errors
from utils.evaluation import evaluate, pictures_at_once
from utils.metrics import ZeroShotMetrics
from utils.options import Parser, fraction, parse_with_recipe, shared_options, weight
from utils.run import UNSCALED, Run, choose_amp, choose_device, count_steps, setting

STAGE = 1


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    shared = shared_options(SPLITS, BACKBONES, restore=("pretrained", "continue"), batch_size=9)
    parser = Parser(description=__doc__, parents=[shared])
    method = parser.add_argument_group("method")
    method.add_argument(
        "--lambda",
        dest="lambda_",
        type=weight,
        default=0.2,
        metavar="LAMBDA",
        help="weight of the bias term: raise it if unseen classes stay at 0; 0 trains on source alone",
    )
    method.add_argument(
        "--supervised",
        action="store_true",
        help="NOT zero-shot: labels of the unseen classes too, and nothing else; the ceiling for others to be held "
        "against",
    )
    method.add_argument(
        "--weak-proportion", type=fraction, default=0.2, metavar="W", help="w, the target's share of the bias term"
    )
    return parse_with_recipe(parser, argv, STAGE)


def train_step(model, optimizer, source, target, num_seen: int, args, scaler=UNSCALED) -> dict[str, torch.Tensor]:
    """One optimiser step; returns the losses as scalars on the device.

    Args:
        source: image uint8 [N, 3, S, S] and label uint8 [N, S, S], unseen and unlabelled pixels void.
        target: image uint8 [M, 3, S, S] and valid bool [M, S, S].
        scaler: of the loss, with --amp fp16; does nothing by default.

    Of several processes each gets its share of the batch, and its part of the losses: their sum is the batch's.
    """
    source_image, label = source
    target_image, valid = target
    step = slice(None, None, args.loss_stride)
    label, valid = label[:, step, step], valid[:, step, step]  # [N, S, S] -> [N, s, s]
    image = torch.cat([source_image, target_image])
    logits = model(image)  # [N + M, K, s, s]
    source_logits, target_logits = logits.split([len(source_image), len(target_image)])

    ce = cross_entropy(source_logits, label, joined=joined)
    loss, losses = ce, {"ce": ce}
    if args.lambda_:
        bias_source = bias_loss(source_logits, num_seen, label < num_seen, joined)
        bias_target = bias_loss(target_logits, num_seen, valid, joined)
        w = args.weak_proportion
        loss = ce + args.lambda_ * ((1 - w) * bias_source + w * bias_target)
        losses |= {"bias_source": bias_source, "bias_target": bias_target}

    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return {"total": loss, **losses}


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
    if args.supervised:
        args.lambda_ = 0.0
    target_images = args.target_images if args.lambda_ else "all"  # none is used: do without one that shows unseen
    with main_first():  # it lists once what classes the pictures show
        source, target = training_datasets(
            args.data_path, split, transform, target_images, args.target_pixels, args.train_list, args.supervised
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
    num_steps = count_steps(len(source), args.batch_size, args.num_epochs, args.max_steps)
    run = Run(STAGE, args, setting(args, split.as_dict(), embedding), model, num_steps)
    if args.restore_from_where == "continue":
        run.resume()
    else:
        run.begin()
    print(f"{len(source)} source and {len(target)} target pictures, {num_steps} steps, kept in {run.folder}")

    # Training: every batch depends on seed and step alone, and each process takes its share of it
    replica = replicated(model)
    target_size = args.target_batch_size or args.batch_size
    source_batches = training_loader(source, args.batch_size, run.step, num_steps, args.seed, args.num_workers, share())
    target_batches = training_loader(target, target_size, run.step, num_steps, args.seed + 1, args.num_workers, share())
    if args.lambda_ == 0:
        target_batches = empty_batches(args.input_size)
    for batches in run.steps(source_batches, target_batches, device):
        losses = train_step(replica, run.optimizer, *batches, split.num_trained_seen, args, run.scaler)
        run.note(losses)
        if run.due(args.evaluate_every):
            run.record(evaluate(model, evaluation, ZeroShotMetrics(split.names, split.num_seen), device))
            run.draw(evaluation.dataset, split)
        if run.due(args.save_every):
            run.save()
    if args.dry_run:
        run.forecast(evaluation, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
