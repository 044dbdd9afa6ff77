"""The embedded task: learn shortest paths on a random graph from random walks, by reward alone.

A directed graph has 21 nodes, a to u; a is the goal. A prompt is a start node, a response walks on from it: with "b"
and "dka" the walk is b d k a. A walk of L nodes that reaches the goal along edges earns, L* being the shortest,

    optimality = (10 - L) / (10 - L*)        (0 if it leaves the edges, does not arrive, or takes 10 nodes or more)

Graph, walks, tokenizer and reward are those of trlX's random-walks example (Havrilla et al. 2023), number by number.
"""

import functools
from dataclasses import dataclass

import numpy as np

from tasks.rewards import Sample

GRAPH_SEED = 1000
NODES = "abcdefghijklmnopqrstu"  # also the ids 0 to 20
GOAL = NODES[0]
EDGE_PROBABILITY = 0.1
MAX_NODES = 10  # of a walk
NUM_WALKS = 1000


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


def optimality(samples: list[Sample]) -> list[float]:
    """The reward, in [0, 1]; what follows the goal does not count."""
    return [measure(s.prompt + s.response, make_graph(s.metadata.get("graph_seed", GRAPH_SEED))) for s in samples]


def measure(walk: str, graph: Graph) -> float:
    """Optimality of a walk, given as the letters of its nodes."""
    start, num_nodes = walk[:1], walk.find(GOAL) + 1
    if start not in graph.shortest:
        raise ValueError(f"a walk begins at one of the nodes {NODES}, not at {start!r}")
    path = walk[:num_nodes]
    if not path or any(b not in graph.successors.get(a, "") for a, b in zip(path, path[1:], strict=False)):
        return 0.0
    return max(0, MAX_NODES - num_nodes) / (MAX_NODES - graph.shortest[start])
