"""What a training run is made of besides its method: device, schedule, and what it keeps on disk."""

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoint import check_setting, load_checkpoint, load_model, load_schedule, save_checkpoint
from utils.errors import InputError
from utils.files import check_writable
from utils.metrics import as_json, format_table
from utils.records import GOES_ON, KEPT, LossMeter, append_log, forget_log, make_run_folder, progress, write_arguments

SAME_NETWORK = ("split", "background", "backbone", "embedding")
"""Keys of a setting, and flags, that a checkpoint and the run that starts from it must share."""

SAME_RUN = (*SAME_NETWORK, "target_pixels", "target_images")
"""As above, for a run that goes on: a run has one protocol from its first step to its last."""

SAME_SCHEDULE = ("learning_rate", "head_factor", "optimizer", "momentum", "weight_decay", "poly_power")
"""Flags that a run that goes on can't change: their values lie in the state of its optimiser and schedule."""


def choose_device(name: str, deterministic: bool = False) -> torch.device:
    """The device called `name`; "auto" is cuda, else mps, else cpu. Raises `InputError` if it isn't there.

    Args:
        deterministic: from here on take only algorithms that give the same bits each time.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks for it when it is first used
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)
    if name == "auto":
        backend = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(backend)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise InputError(f"--device {name} can't be used here: choose cpu, or auto for what there is") from error
    return device


def stage_folder(output_dir: Path, split: int, stage: int) -> Path:
    """Where stage `stage` of `split` keeps its run below `--output-dir`."""
    return output_dir / f"split{split}" / f"stage{stage}"


def count_steps(num_pictures: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimiser steps of a run: `num_epochs` times through the pictures, but at most `max_steps`."""
    steps = -(-num_epochs * num_pictures // batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def build_optimizer(groups: list[dict], args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimiser of `--optimizer` over parameter groups that bring their own rates."""
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    return torch.optim.SGD(groups, momentum=args.momentum, weight_decay=args.weight_decay)


def setting(args: argparse.Namespace, split: dict[str, list], embedding: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint must say of itself: the classes, the network and the protocol, in plain types."""
    chosen = ("split", "background", "backbone", "target_pixels", "target_images")
    return {**split, **{name: getattr(args, name) for name in chosen}, "embedding": list(embedding)}


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Within it Ctrl-C and SIGTERM only add their numbers to the list that it gives; a second Ctrl-C ends the process.

    That one is left to the system, so it works whatever the process is doing. No file is harmed: see
    `utils.files.replacing`. Outside the main thread, which alone gets signals, it does nothing.
    """
    caught: list[int] = []

    def note(number: int, _) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not caught:  # a plain write: a signal may come in the middle of a print
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
    """

    selected_by = "miou_unseen"

    def __init__(self, stage: int, args: argparse.Namespace, setting: dict[str, Any], model: nn.Module, num_steps: int):
        self.stage, self.args, self.setting, self.model, self.num_steps = stage, args, setting, model, num_steps
        self.folder = stage_folder(args.output_dir, args.split, stage)
        check_writable(self.folder, f"--output-dir {args.output_dir}")
        self.arguments = {key: _plain(value) for key, value in vars(args).items()}
        groups = model.parameter_groups(args.learning_rate, args.head_factor)
        self.optimizer = build_optimizer(groups, args)
        self.scheduler = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, num_steps, args.poly_power)
        self.step = 0
        self.best: float | None = None
        self._losses, self._bar = LossMeter(), None

    @property
    def latest(self) -> Path:
        return self.folder / "latest.pth"

    # Beginning

    def begin(self) -> None:
        """Begins at step 0.

        Raises:
            InputError: if the folder holds a run already, which would be lost.
        """
        if self.latest.exists():
            raise InputError(
                f"{self.latest} is there: --restore-from-where continue goes on with that run; to begin another, give "
                "another --output-dir or delete the file"
            )

    def resume(self) -> None:
        """Takes everything from `latest.pth`, to go on exactly where it stopped.

        Raises:
            InputError: if there is none, or it is of another stage, network or protocol.
        """
        checkpoint = load_checkpoint(self.latest, "begin with --restore-from-where pretrained or saved")
        if checkpoint["stage"] != self.stage:
            raise InputError(f"{self.latest} is of stage {checkpoint['stage']}: give another --output-dir")
        check_setting(self.latest, checkpoint["setting"], self.setting, SAME_RUN)
        check_setting(self.latest, checkpoint["arguments"], self.arguments, SAME_SCHEDULE)
        load_model(self.model, checkpoint, self.latest)
        load_schedule(self.optimizer, self.scheduler, checkpoint, self.latest)
        if self.scheduler.total_iters != self.num_steps:
            raise InputError(
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
            InputError: if there is none, or it is of another network, or the folder holds a run already.
        """
        self.begin()
        checkpoint = load_checkpoint(path, "run stage 1 first, or give --stage1-checkpoint")
        check_setting(path, checkpoint["setting"], self.setting, SAME_NETWORK)
        if checkpoint["setting"]["target_pixels"] == "oracle":  # else the result would pass for an honest one
            check_setting(path, checkpoint["setting"], self.setting, ["target_pixels"])
        load_model(self.model, checkpoint, path)

    # Going on

    def steps(self, source_batches: Iterable, target_batches: Iterable, device: torch.device) -> Iterator[tuple]:
        """Source and target batch of each step that is left, on the device, with a progress bar.

        Before each step the random state is set from seed and step alone, so that a run that goes on draws
        what an uninterrupted one draws; see also `dataset.loaders.StepSampler`.

        Nothing is written before the first batch is there. After Ctrl-C or SIGTERM the step is finished, an
        evaluation that belongs to it too, then `latest.pth` is saved.

        Raises:
            SystemExit: with 130 after Ctrl-C and 143 after SIGTERM.
        """
        with caught_signals() as signals:  # before zip starts the loaders' workers
            self._bar = progress(
                zip(source_batches, target_batches),
                total=self.num_steps, initial=self.step, desc=f"stage {self.stage}", unit="step",
            )  # fmt: skip
            try:
                for number, batches in enumerate(self._bar):
                    if number == 0:
                        self._open_folder()
                    torch.manual_seed((self.args.seed * 1_000_003 + self.step) % 2**63)
                    yield tuple([tensor.to(device, non_blocking=True) for tensor in batch] for batch in batches)
                    if signals:
                        self.save()
                        print(f"stopped: {self.latest} has step {self.step} of {self.num_steps}; {GOES_ON}", flush=True)
                        raise SystemExit(128 + signals[0])
            finally:
                self._bar = None  # and with it the loaders' workers

    def _open_folder(self) -> None:
        """Says in the run's folder what is run, and clears it of what came after the step to go on from."""
        make_run_folder(self.folder)
        forget_log(self.folder, after=self.step)
        if self.step == 0:
            (self.folder / "best.pth").unlink(missing_ok=True)
        more = {"continued_at": self.step} if self.step else {}
        write_arguments(self.folder, self.arguments, setting=self.setting, **more)

    def note(self, losses: dict[str, torch.Tensor]) -> None:
        """Counts a step as done, notes its losses and lowers the rate; looks at them at the log interval.

        Also before an evaluation, whose scores would be no numbers where the losses are none.
        """
        self.scheduler.step()
        self.step += 1
        self._losses.add(self.step, losses)
        if self.due(self.args.log_every) or self.due(self.args.evaluate_every):
            means = self._losses.means()
            self._bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in means.items()))

    def due(self, every: int) -> bool:
        """Whether something done `every` so many steps, and at the end, is due now; 0: only at the end."""
        return self.step == self.num_steps or (every > 0 and self.step % every == 0)

    def save(self, name: str = "latest.pth", selection: str = "last") -> None:
        """Writes a checkpoint. Raises `InputError` instead if the losses or the weights have gone wrong."""
        self._losses.means()  # raises if one is not finite
        weights = self.model.state_dict()
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise InputError(f"the weights are not finite after step {self.step}: lower --learning-rate; {KEPT}")
        save_checkpoint(
            self.folder / name, stage=self.stage, step=self.step, model=weights,
            optimizer=self.optimizer.state_dict(), scheduler=self.scheduler.state_dict(), best=self.best,
            selection=selection, arguments=self.arguments, setting=self.setting,
        )  # fmt: skip

    def record(self, result: dict) -> None:
        """Logs an evaluation, prints its table, and keeps `best.pth` if it is the best so far."""
        losses = {f"loss_{name}": value for name, value in self._losses.means().items()}
        protocol = {key: self.setting[key] for key in ("target_pixels", "target_images", "background")}
        append_log(self.folder, {"stage": self.stage, "step": self.step, **protocol, **losses, **as_json(result)})
        print(f"\nstage {self.stage}, step {self.step}: {describe_protocol(self.setting)}")
        print(
            format_table(result, self.setting["seen"] + self.setting["unseen"], len(self.setting["seen"])), flush=True
        )
        score = result[self.selected_by]
        score = -1.0 if math.isnan(score) else score  # undefined, without such a pixel: worse than any
        if self.best is None or score > self.best:
            self.best = score
            self.save("best.pth", f"highest {self.selected_by} on the evaluation pictures")

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
    return (
        f"split {setting['split']}, target pixels {setting['target_pixels']} "
        f"({pixels[setting['target_pixels']]}), target images {setting['target_images']}, {background}, "
        f"{setting['backbone']}, {' + '.join(setting['embedding'])}"
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
