"""What a training run is made of besides its method: device, schedule, and what it keeps on disk."""

import argparse
import contextlib
import itertools
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from utils import distributed
from utils.checkpoint import check_setting, load_checkpoint, load_model, load_scaler, load_schedule, save_checkpoint
from utils.errors import UserError, check_writable
from utils.evaluation import predictions
from utils.heap import keep_memory
from utils.metrics import DETAILS, HEADLINES, as_json, format_table
from utils.prefetch import on_device
from utils.records import (
    GOES_ON,
    KEPT,
    LossMeter,
    append_log,
    duration,
    forget_log,
    make_run_folder,
    peak_memory,
    progress,
    summary_writer,
    write_arguments,
    write_evaluation,
)
from utils.sheets import label_rows, pictures_showing, prediction_rows, save_sheet, scores
from utils.waiting import watched

SAME_NETWORK = ("split", "background", "auxiliary_background", "backbone", "embedding")
"""Keys of a setting, and flags, that a checkpoint and the run that starts from it must share."""

SAME_RUN = (*SAME_NETWORK, "target_pixels", "target_images")
"""As above, for a run that goes on: a run has one protocol from its first step to its last."""

SAME_SCHEDULE = ("learning_rate", "head_factor", "optimizer", "momentum", "weight_decay", "poly_power")
"""Flags that a run that goes on can't change: their values lie in the state of its optimiser and schedule."""

REHEARSAL = 4
"""Steps, and evaluation batches, of --dry-run; the first of them warms up and is not timed."""

EXTREMES = 3
"""Worst and best pictures that are drawn at an evaluation, of either so many."""

UNSCALED = torch.amp.GradScaler("cuda", enabled=False)
"""Scales no loss: what a step in another precision than fp16 takes."""


def choose_device(name: str, deterministic: bool = False) -> torch.device:
    """The device called `name`; "auto" is cuda, else mps, else cpu. Raises `UserError` if it isn't there.

    Args:
        deterministic: from here on take only algorithms that give the same bits each time.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks for it when it is first used
    torch.backends.cudnn.allow_tf32 = not deterministic  # TensorFloat-32, of convolutions only
    torch.use_deterministic_algorithms(deterministic)
    if name == "auto":
        backend = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return _own_device(torch.device(backend))
    try:
        device = _own_device(torch.device(name))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {name} can't be used here: choose cpu, or auto for what there is") from error
    return device


def _own_device(device: torch.device) -> torch.device:
    """Of several processes each takes a GPU of its own, or they share the CPU. Raises `UserError` if they can't."""
    if distributed.share()[1] == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UserError(f"--device {device} is not for several processes: give cuda or cpu")
    number = int(os.environ["LOCAL_RANK"])
    if number >= (found := torch.cuda.device_count()):
        raise UserError(f"there are {found} GPUs here: give torchrun no higher --nproc-per-node, or --device cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def choose_amp(name: str, device: torch.device) -> str:
    """The precision of the convolutions in training called `name`; "auto" is bf16 on a GPU that has it, else off."""
    if name != "auto":
        return name
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "off"


def stage_folder(output_dir: Path, split: int | str, stage: int) -> Path:
    """Where stage `stage` of `split` keeps its run below `--output-dir`."""
    return output_dir / f"split{split}" / f"stage{stage}"


def count_steps(num_pictures: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimiser steps of a run: `num_epochs` times through the pictures, but at most `max_steps`."""
    steps = -(-num_epochs * num_pictures // batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def build_optimizer(groups: list[dict], args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimiser of `--optimizer` over parameter groups that bring their own rates."""
    fused = groups[0]["params"][0].is_cuda or None  # one kernel a step; a CPU keeps its rounding
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=fused)
    return torch.optim.SGD(groups, momentum=args.momentum, weight_decay=args.weight_decay, fused=fused)


def setting(args: argparse.Namespace, split: dict[str, list], embedding: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint must say of itself: the classes, the network and the protocol, in plain types."""
    chosen = ("split", "background", "auxiliary_background", "backbone", "target_pixels", "target_images")
    supervised = getattr(args, "supervised", False)  # stage 2 has no such thing
    return {
        **split,
        "supervised": supervised,
        **{name: getattr(args, name) for name in chosen},
        "embedding": list(embedding),
    }


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Within it Ctrl-C and SIGTERM only add their numbers to the list that it gives; a second Ctrl-C ends the process.

    That one is left to the system, so it works whatever the process is doing. No file is harmed: see
    `utils.errors.atomic_write`. Outside the main thread, which alone gets signals, it does nothing.

    torchrun hands a Ctrl-C on to processes that the terminal has told already, so under it a third one ends them.
    """
    caught: list[int] = []
    several = distributed.share()[1] > 1

    def note(number: int, _) -> None:
        if caught or not several:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not caught and distributed.is_main():  # a plain write: a signal may come in the middle of a print
            os.write(2, b"\nstopping: finishes the step, then saves; Ctrl-C leaves at once\n")
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """A stage's network, optimiser and schedule, and the folder that they are kept in.

    `latest.pth` is the checkpoint to report. `best.pth` is the one with the highest `selected_by` on the
    evaluation pictures, and says so in itself.

    Args:
        stage: 1 or 2.
        args: the flags of the run.
        setting: what rebuilds the model and tells its protocol, in plain types, see `utils.checkpoint`.
        model: the network, on its device.
        num_steps: optimiser steps of the whole run.
        teacher: a module whose state goes with the run's, if it has one.
    """

    selected_by = "miou_unseen"

    def __init__(
        self, stage: int, args: argparse.Namespace, setting: dict[str, Any], model: nn.Module, num_steps: int,
        teacher: nn.Module | None = None,
    ):  # fmt: skip
        self.stage, self.args, self.setting, self.model, self.num_steps = stage, args, setting, model, num_steps
        self.folder = stage_folder(args.output_dir, args.split, stage)
        check_writable(self.folder, f"--output-dir {args.output_dir}")
        self.arguments = {key: _plain(value) for key, value in vars(args).items()}
        groups = model.parameter_groups(args.learning_rate, args.head_factor)
        device = groups[0]["params"][0].device
        keep_memory(args.keep_memory, device)
        self.optimizer = build_optimizer(groups, args)
        self.scheduler = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, num_steps, args.poly_power)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")  # else it does nothing
        if self.scaler.is_enabled():  # which may leave out the first steps
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
        self.teacher = teacher
        self.step = 0
        self.best: float | None = None
        self._losses, self._bar, self._board = LossMeter(), None, None
        self._watched: list[int] = []
        self._writer = summary_writer() if args.tensorboard else None
        self._pictures, self._times = 0, []
        self._looked = 0, 0.0  # the step and the time of the last look at the losses

    @property
    def latest(self) -> Path:
        return self.folder / "latest.pth"

    # Beginning

    def begin(self) -> None:
        """Begins at step 0.

        Raises:
            UserError: if the folder holds a run already, which would be lost.
        """
        if os.path.exists(self.latest) and not self.args.dry_run:
            raise UserError(
                f"{self.latest} is there: --restore-from-where continue goes on with that run; to begin another, give "
                "another --output-dir or delete the file"
            )

    def resume(self) -> None:
        """Takes everything from `latest.pth`, to go on exactly where it stopped.

        Raises:
            UserError: if there is none, or it is of another stage, network or protocol.
        """
        checkpoint = load_checkpoint(self.latest, "begin with --restore-from-where pretrained or saved")
        if checkpoint["stage"] != self.stage:
            raise UserError(f"{self.latest} is of stage {checkpoint['stage']}: give another --output-dir")
        check_setting(self.latest, checkpoint["setting"], self.setting, SAME_RUN)
        check_setting(self.latest, checkpoint["arguments"], self.arguments, SAME_SCHEDULE)
        load_model(self.model, checkpoint, self.latest)
        if self.teacher is not None:
            load_model(self.teacher, checkpoint, self.latest, "teacher")
        load_schedule(self.optimizer, self.scheduler, checkpoint, self.latest)
        load_scaler(self.scaler, checkpoint, self.latest)
        if self.scheduler.total_iters != self.num_steps:
            raise UserError(
                f"{self.latest} is of a run of {self.scheduler.total_iters} steps, not {self.num_steps}: give the same "
                "--max-steps, --num-epochs, --batch-size and training list"
            )
        self.step, self.best = checkpoint["step"], checkpoint["best"]
        self._say_changes(checkpoint["arguments"])
        if self.step >= self.num_steps:
            print(f"{self.latest} has all {self.num_steps} steps: nothing to do")

    def start_from(self, path: Path) -> None:
        """Begins with the network, and nothing else, of another stage's checkpoint.

        Raises:
            UserError: if there is none, or it is of another network, or the folder holds a run already.
        """
        self.begin()
        checkpoint = load_checkpoint(path, "run stage 1 first, or give --stage1-checkpoint")
        check_setting(path, checkpoint["setting"], self.setting, SAME_NETWORK)
        if checkpoint["setting"]["supervised"]:
            raise UserError(f"{path} was trained with --supervised, which is not zero-shot: give another checkpoint")
        if checkpoint["setting"]["target_pixels"] == "oracle":  # else the result would pass for an honest one
            check_setting(path, checkpoint["setting"], self.setting, ["target_pixels"])
        load_model(self.model, checkpoint, path)

    # Going on

    def steps(self, source_batches: Iterable, target_batches: Iterable, device: torch.device) -> Iterator[tuple]:
        """Source and target batch of each step that is left, on the device, with a progress bar.

        Before each step the random state is set from seed and step alone, so that a run that goes on draws
        what an uninterrupted one draws; see also `dataset.loaders.StepSampler`. Several processes draw each their own.

        Nothing is written before the first batch is there. After Ctrl-C or SIGTERM the step is finished, an
        evaluation that belongs to it too, then `latest.pth` is saved. Several processes agree on the step.

        Raises:
            SystemExit: with 130 after Ctrl-C and 143 after SIGTERM.
        """
        last = REHEARSAL if self.args.dry_run else None
        with caught_signals() as signals:  # before zip starts the loaders' workers
            # What matters most comes first: a narrow terminal cuts the end off.
            self._bar = progress(
                on_device(itertools.islice(zip(watched(source_batches), watched(target_batches)), last), device),
                total=self.num_steps, initial=self.step, desc=f"stage {self.stage}",
                bar_format="{l_bar}{bar:20}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]",
            )  # fmt: skip
            try:
                for number, (source, target) in enumerate(self._bar):
                    if number == 0:
                        self._looked = self.step, time.perf_counter()
                        if not self.args.dry_run and distributed.is_main():
                            self._open_folder()
                    seed = self.args.seed * 1_000_003 + self.step + distributed.share()[0] * 0x9E3779B97F4A7C15
                    torch.manual_seed(seed % 2**63)
                    target_size = self.args.target_batch_size or self.args.batch_size
                    self._pictures = self.args.batch_size + (target_size if len(target[0]) else 0)
                    yield source, target
                    stop = distributed.highest(signals[0] if signals else 0)
                    if stop and not self.args.dry_run:
                        self.save()
                        print(f"stopped: {self.latest} has step {self.step} of {self.num_steps}; {GOES_ON}", flush=True)
                    if stop:
                        distributed.disconnect(failed=False)
                        raise SystemExit(128 + stop)
            finally:
                self._bar = None  # and with it the loaders' workers
                if self._board is not None:
                    self._board.close()

    def _open_folder(self) -> None:
        """Says in the run's folder what is run, and clears it of what came after the step to go on from."""
        make_run_folder(self.folder)
        forget_log(self.folder, after=self.step)
        if self.step == 0:
            (self.folder / "best.pth").unlink(missing_ok=True)
        more = {"continued_at": self.step} if self.step else {}
        write_arguments(self.folder, self.arguments, setting=self.setting, **more)
        if self._writer is not None:
            self._board = self._writer(self.folder / "tensorboard", purge_step=self.step + 1)

    def note(self, losses: dict[str, torch.Tensor]) -> None:
        """Counts a step as done, notes its losses and lowers the rate; looks at them at the log interval.

        Also before an evaluation, whose scores would be no numbers where the losses are none.
        """
        rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self.step += 1
        self._losses.add(self.step, losses)
        if self.args.dry_run or self.due(self.args.log_every) or self.due(self.args.evaluate_every):
            means = self._losses.means()
            (step, before), now = self._looked, time.perf_counter()
            self._looked = self.step, now
            self._times.append(now)
            speed = self._pictures * (self.step - step) / max(now - before, 1e-9)
            parts = " ".join(f"{name} {value:.3f}" for name, value in means.items())
            self._bar.set_postfix_str(f"{speed:.1f} pictures/s, lr {rate:.1e}, {parts}")
            if self._board is not None:
                self._scalars({**{f"loss/{name}": value for name, value in means.items()}, "learning rate": rate})

    def due(self, every: int) -> bool:
        """Whether something done `every` so many steps, and at the end, is due now; 0: only at the end.

        In a dry run nothing ever is.
        """
        due = self.step == self.num_steps or (every > 0 and self.step % every == 0)
        return due and not self.args.dry_run

    def save(self, name: str = "latest.pth", selection: str = "last") -> None:
        """Writes a checkpoint. Raises `UserError` instead if the losses or the weights have gone wrong."""
        self._losses.means()  # raises if one is not finite
        weights = self.model.state_dict()
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise UserError(f"the weights are not finite after step {self.step}: lower --learning-rate; {KEPT}")
        if not distributed.is_main():
            return
        save_checkpoint(
            self.folder / name, stage=self.stage, step=self.step, model=weights,
            optimizer=self.optimizer.state_dict(), scheduler=self.scheduler.state_dict(), best=self.best,
            scaler=self.scaler.state_dict(),
            teacher={} if self.teacher is None else self.teacher.state_dict(), selection=selection,
            arguments=self.arguments, setting=self.setting,
        )  # fmt: skip

    def record(self, result: dict) -> None:
        """Logs an evaluation, prints its table, and keeps `best.pth` if it is the best so far.

        Args:
            result: of `utils.evaluation.evaluate`. Its details go to `evaluation.json`, the figures to the log.
        """
        losses = {f"loss_{name}": value for name, value in self._losses.means().items()}
        protocol = {key: self.setting[key] for key in ("target_pixels", "target_images", "background")}
        figures = {key: value for key, value in as_json(result).items() if key not in DETAILS}
        logged = {"stage": self.stage, "step": self.step, **protocol, **losses, **figures}
        described = {"selection": "last", "protocol": describe_protocol(self.setting)}
        self._evaluation = {**logged, **described, **{key: result[key] for key in DETAILS}}
        if distributed.is_main():
            append_log(self.folder, logged)
            write_evaluation(self.folder, self._evaluation)
        self._bar.clear()
        print(f"\nstage {self.stage}, step {self.step}: {describe_protocol(self.setting)}")
        print(format_table(result, result["seen"] + result["unseen"], len(result["seen"])), flush=True)
        if self._board is not None:
            self._scalars({f"evaluation/{title}": figures[key] for title, key in HEADLINES if figures[key] is not None})
        score = result[self.selected_by]
        score = -1.0 if math.isnan(score) else score  # undefined, without such a pixel: worse than any
        if self.best is None or score > self.best:
            self.best = score
            self.save("best.pth", f"highest {self.selected_by} on the evaluation pictures")

    # Showing

    def draw(self, dataset: Dataset, split: Any) -> None:
        """Draws what the network now makes of evaluation pictures, into `pictures/` of the run's folder.

        One sheet with a picture for each unseen class, the same ones at each evaluation; and the pictures that were
        done worst and best at the last evaluation, for `utils.report`.

        Args:
            dataset: the evaluation pictures, with their names in `ids`.
            split: the classes that are scored; gives `names`, `num_seen`, `to_mask` and `drawing`, see `utils.sheets`.
        """
        if self.args.no_pictures or not distributed.is_main():
            return
        self._watched = self._watched or pictures_showing(dataset, range(split.num_seen, len(split.names)))
        rows = prediction_rows(self.model, dataset, self._watched, split.to_mask)
        self._save_sheet("evaluation", rows, split)

        done = [(score, name) for name, (score, _) in self._evaluation["per_picture"].items() if score is not None]
        done, count = sorted(done), min(EXTREMES, len(done) // 2)
        extremes = {f"worst_{n + 1}": done[n] for n in range(count)} | {
            f"best_{n + 1}": done[-1 - n] for n in range(count)
        }
        drawn = {}
        for name, (score, picture) in extremes.items():
            rows = prediction_rows(self.model, dataset, [dataset.ids.index(picture)], split.to_mask)
            drawn[picture] = f"pictures/{name}.jpg"
            save_sheet(self.folder / drawn[picture], rows, f"{picture}: mean IoU {score:.1%}", split.drawing)
        write_evaluation(self.folder, {**self._evaluation, "drawn": drawn})

    def watch(self, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image, valid and logits of four target pictures, spread over `dataset` and the same at each evaluation."""
        keys = [(len(dataset) * n // 4, 0) for n in range(min(4, len(dataset)))]
        image, valid = map(torch.stack, zip(*[dataset[key] for key in keys]))
        logits = scores(self.model, image)
        return image, valid.to(logits.device), logits

    def draw_labels(self, image: torch.Tensor, labels: Mapping[str, torch.Tensor], split: Any) -> None:
        """Draws class indices {heading: [N, H, W]} over their pictures, as `draw` does."""
        if self.args.no_pictures or not distributed.is_main():
            return
        self._save_sheet("pseudo_labels", label_rows(image, labels, split.to_mask), split)

    def forecast(self, evaluation: DataLoader, device: torch.device) -> None:
        """Ends a dry run: says how long the run that it stands for will take, and what it needs."""
        if not self._times:
            print(f"dry run: {self.latest} has all {self.num_steps} steps: nothing to do")
            return
        if not distributed.is_main():
            return
        step_time = (self._times[-1] - self._times[0]) / max(1, len(self._times) - 1)
        times, counts = [], []
        for _, _, index, logits in itertools.islice(predictions(self.model, evaluation, device), REHEARSAL):
            logits[0, 0, 0, 0].item()  # waits for the device
            times.append(time.perf_counter())
            counts.append(len(index))
        num_pictures, left = len(evaluation.dataset), self.num_steps - self.step + len(self._times)
        evaluation_time = num_pictures * (times[-1] - times[0]) / max(1, sum(counts[1:])) / distributed.share()[1]
        every = self.args.evaluate_every
        evaluations = max(1, -(-left // every)) if every else 1
        memory, total = peak_memory(device), left * step_time + evaluations * evaluation_time
        print(
            f"dry run: data, words, weights and {len(self._times)} steps are in order; nothing is kept of them\n"
            f"a step: {step_time:.2f} s, {self._pictures / max(step_time, 1e-9):.1f} pictures a second; "
            f"{left} steps: {duration(left * step_time)}\n"
            f"an evaluation: {num_pictures} pictures, {duration(evaluation_time)}; {evaluations} of them: "
            f"{duration(evaluations * evaluation_time)}\n"
            f"memory, at most: {memory:.1f} GB {'of the GPU' if device.type == 'cuda' else 'of this process'}\n"
            f"altogether about {duration(total)} on {device.type}"
        )

    def _save_sheet(self, name: str, rows: Sequence[tuple], split: Any) -> None:
        figures = {title: self._evaluation[key] for title, key in HEADLINES[:3]}
        said = ", ".join(f"{title} {'-' if value is None else f'{value:.1%}'}" for title, value in figures.items())
        path = self.folder / "pictures" / f"{name}_{self.step:06d}.jpg"
        sheet = save_sheet(path, rows, f"stage {self.stage}, step {self.step}: {said}", split.drawing)
        if self._board is not None:
            self._board.add_image(name, sheet, self.step, dataformats="HWC")

    def _scalars(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, self.step)

    def _say_changes(self, before: dict[str, Any]) -> None:
        ignored = ("restore_from_where", "cache_features", "num_workers", "device", "output_dir", "data_path")
        for key, value in self.arguments.items():
            if key not in ignored and before.get(key) != value:
                flag = "--" + key.strip("_").replace("_", "-")
                print(f"note: goes on with {flag} {value}, was {before.get(key)}", file=sys.stderr)


def describe_protocol(setting: dict[str, Any]) -> str:
    """One line that tells how a network was trained, for tables and logs."""
    pixels = {"all": "no target mask opened", "oracle": "ORACLE: target masks told where unseen pixels are"}
    background = "background a seen class" if setting["background"] else "background ignored"
    if setting["auxiliary_background"]:
        background += " but trained on"
    if setting["supervised"]:
        return f"split {setting['split']}, SUPERVISED with all labels, {background}, {setting['backbone']}"
    return (
        f"split {setting['split']}, target pixels {setting['target_pixels']} "
        f"({pixels[setting['target_pixels']]}), target images {setting['target_images']}, {background}, "
        f"{setting['backbone']}, {' + '.join(setting['embedding'])}"
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
