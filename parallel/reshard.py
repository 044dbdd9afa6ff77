"""Whole weights from shards: layer by layer for the passes of training, all at once for a rollout.

Under zero 3 a rank holds a part of each unit (`data_parallel.py`) and gathers the whole where a pass needs it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from parallel.model import Decoder

if TYPE_CHECKING:
    from parallel.data_parallel import Unit


class Shards:
    """Gathers a decoder's weights as its passes come to them: the section in use and, on its way, the next one.

    Sections are the input embeddings, each layer, and the output (final norm and LM head, hence also the embedding
    where the two are tied). `Decoder.forward` announces each by `enter`. In the backward the gradient of what a section
    reads announces that the section is done; the gather for it serves recomputation, too, and comes right before it.
    An output section stays from its forward to its backward, since losses read the head. Tensors saved for the
    backward refer to the parameters, hold no memory while those are freed, and raise if they are used then.
    Args: units: those of one decoder. in_use: units that are whole at the moment, with the number of backward passes
        that each waits for; one for all decoders of a model, so that a pass of one frees what another left.
    """

    def __init__(self, role: str, decoder: Decoder, units: "list[Unit]", in_use: "Counter[Unit]"):
        names = ["input", *(f"layers.{i}" for i in range(len(decoder.layers))), "output"]
        self.sections = [[unit for unit in units if unit.name == f"{role}.{name}"] for name in names]
        if decoder.ties_lm_head:
            self.sections[-1] = self.sections[-1] + self.sections[0]
        self.units, self.in_use = units, in_use
        self.stays_whole = False  # during a rollout

    def enter(self, section: int, x: Tensor | None) -> None:
        """The forward comes to a section, which reads x; one after the last, x is what the decoder returns."""
        if self.stays_whole:
            return
        last = len(self.sections) - 1
        self.hold(min(section, last), section + 1)
        if x is not None and x.requires_grad:
            if section == last:
                self.in_use.update(self.sections[last])
            x.register_hook(lambda _: self.leave(section))

    def leave(self, section: int) -> None:
        """The backward has done a section and goes on to the one before; embeddings need no weights there."""
        if section == len(self.sections) - 1:
            self.in_use.subtract(self.sections[section])
        self.hold(max(section - 1, 0) or None, max(section - 2, 0) or None)

    def hold(self, now: int | None, soon: int | None) -> None:
        """Frees what no pass needs, has one section whole and starts to gather another."""
        now, soon = (self.sections[i] if i is not None and i < len(self.sections) else [] for i in (now, soon))
        free_units(self.in_use, keep=[*now, *soon])
        for unit in [*now, *soon]:
            unit.start_gather()
            self.in_use[unit] += 0
        for unit in now:
            unit.finish_gather()

    def gather(self) -> None:
        """All weights whole until `free`, for passes that not all replicas make."""
        self.stays_whole = True
        for unit in self.units:
            unit.start_gather()
        for unit in self.units:
            unit.finish_gather()

    def free(self) -> None:
        self.stays_whole = False
        for unit in self.units:
            unit.free()

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Weights by their name in the decoder, gathered unit by unit; on the first replica alone."""
        for unit in self.units:
            for name, x in unit.tensors(unit.flat):
                yield name.partition(".")[2], x


def free_units(in_use: "Counter[Unit]", keep: "Sequence[Unit]" = ()) -> None:
    """Frees the units that wait for no backward pass, but for some."""
    for unit in [unit for unit, waiting in in_use.items() if not waiting and unit not in keep]:
        unit.free()
        del in_use[unit]


@contextmanager
def rollout_weights(*decoders: Decoder) -> Iterator[None]:
    """Whole weights for passes without gradient of which the replicas make different numbers: generation, evaluation.

    Under zero 0 to 2 this does nothing: the weights of training serve. Under zero 3 every unit is gathered once, into
    the tensors that the parameters view in training, too, and freed at the end. Weights must not change meanwhile.
    Communication: under zero 3 one all-gather over dp per unit, so that every replica must come here.
    """
    sharded = [decoder.shards for decoder in decoders if decoder.shards is not None]
    try:
        for shards in sharded:
            shards.gather()
        yield
    finally:
        for shards in sharded:
            shards.free()
