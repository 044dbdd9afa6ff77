"""The embedded task: learn shortest paths on a random graph from random walks, by reward alone.

A directed graph has 21 nodes, a to u; a is the goal. A prompt is a start node, a response walks on from it: with "b"
and "dka" the walk is b d k a. A walk of L nodes that reaches the goal along edges earns, L* being the shortest,

    optimality = (10 - L) / (10 - L*)        (0 if it leaves the edges, does not arrive, or takes 10 nodes or more)

Graph, walks, tokenizer and reward are those of trlX's random-walks example (Havrilla et al. 2023), number by number.
"""

import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from parallel.checkpoint import save_decoder
from parallel.data import pack_batch, rows_at
from parallel.data_parallel import data_parallel
from parallel.families import config_from_hf
from parallel.mesh import Layout, Mesh, lone_mesh
from parallel.model import Decoder
from parallel.optim import AdamW, Optim, clip_grad_norm
from parallel.pipeline import forward_backward
from parallel.tensor import hidden_before, vocab_parallel_logprobs
from tasks.rewards import Sample

GRAPH_SEED = 1000
NODES = "abcdefghijklmnopqrstu"  # also the ids 0 to 20
GOAL = NODES[0]
EDGE_PROBABILITY = 0.1
MAX_NODES = 10  # of a walk
NUM_WALKS = 1000
NUM_PAIRS = 2000  # of preferences
EOS, PAD = 21, 22  # PAD is also the tokenizer's unknown

# The policy that learns: a GPT-2, here as Hugging Face's config.json has it.
POLICY = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 6,
    "n_embd": 144,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 23,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
CLONE_STEPS = 250  # optimizer steps
CLONE_BATCH = 50  # walks of a step
CLONE_OPTIM = Optim(lr=2e-3, schedule="cosine", warmup_steps=20)
CACHE = Path("runs/cache")
WAIT_SECONDS = 600  # that ranks wait for the one that makes a policy


@dataclass(frozen=True)
class Graph:
    """The graph of a seed, and random walks on it."""

    successors: dict[str, str]  # node -> the nodes that an edge leads to
    shortest: dict[str, int]  # node -> nodes of a shortest path to the goal, both ends counted
    walks: tuple[str, ...]


@functools.cache
def make_graph(graph_seed: int = GRAPH_SEED) -> Graph:
    """The graph and the walks of a seed.

    Differs from trlX: a graph on which some start cannot reach the goal within a walk is drawn anew from where the
    generator stands; there, trlX's reward divides by 0.
    """
    rng = np.random.RandomState(graph_seed)
    while True:
        edges = rng.rand(len(NODES), len(NODES)) > 1 - EDGE_PROBABILITY  # [from, to]
        np.fill_diagonal(edges, False)
        if not edges.any(1).all():
            continue
        edges[0] = False
        edges[0, 0] = True  # the goal is absorbing
        successors = {
            node: "".join(NODES[j] for j in np.flatnonzero(row)) for node, row in zip(NODES, edges, strict=True)
        }
        shortest = count_shortest(successors)
        if all(shortest.get(node, MAX_NODES) < MAX_NODES for node in NODES):
            break
    walks = []
    for _ in range(NUM_WALKS):
        node = 0
        while node == 0:
            node = rng.randint(len(NODES))
        walk = NODES[node]
        while len(walk) < MAX_NODES and walk[-1] != GOAL:
            node = rng.choice(np.flatnonzero(edges[node]))
            walk += NODES[node]
        walks.append(walk)
    return Graph(successors, shortest, tuple(walks))


def count_shortest(successors: dict[str, str]) -> dict[str, int]:
    """Nodes on a shortest path to the goal, both ends counted, from each node that has one (breadth-first search)."""
    shortest, frontier = {GOAL: 1}, [GOAL]
    while frontier:
        reached = {n: shortest[m] + 1 for m in frontier for n in successors if m in successors[n] and n not in shortest}
        shortest |= reached
        frontier = list(reached)
    return shortest


def prompts(graph_seed: int = GRAPH_SEED) -> list[dict]:
    """The 20 start nodes."""
    return [{"prompt": node, "graph_seed": graph_seed} for node in NODES if node != GOAL]


def walks(graph_seed: int = GRAPH_SEED) -> list[dict]:
    """The random walks as demonstrations."""
    return [{"prompt": walk[0], "completion": walk[1:]} for walk in make_graph(graph_seed).walks]


def rated_walks(graph_seed: int = GRAPH_SEED) -> list[dict]:
    """The random walks, each with its optimality as its return."""
    graph = make_graph(graph_seed)
    return [
        {"prompt": walk[0], "response": walk[1:], "reward": measure(walk, graph), "graph_seed": graph_seed}
        for walk in graph.walks
    ]


def preferences(graph_seed: int = GRAPH_SEED) -> list[dict]:
    """Different pairs of walks from one start, the one of higher optimality chosen.

    The random walks all keep to the edges. In every other pair one of the two is such a walk with one node exchanged,
    so that a reward model also learns what leaving the edges is worth.
    """
    graph, rng = make_graph(graph_seed), np.random.RandomState(graph_seed)
    pairs: dict[tuple[str, str], None] = {}
    while len(pairs) < NUM_PAIRS:
        walk = graph.walks[rng.randint(NUM_WALKS)]
        if len(pairs) % 2:
            place = rng.randint(1, len(walk))
            other = walk[:place] + NODES[rng.randint(len(NODES))] + walk[place + 1 :]
        else:
            others = [w for w in graph.walks if w[0] == walk[0]]
            other = others[rng.randint(len(others))]
        rejected, chosen = sorted((walk, other), key=lambda w: measure(w, graph))
        if measure(chosen, graph) > measure(rejected, graph):
            pairs[chosen, rejected] = None
    return [{"prompt": chosen[0], "chosen": chosen[1:], "rejected": rejected[1:]} for chosen, rejected in pairs]


def optimality(samples: list[Sample]) -> list[float]:
    """The reward, in [0, 1]; what follows the goal does not count."""
    return [measure(s.prompt + s.response, make_graph(s.metadata.get("graph_seed", GRAPH_SEED))) for s in samples]


def measure(walk: str, graph: Graph) -> float:
    """Optimality of a walk, given as the letters of its nodes."""
    start, num_nodes = walk[:1], walk.find(GOAL) + 1
    if start not in graph.shortest:
        raise ValueError(f"a walk begins at one of the nodes {NODES}, not at {start!r}; --reward names another reward")
    path = walk[:num_nodes]
    if not path or any(b not in graph.successors.get(a, "") for a, b in zip(path, path[1:], strict=False)):
        return 0.0
    return max(0, MAX_NODES - num_nodes) / (MAX_NODES - graph.shortest[start])


# --- the policy to start from ---------------------------------------------------------------------------------------


def base_policy(graph_seed: int = GRAPH_SEED, num_steps: int = CLONE_STEPS) -> Path:
    """A Hugging Face folder with tokenizer: a policy that walks at random along edges, cloned from the walks.

    It is made once and kept in a folder named by a hash of its settings, which appears whole or not at all. Of several
    processes on a machine the first makes it, and the others wait; nothing but that folder passes between them.
    """
    settings = json.dumps([POLICY, graph_seed, num_steps, CLONE_BATCH, vars(CLONE_OPTIM)])
    folder = CACHE / f"random_walks-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    deadline = time.monotonic() + WAIT_SECONDS
    while not folder.is_dir() and os.environ.get("LOCAL_RANK", "0") != "0":
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"{folder} has not appeared within {WAIT_SECONDS} s: the first process makes it")
        time.sleep(0.1)
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            if num_steps:
                print(f"Making the base policy, once: cloning {NUM_WALKS:,} random walks into {folder} ...", flush=True)
            mesh = lone_mesh()
            policy = clone_walks(make_graph(graph_seed).walks, num_steps, mesh)
            save_decoder(policy, draft, mesh, make_tokenizer())
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def untrained_policy() -> Path:
    """The same folder with the policy's initial weights."""
    return base_policy(num_steps=0)


def clone_walks(walks: tuple[str, ...], num_steps: int, mesh: Mesh) -> Decoder:
    """A policy trained by maximum likelihood of the walks and their EOS, given the start."""
    policy = Decoder(config_from_hf(POLICY, "the task's policy")[0], mesh)
    policy.hf_config = POLICY
    model = data_parallel({"policy": policy}, mesh, Layout())
    optimizer = AdamW(model, CLONE_OPTIM.lr)
    position = torch.arange(MAX_NODES + 1)
    seq_lens = torch.tensor([len(walk) + 1 for walk in walks])  # [num_walks]
    input_ids = torch.tensor([[*map(NODES.find, walk), EOS, *[PAD] * (MAX_NODES - len(walk))] for walk in walks])
    fields = {"input_ids": input_ids, "loss_mask": (position > 0) & (position < seq_lens[:, None])}

    def loss_fn(hidden, microbatch):
        mask = microbatch["loss_mask"]
        states = hidden_before(hidden["policy"], mask)
        logprobs, _ = vocab_parallel_logprobs(states, policy, microbatch["input_ids"][mask])
        return -logprobs.mean(), {}

    for step in range(num_steps):
        rows = rows_at(step * CLONE_BATCH, CLONE_BATCH, len(walks), seed=0)
        model.zero_grad()
        forward_backward(model, [pack_batch(fields, seq_lens, torch.tensor(rows))], loss_fn)
        clip_grad_norm(model, CLONE_OPTIM.max_grad_norm, mesh)
        optimizer.step(CLONE_OPTIM.lr_multiplier(step, num_steps))
    return policy


def make_tokenizer():
    """The task's tokenizer: one id per letter, '|' = 21 ends a walk, '<pad>' = 22 stands for everything else."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {node: i for i, node in enumerate(NODES)} | {"|": EOS, "<pad>": PAD}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = dict(eos_token="|", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
