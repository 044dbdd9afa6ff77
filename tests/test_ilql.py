"""What ilql.py computes: against an independent numpy computation, brute force, closed forms; what it learns."""

import json
import math
import signal
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ilql
from parallel.checkpoint import load_decoder, load_heads
from parallel.data_parallel import data_parallel
from parallel.generation import Sampling, generate
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder
from parallel.optim import AdamW
from parallel.pipeline import forward_backward
from parallel.rows import Row
from parallel.run import launch
from tasks.random_walks import make_tokenizer
from tests.ranks import run_ranks
from tests.scripts import (
    assert_explained,
    make_tiny_model,
    read_rows,
    run,
    run_on_ranks,
    states_of,
    without_times,
)
from tests.states import read_state
from tests.test_generation import CONFIG

SHORT = ("--batch-size", 8, "--microbatch-size", 4, "--eval-samples", 20, "--advantage-scales", 0, 10)


def make_dialogues():
    """Several turns a dialogue, environment text between them, rewards on any action."""
    generator = torch.Generator().manual_seed(0)
    dialogues = []
    for n in (2, 9, 5, 17, 3, 30, 4, 8):
        ids = torch.randint(0, CONFIG.vocab_size, (n,), generator=generator).tolist()
        mask = [False] + (torch.rand(n - 1, generator=generator) < 0.6).tolist()
        mask[max(1, n - 2)] = True
        rewards = [x * m for x, m in zip(torch.randn(n, generator=generator).tolist(), mask, strict=True)]
        last = max(t for t in range(n) if mask[t])
        dialogues.append(ilql.Dialogue(ids, mask, rewards, [t == last for t in range(n)]))
    return dialogues


def make_roles(args, mesh, dtype=torch.float64):
    decoder = Decoder(CONFIG, mesh, dtype, seed=3)
    heads = ilql.make_heads(CONFIG, args, dtype, mesh)
    with torch.no_grad():  # targets of their own, and values large enough to tell the terms apart
        for p in heads["target_q_heads"].parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7), dtype=p.dtype) * 0.1)
    return {"policy": decoder, "q_heads": heads["q_heads"], "value_head": heads["value_head"]}, heads["target_q_heads"]


def hidden_states(decoder, dialogue):
    ids = torch.tensor([dialogue.input_ids])
    return decoder(ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))[0]


def numpy_losses(roles, target_q_heads, dialogues, args):
    """Every term of the loss from eq. 1 to 6, dialogue by dialogue and action by action, in numpy."""

    def mlp(head, state):
        w1, b1, w2, b2 = (p.detach().numpy() for p in (head.inner_weight, head.inner_bias, head.weight, head.bias))
        return np.maximum(state @ w1.T + b1, 0) @ w2.T + b2

    def log_softmax(x):
        x = x[: CONFIG.vocab_size]
        return x - x.max() - np.log(np.exp(x - x.max()).sum())

    lm_head = roles["policy"].lm_head_weight.detach().numpy()
    sums = dict.fromkeys(("q_loss", "value_loss", "cql_loss", "awac_loss"), 0.0)
    num_actions = 0
    for dialogue in dialogues:
        hidden = hidden_states(roles["policy"], dialogue).detach().numpy()
        actions = [t for t, is_action in enumerate(dialogue.action_mask) if is_action]
        num_actions += len(actions)
        for i, t in enumerate(actions):
            state, a = hidden[t - 1], dialogue.input_ids[t]
            value = mlp(roles["value_head"], state)[0]
            target_q = min(mlp(head, state)[a] for head in target_q_heads)
            y = dialogue.rewards[t]
            if i + 1 < len(actions):
                y += args.gamma * mlp(roles["value_head"], hidden[actions[i + 1] - 1])[0]
            for head in roles["q_heads"]:
                sums["q_loss"] += (mlp(head, state)[a] - y) ** 2
                sums["cql_loss"] -= log_softmax(mlp(head, state))[a]
            tau = args.expectile if target_q >= value else 1 - args.expectile
            sums["value_loss"] += tau * (target_q - value) ** 2
            weight = min(math.exp(args.awac_beta * (target_q - value)), ilql.MAX_AWAC_WEIGHT)
            sums["awac_loss"] -= weight * log_softmax(lm_head @ state)[a]
    means = {name: x / num_actions for name, x in sums.items()}
    coefs = {"q_loss": 1, "value_loss": 1, "cql_loss": args.cql_coef, "awac_loss": args.awac_coef}
    return {**means, "loss": sum(coefs[name] * x for name, x in means.items())}, num_actions


@pytest.mark.parametrize("num_q_heads", [1, 2])
@pytest.mark.parametrize("microbatch_size", [1, 3, 8])
def test_loss_terms_match_numpy(num_q_heads, microbatch_size, monkeypatch):
    """Environment text between two turns is skipped, packing and micro-batches change nothing."""
    monkeypatch.setattr(ilql, "MAX_AWAC_WEIGHT", 1.0)  # some weights are clipped, some are not
    args = ilql.Args(num_q_heads=num_q_heads, microbatch_size=microbatch_size, awac_beta=3.0, awac_coef=0.7)
    mesh, dialogues = init_mesh(), make_dialogues()
    roles, target_q_heads = make_roles(args, mesh)
    expected, num_actions = numpy_losses(roles, target_q_heads, dialogues, args)
    model = data_parallel(roles, mesh, Layout())
    model.zero_grad()
    loss_fn = partial(ilql.ilql_loss, roles=roles, target_q_heads=target_q_heads, args=args, num_actions=num_actions)
    metrics = forward_backward(model, list(ilql.make_microbatches(dialogues, args, mesh.device)), loss_fn)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name  # the rewards are float32
    assert 0.3 < metrics["awac_weight"] < 0.99 and all(p.grad is None for p in target_q_heads.parameters())


def brute_force_loss(roles, target_q_heads, dialogues, args, num_actions):
    """The loss with whole [actions, vocab] tensors, for autograd."""
    loss = 0.0
    for dialogue in dialogues:
        hidden = hidden_states(roles["policy"], dialogue)
        actions = torch.tensor(dialogue.action_mask).nonzero()[:, 0]
        states, ids = hidden[actions - 1], torch.tensor(dialogue.input_ids)[actions]
        rows = torch.arange(len(ids))
        values = roles["value_head"](states)[:, 0]
        with torch.no_grad():
            target_q = torch.stack([head(states)[rows, ids] for head in target_q_heads]).amin(0)
            rewards = torch.tensor(dialogue.rewards, dtype=torch.float32).double()[actions]
            y = rewards + args.gamma * torch.cat((values[1:], torch.zeros(1)))
            awac = (args.awac_beta * (target_q - values)).exp().clamp(max=ilql.MAX_AWAC_WEIGHT)
            tau = torch.where(target_q < values, 1 - args.expectile, args.expectile)
        loss = loss + (tau * (target_q - values) ** 2).sum()
        logits = (states @ roles["policy"].lm_head_weight.t())[:, : CONFIG.vocab_size]
        loss = loss - args.awac_coef * (awac * logits.log_softmax(1)[rows, ids]).sum()
        for head in roles["q_heads"]:
            q = head(states)[:, : CONFIG.vocab_size]
            loss = loss + ((q[rows, ids] - y) ** 2).sum() - args.cql_coef * q.log_softmax(1)[rows, ids].sum()
    return loss / num_actions


@pytest.mark.parametrize("coefs", [(0, 0), (0.3, 0), (0, 0.9), (0.1, 1)], ids=str)
def test_gradients_match_brute_force(coefs):
    """Q and value loss alone, then with each other term: of every parameter, trunk included."""
    args = ilql.Args(cql_coef=coefs[0], awac_coef=coefs[1], awac_beta=0.5, microbatch_size=3)
    mesh, dialogues = init_mesh(), make_dialogues()
    roles, target_q_heads = make_roles(args, mesh)
    num_actions = sum(sum(d.action_mask) for d in dialogues)
    model = data_parallel(roles, mesh, Layout())
    parameters = dict(model.named_parameters())
    loss = brute_force_loss(roles, target_q_heads, dialogues, args, num_actions)
    expected = torch.autograd.grad(loss, list(parameters.values()))
    model.zero_grad()
    loss_fn = partial(ilql.ilql_loss, roles=roles, target_q_heads=target_q_heads, args=args, num_actions=num_actions)
    metrics = forward_backward(model, list(ilql.make_microbatches(dialogues, args, mesh.device)), loss_fn)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-12)
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        error = (parameter.grad - gradient).abs().max()
        assert error <= 1e-11 * gradient.abs().max(), (name, error)  # both 0 where no term reaches


def gradients_on_ranks(num_ranks):
    args = ilql.Args(awac_beta=0.5, microbatch_size=2)
    mesh, dialogues = init_mesh(), make_dialogues()
    roles, target_q_heads = make_roles(args, mesh)
    num_actions = sum(sum(d.action_mask) for d in dialogues)
    model = data_parallel(roles, mesh, Layout())
    model.zero_grad()
    share = len(dialogues) // num_ranks
    mine = dialogues[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]
    loss_fn = partial(ilql.ilql_loss, roles=roles, target_q_heads=target_q_heads, args=args, num_actions=num_actions)
    metrics = forward_backward(model, list(ilql.make_microbatches(mine, args, mesh.device)), loss_fn)
    return metrics["loss"], {name: p.grad.clone() for name, p in model.named_parameters()}


def test_two_ranks_match_one():
    [(loss, expected)] = run_ranks(1, gradients_on_ranks, 1)
    for rank, (actual_loss, actual) in enumerate(run_ranks(2, gradients_on_ranks, 2)):
        assert actual_loss == pytest.approx(loss, rel=1e-6)
        for name in expected:  # gradients are summed in float32
            error = (actual[name] - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 5e-6, (rank, name, error)


def test_targets_follow_in_closed_form():
    """After n updates with sources Q_1 ... Q_n: (1 - a)^n Q'_0 + sum_k a (1 - a)^(n - k) Q_k."""
    args, rate, n = ilql.Args(), 0.1, 7
    roles, target_q_heads = make_roles(args, init_mesh())
    expected = [(1 - rate) ** n * p.clone() for p in target_q_heads.parameters()]
    for k in range(1, n + 1):
        with torch.no_grad():
            for p in roles["q_heads"].parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k), dtype=p.dtype))
        expected = [
            e + rate * (1 - rate) ** (n - k) * p.detach()
            for e, p in zip(expected, roles["q_heads"].parameters(), strict=True)
        ]
        ilql.sync_targets(roles["q_heads"], target_q_heads, rate)
    for actual, p in zip(target_q_heads.parameters(), expected, strict=True):
        torch.testing.assert_close(actual, p, rtol=1e-12, atol=1e-12)


def test_targets_of_a_bfloat16_model_are_float32():
    heads = ilql.make_heads(CONFIG, ilql.Args(), torch.bfloat16, init_mesh())
    before = heads["target_q_heads"][0].weight.clone()
    with torch.no_grad():
        heads["q_heads"][0].weight.add_(1)
    ilql.sync_targets(heads["q_heads"], heads["target_q_heads"], 1e-4)  # far below what bfloat16 can add
    moved = heads["target_q_heads"][0].weight - before
    assert heads["target_q_heads"][0].weight.dtype == torch.float32 and moved.mean().item() == pytest.approx(1e-4, 0.1)


def test_decoding_adds_the_smaller_target_q():
    """Greedy tokens with a cache equal those of whole forwards with log pi + scale * min Q' - V from eq. 8."""
    args = ilql.Args(sampling=Sampling(temperature=0, max_new_tokens=6))
    roles, target_q_heads = make_roles(args, init_mesh())
    policy = roles["policy"]
    prompts = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]
    logits_fn = partial(ilql.guided_logits, policy=policy, target_q_heads=target_q_heads, advantage_scale=30.0)
    out = generate(policy, prompts, args.sampling, eos_ids=[], sample_ids=[0, 1, 2], seed=0, logits_fn=logits_fn)
    differs = False
    for prompt, ids, n in zip(prompts, out.input_ids, out.seq_lens.tolist(), strict=True):
        ids = ids[:n].tolist()
        for t in range(len(prompt), n):
            state = hidden_states(policy, ilql.Dialogue(ids[:t], [], [], []))[-1]
            log_pi = (policy.lm_head_weight @ state)[: CONFIG.vocab_size].log_softmax(0)
            q = torch.stack([head(state) for head in target_q_heads]).amin(0)[: CONFIG.vocab_size]
            assert ids[t] == (log_pi + 30.0 * (q - roles["value_head"](state))).argmax()
            differs |= ids[t] != log_pi.argmax().item()
    assert differs


# --- data -----------------------------------------------------------------------------------------------------------


def rows_of(*rows):
    return [Row(row, f"rated.jsonl, line {i}") for i, row in enumerate(rows, 1)]


def turn(role, content):
    return {"role": role, "content": content}


def test_a_return_lies_on_the_last_action_standardised():
    tokenizer = make_tokenizer()
    rows = rows_of({"prompt": "b", "response": "ca", "reward": 1}, {"prompt": "d", "response": "efg", "reward": 0.0})
    first, second = ilql.read_dialogues(rows, tokenizer, True, 100)
    assert first == ilql.Dialogue([1, 2, 0, 21], [False, True, True, True], [0, 0, 0, 1.0], [False] * 3 + [True])
    assert second.input_ids == [3, 4, 5, 6, 21] and second.rewards == [0, 0, 0, 0, -1.0]


def test_dense_rewards_are_taken_as_they_are():
    [dialogue] = ilql.read_dialogues(
        rows_of({"prompt": "b", "response": "ca", "reward": [0.5, 2, -1]}), make_tokenizer(), True, 100
    )
    assert dialogue.rewards == [0, 0.5, 2.0, -1.0]


def test_chats_earn_by_turn_or_at_the_end():
    """The assistant's turns are the actions; the others' text lies between a state and the next."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}|{% endif %}{% endfor %}"
    )
    messages = [turn("user", "bc"), turn("assistant", "de"), turn("user", "f"), turn("assistant", "a")]
    ids = [1, 2, 3, 4, 21, 5, 0, 21]
    mask = [False, False, True, True, True, False, True, True]
    rows = rows_of({"messages": messages, "rewards": [2, 3.5]})
    [dialogue] = ilql.read_dialogues(rows, tokenizer, True, 100)
    assert dialogue.input_ids == ids and dialogue.action_mask == mask
    assert dialogue.rewards == [0, 0, 0, 0, 2, 0, 0, 3.5] and dialogue.terminal == [False] * 7 + [True]
    rows = rows_of({"messages": messages, "rewards": 1}, {"messages": messages, "rewards": 3})
    assert [d.rewards for d in ilql.read_dialogues(rows, tokenizer, True, 100)] == [[0] * 7 + [-1.0], [0] * 7 + [1.0]]


RATED = {"prompt": "b", "response": "ca", "reward": 1.0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "b", "response": "ca"}, "needs `prompt`, `response` and `reward`, or .*; it has prompt, response"),
        ({**RATED, "response": 3}, "`response` is 3, not a string"),
        ({**RATED, "reward": "good"}, "its reward holds 'good', which is not a number between"),
        ({**RATED, "reward": float("nan")}, "its reward holds nan, which is not a number between"),
        ({**RATED, "reward": None}, "its reward holds None"),
        ({**RATED, "reward": 10**400}, "its reward holds 1000"),
        ({**RATED, "reward": 1e200}, r"its reward holds 1e\+200"),
        (
            {**RATED, "reward": [1, 2, 3]},
            r"\[1, 2, 3\] is given, and 0.0 for rated.jsonl, line 1: all rewards are numbers",
        ),
        ({**RATED, "prompt": ""}, "nothing stands before the first action"),
        ({"messages": [turn("assistant", "b")], "rewards": 1}, "start with the assistant"),
        ({"messages": [turn("user", "b")], "rewards": 1}, "none of its `messages` is the assistant's"),
        ({"messages": "b", "rewards": 1}, "`messages` should be a list"),
        ({"messages": [turn("user", "b"), turn("assistant", "c\ud800")], "rewards": 1}, "half a surrogate pair"),
    ],
)
def test_read_dialogues_rejects(row, message):
    with pytest.raises(ValueError, match=f"^rated.jsonl, line 2: .*{message}"):
        ilql.read_dialogues(rows_of({**RATED, "reward": 0.0}, row), make_tokenizer(), True, 100)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**RATED, "reward": [1, 2]}], "line 1: 2 rewards for 3 tokens in the response, its EOS included"),
        ([{**RATED, "reward": []}], "line 1: its list of rewards is empty"),
        ([RATED, RATED], "all 2 returns are 1.0: there is nothing better or worse to learn from"),
        ([{**RATED, "response": "c" * 50}, {**RATED, "response": "d" * 60, "reward": 0}], "2 of 2 .* none is left"),
    ],
)
def test_read_dialogues_rejects_data_sets(rows, message):
    with pytest.raises(ValueError, match=message):
        ilql.read_dialogues(rows_of(*rows), make_tokenizer(), True, 20)


def test_long_dialogues_are_named_and_left_out():
    """Before returns are standardised: those that are left have mean 0 and deviation 1, or are all equal."""
    rows = rows_of(RATED, {**RATED, "reward": 0}, {**RATED, "response": "c" * 50, "reward": 7})
    with pytest.warns(UserWarning, match=r"1 of 3 dialogues longer than 20 .* left out: rated\.jsonl, line 3 has 52"):
        dialogues = ilql.read_dialogues(rows, make_tokenizer(), True, 20)
    assert [sum(dialogue.rewards) for dialogue in dialogues] == [1, -1]
    rows = rows_of(RATED, RATED, {**RATED, "response": "c" * 50, "reward": 7})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="all 2 returns are 1"):
        ilql.read_dialogues(rows, make_tokenizer(), True, 20)


def test_rewards_lie_on_the_ends_of_turns():
    """Also where no text stands between two turns of the assistant, and not on one that says nothing."""
    chat = [turn("user", "b"), turn("assistant", "cd"), turn("assistant", "a")]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    [dialogue] = ilql.read_dialogues(rows_of({"messages": chat, "rewards": [1, 2]}), tokenizer, True, 20)
    assert dialogue.action_mask == [False, True, True, True] and dialogue.rewards == [0, 0, 1, 2]
    silent = [turn("user", "b"), turn("assistant", ""), turn("assistant", "a")]
    with pytest.raises(ValueError, match="line 1: a turn of the assistant has no token"):
        ilql.read_dialogues(rows_of({"messages": silent, "rewards": [1, 2]}), tokenizer, True, 20)
    with pytest.raises(ValueError, match="all rewards of 1 dialogues are 0"):
        ilql.read_dialogues(rows_of({"messages": chat, "rewards": [0, 0]}), tokenizer, True, 20)


def test_prompts_are_those_of_the_data():
    chat = [turn("user", "b"), turn("assistant", "c"), turn("user", "d"), turn("assistant", "a")]
    rows = rows_of(RATED, {**RATED, "reward": 0}, {"messages": chat, "rewards": 1, "answer": "x"})
    prompts = ilql.evaluation_prompts(rows)
    assert [dict(row) for row in prompts] == [{"prompt": "b"}, {"messages": chat[:1], "answer": "x"}]


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield make_tiny_model(tmp_path / "tiny")
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_default_run_beats_cloning(tmp_path):
    """1,000 random walks with an optimality of 0.35: decoding at scale 100 finds short paths, scale 0 clones."""
    status, out, err = run("ilql.py", "--eval-every", 200, "--advantage-scales", 0, 100, cwd=tmp_path, fresh=True)
    assert status == 0, err
    [before, after] = read_rows(tmp_path / "runs/ilql", "eval")
    assert_explained([after, *read_rows(tmp_path / "runs/ilql")])
    assert before["eval_score_scale_100"] < 0.1
    assert after["eval_score_scale_100"] >= 0.95 and 0.3 <= after["eval_score_scale_0"] <= 0.4, after
    assert "runs/ilql/model" in out and (tmp_path / "runs/ilql/curves.png").exists()


def test_targets_are_synchronised_in_optimizer_steps(tiny, tmp_path):
    """With alpha = 1 every third step copies the Q heads; in between the targets rest."""
    flags = (*SHORT, "--model", tiny, "--max-steps", 7, "--save-every", 1, "--eval-every", 100)
    flags += ("--target-sync-steps", 3, "--target-update-rate", 1, "--output-dir", tmp_path / "run")
    status, _, err = run("ilql.py", *flags, cwd=tmp_path)
    assert status == 0, err
    sixth, seventh = (read_state(tmp_path / f"run/checkpoints/step-{step}") for step in (6, 7))
    names = [name for name in sixth if name.startswith("q_heads.") and "|" not in name]
    assert len(names) == 8
    for name in names:
        assert torch.equal(sixth[name], sixth[f"target_{name}"])
        assert torch.equal(seventh[f"target_{name}"], sixth[name]) and not torch.equal(seventh[name], sixth[name])


def run_here(monkeypatch, folder, *flags):
    """ilql.py in this process, its run in folder/run."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["ilql.py", "--output-dir", "run", *map(str, flags)])
    launch(ilql.main, ilql.Args)


def test_a_skipped_step_does_not_count_for_the_targets(tiny, tmp_path, monkeypatch):
    """Of five steps the second is skipped, so every second one that is taken ends as number 3 and 5."""
    taken, synced = [], []
    monkeypatch.setattr(AdamW, "step", lambda self, scale: taken.append(len(taken) != 1) or taken[-1])
    monkeypatch.setattr(ilql, "sync_targets", lambda *_: synced.append(len(taken)))
    run_here(monkeypatch, tmp_path, *SHORT, "--model", tiny, "--max-steps", 5, "--target-sync-steps", 2)
    assert synced == [3, 5] and read_rows("run")[-1]["skipped_steps"] == 1


def test_the_best_evaluation_is_kept(tiny, tmp_path, monkeypatch):
    scores, saved = [0.1, 0.5, 0.3, 0.7, 0.6], []
    monkeypatch.setattr(ilql, "evaluate", lambda *_: ({"eval_score_scale_1": scores.pop(0)}, []))
    monkeypatch.setattr(ilql, "save_decoder", lambda policy, folder, *_: saved.append((folder.name, len(scores))))
    run_here(monkeypatch, tmp_path, *SHORT, "--model", tiny, "--max-steps", 4, "--eval-every", 1)
    assert saved == [("best", 3), ("best", 1), ("model", 0)]


def test_the_weight_of_cloning_is_clipped():
    args, mesh = ilql.Args(awac_beta=1e6, num_q_heads=1), init_mesh()
    roles, target_q_heads = make_roles(args, mesh)
    [microbatch] = ilql.make_microbatches(make_dialogues(), args, mesh.device)
    loss, metrics = ilql.ilql_loss(
        states_of(roles, microbatch), microbatch, roles, target_q_heads, args, int(microbatch["action_mask"].sum())
    )
    assert loss.isfinite() and 5 < metrics["awac_weight"] < ilql.MAX_AWAC_WEIGHT <= 100


def test_a_run_with_other_heads_is_not_gone_on_with(tiny, tmp_path, monkeypatch, capfd):
    flags = (*SHORT, "--model", tiny, "--max-steps", 2, "--num-q-heads", 1)
    run_here(monkeypatch, tmp_path, *flags)
    with pytest.raises(SystemExit):
        run_here(monkeypatch, tmp_path, *flags[:-1], 2, "--resume", "--allow-change", "num-q-heads")
    assert "the checkpoint has no tensor q_heads.1.inner_weight" in capfd.readouterr().err


def test_a_failing_reward_leaves_the_run_that_it_was_to_replace(tiny, tmp_path, monkeypatch, capfd):
    (tmp_path / "mine.py").write_text("def fails(samples):\n    raise KeyError('answer')\n")
    flags = (*SHORT, "--model", tiny, "--max-steps", 2)
    run_here(monkeypatch, tmp_path, *flags)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        run_here(monkeypatch, tmp_path, *flags, "--overwrite", "--reward", "mine.py:fails")
    assert "KeyError" in capfd.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_reward_model_is_no_policy(tiny, tmp_path, monkeypatch, capfd):
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2ForSequenceClassification"]}))
    with pytest.raises(SystemExit):
        run_here(monkeypatch, tmp_path, *SHORT, "--model", tiny)
    assert "is a GPT2ForSequenceClassification: it scores texts" in capfd.readouterr().err


def test_resume_is_bit_for_bit_and_the_export_evaluates_alike(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    flags = (*SHORT, "--model", tiny, "--save-every", 2, "--eval-every", 3)
    status, _, err = run("ilql.py", *flags, "--max-steps", 6, "--output-dir", tmp_path / "a", cwd=tmp_path)
    assert status == 0, err
    moment = ("parallel.run.Run.progress", 5, signal.SIGKILL)
    to_kill = ("--max-steps", 6, "--output-dir", tmp_path / "b")
    status, _, err = run("ilql.py", *flags, *to_kill, cwd=tmp_path, signal_at=moment)
    assert status == -signal.SIGKILL and (tmp_path / "b/checkpoints/step-4").exists(), err
    status, _, err = run("ilql.py", *flags, "--max-steps", 6, "--output-dir", tmp_path / "b", "--resume", cwd=tmp_path)
    assert status == 0, err
    rows = [without_times([json.loads(line) for line in open(tmp_path / run_ / "metrics.jsonl")]) for run_ in "ab"]
    assert rows[0] == rows[1] and rows[0][-1]["event"] == "eval"
    for file in ("model.safetensors", "heads.safetensors"):
        a, b = (load_file(tmp_path / run_ / "model" / file) for run_ in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    # the export opens in transformers with equal logits, and its heads go on where they were
    folder = tmp_path / "a/model"
    decoder = load_decoder(str(folder), init_mesh(), torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    hidden = decoder(ids, torch.arange(3)[None], torch.zeros_like(ids))
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(hidden @ decoder.lm_head_weight.t()[:, :23], logits, rtol=1e-5, atol=1e-5)
    status, _, err = run(
        "ilql.py", *SHORT, "--model", folder, "--max-steps", 0, "--output-dir", tmp_path / "c", cwd=tmp_path
    )
    assert status == 0, err
    [again] = read_rows(tmp_path / "c", "eval")
    last = read_rows(tmp_path / "a", "eval")[-1]
    assert all(again[name] == x for name, x in last.items() if name.startswith("eval_"))
    heads = ilql.make_heads(decoder.config, ilql.Args(seed=5), torch.float32, init_mesh())
    load_heads(folder, heads, init_mesh())
    assert torch.equal(heads["q_heads"][0].weight[:23], a["q_heads.0.weight"])


def test_two_ranks_run(tiny, tmp_path):
    losses, evaluations = [], []
    for ranks in (1, 2):
        folder = tmp_path / f"run-{ranks}"
        flags = (*SHORT, "--model", tiny, "--max-steps", 3, "--output-dir", folder)
        run_on_ranks("ilql.py", *flags, cwd=tmp_path, ranks=ranks)
        losses.append([row["loss"] for row in read_rows(folder)])
        evaluations.append((read_rows(folder, "eval"), (folder / "samples.jsonl").read_text()))
        assert len(evaluations[-1][0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert evaluations[0] == evaluations[1]  # the same samples of the same prompts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--expectile", 1.5), "--expectile 1.5 is not between 0 and 1"),
        (("--target-update-rate", 0), "--target-update-rate 0.0 is not in"),
        (("--target-sync-steps", 0), "--target-sync-steps 0 should be a number of at least 1"),
        (("--advantage-scales", "nan"), "should be finite numbers"),
        (("--advantage-scales", 1, 1.0000001), "holds a scale twice"),
        (("--data", "{tmp}/walks.jsonl"), "line 1: needs `prompt`, `response` and `reward`"),
        (("--data", "{tmp}/equal.jsonl"), "all 2 returns are 1.0"),
    ],
)
def test_ilql_rejects(flags, message, tiny, tmp_path, monkeypatch, capfd):
    (tmp_path / "walks.jsonl").write_text('{"prompt": "b", "completion": "ca"}\n')
    (tmp_path / "equal.jsonl").write_text((json.dumps(RATED) + "\n") * 2)
    flags = [str(flag).format(tmp=tmp_path) for flag in (*SHORT, *flags)]
    monkeypatch.setattr("sys.argv", ["ilql.py", "--model", str(tiny), "--output-dir", str(tmp_path / "run"), *flags])
    with pytest.raises(SystemExit) as stopped:
        launch(ilql.main, ilql.Args)
    assert stopped.value.code and message in capfd.readouterr().err
    assert not (tmp_path / "run/metrics.jsonl").exists()
