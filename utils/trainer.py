"""What both stages do alike: device, data, network, optimiser, resume, log, evaluation, signals.

A script makes a `Trainer`, restores it, ends each of its `steps` with `end_step`, and returns what `finish` does.
"""

import argparse
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from dataset.loaders import empty_batches, evaluation_loader, training_loader
from dataset.transforms import training_transform
from dataset.voc import choose_split, evaluation_dataset, training_datasets
from embeddings import load_class_embeddings
from model.backbone import build_backbone
from model.segmenter import Segmenter
from utils import checkpoint, distributed, metrics
from utils.errors import UserError, check_writable, write_text
from utils.logging import LossMeter, json_lines, open_run_folder, peak_memory, read_log, write_log

DRY_RUN_STEPS = 4  # of --dry-run, and evaluation batches; the first of them warms up and is not timed
LOOK_AT_MOST = 3000  # images of each kind that a pseudo-labeller looks at before the first step
SELECTED_BY = "miou_unseen"  # the figure on the evaluation images by which best.pth is chosen

# What a checkpoint shares with the run that starts from it, and with one that continues: its protocol and optimiser.
SAME_NETWORK = ("split", "background", "backbone", "embedding", "supervised")
SAME_RUN = (*SAME_NETWORK, "target_pixels", "target_images", "freeze_backbone", "head_factor", "optimizer", "momentum",
            "weight_decay", "poly_power")  # fmt: skip
# What a run that continues may change without a note.
ANY_VALUE = ("restore_from_where", "cache_features", "num_workers", "device", "output_dir", "data_path", "config")


def stage_folder(output_dir: Path, split: str, stage: int) -> Path:
    """Where a stage keeps its run below `--output-dir`."""
    return output_dir / f"split{split}" / f"stage{stage}"


def build_optimizer(groups: list[dict], args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimiser of `--optimizer` over parameter groups that bring their own rates."""
    fused = groups[0]["params"][0].is_cuda or None  # one kernel a step on a GPU; a CPU keeps its rounding
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=fused)
    return torch.optim.SGD(groups, momentum=args.momentum, weight_decay=args.weight_decay, fused=fused)


def optimizer_step(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Backward pass and update."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Within it Ctrl-C and SIGTERM only add their numbers to the list that it gives; a second Ctrl-C ends the process.

    torchrun passes a Ctrl-C on to processes that the terminal has interrupted already, so under it a third ends them.
    """
    caught: list[int] = []

    def catch(number: int, _) -> None:
        if caught or distributed.place()[1] == 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not caught and distributed.is_main():  # a plain write: a signal may come in the middle of a print
            os.write(2, b"\nstopping: finishes the step, then saves; Ctrl-C leaves at once\n")
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """A stage's data, network, optimiser and schedule, and the folder that the run is kept in.

    `latest.pth` is the checkpoint to report. `best.pth` has the highest unseen mIoU on the evaluation images, and says
    so in itself. `replica` is the network to call in a training step.
    """

    def __init__(self, stage: int, args: argparse.Namespace):
        distributed.connect(args.device)
        self.stage, self.args = stage, args
        self.device = distributed.choose_device(args.device, args.deterministic)
        args.amp = distributed.choose_amp(args.amp, self.device)
        torch.manual_seed(args.seed)
        self._load_data()
        self._build_network()
        self.folder = stage_folder(args.output_dir, args.split, stage)
        self.latest = self.folder / "latest.pth"
        check_writable(self.folder, f"--output-dir {args.output_dir}")
        self.settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        names = ("backbone", "target_pixels", "target_images", "select")
        self.metadata |= self.split.as_dict() | {name: getattr(args, name) for name in names}
        self.step, self.best = 0, None
        self._losses, self._waited, self._times = LossMeter(), 0.0, []

    def _load_data(self) -> None:
        """Labelled source images, unlabelled target images, evaluation images."""
        args = self.args
        self.split = choose_split(args.data_path, args.split, args.unseen, args.background)
        args.split, args.background = self.split.name, self.split.background
        low, high = sorted(args.scale)
        transform = training_transform(args.input_size, (low, high), args.rotation, args.flip, args.resize)
        self.metadata = {"supervised": getattr(args, "supervised", False)}
        if self.metadata["supervised"]:
            args.lambda_ = 0.0
        self._source_only = self.stage == 1 and args.lambda_ == 0
        with distributed.rank_zero_first():  # it lists once which classes the images show
            self.source, self.target = training_datasets(
                args.data_path, self.split, transform, "all" if self._source_only else args.target_images,
                args.target_pixels, args.train_list, **self.metadata,
                complete_labels=getattr(args, "complete_labels", False),
            )  # fmt: skip
            training = [*self.source.ids, *self.target.ids]
            images = evaluation_dataset(args.data_path, self.split, args.evaluation_list, training)
        at_once = metrics.images_at_once(args.evaluation_batch_size, self.device)
        self.evaluation = evaluation_loader(images, args.num_workers, at_once, distributed.place())
        steps = -(-args.num_epochs * len(self.source) // args.batch_size)
        self.num_steps = min(steps, args.max_steps or steps)

    def _build_network(self) -> None:
        args = self.args
        class_embeddings, embedding = load_class_embeddings(
            self.split.names, args.embedding, args.embedding_path, args.word_weighting
        )
        self.metadata["embedding"] = list(embedding)
        with distributed.rank_zero_first():  # it downloads the weights, once
            weights = args.backbone_weights if args.restore_from_where == "pretrained" else "none"
            backbone = build_backbone(
                args.backbone, weights, args.freeze_backbone, args.cache_features, args.checkpoint_activations
            )
        words = torch.from_numpy(class_embeddings)
        network = Segmenter(backbone, words, self.split.num_auxiliary, args.loss_stride, args.amp)
        distributed.keep_freed_memory(self.device)
        self.network = network.to(self.device)
        self.optimizer = build_optimizer(self.network.parameter_groups(args.learning_rate, args.head_factor), args)
        self.scheduler = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, self.num_steps, args.poly_power)

    def restore(self, pseudo_labeler: nn.Module | None = None) -> None:
        """Does what `--restore-from-where` says, then shares the weights with the other processes.

        Rank 0 shows the data to `pseudo_labeler`, for all processes, unless the checkpoint brings its state. Raises
        `UserError` if the checkpoint is missing or does not fit, or the folder holds another run.
        """
        args, self.pseudo_labeler = self.args, pseudo_labeler
        if args.restore_from_where == "continue":
            self._resume()
        elif os.path.exists(self.latest) and not args.dry_run:
            hint = "--restore-from-where continue resumes it; else give another --output-dir or delete the file"
            raise UserError(f"{self.latest} is there: {hint}")
        elif args.restore_from_where == "saved":
            name = "best.pth" if args.select == "best" else "latest.pth"
            path = args.stage1_checkpoint or stage_folder(args.output_dir, args.split, 1) / name
            saved = checkpoint.load_checkpoint(path, "run stage 1 first, or give --stage1-checkpoint")
            # After an oracle the result would be reported without one.
            names = (*SAME_NETWORK, *(["target_pixels"] if saved["metadata"].get("target_pixels") == "oracle" else []))
            checkpoint.check_settings(path, saved["metadata"], self.metadata, names)
            checkpoint.load_model(self.network, saved["model"], path)
        self.replica = distributed.replicate(self.network)
        print(f"{len(self.source)} source and {len(self.target)} target images, {self.num_steps} steps, {self.folder}")
        if pseudo_labeler is not None and self.step == 0:
            size = args.target_batch_size or args.batch_size
            batches = [
                training_loader(part, size, 0, -(-min(len(part), LOOK_AT_MOST) // size), args.seed, args.num_workers)
                for part in (self.target, *self.source.divide(self.target))
            ]
            if distributed.is_main():
                pseudo_labeler.fit(*batches)
            distributed.broadcast(pseudo_labeler)

    def _resume(self) -> None:
        """Takes everything from latest.pth, to continue exactly where it stopped."""
        saved = checkpoint.load_checkpoint(self.latest, "begin with --restore-from-where pretrained or saved")
        before = saved["settings"]
        checkpoint.check_settings(self.latest, before | saved["metadata"], self.settings | self.metadata, SAME_RUN)
        checkpoint.load_model(self.network, saved["model"], self.latest)
        if self.pseudo_labeler is not None:
            checkpoint.load_model(self.pseudo_labeler, saved["pseudo_labeler"], self.latest)
        checkpoint.load_schedule(self.optimizer, self.scheduler, saved, self.latest)
        self.step, self.best = saved["step"], saved["best"]
        for group in self.optimizer.param_groups:  # the schedule computes each rate from the one before
            group["lr"] *= self.args.learning_rate / before["learning_rate"]
        for key, value in self.settings.items():
            if key not in ANY_VALUE and before.get(key) != value:
                print(f"note: continues with {key.strip('_')} {value}, was {before.get(key)}", file=sys.stderr)

    def steps(self) -> Iterator[tuple]:
        """Source and target batch of each step that is left, on the device, with a progress bar.

        Before each step the random state is set from seed, step and rank alone, so that a resumed run draws the same
        numbers. After Ctrl-C or SIGTERM all processes finish the same step, with an evaluation that belongs to it, save
        latest.pth, and exit with 130 or 143.
        """
        args, place = self.args, distributed.place()
        last = min(self.num_steps, self.step + DRY_RUN_STEPS) if args.dry_run else self.num_steps
        plan = [(self.source, args.batch_size), (self.target, args.target_batch_size or args.batch_size)]
        source, target = (
            training_loader(images, size, self.step, last, args.seed + n, args.num_workers, place)
            for n, (images, size) in enumerate(plan)
        )
        with caught_signals() as signals:  # before zip starts the loaders' workers
            self._bar = tqdm(
                zip(source, empty_batches(args.input_size) if self._source_only else target),
                f"stage {self.stage}", total=self.num_steps, initial=self.step, unit=" steps", disable=None,
            )  # fmt: skip
            self._open_folder()
            asked = time.perf_counter()
            for batch in self._bar:
                self._waited += time.perf_counter() - asked
                torch.manual_seed((args.seed * 1_000_003 + self.step + place[0] * 0x9E3779B97F4A7C15) % 2**63)
                yield tuple([tensor.to(self.device, non_blocking=True) for tensor in group] for group in batch)
                self._stop_if_asked(signals)
                asked = time.perf_counter()

    def _open_folder(self) -> None:
        """Prepares the run's folder, and evaluates if the run stopped between a save and the evaluation after it."""
        due = self.step > 0 and self.is_due(self.args.evaluate_every)
        due = due and all(entry["step"] != self.step for entry in read_log(self.folder))
        if self.step >= self.num_steps and not due:
            print(f"{self.latest} has all {self.num_steps} steps: nothing to do")
        elif distributed.is_main() and not self.args.dry_run:
            open_run_folder(self.folder, self.step, self.settings)
        if due:
            self._evaluate()

    def _stop_if_asked(self, signals: list[int]) -> None:
        if not distributed.all_reduce_sum(torch.tensor(len(signals))):
            return
        if not self.args.dry_run:
            self.save()
            done = f"stopped: {self.latest} has step {self.step} of {self.num_steps}"
            print(f"{done}; --restore-from-where continue resumes there", flush=True)
        distributed.disconnect()
        self._bar = None  # and with it the loaders' workers, for which the interpreter would wait
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])

    def end_step(self, losses: dict[str, torch.Tensor]) -> None:
        """Counts a step as done: lowers the rate; logs (only then it reads `losses`), saves, evaluates where due."""
        args = self.args
        rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        self.step += 1
        self._losses.add(losses)
        evaluates = self.is_due(args.evaluate_every)
        if args.dry_run or self.is_due(args.log_every) or evaluates:
            means = " ".join(f"{name} {value:.3f}" for name, value in self._losses.means(self.step).items())
            self._bar.set_postfix_str(f"{means}, lr {rate:.1e}, waited {self._waited:.0f} s for images")
            self._times.append(time.perf_counter())
        if evaluates or self.is_due(args.save_every):  # before the evaluation: a bad image there loses no training
            self.save()
        if evaluates:
            self._evaluate()

    def is_due(self, every: int) -> bool:
        """Whether what is done `every` so many steps (0: at the end only) is due now. In a dry run nothing is."""
        due = self.step == self.num_steps or (every > 0 and self.step % every == 0)
        return due and not self.args.dry_run

    def save(self, name: str = "latest.pth", selection: str = "last") -> None:
        """Writes a checkpoint. Raises `UserError` instead if a loss or a weight is not finite."""
        self._losses.means(self.step)
        weights, labeler = self.network.state_dict(), self.pseudo_labeler
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            hint = "begin again with a lower --learning-rate and another --output-dir; the last checkpoint is kept"
            raise UserError(f"the weights are not finite after step {self.step}: {hint}")
        if distributed.is_main():
            checkpoint.save_checkpoint(
                self.folder / name, stage=self.stage, step=self.step, model=weights, best=self.best,
                optimizer=self.optimizer.state_dict(), scheduler=self.scheduler.state_dict(),
                pseudo_labeler={} if labeler is None else labeler.state_dict(),
                selection=selection, settings=self.settings, metadata=self.metadata,
            )  # fmt: skip

    def _evaluate(self) -> None:
        """Evaluates, logs, prints the table, draws, and keeps best.pth if it is the best so far."""
        split, about = self.split, checkpoint.describe_protocol(self.metadata)
        figures = metrics.ZeroShotMetrics(split.names, split.num_seen)
        result = metrics.evaluate(self.network, self.evaluation, figures, self.device, self.args.calibration)
        entry = {
            "stage": self.stage, "step": self.step,
            **{key: self.metadata[key] for key in ("target_pixels", "target_images", "background")},
            **{f"loss_{name}": value for name, value in self._losses.last.items()}, **result,
        }  # fmt: skip
        confusion = entry.pop("confusion")
        self._bar.clear()
        print(f"\nstage {self.stage}, step {self.step}: {about}")
        print(metrics.format_table(result), flush=True)
        score = -1.0 if result[SELECTED_BY] is None else result[SELECTED_BY]  # None: no pixel is unseen
        if self.best is None or score > self.best:
            self.best = score
            self.save("best.pth", f"highest {SELECTED_BY} on the evaluation images")
            self.save()  # with the new best score
        if distributed.is_main():
            self._draw(result)
            content = {**entry, "selection": "last", "protocol": about, "confusion": confusion}
            write_text(self.folder / "evaluation.json", json_lines(content))
            # Last: a run that resumes repeats an evaluation that is not in the log.
            write_log(self.folder, [*read_log(self.folder), entry])

    def _draw(self, result: dict) -> None:
        """Draws into images/ what the network predicts, and the pseudo-labels of a pseudo-labeller."""
        from utils.visualize import contact_sheet, images_showing, prediction_rows, save_image  # with fonts: if needed

        split, dataset = self.split, self.evaluation.dataset
        indices = images_showing(dataset, range(split.num_seen, len(split.names)))  # the same ones each time
        sheets = {"evaluation": (split, prediction_rows(self.network, dataset, split, indices))}
        if self.pseudo_labeler is not None:
            keys = [(len(self.target) * n // 4, 0) for n in range(min(4, len(self.target)))]
            target = [torch.stack(parts).to(self.device) for parts in zip(*[self.target[key] for key in keys])]
            image, masks = target[0], split.trained.to_mask(self.pseudo_labeler(*target).cpu().numpy())
            images = image.permute(0, 2, 3, 1).cpu().numpy()
            rows = [(image, {"pseudo-label": mask}) for image, mask in zip(images, masks)]
            sheets["pseudo_labels"] = split.trained, rows
        figures = ", ".join(f"{title} {metrics.percent(result[key])} %" for title, key in metrics.HEADLINES[:3])
        title = f"stage {self.stage}, step {self.step}: {figures}"
        for name, (shown, rows) in sheets.items():
            sheet = contact_sheet(rows, title=title, **shown.drawing)
            save_image(sheet, self.folder / "images" / f"{name}_{self.step:06d}.jpg")

    def finish(self) -> int:
        """Ends a run; after a dry run prints how long the run will take and what it needs. Returns exit code 0."""
        if not (self._times and self.args.dry_run and distributed.is_main()):
            return 0
        times = []
        batches = metrics.predictions(self.network, self.evaluation, self.device)
        for *_, logits in itertools.islice(batches, DRY_RUN_STEPS):
            logits.coarse[0, 0, 0, 0].item()  # waits for the device
            times.append(time.perf_counter())
        step_time, batch_time = ((t[-1] - t[0]) / max(1, len(t) - 1) for t in (self._times, times))
        every = self.args.evaluate_every
        left = self.num_steps - self.step + len(self._times)
        training = timedelta(seconds=round(left * step_time))
        evaluation = timedelta(seconds=round(len(self.evaluation) * batch_time))
        evaluations = max(1, -(-left // every)) if every else 1
        print(
            f"dry run: data, words, weights and {len(self._times)} steps are in order; nothing of them is kept\n"
            f"{left} steps of {step_time:.2f} s: {training}\n"
            f"{evaluations} evaluations of {len(self.evaluation.dataset)} images, {evaluation} each\n"
            f"memory, at most: {peak_memory(self.device):.1f} GB "
            f"{'of the GPU' if self.device.type == 'cuda' else 'of this process'}\n"
            f"altogether about {training + evaluations * evaluation} on {self.device.type}"
        )
        return 0
