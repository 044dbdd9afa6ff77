"""What of a decoder trains: all of it, some parts, or low-rank adapters beside weights that stay as they are.

    --freeze                parts keep their weights
    --unfrozen-layers N     only the N upper layers train, and what lies above them (trlX's "hydra")
    --lora.rank N           only low-rank updates of matrices train (Hu et al. 2021, arXiv 2106.09685)

Together: adapters go where weights are not frozen. A reference for the KL penalty needs no second copy of what does not
train: `make_reference` shares that, and what lies below the first layer that trains is computed once for both.
"""

import fnmatch
import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from parallel.checkpoint import ADAPTERS, WeightFiles, find_folder
from parallel.files import read_json
from parallel.model import Decoder, DecoderConfig
from parallel.tensor import Adapter, fill_local, placements

INPUTS = ("embedding", "position_embedding")
OF_LAYERS = ("qkv", "attn_out", "ffn_in", "ffn_out")
FINGERPRINT_ROWS = 64  # about so many of each tensor: all of a large model's would take as long as to load it


@dataclass(frozen=True)
class Lora:
    """Flags of the adapters, alike in every script."""

    rank: int = 0
    """train low-rank updates of this rank instead of the weights (Hu et al. 2021: 4 to 64); 0 = off"""
    alpha: float = 16.0
    """an update is alpha / rank x B A"""
    targets: tuple[Literal["qkv", "attn_out", "ffn_in", "ffn_out", "lm_head"], ...] = OF_LAYERS
    """the matrices of every layer that have one, and whether the LM head has; queries, keys and values share their A"""
    adapters: str = ""
    """begin with the adapters of this folder (a model/ that was trained with them), with their rank, alpha and targets,
    on --model, their base"""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"--lora.rank {self.rank} should be a number from 0 on")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"--lora.alpha {self.alpha} should be a number above 0")
        if not self.targets:
            raise ValueError("--lora.targets names no matrix: leave the flag out for all of them")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Tuning:
    """What of a decoder trains."""

    freeze: tuple[str, ...] = ()
    unfrozen_layers: int = 0
    lora: Lora = field(default_factory=Lora)

    def resolved(self) -> "Tuning":
        """With rank, alpha and targets of the adapters to begin with, if there are any.

        Raises: FileNotFoundError or ValueError if that folder holds none, or --lora.rank asks for others.
        """
        if not self.lora.adapters:
            return self
        stored = read_adapters(self.lora.adapters)
        if self.lora.rank not in (0, stored["rank"]):
            raise ValueError(
                f"--lora.rank {self.lora.rank}, but the adapters of {self.lora.adapters} have rank {stored['rank']}: "
                "leave --lora.rank out"
            )
        lora = replace(self.lora, rank=stored["rank"], alpha=float(stored["alpha"]), targets=tuple(stored["targets"]))
        return replace(self, lora=lora)

    def check(self, names: Iterable[str], config: DecoderConfig, lm_head: bool) -> None:
        """Returns if the flags fit a decoder with these parameters.

        Args: names: of the whole model, an LM head of its own included, which flags may name. lm_head: whether the
            decoder has it: value and reward models do not.
        Raises: ValueError naming the flag.
        """
        names, num_layers, hidden_size = list(names), config.num_layers, config.hidden_size
        if not 0 <= self.unfrozen_layers < num_layers:
            raise ValueError(
                f"--unfrozen-layers {self.unfrozen_layers} of {num_layers} layers: give 1 to {num_layers - 1}, "
                "or 0 to train all of them"
            )
        for part in self.freeze:
            if not any(matches(name, part) for name in names):
                parts = dict.fromkeys(name.partition(".")[0] for name in names)
                raise ValueError(
                    f"--freeze {part} is no part of this model: it has {', '.join(parts)} "
                    f"(layers.0 to layers.{num_layers - 1}, ranges as layers.0-{num_layers - 1}); patterns such as "
                    "*.bias or layers.*.ffn_norm are of full names"
                )
        if self.lora.rank > hidden_size:
            raise ValueError(f"--lora.rank {self.lora.rank} is more than the model's width {hidden_size}")
        if self.lora.rank and "lm_head" in self.lora.targets and lm_head and config.tied_embeddings:
            raise ValueError(
                "--lora.targets lm_head: the LM head of this model is its embedding, which has no adapter: leave it out"
            )
        held = [name for name in names if lm_head or not name.startswith("lm_head.")]
        if not any(self.trains(name, num_layers) or self.adapts(name, num_layers) for name in held):
            of_what = "" if lm_head else ": a value or reward model has no LM head"
            raise ValueError(f"--freeze, --unfrozen-layers and --lora.targets leave nothing to train{of_what}")

    def is_frozen(self, name: str, num_layers: int) -> bool:
        """Whether flags alone freeze a parameter: without regard to adapters."""
        if any(matches(name, part) for part in self.freeze):
            return True
        layer = re.match(r"layers\.(\d+)\.", name)
        is_below = name.startswith(INPUTS) or (layer and int(layer[1]) < num_layers - self.unfrozen_layers)
        return bool(self.unfrozen_layers and is_below)

    def trains(self, name: str, num_layers: int) -> bool:
        """Whether a parameter learns; adapters always do."""
        return ".adapter." in name or (not self.lora.rank and not self.is_frozen(name, num_layers))

    def adapts(self, name: str, num_layers: int) -> bool:
        """Whether a weight has an adapter beside it."""
        target = re.fullmatch(r"(?:layers\.\d+\.)?(\w+)\.weight", name)
        is_target = target is not None and target[1] in self.lora.targets
        return bool(self.lora.rank and is_target and not self.is_frozen(name, num_layers))


def matches(name: str, part: str) -> bool:
    """Whether a parameter belongs to a part: its name begins with it, or fits the pattern; layers.0-5 is a range."""
    span = re.fullmatch(r"layers\.(\d+)-(\d+)(\..*)?", part)
    if span is not None:
        layers = range(int(span[1]), int(span[2]) + 1)
        return any(matches(name, f"layers.{i}{span[3] or ''}") for i in layers)
    return fnmatch.fnmatchcase(name, part) or fnmatch.fnmatchcase(name, f"{part}.*")


def all_names(config: DecoderConfig, of_layer: Iterable[str]) -> list[str]:
    """Names of the parameters of a whole model, from those of one of its layers; an LM head of its own included."""
    of_layer = list(of_layer)
    names = [f"{name}.weight" for name in INPUTS[: 1 + config.learned_positions]]
    names += [f"layers.{i}.{name}" for i in range(config.num_layers) for name in of_layer]
    names += ["final_norm.weight"] + ["final_norm.bias"] * (config.norm == "layernorm")
    if not config.tied_embeddings:
        names += ["lm_head.weight"] + ["lm_head.bias"] * config.head_bias
    return names


def names_of(decoder: Decoder) -> list[str]:
    """`all_names` of a decoder of which this stage has a part."""
    layer = next(iter(decoder.layers.values()))
    return all_names(decoder.config, (name for name, _ in layer.named_parameters()))


def set_trained(decoder: Decoder, tuning: Tuning, seed: int = 0) -> Decoder:
    """The decoder itself, with adapters and with `requires_grad` of every parameter as the flags say.

    To be called before `data_parallel`.
    Raises: ValueError naming the flag that does not fit, or the base that the adapters to begin with are of.
    """
    tuning = tuning.resolved()
    num_layers = decoder.config.num_layers
    tuning.check(names_of(decoder), decoder.config, decoder.has_lm_head)
    decoder.tuning = tuning
    if tuning.lora.rank:
        decoder.base = fingerprint(decoder.source) if decoder.source else ""
        attach_adapters(decoder, tuning, seed)
        if tuning.lora.adapters:
            load_adapters(decoder, tuning.lora.adapters)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(tuning.trains(name, num_layers))
    return decoder


@torch.no_grad()
def attach_adapters(decoder: Decoder, tuning: Tuning, seed: int = 0) -> None:
    """Puts adapters beside the weights that are to have them: A uniform within 1 / sqrt(its inputs), B 0.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; their A is normal.
    """
    for name, weight in list(decoder.named_parameters()):
        if not tuning.adapts(name, decoder.config.num_layers):
            continue
        layer, tp = decoder.get_submodule(name.removesuffix(".weight")), decoder.mesh.tp
        placement = decoder.placements[name]
        layer.adapter = Adapter(weight, placement, tuning.lora.rank, tuning.lora.scale, tp)
        digest = hashlib.sha256(f"{seed} {name} adapter".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        shape = layer.adapter.placements["a"].full_shape(layer.adapter.a.shape)
        full = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
        fill_local(layer.adapter.a, full, layer.adapter.placements["a"], tp)
    decoder.placements = placements(decoder)


def shares_weights(tuning: Tuning, num_stages: int) -> bool:
    """Whether a reference has weights of the policy's own: with stages only if all that trains is adapters."""
    return bool(tuning.lora.rank) or (num_stages == 1 and tuning != Tuning())


def make_reference(policy: Decoder) -> Decoder | None:
    """The policy as it is before it learns, without adapters: of what does not train it has the policy's own tensors.

    Layers below the first one that trains are not in it: they compute the same for both, and where both are given to
    `forward_only` they do so once. With stages that is so only of adapters: the reference then lies on the same stages.
    Returns: None where nothing can be shared: the reference is then the model, loaded again.
    """
    if not shares_weights(policy.tuning, policy.mesh.pp.size):
        return None
    start = 0 if policy.mesh.pp.size > 1 else first_trained_layer(policy)
    where = policy.config, policy.mesh, policy.dtype
    reference = Decoder(*where, seed=None, lm_head=policy.has_lm_head, has_storage=False, start=start)
    reference.__dict__["trunk"] = policy  # not as a part of it
    reference.hf_config, reference.source, reference.files = policy.hf_config, policy.source, policy.files
    for name, own in list(reference.named_parameters()):
        shared = policy.get_parameter(name)
        if not shared.requires_grad:
            module, _, leaf = name.rpartition(".")
            setattr(reference.get_submodule(module), leaf, shared)
        elif policy.files is None:
            own.data = shared.detach().clone()
    return reference.requires_grad_(False)


def first_trained_layer(decoder: Decoder) -> int:
    """The number of layers that nothing which trains lies in or below; at most all but one."""
    trained = [name for name, parameter in decoder.named_parameters() if parameter.requires_grad]
    if any(name.startswith(INPUTS) for name in trained):
        return 0
    layers = [int(name.split(".")[1]) for name in trained if name.startswith("layers.")]
    return min([*layers, decoder.config.num_layers - 1])


# --- files ----------------------------------------------------------------------------------------------------------


def fingerprint(path_or_id: str) -> str:
    """What tells a model's weights from others: a hash of names, shapes and some rows of every stored tensor."""
    digest = hashlib.sha256()
    with WeightFiles(find_folder(path_or_id)) as files:
        for name in sorted(files.names()):
            stored = files.find(name)
            shape = stored.get_shape()
            digest.update(f"{name} {shape} {stored.get_dtype()}".encode())
            step = max(shape[0] // FINGERPRINT_ROWS, 1) if shape else 0
            rows = [stored[i : i + 1] for i in range(0, shape[0], step)] if shape else [stored[...]]
            for row in rows:
                digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def read_adapters(folder: str) -> dict:
    """What adapters.json of a folder says. Raises: FileNotFoundError or ValueError naming what is missing."""
    path = Path(folder).expanduser() / f"{ADAPTERS}.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {path.name}: adapters lie beside models trained with --lora.rank")
    stored = read_json(path)
    missing = [name for name in ("base", "fingerprint", "rank", "alpha", "targets") if name not in stored]
    if missing:
        raise ValueError(f"{path} does not say {', '.join(missing)}")
    return stored


@torch.no_grad()
def load_adapters(decoder: Decoder, folder: str) -> None:
    """Fills a decoder's adapters from a folder. Raises: ValueError if they are of another base, or do not fit."""
    stored = read_adapters(folder)
    if stored["fingerprint"] != decoder.base:
        raise ValueError(
            f"the adapters of {folder} are of {stored['base']} ({stored['fingerprint']}), and {decoder.source} "
            f"({decoder.base}) has other weights: give their base as --model, or {folder} itself, where they are merged"
        )
    path = Path(folder).expanduser() / f"{ADAPTERS}.safetensors"
    tensors = load_file(path)
    adapted = [x for x in names_of(decoder) if decoder.tuning.adapts(x, decoder.config.num_layers)]
    unused = tensors.keys() - {f"{x.removesuffix('weight')}adapter.{ab}" for x in adapted for ab in "ab"}
    if unused:
        raise ValueError(
            f"{path} holds {min(unused)}, of a weight that --freeze or --unfrozen-layers leaves without an adapter: "
            f"leave those flags out, or give {folder} as --model, where its adapters are merged"
        )
    for name, parameter in decoder.named_parameters():
        if ".adapter." in name:
            placement = decoder.placements[name]
            full, shape = tensors.get(name), placement.full_shape(parameter.shape)
            if full is None or list(full.shape) != shape:
                found = "missing" if full is None else list(full.shape)
                raise ValueError(f"{path}: {name} is {found}, needed as {shape}")
            fill_local(parameter, full, placement, decoder.mesh.tp)
