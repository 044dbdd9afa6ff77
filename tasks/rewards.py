"""Rewards: a Python function, an HTTP endpoint or a reward model, called alike and checked alike.

A reward maps samples to one number each, or (dense) to one list each with a number per response token. Whatever it
gives is checked before it reaches the algorithm: nonsense is an error that names the sample.
"""

import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import torch

from parallel.data import check_vocabulary, join_parts, load_tokenizer
from parallel.data_parallel import data_parallel
from parallel.mesh import Mesh
from parallel.reward import load_reward_model, pack_sequences, read_scores
from parallel.rows import Row, describe_error, is_object_spec, load_object, reject_missing_folder

HTTP_BATCH = 64  # samples of a request
HTTP_TIMEOUT = 12.0  # seconds in which an answer must begin, and then end, at each try
HTTP_TRIES = 3
HTTP_PAUSE = 1.0  # seconds before the second try, doubled before each further one
HTTP_LAST_TRY = 30.0  # seconds after the first try in which another may begin
SEARCH_SECONDS = 10.0  # spent on finding the sample on which a reward function raises
MAX_SCORE = 1e30  # far below what overflows in float32
MODEL_BATCH = 32  # samples of a reward model's forward pass


@dataclass
class Sample:
    """A response to a prompt, as a reward sees it."""

    prompt: str
    response: str  # cut before a stop sequence, without the EOS
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[int] = field(default_factory=list)  # all that was sampled
    finished: bool = True  # ended by an EOS or a stop sequence, not by the length limit
    metadata: dict = field(default_factory=dict)  # the other fields of the prompt's row


Scores = list[float] | list[list[float]]
Reward = Callable[[list[Sample]], Scores]


@dataclass
class SampleContext:
    """What a reward model has to know of the policy whose samples it scores."""

    mesh: Mesh
    tokenizer: object
    eos: list[int]  # every id that ends a response
    add_bos: bool = True
    dtype: torch.dtype = torch.float32
    max_sample_len: int = 0  # tokens of the longest prompt and response


def make_reward(spec: str, context: SampleContext | None = None, timeout: float = HTTP_TIMEOUT) -> Reward:
    """The reward that a spec names: module:function, file.py:function, an http(s) address or a reward model's folder.

    Args: context: of the samples that a reward model will score; needed for a folder only.
        timeout: seconds in which an address must begin its answer, and then end it, at each of HTTP_TRIES tries.
    Returns: samples -> one float each, or one list of floats each, as long as its response_ids.
    Raises: ValueError or FileNotFoundError naming the spec; the reward itself: ValueError naming spec and sample.
    """
    try:
        scheme = urllib.parse.urlsplit(spec).scheme
        spec.encode("ascii" if scheme in ("http", "https") else "utf-8")
    except ValueError as error:
        raise ValueError(f"reward {spec} is no address that can be asked: {error}") from error
    if scheme in ("http", "https"):
        return lambda samples: check_scores(ask_endpoint(spec, samples, timeout), samples, spec)
    if Path(spec).is_dir():
        if context is None:
            raise ValueError(f"{spec} is a folder; a reward is module:function, file.py:function or an http(s) address")
        score = make_model_reward(spec, context)

        def score_checked(samples: list[Sample]) -> Scores:
            return check_scores(score(samples), samples, spec)

        score_checked.lies_on_all_ranks = True
        return score_checked
    if not is_object_spec(spec):
        reject_missing_folder(spec)
        raise ValueError(f"{spec} is neither a folder here nor module:function, file.py:function or an http(s) address")
    function = load_object(spec)
    if not callable(function):
        raise ValueError(f"{spec} is {function!r:.80}, not a function")
    return lambda samples: check_scores(call_function(function, samples, spec), samples, spec)


def check_scores(scores, samples: list[Sample], source: str) -> Scores:
    """The scores as plain floats. Raises: ValueError naming source and sample unless each sample has its number(s)."""
    scores = scores.tolist() if hasattr(scores, "tolist") else scores  # arrays and tensors
    if not isinstance(scores, list | tuple):
        raise ValueError(f"reward {source} returned {scores!r:.80}, not a list of {len(samples)} numbers")
    if len(scores) != len(samples):
        lost = f"; {describe_sample(samples, len(scores))} has none" if len(scores) < len(samples) else ""
        raise ValueError(f"reward {source} returned {len(scores)} values for {len(samples)} samples{lost}")

    def number(value, where: str) -> float:
        value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, Real):
            raise ValueError(f"reward {source} gave {value!r:.80}, not a number, {where}")
        if not abs(value) <= MAX_SCORE:
            raise ValueError(f"reward {source} gave {value} {where}; scores are finite and at most {MAX_SCORE:.0e}")
        return float(value)

    checked: list = []
    for i, score in enumerate(scores):
        score = score.tolist() if hasattr(score, "tolist") else score
        of_sample = f"for {describe_sample(samples, i)}"
        is_dense = isinstance(score, list | tuple)
        if i and is_dense != isinstance(checked[0], list):
            raise ValueError(f"reward {source} gave numbers for some samples and lists for others, first {of_sample}")
        if not is_dense:
            checked.append(number(score, of_sample))
            continue
        num_tokens = len(samples[i].response_ids)
        if len(score) != num_tokens:
            raise ValueError(
                f"reward {source} gave {len(score)} numbers {of_sample}, whose response has {num_tokens} tokens"
            )
        checked.append([number(value, f"{of_sample}, response token {t}") for t, value in enumerate(score)])
    return checked


def describe_sample(samples: list[Sample], i: int) -> str:
    def excerpt(text: str) -> str:
        return repr(text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}")

    return f"sample {i} (prompt {excerpt(samples[i].prompt)}, response {excerpt(samples[i].response)})"


def make_samples(generation, prompts, tokenizer, eos, stop):
    """What the reward sees of each response: its text without the EOS, cut before a stop sequence.

    The text of a response is what it adds to its prompt's, so that a leading space survives.
    """
    if not prompts:
        return []
    responses = generation.response_ids()
    stripped = [ids[:-1] if ids and ids[-1] in eos else ids for ids in responses]
    before = tokenizer.batch_decode([row.prompt_ids for row in prompts], skip_special_tokens=True)
    both = [row.prompt_ids + ids for row, ids in zip(prompts, stripped, strict=True)]
    samples = []
    for i, text in enumerate(tokenizer.batch_decode(both, skip_special_tokens=True)):
        response = text[len(before[i]) :]
        cut = min((response.find(end) for end in stop if end in response), default=len(response))
        samples.append(
            Sample(
                prompt=prompts[i].prompt,
                response=response[:cut],
                prompt_ids=prompts[i].prompt_ids,
                response_ids=responses[i],
                finished=bool(generation.finished[i]),
                metadata=prompts[i].metadata,
            )
        )
    return samples


def score_together(reward, samples, mesh, timeout=math.inf):
    """Scores of this replica's samples; an error stops all ranks with its message.

    One rank of the replica asks for them. A reward that is a model lies on all ranks: stages divide the samples.

    Args: timeout: seconds after which a rank that is still sampling or scoring stops all.
    """
    scores, error = [], None
    mesh.at("scoring")
    by_model = getattr(reward, "lies_on_all_ranks", False)
    mine = samples[mesh.pp.rank :: mesh.pp.size] if by_model else samples
    try:
        if by_model or (samples and mesh.tp.rank == 0 and mesh.pp.rank == 0):
            scores = reward(mine)
    except ValueError as caught:
        error = caught
    mesh.wait_for_all("the scores (--rollout-timeout)", timeout)
    mesh.raise_together(error)
    if not by_model:
        return mesh.broadcast_object(mesh.broadcast_object(scores, "pp"), "tp")
    found = dict(enumerate(mesh.gather_objects(scores, "pp")))
    return [found[i % mesh.pp.size][i // mesh.pp.size] for i in range(len(samples))]


# --- a reward model -------------------------------------------------------------------------------------------------


def make_model_reward(folder: str, context: SampleContext) -> Callable[[list[Sample]], list[float]]:
    """Scores of a frozen reward model, less its reward_offset, MODEL_BATCH samples at a time.

    It reads prompt and response, cut before a stop sequence and ended by its EOS if the response ended by itself. The
    tokens are the policy's own; where its tokenizer is another one, or the text was cut, they are made from the text.
    Raises: ValueError or FileNotFoundError naming the folder; the reward itself: ValueError naming a sample that does
        not fit the model's context.
    """
    mesh = context.mesh
    reward_model, reward_head = load_reward_model(folder, mesh.folded, context.dtype)
    data_parallel({"reward_model": reward_model.requires_grad_(False)}, mesh, mesh.layout)  # frozen: perhaps in shards
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, reward_model.config, folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: its tokenizer has no EOS token, on which the scores lie")
    add_bos = reward_model.hf_config.get("add_bos", context.add_bos)  # as it was trained
    same_bos = add_bos == context.add_bos or tokenizer.bos_token_id is None
    same_ids = same_bos and give_equal_ids(tokenizer, context.tokenizer)
    if not same_ids and mesh.is_logger:
        print(f"{folder} has another tokenizer, or BOS, than the policy: it scores the re-tokenised texts")
    max_len = reward_model.config.max_seq_len
    if same_ids and context.max_sample_len > max_len:
        raise ValueError(
            f"prompts and responses of up to {context.max_sample_len} tokens do not fit the {max_len} of the reward "
            f"model {folder}: give shorter prompts or a smaller --sampling.max-new-tokens"
        )

    def encode_sample(sample: Sample) -> list[int]:
        ended = bool(sample.response_ids) and sample.response_ids[-1] in context.eos
        if same_ids and (ended or not sample.finished):
            ids = sample.prompt_ids + sample.response_ids
        else:
            parts, row = [sample.prompt, sample.response], Row({}, "a sample")
            [example] = join_parts([row], [parts], [[False, True]], tokenizer, add_bos, add_eos=False)
            ids = example.input_ids
        # a turn may have ended by another id, which stays, as it did when the model was trained
        return [*ids, tokenizer.eos_token_id] if sample.finished and ids[-1] != tokenizer.eos_token_id else ids

    @torch.no_grad()
    def score(samples: list[Sample]) -> list[float]:
        sequences, error = [encode_sample(sample) for sample in samples], None
        for i, ids in enumerate(sequences):
            if len(ids) > max_len and error is None:
                error = ValueError(
                    f"{describe_sample(samples, i)} has {len(ids)} tokens, more than the {max_len} of the reward model "
                    f"{folder}: give shorter prompts or a smaller --sampling.max-new-tokens"
                )
        mesh.raise_together(error)  # before passes that all ranks make together
        scores = [0.0] * len(samples)
        order = sorted(range(len(samples)), key=lambda i: len(sequences[i]))
        batches = [order[first : first + MODEL_BATCH] for first in range(0, len(order), MODEL_BATCH)]
        if reward_model.shards is not None:  # gathered in each pass, of which all ranks make as many
            batches += [[]] * (int(mesh.folded.max(len(batches), "dp")) - len(batches))
        for some in batches:
            packed = pack_sequences([sequences[i] for i in some] or [[tokenizer.eos_token_id]], mesh.device)
            hidden = reward_model(packed["input_ids"], packed["position_ids"], packed["first_key"])
            for i, value in zip(some, read_scores(hidden, reward_head, packed).tolist(), strict=False):
                scores[i] = value
        return scores

    return score


def give_equal_ids(a, b) -> bool:
    """Whether two tokenizers are known to turn every text into the same ids."""
    if not (a.is_fast and b.is_fast) or (a.bos_token_id, a.eos_token_id) != (b.bos_token_id, b.eos_token_id):
        return False
    rules = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (a, b)]
    names = ("model", "normalizer", "pre_tokenizer")
    return a.get_vocab() == b.get_vocab() and all(rules[0][name] == rules[1][name] for name in names)


# --- a Python function ----------------------------------------------------------------------------------------------


def call_function(function: Callable, samples: list[Sample], source: str):
    """What the function returns. Raises: ValueError with the line that raised and the sample it raised on."""
    try:
        return function(samples)
    except (Exception, SystemExit) as error:
        culprit = find_culprit(function, samples)
        code = getattr(function, "__code__", None)
        reason = describe_error(error, code.co_filename if code else "")
        raise ValueError(f"reward {source} raised {reason}, on {culprit}") from error


def find_culprit(function: Callable, samples: list[Sample]) -> str:
    """The first sample on which the function raises alone."""
    deadline = time.monotonic() + SEARCH_SECONDS
    for i, sample in enumerate(samples):
        if time.monotonic() > deadline:
            break
        try:
            function([sample])
        except (Exception, SystemExit):
            return describe_sample(samples, i)
    return (
        f"{len(samples)} samples together, the first being {describe_sample(samples, 0)}" if samples else "no samples"
    )


# --- an HTTP endpoint -----------------------------------------------------------------------------------------------


def ask_endpoint(url: str, samples: list[Sample], timeout: float) -> list:
    """Posts {"samples": [{"prompt", "response", "metadata"}]} in batches and joins the {"rewards": [...]}.

    Raises: ValueError naming the address, what it did, and the samples it was asked about.
    """
    rewards: list = []
    for first in range(0, len(samples), HTTP_BATCH):
        batch = samples[first : first + HTTP_BATCH]
        fields = [{"prompt": s.prompt, "response": s.response, "metadata": s.metadata} for s in batch]
        try:
            body = json.dumps({"samples": fields}).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{describe_sample(samples, first)} or a later one: metadata is not JSON: {error}"
            ) from error
        about = f"asked about samples {first} to {first + len(batch) - 1}"
        answer = post(url, body, timeout, about)
        try:
            values = json.loads(answer)["rewards"]
        except (ValueError, TypeError, KeyError):
            values = None
        if not isinstance(values, list):
            raise ValueError(f'reward {url}, {about}, answered {answer[:100]!r}, not {{"rewards": [...]}}')
        if len(values) != len(batch):
            raise ValueError(f"reward {url}, {about}, answered with {len(values)} values for {len(batch)} samples")
        rewards += values
    return rewards


def post(url: str, body: bytes, timeout: float, about: str) -> bytes:
    """The answer's body; tries again after a failure that may pass: no connection, no answer in time, 429, 5xx."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    began = time.monotonic()
    for attempt in range(HTTP_TRIES):
        if attempt:
            time.sleep(HTTP_PAUSE * 2 ** (attempt - 1))
            if time.monotonic() > began + HTTP_LAST_TRY:
                break
        num_tries, deadline = attempt + 1, time.monotonic() + timeout
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                chunks = []
                while chunk := response.read1(1 << 16):
                    chunks.append(chunk)
                    if time.monotonic() > deadline:  # the socket's own timeout is for each piece
                        raise TimeoutError
                return b"".join(chunks)
        except urllib.error.HTTPError as error:
            reason = f"answered {error.code} {error.reason}: {error.read(100)!r}"
            if error.code != 429 and error.code < 500:
                break
        except TimeoutError:
            reason = f"gave no answer within {timeout:g} s"
        except OSError as error:  # URLError and what sockets raise
            inner = getattr(error, "reason", error)
            reason = f"gave no answer within {timeout:g} s" if isinstance(inner, TimeoutError) else f"failed: {inner}"
        except http.client.HTTPException as error:
            reason = f"does not speak HTTP: {error!r}"
    raise ValueError(f"reward {url}, {about}, {reason} ({num_tries} of {HTTP_TRIES} tries)")
