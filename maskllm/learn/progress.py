"""What one sees of a run: a bar, a line at every measurement, TensorBoard, and a picture at the end."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass(frozen=True)
class Measured:
    """The hard mask at one step."""

    step: int
    scores: dict[str, float]
    """Of the held-out examples: `loss` in nats, and perplexity or accuracy."""
    changed: float
    """Share of groups whose pattern is no longer the prior's."""
    flipped: float
    """Share of groups whose pattern is not that of the measurement before; at first, not the prior's."""
    confidence: dict[str, float]
    """By layer, the chance that a weight which the hard mask keeps is drawn: N/M undecided, 1 decided."""

    @property
    def mean_confidence(self) -> float:
        """Over layers."""
        return sum(self.confidence.values()) / len(self.confidence)


class Progress:
    """Shows the steps `start` to `steps`; the bar is only for terminals, TensorBoard only with a folder.

    Of many processes only the first shows anything.
    """

    def __init__(self, start: int, steps: int, log_dir: Path | None, show: bool) -> None:
        self._show = show
        self._bar = tqdm(initial=start, total=steps, unit="step", disable=None if show else True)
        self._board = SummaryWriter(str(log_dir), purge_step=start) if log_dir and show else None
        self._last = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._board:
            self._board.close()

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._show:
            self._bar.write(line, file=sys.stderr)

    def stepped(self, step: int, loss: float, tau: float, scale: float, lr: float) -> None:
        """After each step."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, hard {self._last}", refresh=False)
        self._bar.update()
        self._write(step, {"loss": loss, "tau": tau, "scale": scale, "lr": lr})

    def measured(self, hard: Measured, figure: str) -> None:
        """After each measurement."""
        self._last = f"{figure} {hard.scores[figure]:.4g}"
        self.say(
            f"step {hard.step}: hard {self._last}, {hard.changed:.1%} of groups changed since the prior, "
            f"{hard.flipped:.1%} since the last look, confidence {hard.mean_confidence:.3f}"
        )
        shares = {"changed": hard.changed, "flipped": hard.flipped, "confidence": hard.mean_confidence}
        self._write(hard.step, {f"hard/{name}": value for name, value in (hard.scores | shares).items()})
        self._write(hard.step, {f"confidence/{layer}": value for layer, value in hard.confidence.items()})

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)


def draw(history: Sequence[Measured], figure: str, dense: float, title: str, file: Path) -> None:
    """One picture of a run, a PNG: the figure, what moved, and how decided every layer is."""
    from matplotlib.figure import Figure

    steps = [hard.step for hard in history]
    picture = Figure(figsize=(13, 4.2), layout="constrained")
    picture.suptitle(title)
    quality, moved, decided = picture.subplots(1, 3)
    quality.plot(steps, [hard.scores[figure] for hard in history], marker=".", label="hard mask")
    quality.axhline(dense, color="gray", linestyle="--", label="dense")
    quality.set(title=f"held-out {figure}", xlabel="step")
    if figure == "perplexity":
        quality.set_yscale("log")
    quality.legend()
    moved.plot(steps, [100 * hard.changed for hard in history], marker=".", label="since the prior")
    moved.plot(steps[1:], [100 * h.flipped for h in history[1:]], marker=".", label="since the last look")
    moved.set(title="groups with another pattern", xlabel="step", ylabel="%")
    moved.legend()
    layers = list(history[0].confidence)
    grid = [[hard.confidence[layer] for hard in history] for layer in layers]
    image = decided.imshow(
        grid,
        aspect="auto",
        vmax=1,
        interpolation="nearest",
        extent=(steps[0], steps[-1] or 1, len(layers), 0),
    )
    decided.set(title="confidence by layer", xlabel="step", ylabel="layer, first to last")
    picture.colorbar(image, ax=decided)
    picture.savefig(file, dpi=100)
