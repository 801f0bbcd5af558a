"""Reports of a run: curves, overlays, TensorBoard, and the printed summary."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..checkpoint import Preprocessing
from ..data import augment
from ..data.folders import Dataset
from ..data.ragged import Ragged
from ..errors import one_line, warn
from ..inference.overlay import outline
from ..inference.predictor import GATED, gated_foreground
from ..model import SemiMoE
from .run_folder import BEST

Records = Sequence[dict[str, Any]]
TITLES = ("truth", "prediction", "signed distance (red: inside)", "boundary")


def draw_curves(records: Records, tasks: Sequence[str], path: Path | IO[bytes]) -> None:
    """Plot losses, terms, learned loss weights exp(-s), mean gate weights, validation and the experts' health.

    At least one record must have validation scores.
    """
    figure = Figure(figsize=(20, 8), layout="constrained")
    losses, supervised, pseudo, weights, gates, scores, dead, spread = figure.subplots(2, 4).flat
    epochs = [r["epoch"] + 1 for r in records]  # done, as the table of scores counts them
    semi_supervised = any(r["unsupervised_weight"] for r in records)
    for name in ("total", "supervised_total", "unsupervised_total") if semi_supervised else ("supervised_total",):
        losses.plot(epochs, [r[name] for r in records], label=name.replace("_", " "))
    for axis, name in ((supervised, "supervised_terms"), (pseudo, "unsupervised_terms"), (weights, "loss_weights")):
        for k, task in enumerate(tasks):
            axis.plot(epochs, [r[name][k] for r in records], label=task)
    for k, task in enumerate(tasks):
        for e in range(len(records[0]["gate_weights"][k])):
            style = {"color": f"C{k}", "linestyle": ("-", "--", ":", "-.")[e % 4]}
            label = f"{task}: {tasks[e]}"
            gates.plot(epochs, [r["gate_weights"][k][e] for r in records], label=label, **style)
    validated = [r for r in records if "val" in r]
    experts = [name for name in validated[0]["val"] if name != GATED]
    colors = {GATED: "black"} | {name: f"C{k}" for k, name in enumerate(experts)}
    for name, color in colors.items():
        for score, style in (("dice", "-"), ("jaccard", "--")):
            points = [(r["epoch"] + 1, r["val"][name][score]) for r in validated if name in r["val"]]
            label = f"{name}, {score.capitalize()}" if name == GATED or score == "dice" else None
            scores.plot(*zip(*points, strict=True), style, marker=".", color=color, label=label)
    examined = [r for r in records if "health" in r]
    for axis, name in ((dead, "dead_channels"), (spread, "spread")):
        for k, task in enumerate(tasks):
            values = [r["health"][name][k] for r in examined]
            axis.plot([r["epoch"] + 1 for r in examined], values, marker=".", label=f"{task} expert")
    titles = {
        losses: "loss",
        supervised: "supervised terms (own + gated)",
        pseudo: "unsupervised terms (own, pseudo-labels)",
        weights: "learned loss weights exp(-s)",
        gates: "gate weights, mean over labeled images",
        scores: "validation at threshold 0.5 (dashed: Jaccard)",
        dead: "share of dead feature channels",
        spread: "standard deviation of the expert's own prediction",
    }
    for axis, title in titles.items():
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=7, handlelength=3)  # shows dashes as such
    gates.set_ylim(0, 1.3)
    gates.legend(title="task: expert", fontsize=7, title_fontsize=7, handlelength=3, ncols=3, loc="upper center")
    for axis in (scores, dead):
        axis.set_ylim(-0.02, 1.02)
    pseudo.set_visible(semi_supervised)
    figure.savefig(path, dpi=100, format="png")


@torch.no_grad()
def draw_overlays(
    model: SemiMoE, val: Dataset | Ragged, preprocessing: Preprocessing, device: torch.device, path: Path
) -> None:
    """Draw at most six validation images: image, true outline, gated mask, gated sdf and gated boundary.

    Of images of any size it draws the square of the training size in the middle.
    """
    model.eval()
    chosen = torch.linspace(0, len(val) - 1, min(6, len(val))).round().long()
    if isinstance(val, Ragged):
        side = preprocessing.image_size
        images, masks = val.windows(chosen, (val.sizes[chosen] - side) // 2, side)
    else:
        images, masks = val.images[chosen], val.masks[chosen]
    output = model(augment.normalize(images.to(device), preprocessing.mean, preprocessing.std))
    predicted = (gated_foreground(output) > 0.5).cpu()
    sdf = output.sdf[:, 0].float().tanh().cpu().numpy()
    ring = output.boundary.float().softmax(1)[:, 1].cpu().numpy()
    figure = Figure(figsize=(12.5, 2.5 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 5, squeeze=False)
    titles = f"image at {preprocessing.image_size} x {preprocessing.image_size}", *TITLES
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title)
    for row, index in enumerate(chosen.tolist()):
        image = images[row].permute(1, 2, 0).numpy()
        axes[row, 0].set_ylabel(one_line(val.names[index]), fontsize=7, parse_math=False)
        axes[row, 0].imshow(image)
        for axis, mask in ((axes[row, 1], masks[row] != 0), (axes[row, 2], predicted[row])):
            axis.imshow(outline(image, mask))
        axes[row, 3].imshow(sdf[row], cmap="RdBu_r", vmin=-1, vmax=1)
        axes[row, 4].imshow(ring[row], cmap="gray", vmin=0, vmax=1)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100, format="png")


class TensorBoard:
    """Writes the records as TensorBoard scalars; does nothing if `wanted` is False or TensorBoard is not installed.

    first_epoch: a resumed run replaces the scalars from this epoch on.
    """

    def __init__(self, folder: Path, tasks: Sequence[str], first_epoch: int, wanted: bool = True) -> None:
        self.tasks, self.writer = tasks, None
        if not wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        try:
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch + 1)
        except UnicodeEncodeError:
            warn(f"{folder}: TensorBoard needs a folder with a UTF-8 name; metrics.jsonl has its scalars")

    def write(self, record: dict[str, Any]) -> None:
        if self.writer is None:
            return
        for name, value in self._scalars(record):
            self.writer.add_scalar(name, value, record["epoch"] + 1)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _scalars(self, record: dict[str, Any]) -> Iterator[tuple[str, float]]:
        for name in ("total", "supervised_total", "unsupervised_total", "lr"):
            yield name, record[name]
        if (speed := record["speed"]["images_per_second"]) is not None:
            yield "images_per_second", speed
        for name in ("supervised_terms", "unsupervised_terms", "loss_weights"):
            for task, value in zip(self.tasks, record[name], strict=True):
                yield f"{name}/{task}", value
        for task, gates in zip(self.tasks, record["gate_weights"], strict=True):
            for expert, value in enumerate(gates, 1):
                yield f"gates/{task}/expert_{expert}", value
        for name, values in record.get("health", {}).items():
            for task, value in zip(self.tasks, values, strict=True):
                yield f"{name}/{task}", value
        for predictor, scores in record.get("val", {}).items():
            for score, value in scores.items():
                yield f"val/{predictor.replace(' ', '_')}/{score}", value


def summary(records: Records, folder: Path) -> str:
    """The scores of the last and the best validated epoch, the files of the run, and the command that predicts."""
    validated = [r for r in records if "val" in r]
    best = max(validated, key=lambda r: r["val"][GATED]["dice"])
    lines = [f"{'validation':<22}{'Dice':>8}{'Jaccard':>9}{'swept Dice':>12}{'Jaccard':>9}{'threshold':>11}"]
    for title, record in (("last", validated[-1]), ("best", best)):
        for name, s in record["val"].items():
            if title == "last" or name == GATED:
                lines.append(
                    f"{f'{title}, {name}':<22}{s['dice']:8.4f}{s['jaccard']:9.4f}"
                    f"{s['swept_dice']:12.4f}{s['swept_jaccard']:9.4f}{s['swept_threshold']:11.2f}"
                )
    lines.append("gated: the mask that predict writes; an expert: its U-Net's own prediction")
    lines.append("swept: at the threshold that maximizes Jaccard on the validation images")
    lines.append(
        f"best: epoch {best['epoch'] + 1} of {records[-1]['epoch'] + 1}; curves.png, overlays.png, metrics.jsonl,"
    )
    lines.append(f"best.safetensors and last.safetensors are in {one_line(str(folder))}")
    best_file = shlex.quote(str(folder / BEST))
    command = f"python -m semimoe_fast.predict --checkpoint {best_file} --input FOLDER --out masks"
    lines.append(one_line(f"predict with: {command}"))
    return "\n".join(lines)
