"""The random-walks task against trlX's facts and exact computation; rewards against every kind of nonsense."""

import http.server
import itertools
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from parallel.checkpoint import load_decoder
from parallel.mesh import init_mesh
from tasks import random_walks, rewards
from tasks.random_walks import (
    EOS,
    GOAL,
    MAX_NODES,
    NODES,
    base_policy,
    make_graph,
    measure,
    optimality,
    prompts,
    untrained_policy,
    walks,
)
from tasks.rewards import Sample, make_reward

SEEDS = (1000, 1002, 1004, 1001, 1003, 7)  # the first three are graphs of trlX; 1001 and 1003 it cannot use


# --- the task -------------------------------------------------------------------------------------------------------


def uniform_policy_value(graph):
    """Exact expected optimality, over the 20 starts, of walking along uniformly drawn edges (dynamic programming)."""
    total = 0.0
    for start in NODES[1:]:
        at = {start: 1.0}  # probability of being at a node after num_nodes nodes
        for num_nodes in range(2, MAX_NODES + 1):
            following: dict[str, float] = {}
            for node, p in at.items():
                for successor in graph.successors[node]:
                    following[successor] = following.get(successor, 0) + p / len(graph.successors[node])
            arrived = following.pop(GOAL, 0.0)
            total += arrived * (MAX_NODES - num_nodes) / (MAX_NODES - graph.shortest[start])
            at = following
    return total / 20


def test_graph_and_walks_match_the_facts_of_trlx():
    graph = make_graph()
    assert sum(len(s) for node, s in graph.successors.items() if node != GOAL) == 51
    assert graph.successors[GOAL] == GOAL
    assert sum(GOAL in s for node, s in graph.successors.items() if node != GOAL) == 2
    assert {graph.shortest[node] for node in NODES[1:]} == {2, 3, 4, 5}
    assert len(graph.walks) == 1000 and len(set(graph.walks)) == 722
    assert np.mean([len(walk) for walk in graph.walks]) == pytest.approx(7.74, abs=0.005)
    assert np.mean([walk[-1] == GOAL for walk in graph.walks]) == pytest.approx(0.56)
    scores = [measure(walk, graph) for walk in graph.walks]
    assert np.mean(scores) == pytest.approx(0.3515, abs=5e-5)
    assert np.mean([score == 1 for score in scores]) == pytest.approx(0.184)
    assert np.mean([score == 0 for score in scores]) == pytest.approx(0.495)
    best = {
        start: max(s for s, walk in zip(scores, graph.walks, strict=True) if walk[0] == start) for start in NODES[1:]
    }
    assert np.mean(list(best.values())) == pytest.approx(0.9917, abs=5e-5)
    assert [start for start, score in best.items() if score < 1] == ["m"]
    assert uniform_policy_value(graph) == pytest.approx(0.3462, abs=5e-5)


@pytest.mark.parametrize(
    ("seed", "num_edges", "of_walks", "of_uniform"), [(1002, 42, 0.790, 0.785), (1004, None, 0.4935, 0.482)]
)
def test_other_graphs_match_the_facts_of_trlx(seed, num_edges, of_walks, of_uniform):
    graph = make_graph(seed)
    assert num_edges in (None, sum(len(s) for node, s in graph.successors.items() if node != GOAL))
    assert np.mean([measure(walk, graph) for walk in graph.walks]) == pytest.approx(of_walks, abs=6e-4)
    assert uniform_policy_value(graph) == pytest.approx(of_uniform, abs=6e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_shortest_paths_match_matrix_powers(seed):
    """Every graph, redrawn ones included, leads from each start to the goal within a walk."""
    graph = make_graph(seed)
    edges = np.array([[m in graph.successors[n] for m in NODES] for n in NODES], dtype=int)
    reach = np.eye(len(NODES), dtype=int)
    first: dict[str, int] = {}
    for num_nodes in range(1, MAX_NODES):
        for i, node in enumerate(NODES):
            if reach[i, 0] and node not in first:
                first[node] = num_nodes
        reach = (reach @ edges > 0).astype(int)
    assert first == graph.shortest and len(first) == len(NODES)


@pytest.mark.parametrize("seed", SEEDS)
def test_optimality_matches_a_step_by_step_scan(seed):
    graph, rng = make_graph(seed), random.Random(seed)
    texts = list(graph.walks)
    for _ in range(2000):
        walk = rng.choice(NODES[1:])
        for _ in range(rng.randrange(12)):
            nearby = graph.successors.get(walk[-1], NODES)
            walk += rng.choice(nearby if rng.random() < 0.95 else NODES + "|z ")
        texts.append(walk)
    samples = [Sample(text[:1], text[1:], metadata={"graph_seed": seed}) for text in texts]
    for text, score in zip(texts, optimality(samples), strict=True):
        num_nodes = MAX_NODES
        for i, node in enumerate(text):
            if i and (text[i - 1] not in graph.successors or node not in graph.successors[text[i - 1]]):
                break
            if node == GOAL:
                num_nodes = min(i + 1, MAX_NODES)
                break
        assert score == pytest.approx((MAX_NODES - num_nodes) / (MAX_NODES - graph.shortest[text[0]])), text
        assert 0 <= score <= 1


def test_optimality_by_hand():
    graph = make_graph()
    [start] = [node for node in NODES[1:] if graph.shortest[node] == 2][:1]
    detour = next(walk for walk in graph.walks if walk[0] == start and len(walk) == 5 and walk[-1] == GOAL)
    responses = [GOAL, detour[1:], f"{GOAL}{GOAL}xyz", detour[1:-1], "", f"?{GOAL}", f"{start}{GOAL}"]
    scores = optimality([Sample(start, response) for response in responses])
    assert scores == [1.0, 5 / 8, 1.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="a walk begins at one of the nodes .*, not at '!'"):
        optimality([Sample("!", "a")])


def test_rows_are_the_starts_and_the_walks():
    assert [row["prompt"] for row in prompts()] == list("bcdefghijklmnopqrstu")
    assert {row["graph_seed"] for row in prompts(1002)} == {1002}
    assert [row["prompt"] + row["completion"] for row in walks(1002)] == list(make_graph(1002).walks)
    assert make_graph(1002).walks != make_graph().walks


# --- the policy to start from ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder where base_policy keeps what it makes."""
    monkeypatch.setattr(random_walks, "CACHE", tmp_path / "cache")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path / "cache"


def test_base_policy_opens_in_transformers(cache):
    folder = base_policy(num_steps=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        len(tokenizer) == 23
        and tokenizer.get_vocab()["|"] == tokenizer.eos_token_id == 21
        and tokenizer.bos_token_id is None
    )
    assert tokenizer(NODES + "|").input_ids == list(range(22)) and tokenizer.decode([1, 3, 10, 0]) == "bdka"
    ids = torch.tensor([[1, 3, 10, 0, EOS]])
    policy = load_decoder(str(folder), init_mesh(), torch.float32)
    hidden = policy(ids, torch.arange(5)[None], torch.zeros_like(ids))
    torch.testing.assert_close(hidden @ policy.lm_head_weight[:23].t(), model(ids).logits, rtol=1e-5, atol=1e-5)


def test_base_policies_are_kept_apart_by_their_settings(cache):
    folders = {base_policy(num_steps=0), base_policy(num_steps=1), base_policy(1002, num_steps=1), untrained_policy()}
    assert len(folders) == 3 and set(cache.iterdir()) == folders


def test_two_processes_may_make_the_base_policy_at_once(cache, monkeypatch):
    both, make = threading.Barrier(2, timeout=60), random_walks.clone_walks

    def clone_walks(*args):
        both.wait()
        return make(*args)

    monkeypatch.setattr(random_walks, "clone_walks", clone_walks)
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: base_policy(num_steps=0), range(2))
    assert first == second and list(cache.iterdir()) == [first]
    load_decoder(str(first), init_mesh(), torch.float32)


def test_other_ranks_wait_for_the_base_policy(cache, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(base_policy, num_steps=0)
        time.sleep(0.3)
        assert not waiting.done() and not cache.exists()
        monkeypatch.setenv("LOCAL_RANK", "0")
        made = base_policy(num_steps=0)
        assert waiting.result(timeout=10) == made
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(random_walks, "WAIT_SECONDS", 0.2)
    with pytest.raises(FileNotFoundError, match="has not appeared within 0.2 s"):
        base_policy(num_steps=2)


def test_interrupted_base_policy_leaves_nothing(cache, monkeypatch):
    def save_half(policy, folder, *args):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(random_walks, "save_decoder", save_half)
        with pytest.raises(OSError, match="disk full"):
            base_policy(num_steps=0)
    assert not any(cache.iterdir())
    assert base_policy(num_steps=0).is_dir()


# --- rewards: Python functions --------------------------------------------------------------------------------------

SAMPLES = [Sample("say hello", f"hello {i}", response_ids=[1, 2, 3][: i + 1], metadata={"id": i}) for i in range(3)]


def user_reward(tmp_path, body):
    """A reward of a user's own file, whose function has this body."""
    (tmp_path / "mine.py").write_text(
        f"import math\nimport numpy as np\nimport torch\n\n\ndef score(samples):\n{body}\n"
    )
    return make_reward(f"{tmp_path}/mine.py:score")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("    return [len(s.response) + s.metadata['id'] for s in samples]", [7.0, 8.0, 9.0]),
        ("    return tuple(s.finished for s in samples)", [1.0, 1.0, 1.0]),
        ("    return np.arange(3, dtype=np.float32)", [0.0, 1.0, 2.0]),
        ("    return [np.int64(2), torch.tensor(3.0), 4]", [2.0, 3.0, 4.0]),
        ("    return [[0.5] * len(s.response_ids) for s in samples]", [[0.5], [0.5] * 2, [0.5] * 3]),
        ("    return [torch.ones(len(s.response_ids)) for s in samples]", [[1.0], [1.0] * 2, [1.0] * 3]),
    ],
)
def test_reward_functions_give_plain_floats(tmp_path, body, expected):
    scores = user_reward(tmp_path, body)(SAMPLES)
    assert scores == expected
    assert all(type(x) is float for score in scores for x in (score if isinstance(score, list) else [score]))


def test_embedded_reward_is_found_by_name():
    graph = make_graph()
    assert make_reward("tasks.random_walks:optimality")([Sample(w[0], w[1:]) for w in graph.walks]) == [
        measure(w, graph) for w in graph.walks
    ]


SAMPLE_1 = r"sample 1 \(prompt 'say hello', response 'hello 1'\)"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    return [1.0, 2.0]", r"returned 2 values for 3 samples; sample 2 \(.*'hello 2'\) has none"),
        ("    return [1.0, 2.0, 3.0, 4.0]", "returned 4 values for 3 samples$"),
        ("    return 1.0", "returned 1.0, not a list of 3 numbers"),
        ("    return None", "returned None, not a list of 3 numbers"),
        ("    return 'abc'", "returned 'abc', not a list"),
        ("    return [1.0, math.nan, 2.0]", f"gave nan for {SAMPLE_1}"),
        ("    return torch.tensor([1.0, -math.inf, 2.0])", f"gave -inf for {SAMPLE_1}"),
        ("    return [1.0, '0.5', 2.0]", f"gave '0.5', not a number, for {SAMPLE_1}"),
        ("    return [1.0, None, 2.0]", f"gave None, not a number, for {SAMPLE_1}"),
        ("    return [1.0, 2j, 2.0]", f"gave 2j, not a number, for {SAMPLE_1}"),
        ("    return [[1.0], [1.0], [1.0]]", f"gave 1 numbers for {SAMPLE_1}, whose response has 2 tokens"),
        ("    return [[1.0], [1.0, math.nan], [1.0] * 3]", f"gave nan for {SAMPLE_1}, response token 1"),
        (
            "    return [1.0, [1.0, 2.0], 3.0]",
            f"gave numbers for some samples and lists for others, first for {SAMPLE_1}",
        ),
        (
            "    return [float(s.response.replace('hello 1', 'x').split()[-1]) for s in samples]",
            r"raised ValueError: could not convert string to float: 'x' \(.*mine\.py:7, in .*: return \[float.*, on "
            + SAMPLE_1,
        ),
        ("    return [json.dumps(s.metadata) for s in samples]", r"raised NameError: .*mine\.py:7.* on sample 0 \("),
        ("    return [1 / (3 - len(samples))] * 3", r"raised ZeroDivisionError.* on 3 samples together.*sample 0 \("),
        (
            "    return [math.sqrt(-s.metadata['id']) for s in samples]",
            rf"raised ValueError.*mine\.py:7.* on {SAMPLE_1}",
        ),
        (
            "    return [torch.ones(2)[s.metadata['id'] * 2] for s in samples]",
            rf"raised IndexError.*:7.* on {SAMPLE_1}",
        ),
    ],
)
def test_reward_functions_are_rejected_for(tmp_path, body, message):
    with pytest.raises(ValueError, match=rf"^reward \S+mine\.py:score {message}"):
        user_reward(tmp_path, body)(SAMPLES)


def test_error_in_a_library_names_the_users_own_line(tmp_path):
    with pytest.raises(ValueError, match=r"JSONDecodeError: .*mine\.py:8, in .*: .*json\.loads\(s\.response\)"):
        user_reward(tmp_path, "    import json\n    return [json.loads(s.response) for s in samples]")(SAMPLES)


def test_long_texts_are_shortened_in_messages(tmp_path):
    with pytest.raises(ValueError, match=r"prompt 'x{40} \.\.\. x{15}', response 'y'\)$"):
        user_reward(tmp_path, "    return [None]")([Sample("x" * 1000, "y")])


def test_make_reward_rejects_what_is_no_reward(tmp_path):
    (tmp_path / "mine.py").write_text("score = 3\n")
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder; a reward is module:function"):
        make_reward(str(tmp_path))
    with pytest.raises(ValueError, match="mine.py:score is 3, not a function"):
        make_reward(f"{tmp_path}/mine.py:score")
    with pytest.raises(ValueError, match="tasks.random_walks has no optimalty; did you mean optimality"):
        make_reward("tasks.random_walks:optimalty")
    with pytest.raises(FileNotFoundError, match="yours.py:score: no such file"):
        make_reward(f"{tmp_path}/yours.py:score")


# --- rewards: HTTP endpoints ----------------------------------------------------------------------------------------


@contextmanager
def endpoint(answer):
    """An HTTP server on this machine; answer(number of the request, its JSON) -> (status, body) or a function of the
    handler that writes for itself. Yields its address and the requests seen."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            reply = answer(len(requests) - 1, body)
            if callable(reply):
                return reply(self)
            status, text = reply
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def quick_http(monkeypatch):
    monkeypatch.setattr(rewards, "HTTP_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def lengths(_, body):
    return 200, json.dumps({"rewards": [len(s["response"]) + s["metadata"]["id"] for s in body["samples"]]}).encode()


def test_endpoint_is_asked_in_batches(monkeypatch):
    monkeypatch.setattr(rewards, "HTTP_BATCH", 2)
    with endpoint(lengths) as (url, requests):
        assert make_reward(url)(SAMPLES) == [7.0, 8.0, 9.0]
    assert [len(request["samples"]) for request in requests] == [2, 1]
    assert requests[1] == {"samples": [{"prompt": "say hello", "response": "hello 2", "metadata": {"id": 2}}]}


def test_endpoint_is_asked_again_after_a_passing_failure():
    with endpoint(lambda i, body: (503, b"busy") if i < 2 else lengths(i, body)) as (url, requests):
        assert make_reward(url)(SAMPLES) == [7.0, 8.0, 9.0]
    assert len(requests) == 3 and requests[0] == requests[2]


def test_endpoint_may_give_a_number_per_token():
    dense = [[0.5] * len(s.response_ids) for s in SAMPLES]
    with endpoint(lambda *_: (200, json.dumps({"rewards": dense}).encode())) as (url, _):
        assert make_reward(url)(SAMPLES) == dense


@pytest.mark.parametrize(
    ("answer", "num_requests", "message"),
    [
        ((500, b"no model"), 3, r"answered 500 Internal Server Error: b'no model' \(3 of 3 tries\)"),
        ((404, b"lost"), 1, r"answered 404 Not Found: b'lost' \(1 of 3 tries\)"),
        ((200, b"<html>login</html>"), 1, r"answered b'<html>login</html>', not \{\"rewards\""),
        ((200, b'{"scores": [1, 2, 3]}'), 1, r"answered b'.*scores.*', not \{\"rewards\""),
        ((200, b'{"rewards": 1}'), 1, r"answered b'.*', not \{\"rewards\""),
        ((200, b"[1, 2, 3]"), 1, r"answered b'\[1, 2, 3\]', not"),
        ((200, b'{"rewards": [1, 2]}'), 1, "answered with 2 values for 3 samples"),
    ],
)
def test_endpoint_is_rejected_for(answer, num_requests, message):
    with endpoint(lambda *_: answer) as (url, requests):
        with pytest.raises(ValueError, match=rf"^reward {url}, asked about samples 0 to 2, {message}"):
            make_reward(url)(SAMPLES)
    assert len(requests) == num_requests


@pytest.mark.parametrize("reward", ["NaN", "null", '"high"', "Infinity"])
def test_endpoint_that_answers_no_number_names_the_sample(reward):
    with endpoint(lambda *_: (200, f'{{"rewards": [1, {reward}, 2]}}'.encode())) as (url, _):
        with pytest.raises(ValueError, match=f"^reward {url} gave .* for {SAMPLE_1}"):
            make_reward(url)(SAMPLES)


def test_endpoint_that_is_down():
    with endpoint(lengths) as (url, _):
        pass  # nothing listens there any more
    with pytest.raises(ValueError, match=rf"^reward {url}, .* failed: .*refused \(3 of 3 tries\)"):
        make_reward(url)(SAMPLES)


def answer_late(handler, over):
    over.wait(60)


def answer_by_drops(handler, over):
    handler.send_response(200)
    handler.end_headers()
    with suppress(OSError):  # the client goes away
        for _ in range(3000):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            if over.wait(0.02):
                break


def answer_rubbish(handler):
    handler.wfile.write(b"\x00\x01\x02 this is not HTTP\r\n\r\n")


@pytest.mark.parametrize("reply", [answer_late, answer_by_drops])
def test_endpoint_that_is_slow(reply):
    """An answer that ends later than the test is given up."""
    over = threading.Event()
    with endpoint(lambda *_: partial(reply, over=over)) as (url, requests):
        with pytest.raises(ValueError, match=r"gave no answer within 0\.1 s \(3 of 3 tries\)"):
            make_reward(url, timeout=0.1)(SAMPLES)
        over.set()
    assert len(requests) == 3


def test_endpoint_that_speaks_no_http():
    with endpoint(lambda *_: answer_rubbish) as (url, _):
        with pytest.raises(
            ValueError, match=rf"^reward {url}, .* (does not speak HTTP: BadStatusLine.*x00|failed: ).* tries\)"
        ):
            make_reward(url)(SAMPLES)


def test_endpoint_failures_take_less_than_a_minute(monkeypatch):
    """The clock is a fake: every request takes its whole time twice, to begin its answer and to end it."""
    now, tries = itertools.count(), []
    clock = [0.0]
    monkeypatch.setattr(rewards.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(rewards.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(rewards, "HTTP_PAUSE", 1.0)

    def urlopen(request, timeout):
        tries.append(next(now))
        clock[0] += 2 * timeout
        raise TimeoutError

    monkeypatch.setattr(rewards.urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match=r"gave no answer within 12 s \(2 of 3 tries\)"):
        make_reward("http://127.0.0.1:9/")(SAMPLES)
    assert clock[0] < 60 and len(tries) == 2
