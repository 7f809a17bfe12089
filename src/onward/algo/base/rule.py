"""What a learning rule is, and what it claims about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from onward.data.spec import Batch, DataSpec
from onward.errors import ConfigError, nearest
from onward.hardware.base import Hardware
from onward.model.base import Stack

if TYPE_CHECKING:
    from onward.engine.engine import Engine

Locality = Literal["block", "broadcast", "global"]


@dataclass(frozen=True)
class RuleInfo:
    """What a rule claims about itself; the pages and the audit are made from it.

    locality: ``block`` (an update depends on its own block and those before it), ``broadcast`` (and on
    the output error, through no other block's weights), ``global``. passes: executions of the network per
    update, in words. equation: the update, in LaTeX. differs: one honest line on where this
    implementation departs from its source. reported: figures the source publishes, in words.
    """

    title: str
    authors: str
    year: int
    url: str
    locality: Locality
    passes: str
    equation: str
    differs: str
    reported: str = ""
    control: bool = False


class Rule(nn.Module):
    """How parameters change. One file and one YAML; adding one edits nothing else.

    A rule is a module: its buffers (feedback matrices, running means) and heads travel with the
    checkpoint. It imports neither Lightning, nor Hydra, nor MLflow, and executes blocks only through the
    engine it is given.
    """

    info: ClassVar[RuleInfo]
    tier: ClassVar[str] = "Global"
    # True: each unit is written as soon as its gradient is known, so gradients of one unit live at a time
    eager: ClassVar[bool] = False
    # True: the stack, readout included, is a network from input to scores, which backprop could train too
    end_to_end: ClassVar[bool] = True
    # True: no derivative with respect to a block's input is ever asked for, or the rule brings a model of what is
    # there; such a rule trains nets with a physical system before every block
    physical: ClassVar[bool] = False
    # True: it trains whatever parameters the blocks have, be it none or some of a layer's, as model/tuning leaves them
    tunes: ClassVar[bool] = False
    # buffers that the first update sets for good by comparing losses: in float32 a processor's rounding decides them
    chosen_once: ClassVar[tuple[str, ...]] = ()

    def supports(self, model: Stack, spec: DataSpec, hardware: Hardware) -> str | None:
        """None, or one sentence saying why this combination means nothing. Called before setup."""
        return None

    def input_spec(self, spec: DataSpec) -> DataSpec:
        """The data as the model must read it (a rule may append a label channel)."""
        return spec

    def setup(self, model: Stack, spec: DataSpec) -> Stack:
        """Make heads and feedback for this model; return the stack whose units will be trained."""
        return model

    def check_plan(self, depth: int, total_steps: int) -> None:
        """Called once before any compute. Raises ConfigError if that many updates cannot train all blocks."""

    def watch(self, means: dict[str, float], first_epoch_over: bool = False) -> None:
        """Look at the means of a window of updates, by metric name, for signs that a block cannot learn any more.

        Called once per window, and at the end of the first epoch with its last window. May warn through logging.

        Raises:
            Diverged: which block, and the mend.
        """

    def local_module(self, i: int) -> nn.Module | None:
        """The rule's own module trained together with unit i (a head), if any."""
        return None

    def shared_module(self) -> nn.Module | None:
        """The rule's own module trained by several units together, if any."""
        return None

    def step(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """One update from one batch, without autograd; returns detached metrics.

        ``loss`` at least, 0-dim; a vector named ``block/<what>`` holds one value per block.
        """
        raise NotImplementedError

    def predict(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Scores by readout name, the primary readout first. ``batch.y`` is None: a readout sees no label."""
        return {"readout": engine.forward(batch)}

    def limit(self) -> Rule | None:
        """A rule that this one tends to in some limit, set up alike; the alignment probe compares the two."""
        return None

    def alignment(self, engine: Engine) -> dict[str, float]:
        """Further figures for the alignment probe, by name below ``align/``."""
        return {}

    def has_logits(self, readout: str) -> bool:
        """True where that readout's scores are logits, so that the task's loss of them means something."""
        return True


def choice(key: str, value: str, valid: tuple[str, ...]) -> str:
    """Return value if it is one of the valid names, else raise ConfigError with the nearest one."""
    if value not in valid:
        raise ConfigError(key, value, nearest(str(value), valid))
    return value
