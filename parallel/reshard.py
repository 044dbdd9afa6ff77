"""Whole weights from parts: layer by layer for the passes of training, all at once for a rollout.

Under zero 3 a rank holds a part of each unit (`data_parallel.py`) and gathers the whole where a pass needs it. With
pipeline stages a rank holds some layers, and for a rollout all of them if there is room (`Fold`).
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallel.adapters import attach_adapters
from parallel.collectives import broadcast_
from parallel.model import Decoder, free_storage

if TYPE_CHECKING:
    from parallel.data_parallel import Unit


class Shards:
    """Gathers a decoder's weights as its passes come to them: the section in use and, on its way, the next one.

    Sections are the input embeddings, each layer, and the output (final norm and LM head, hence also the embedding
    where the two are tied). `Decoder.forward` announces each by `enter`. In the backward the gradient of what a section
    reads announces that the section is done; the gather for it serves recomputation, too, and comes right before it.
    An output section stays from its forward to its backward, since losses read the head. Tensors saved for the
    backward refer to the parameters, hold no memory while those are freed, and raise if they are used then.
    Args: sections: the units of each, those that no zero 3 divides included. units: those of the decoder alone; it may
        share others with a decoder that trains. in_use: units that are whole at the moment, with the number of backward
        passes that each waits for; one for all decoders of a model, so that a pass of one frees what another left.
    """

    def __init__(self, sections: "list[list[Unit]]", units: "list[Unit]", in_use: "Counter[Unit]"):
        self.sections = [[unit for unit in section if unit.zero == 3] for section in sections]
        self.all_units, self.units = units, [unit for unit in units if unit.zero == 3]
        self.in_use = in_use
        self.stays_whole = False  # during a rollout

    def enter(self, section: int, x: Tensor | None) -> None:
        """The forward comes to a section, which reads x."""
        if self.stays_whole:
            return
        self.hold(section, section + 1)
        if x is not None and x.requires_grad:
            if section == len(self.sections) - 1:
                self.in_use.update(self.sections[section])
            x.register_hook(lambda _: self.leave(section))

    def end(self, section: int, x: Tensor) -> None:
        """The forward has done its last section, which gave x: the output's, or with stages another's."""
        if self.stays_whole:
            return
        self.hold(section, None)
        if x.requires_grad:
            x.register_hook(lambda _: self.leave(section + 1))

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

    def need_output(self) -> None:
        """Has the output section whole, for whoever reads the head after passes of other decoders."""
        for unit in self.sections[-1]:
            unit.start_gather()
            unit.finish_gather()
            self.in_use[unit] += 0

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

    def units_of(self, name: str) -> "list[Unit]":
        """Those that a parameter of this name in the decoder lies in, if they are shared out."""
        return [unit for unit in self.units if any(full.partition(".")[2] == name for full in unit.names)]

    def whole_parameters(self, of_adapters: bool) -> Iterator[tuple[str, Tensor]]:
        """Weights, or adapters, by their name in the decoder, gathered unit by unit; on the first replica alone."""
        for unit in self.all_units:
            if any(".adapter." in name for name in unit.names) != of_adapters:
                continue
            if unit.zero == 3 or self.all_units[0].dp.rank == 0:
                for name, x in unit.tensors(unit.flat):
                    yield name.partition(".")[2], x


def free_units(in_use: "Counter[Unit]", keep: "Sequence[Unit]" = ()) -> None:
    """Frees the units that wait for no backward pass, but for some."""
    for unit in [unit for unit, waiting in in_use.items() if not waiting and unit not in keep]:
        unit.free()
        del in_use[unit]


class Fold:
    """All layers of a decoder on every stage, for as long as a rollout lasts: each stage is then a replica.

    The memory is taken and given back each time; tensors stay what they are, with an empty storage in between.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        where = decoder.config, decoder.mesh.folded, decoder.dtype
        self.whole = Decoder(*where, seed=None, lm_head=decoder.has_lm_head, has_storage=False)
        if decoder.has_adapters:
            attach_adapters(self.whole, decoder.tuning)
        free_storage(self.whole.requires_grad_(False))

    @torch.no_grad()
    def gather(self) -> None:
        """Every stage sends its layers to the others, under zero 3 unit by unit as its replicas gather them.

        Communication: one broadcast over pp per parameter; under zero 3 one all-gather over dp per unit.
        """
        decoder, pp = self.decoder, self.decoder.mesh.pp
        mine, held = dict(decoder.named_parameters()), []
        for name, parameter in sorted(self.whole.named_parameters(), key=lambda item: self.unit_of(item[0])):
            source = stage_of(name, decoder)
            parameter.data.untyped_storage().resize_(parameter.nbytes)
            if pp.rank == source:
                units = decoder.shards.units_of(name) if decoder.shards is not None else []
                if units != held:
                    free_units(dict.fromkeys(held, 0))
                    for unit in units:
                        unit.start_gather()
                        unit.finish_gather()
                    held = units
                parameter.copy_(mine[name])
            broadcast_(parameter.data, pp, source)
        free_units(dict.fromkeys(held, 0))

    def unit_of(self, name: str) -> tuple[int, bool]:
        """What parameters of one unit have in common: where in the model, and whether they train."""
        num_layers, tuning = self.whole.config.num_layers, self.decoder.tuning
        section = int(name.split(".")[1]) if name.startswith("layers.") else num_layers
        if name.startswith(("embedding.", "position_embedding.")):
            section = -1
        return section, tuning is None or tuning.trains(name, num_layers)

    def free(self) -> None:
        free_storage(self.whole)


def stage_of(name: str, decoder: Decoder) -> int:
    """Which stage holds a parameter of the whole model; of a tied embedding the first that does."""
    if name.startswith(("embedding.", "position_embedding.")):
        return 0
    if not name.startswith("layers."):
        return decoder.mesh.pp.size - 1
    index = int(name.split(".")[1])
    ends = itertools.accumulate(decoder.layers_by_part)
    return next(part for part, end in enumerate(ends) if index < end) % decoder.mesh.pp.size


def folds(decoder: Decoder) -> bool:
    """Whether rollouts have all layers on every stage: as the flag says, or if every rank has twice the memory for it.

    Communication: one all-reduce of a number over all ranks.
    """
    mesh = decoder.mesh
    if mesh.layout.rollout != "auto":
        return mesh.layout.rollout == "folded"
    needed = decoder.num_parameters * decoder.dtype.itemsize / mesh.tp.size
    if mesh.device.type == "cuda":
        free = torch.cuda.mem_get_info(mesh.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return mesh.max(float(2 * needed > free), "world") == 0


@contextmanager
def rollout_weights(decoder: Decoder) -> Iterator[Decoder]:
    """The decoder with which to generate, whose replicas may make different numbers of passes meanwhile.

    Under zero 0 to 2 it is the decoder itself. Under zero 3 that, too: every unit is gathered once, into the tensors
    that the parameters view in training, and freed at the end. With stages it is a decoder of all layers on the folded
    mesh, or itself if sequences are to go round the stages (--layout.rollout). Weights must not change meanwhile.
    Communication: under zero 3 one all-gather over dp per unit, with stages that of `Fold.gather`: all ranks come here.
    """
    if decoder.mesh.pp.size > 1 and decoder.fold is None and folds(decoder):
        decoder.fold = Fold(decoder)
    held = decoder.fold or decoder.shards
    if held is not None:
        held.gather()
    try:
        yield decoder.fold.whole if decoder.fold else decoder
    finally:
        if held is not None:
            held.free()
