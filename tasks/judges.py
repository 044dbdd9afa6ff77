"""Judges: rewards that only evaluate, and functions that see two answers. Whether training has used one of them."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint import WeightFiles
from parallel.files import read_json
from parallel.reward import is_reward_model
from parallel.rows import describe_error, is_object_spec, warn
from tasks.rewards import Sample, check_scores, score_together

# --- what training used ---------------------------------------------------------------------------------------------


def lineage(spec: str) -> Iterator[Path]:
    """A model or file of answers, the model that its run began with, the one that this one's run began with, ..."""
    path, seen = Path(spec).expanduser().resolve(), set()
    while path.exists() and path not in seen:
        seen.add(path)
        yield path
        folder = path.parent
        if not (folder / "args.json").exists():
            return
        path = Path(locate(read_json(folder / "args.json").get("model") or "", folder)).resolve()


def ancestors(spec: str) -> list[str]:
    """The reward models among them."""
    return [str(path) for path in lineage(spec) if read_head(str(path)) is not None]


def training_rewards(spec: str) -> Iterator[tuple[str, str]]:
    """(run folder, reward) of each run that a model or a file of answers comes from."""
    for folder in (path.parent for path in lineage(spec) if (path.parent / "args.json").exists()):
        flags = read_json(folder / "args.json")
        for known in (flags, *flags.get("former", [])):  # a resumed run may have had another reward
            for name in ("reward", "value_model"):
                if known.get(name) not in (None, "", "head", "copy"):
                    yield str(folder), locate(known[name], folder)


def locate(spec: str, folder: Path) -> str:
    """A path of a run's flags as it is found from here, or from a folder that the run's own lies in."""
    if is_object_spec(spec):
        file, _, name = spec.rpartition(":")
        return f"{locate(file, folder)}:{name}" if file.endswith(".py") else spec
    places = [Path(), *folder.parents] if spec and "://" not in spec else []
    return next((str(place / spec) for place in places if (place / spec).exists()), spec)


def is_same_judge(a: str, b: str) -> bool:
    """Whether two specs name one function, one address, or folders of one run or with the same head."""
    if identify(a) == identify(b):
        return True
    runs = [Path(folder).expanduser().resolve().parent for folder in (a, b)]
    if runs[0] == runs[1] and (runs[0] / "args.json").exists():  # its model/ and its best/
        return True
    heads = [head for head in map(read_head, (a, b)) if head is not None]
    dtype = min((head.dtype for head in heads), key=lambda dtype: dtype.itemsize, default=None)  # of a rounded copy
    return len(heads) == 2 and torch.equal(*(head.to(dtype) for head in heads))


def read_head(folder: str) -> Tensor | None:
    """What a reward model reads its scores by, which training leaves like no other's; None of anything else."""
    if not (Path(folder) / "config.json").exists() or not is_reward_model(folder):
        return None
    with WeightFiles(Path(folder)) as files:
        return files.find("score.weight")[:]


def identify(spec: str) -> str:
    """A spec, with its file, module or folder as a full path."""
    if not is_object_spec(spec):
        return spec if "://" in spec else str(Path(spec).expanduser().resolve())
    place, _, name = spec.rpartition(":")
    if not place.endswith(".py"):
        try:
            found = find_spec(place)
        except ImportError:
            found = None
        place = found.origin if found and found.origin else place
    return f"{Path(place).expanduser().resolve()}:{name}"


def refuse_training_judge(judge: str, specs: list[str]) -> None:
    """Raises ValueError if the judge is the reward of a run that one of the models or files of answers comes from.

    Neither may be trained from the other.
    """
    judge_ancestors = ancestors(judge)
    for spec in specs:
        for folder, reward in training_rewards(spec):
            of_reward, of_judge = ((judge, x) for x in ancestors(reward)), ((x, reward) for x in judge_ancestors)
            if any(is_same_judge(a, b) for a, b in ((judge, reward), *of_reward, *of_judge)):
                raise ValueError(
                    f"--judge {judge} is the reward of the run {folder}, from which {spec} comes, or one is trained "
                    "from the other: it would say how well training has pleased it. Train another one by "
                    "reward_model.py, on other pairs or at least with another --seed, or give --allow-training-judge"
                )
            if not (is_object_spec(reward) or "://" in reward or Path(reward).exists()):
                warn(
                    f"the reward {reward} of the run {folder} is not here: whether --judge {judge} is it cannot be told"
                )


# --- what they say --------------------------------------------------------------------------------------------------


def score_new(judge, samples: dict[tuple, Sample], known: dict[tuple, float], mesh, timeout: float) -> None:
    """Adds the scores of samples whose keys are not known yet; called by all ranks.

    Equal answers then tie, whatever a reward model's rounding does in different batches, and none is judged twice.
    """
    new = {key: sample for key, sample in samples.items() if key not in known}
    scores = score_together(judge, list(new.values()), mesh, timeout)
    known |= {key: sum(x) if isinstance(x, list) else x for key, x in zip(new, scores, strict=True)}


def judge_both_orders(judge: Callable, spec: str, pairs: list[tuple[Sample, Sample]]) -> list[tuple[float, float]]:
    """p(y, z) and p(z, y) of each pair (y, z), by one call of judge(first, second) -> how much better each first is.

    Raises: ValueError naming the judge unless it gives as many numbers in [0, 1].
    """
    first, second = [y for y, _ in pairs], [z for _, z in pairs]
    try:
        values = judge([*first, *second], [*second, *first])
    except (Exception, SystemExit) as error:
        code = getattr(judge, "__code__", None)
        reason = describe_error(error, code.co_filename if code else "")
        raise ValueError(f"--pairwise-judge {spec} raised {reason}, on {len(pairs)} pairs in both orders") from error
    values = check_scores(values, [*first, *second], spec)
    for value in values:
        if isinstance(value, list) or not 0 <= value <= 1:
            raise ValueError(
                f"--pairwise-judge {spec} gave {value}: it should give 1 (first better) to 0 (second better)"
            )
    return list(zip(values[: len(pairs)], values[len(pairs) :], strict=True))
