"""Prints the README's table of layouts: `OMP_NUM_THREADS=1 python -m tests.table_layouts`.

One PPO update (policy, value head, entropy bonus) of a tiny decoder, on each layout and in one process: the largest
difference of any gradient, relative to the largest entry of its unit.
"""

from parallel.mesh import Layout
from tests.ranks import close_pools, run_ranks
from tests.test_layouts import step, worst_difference

LOOPED = dict(schedule="interleaved", num_chunks=2)
LAYOUTS = [
    (2, Layout()),
    (4, Layout(zero=3, recompute="full")),
    (2, Layout(tp=2)),
    (4, Layout(tp=4, sequence_parallel=False)),
    (8, Layout(tp=8)),
    (2, Layout(pp=2)),
    (4, Layout(pp=4, schedule="gpipe")),
    (2, Layout(pp=2, **LOOPED)),
    (4, Layout(tp=2, zero=1)),
    (4, Layout(pp=2, tp=2)),
    (4, Layout(pp=2, zero=2)),
    (8, Layout(pp=4, tp=2)),
    (8, Layout(pp=2, tp=2, zero=1)),
    (8, Layout(pp=2, tp=2, zero=3, recompute="full", **LOOPED)),
]
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3")


def flags(layout):
    """The flags of a layout that differ from their defaults."""
    given = {name: x for name, x in vars(layout).items() if x != getattr(Layout(), name)}
    return " ".join(
        f"--layout.{'no-' * (x is False)}{name.replace('_', '-')}" + ("" if isinstance(x, bool) else f" {x}")
        for name, x in given.items()
    )


if __name__ == "__main__":
    print("| ranks | flags | float32 | float64 |\n|---|---|---|---|")
    for ranks, layout in LAYOUTS:
        worst = []
        for dtype in ("float32", "float64"):
            found = []
            for case in FAMILIES:
                size = 8 * layout.pp * layout.tp // ranks // 2
                expected = step(case, "ppo", dtype, Layout(), 8, 5)[2]
                found += [
                    worst_difference(x, expected)[0]
                    for *_, x in run_ranks(ranks, step, case, "ppo", dtype, layout, size, 5)
                    if x
                ]
            worst.append(max(found))
        print(f"| {ranks} | {flags(layout) or 'none'} | {worst[0]:.1e} | {worst[1]:.1e} |", flush=True)
    close_pools()
