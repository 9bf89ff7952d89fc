"""What a mask is learned for: the next token of text, or the class of an image. One face for the trainer.

Which of the two follows from the base: an image classifier learns from a folder of images, everything
else is a causal language model and learns from text.
"""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskllm.core.base import Base
from maskllm.data import BadData, Stream, load_tokens, sample, windows
from maskllm.evaluate.perplexity import perplexity, protocol
from maskllm.images import Folder, is_classifier, load_classifier, measure
from maskllm.learn.config import LearnConfig
from maskllm.learn.parameterisations import generator, seed_of
from maskllm.models import check_length, load_base

CALIBRATION = 128
"""Windows or images for a one-shot prior."""
ORDER = 1 << 40
"""Sets the seeds of the examples' order apart from those of the noise."""


class Batch(NamedTuple):
    """Examples, and what is to be predicted of them."""

    inputs: Tensor
    """(examples, ...)"""
    labels: Tensor
    """(examples, ...) int64"""


class Task(Protocol):
    """What the trainer asks of a task."""

    model: PreTrainedModel
    base: Base
    figure: str
    """What `measure` calls the figure that users look at."""
    protocol: str
    """How `measure` comes to it."""
    data_sha256: str
    """Of the training examples; empty for a stream, of which nobody sees the whole."""

    def batch(self, step: int) -> Batch:
        """The examples of a step: of a stream the next ones, else a function of seed and step."""

    def calibration(self) -> Tensor:
        """Inputs for a one-shot prior, (examples, ...)."""

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What the model says of inputs, (examples, ..., classes), a row for each label."""

    def measure(self) -> dict[str, float]:
        """`loss` in nats and the figure, of the held-out examples."""

    def state(self) -> dict[str, Any]:
        """Where a stream stands, as JSON; empty for all else."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""


def load(model: str, config: LearnConfig, device: str) -> Task:
    """The task that a base (a folder or a Hugging Face name) is for."""
    return (Images if is_classifier(model) else Text)(model, config, device)


class Text:
    """A causal language model learns from windows of text."""

    figure = "perplexity"

    def __init__(self, model: str, config: LearnConfig, device: str) -> None:
        self.config = config
        self.model, tokenizer, self.base = load_base(model, getattr(torch, config.dtype), device)
        check_length(self.model, config.length)
        most = config.heldout_windows * config.length + 1
        self._heldout = torch.cat(
            [
                windows(load_tokens(tokenizer, [source], most, config.columns), config.length)
                for source in config.heldout
            ]
        )
        self.protocol = protocol(self.model, tokenizer, self._heldout)
        self._stream = Stream(tokenizer, config.data, config.length, config.columns)
        self._text, self.data_sha256 = torch.empty(0, dtype=torch.int64), ""
        if not config.stream:
            self._text = load_tokens(tokenizer, config.data, columns=config.columns)
            self.data_sha256 = hashlib.sha256(self._text.numpy().data).hexdigest()

    def batch(self, step: int) -> Batch:
        """Windows (examples, length), and of each the tokens but the first."""
        if self.config.stream:
            rows = self._stream.next_windows(self.config.batch)
        else:
            rows = self._sample(self.config.batch, step)
        return Batch(rows, rows[:, 1:])

    def calibration(self) -> Tensor:
        """Windows (examples, length); a stream is read from its beginning again afterwards."""
        if not self.config.stream:
            return self._sample(CALIBRATION)
        start = self._stream.state()
        rows = self._stream.next_windows(CALIBRATION)
        self._stream.restore(start)
        return rows

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """(examples, length - 1, vocabulary)."""
        said: Tensor = model(input_ids=inputs, use_cache=False).logits
        return said[:, :-1]

    def measure(self) -> dict[str, float]:
        """Perplexity of the held-out windows."""
        value = perplexity(self.model, self._heldout)
        return {"loss": math.log(value), "perplexity": value}

    def state(self) -> dict[str, Any]:
        """The stream's."""
        return self._stream.state() if self.config.stream else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the stream back."""
        if state:
            self._stream.restore(state)

    def _sample(self, count: int, *step: int) -> Tensor:
        order = generator(seed_of(self.config.seed, ORDER, *step))
        return sample(self._text, self.config.length, count, order)


class Images:
    """An image classifier learns from a folder of images."""

    figure = "accuracy"

    def __init__(self, model: str, config: LearnConfig, device: str) -> None:
        self.config = config
        if len(config.data) != 1 or len(config.heldout) != 1 or config.stream:
            raise BadData("an image classifier learns from one folder of images and is measured on another")
        self.model, processor, self.base = load_classifier(model, getattr(torch, config.dtype), device)
        classes = {name: int(label) for name, label in (self.model.config.label2id or {}).items()}
        self._images = Folder(processor, classes, Path(config.data[0]))
        self._heldout = Folder(processor, classes, Path(config.heldout[0]))
        self.protocol = f"{len(self._heldout.files)} images, {self.config.dtype}"
        digest = hashlib.sha256()
        for file in self._images.files:
            digest.update(f"{file.parent.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        self.data_sha256 = digest.hexdigest()

    def batch(self, step: int) -> Batch:
        """Images (examples, channels, height, width) drawn at random, and their classes."""
        return self._sample(self.config.batch, step)

    def calibration(self) -> Tensor:
        """Images (examples, channels, height, width)."""
        return self._sample(CALIBRATION).inputs

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """(examples, classes)."""
        said: Tensor = model(pixel_values=inputs).logits
        return said

    def measure(self) -> dict[str, float]:
        """Accuracy on the held-out images."""
        return measure(self.model, self._heldout)

    def state(self) -> dict[str, Any]:
        """Nothing: the order is a function of the seed."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def _sample(self, count: int, *step: int) -> Batch:
        order = generator(seed_of(self.config.seed, ORDER, *step))
        chosen = torch.randint(len(self._images.files), (count,), generator=order)
        return Batch(self._images.pixels(chosen.tolist()).to(self.model.dtype), self._images.labels[chosen])
