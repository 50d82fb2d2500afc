"""Stage 2: self-training on the unlabelled target pictures, from the checkpoint of stage 1.

    L = CE(source) + w * st_lambda * CE(target, pseudo)
    pseudo = argmax over the unseen logits, kept for the pixels with the highest unseen logit

CE(source) keeps the seen classes. The network's own best unseen class of each target pixel is its label, kept for the
`--keep` share of the batch's valid target pixels that are surest. "Learning unbiased zero-shot semantic segmentation
networks via transductive transfer", arXiv 2007.00515.

    python train_st_split.py --split 1 --restore-from-where saved              # from runs/split1/stage1/latest.pth
    python train_st_split.py --split 1 --restore-from-where continue           # go on after a stop

Writes runs/split1/stage2/latest.pth (the checkpoint to report), best.pth, log.jsonl and args.json; then run eval.py.
With --target-pixels all, the default, no mask of a target picture is opened.
"""

import argparse
import sys
from pathlib import Path

import torch

from dataset.errors import DatasetError
from dataset.loaders import evaluation_loader, training_loader
from dataset.splits import VOC_SPLITS, Split
from dataset.transforms import training_transform
from dataset.voc import evaluation_dataset, training_datasets
from embeddings import EmbeddingError, load_class_embeddings
from model.backbone import BACKBONES, ModelError
from model.losses import cross_entropy, pseudo_labels
from model.segmenter import Segmenter
from utils.errors import one_line_errors
from utils.evaluation import evaluate
from utils.metrics import ZeroShotMetrics
from utils.options import Parser, fraction, shared_options, weight
from utils.run import Run, choose_device, count_steps, setting, stage_folder

STAGE = 2


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    shared = shared_options(VOC_SPLITS, BACKBONES, restore=("saved", "continue", "pretrained"), batch_size=10)
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
    return parser.parse_args(argv)


def train_step(model, optimizer, source, target, num_seen: int, args) -> dict[str, torch.Tensor]:
    """One optimiser step; returns the losses as scalars on the device.

    Args:
        source: image uint8 [N, 3, S, S] and label uint8 [N, S, S], unseen and unlabelled pixels void.
        target: image uint8 [M, 3, S, S] and valid bool [M, S, S].
    """
    source_image, label = source
    target_image, valid = target
    logits = model(torch.cat([source_image, target_image]))  # [N + M, K, S, S]
    source_logits, target_logits = logits.split([len(source_image), len(target_image)])

    pseudo_label = pseudo_labels(target_logits, num_seen, valid, args.keep, balanced=args.balance_classes)
    ce = cross_entropy(source_logits, label)
    self_training = cross_entropy(target_logits, pseudo_label)
    loss = ce + args.weak_proportion * args.st_lambda * self_training

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"total": loss, "ce": ce, "self_training": self_training}


@one_line_errors(DatasetError, EmbeddingError, ModelError)
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = choose_device(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data: labelled source pictures, unlabelled target pictures, evaluation pictures
    split = Split.voc(args.split, args.background)
    transform = training_transform(args.input_size, tuple(args.scale), args.rotation, args.flip)
    source, target = training_datasets(
        args.data_path, split, transform, args.target_images, args.target_pixels, args.train_list
    )
    evaluation = evaluation_loader(evaluation_dataset(args.data_path, split, args.evaluation_list), args.num_workers)

    # Network, optimiser and what is kept of them
    class_embeddings, embedding = load_class_embeddings(split.names, args.embedding, args.embedding_path)
    weights = args.backbone_weights if args.restore_from_where == "pretrained" else "none"
    model = Segmenter(
        args.backbone, torch.from_numpy(class_embeddings), weights, args.freeze_backbone, args.cache_features
    ).to(device)
    num_steps = count_steps(len(source), args.batch_size, args.num_epochs, args.max_steps)
    run = Run(STAGE, args, setting(args, split.as_dict(), embedding), model, num_steps)
    if args.restore_from_where == "continue":
        run.resume()
    elif args.restore_from_where == "saved":
        run.start_from(args.stage1_checkpoint or stage_folder(args.output_dir, args.split, STAGE - 1) / "latest.pth")
    else:
        run.begin()
    print(f"{len(source)} source and {len(target)} target pictures, {num_steps} steps, kept in {run.folder}")

    # Training: every batch depends on seed and step alone
    target_size = args.target_batch_size or args.batch_size
    source_batches = training_loader(source, args.batch_size, run.step, num_steps, args.seed, args.num_workers)
    target_batches = training_loader(target, target_size, run.step, num_steps, args.seed + 1, args.num_workers)
    for source_batch, target_batch in run.steps(source_batches, target_batches, device):
        losses = train_step(model, run.optimizer, source_batch, target_batch, split.num_seen, args)
        run.note(losses)
        if run.due(args.evaluate_every):
            run.record(evaluate(model, evaluation, ZeroShotMetrics(split.names, split.num_seen), device))
        if run.due(args.save_every):
            run.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
