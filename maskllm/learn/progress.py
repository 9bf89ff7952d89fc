"""What one sees of a run: a progress bar, a line at every measurement, and TensorBoard."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass(frozen=True)
class Measured:
    """The hard mask at one step."""

    perplexity: float
    """Of the held-out text."""
    confidence: float
    """Mean over groups of the chance that a soft mask leans to the group's likeliest pattern."""
    changed: float
    """Share of groups whose pattern is no longer the prior's."""


class Progress:
    """Shows the steps `start` to `steps`; the bar is only for terminals, TensorBoard only with a folder."""

    def __init__(self, start: int, steps: int, log_dir: Path | None) -> None:
        self._bar = tqdm(initial=start, total=steps, unit="step", disable=None)
        self._board = SummaryWriter(str(log_dir), purge_step=start) if log_dir else None
        self._perplexity = float("nan")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._board:
            self._board.close()

    def stepped(self, step: int, loss: float, tau: float, scale: float, lr: float) -> None:
        """After each step."""
        self._bar.set_postfix(loss=f"{loss:.3f}", hard_ppl=f"{self._perplexity:.3f}", refresh=False)
        self._bar.update()
        self._write(step, {"loss": loss, "tau": tau, "scale": scale, "lr": lr})

    def measured(self, step: int, hard: Measured) -> None:
        """After each measurement."""
        self._perplexity = hard.perplexity
        self._bar.write(
            f"step {step}: hard perplexity {hard.perplexity:.3f}, {hard.changed:.1%} of groups changed, "
            f"confidence {hard.confidence:.3f}",
            file=sys.stderr,
        )
        self._write(step, {f"hard/{name}": value for name, value in asdict(hard).items()})

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
