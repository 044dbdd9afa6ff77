"""What trains: adapters, frozen parts, upper layers; the reference that shares the rest. Each against the plain run."""

import functools
import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ppo
from parallel.adapters import OF_LAYERS, Lora, Tuning, make_reference, set_trained
from parallel.checkpoint import load_decoder, save_decoder
from parallel.data_parallel import data_parallel
from parallel.families import config_from_hf
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder, ScalarHead
from parallel.reward import save_reward_model
from parallel.training_state import load_training_state, save_training_state
from tests.ranks import run_ranks
from tests.scripts import ROOT, TINY_GPT2, call_main, make_tiny_model, read_rows, run_on_ranks
from tests.test_layouts import CASES, MAKE, SCRIPTS, check_step, draw, half_step, sequences, show, step

LORA = Tuning(lora=Lora(rank=3, alpha=6.0, targets=(*OF_LAYERS, "lm_head")))
TUNINGS = {
    "lora": LORA,
    "lora of some": Tuning(lora=Lora(rank=2, targets=("qkv", "ffn_out"))),
    "upper layers": Tuning(unfrozen_layers=1),
    "parts": Tuning(freeze=("embedding", "layers.0", "*.attn_out", "layers.*.ffn_norm")),
    "the head alone": Tuning(freeze=("embedding", "position_embedding", "layers.0-9")),
    "lora above": Tuning(unfrozen_layers=1, lora=Lora(rank=3)),
    "lora of the head": Tuning(lora=Lora(rank=2, targets=("attn_out", "lm_head"))),
}


def of_case(tuning, case):
    """Without the parts that a family does not have."""
    missing = {"position_embedding"} if case != "gpt2" else set()
    missing |= {"lm_head"} if case in ("gpt2", "qwen3") else set()  # tied to the embedding
    freeze, targets = (tuple(x for x in parts if x not in missing) for parts in (tuning.freeze, tuning.lora.targets))
    return replace(tuning, freeze=freeze, lora=replace(tuning.lora, targets=targets))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["upper layers", "parts", "the head alone"])
@pytest.mark.parametrize(("case", "script"), list(zip(CASES, SCRIPTS, strict=True)))
def test_what_still_trains_gets_the_plain_gradients(name, case, script):
    """To the last bit: freezing takes gradients away and changes none."""
    tuning = of_case(TUNINGS[name], case)
    plain, tuned = (step(case, script, "float32", Layout(), 4, 3, t)[2] for t in (Tuning(), tuning))
    plain = {full_name: x for (_, full_name), x in plain.items()}
    assert 0 < len(tuned) < len(plain)
    for (_, full_name), x in tuned.items():
        assert torch.equal(x, plain[full_name]), full_name
        assert x.abs().sum() > 0 or not plain[full_name].any()


@pytest.mark.parametrize(("case", "script"), list(zip(CASES, SCRIPTS, strict=True)))
def test_gradients_of_adapters_are_those_of_the_merged_weight(case, script):
    """For W' = W + s B A: dL/dA = s B^T dL/dW', dL/dB = s dL/dW' A^T, with dL/dW' of the plain run at W'."""
    model, _, _ = half_step(case, script, "float64", Layout(), 4, tuning=of_case(LORA, case))
    adapters = {
        n: unit.view(unit.flat_grad, i) for unit in model.units if unit.trainable for i, n in enumerate(unit.names)
    }
    role = next(iter(model.decoders))
    decoder = model.roles[role]
    merged = dict(decoder.local_parameters())
    values = dict(decoder.local_parameters(adapters=True))

    mesh = init_mesh()
    roles, microbatches, loss_fn = MAKE[script](config_from_hf(CASES[case], "test")[0], mesh, torch.float64, 4)
    for module in roles.values():
        draw(module, mesh)
    with torch.no_grad():
        for name, parameter in roles[role].named_parameters():
            parameter.copy_(merged[name])
    for microbatch in microbatches:
        hidden = {
            n: m(microbatch["input_ids"], microbatch["position_ids"], microbatch["first_key"])
            for n, m in roles.items()
            if isinstance(m, Decoder)
        }
        loss_fn(hidden, microbatch)[0].backward()
    compared = 0
    for name, parameter in roles[role].named_parameters():
        prefix = f"{name.removesuffix('weight')}adapter."
        if f"{prefix}a" in values:
            a, b, scale = values[f"{prefix}a"], values[f"{prefix}b"], LORA.lora.scale
            for x, expected in (("a", scale * b.T @ parameter.grad), ("b", scale * parameter.grad @ a.T)):
                torch.testing.assert_close(adapters[f"{role}.{prefix}{x}"], expected, rtol=1e-9, atol=1e-13)
                compared += 1
    assert compared == 2 * (4 * decoder.config.num_layers + (decoder.lm_head is not None))


def cover():
    """(tuning, case, script, dtype, ranks, layout, sequences of a micro-batch): every pair of tuning and layout."""
    looped = dict(schedule="interleaved", num_chunks=2)
    layouts = [(2, Layout(tp=2)), (4, Layout(tp=4, sequence_parallel=False)), (2, Layout(zero=1))]
    layouts += [(4, Layout(tp=2, zero=3, recompute="full")), (2, Layout(zero=3, recompute="selective"))]
    layouts += [(2, Layout(pp=2)), (4, Layout(pp=2, tp=2, recompute="full")), (2, Layout(pp=2, **looped))]
    layouts += [(4, Layout(pp=2, zero=3)), (2, Layout(zero=2, offload=("optimizer",)))]
    for i, (ranks, layout) in enumerate(layouts):
        for j, name in enumerate(TUNINGS):
            case, script = list(CASES)[(i + j) % 4], SCRIPTS[(i // 2 + j) % 4]
            if name == "the head alone" and script == "reward_model":
                script = "sft"  # it has no head in the decoder
            size = (1, 2)[(i + j) % 2] * layout.pp
            yield name, case, script, "float64" if (i + j) % 3 == 0 else "float32", ranks, layout, size


@pytest.mark.parametrize(("name", "case", "script", "dtype", "ranks", "layout", "size"), list(cover()), ids=show)
def test_step_equals_one_process(name, case, script, dtype, ranks, layout, size):
    check_step(case, script, dtype, ranks, layout, size, of_case(TUNINGS[name], case))


# --- the reference ---------------------------------------------------------------------------------------------------


def reference_logprobs(case, layout, tuning, is_shared=True):
    """Bytes of the reference's own weights here, and log-probabilities under policy and reference, before and after the
    policy has moved."""
    mesh, dtype = init_mesh(layout), torch.float64
    config = replace(config_from_hf(CASES[case], "test")[0], num_layers=4)
    policy = Decoder(config, mesh, dtype)
    draw(policy, mesh)
    set_trained(policy, tuning)
    if is_shared:
        reference = make_reference(policy)
    else:
        reference = Decoder(config, mesh, dtype)
        draw(reference, mesh)
        reference.requires_grad_(False)
    model = data_parallel({"policy": policy, "ref_policy": reference}, mesh, layout)
    own = sum(unit.flat.nbytes for unit in model.units if unit.name.startswith("ref_policy"))
    ids, lens = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in sequences()], True), map(len, sequences())
    lens = torch.tensor(list(lens))
    mask = (torch.arange(ids.shape[1]) > 0) & (torch.arange(ids.shape[1]) < lens[:, None])
    rollout = ppo.Rollout(ids, lens, mask, None, None, None)
    rows = torch.arange(len(ids)).tensor_split(mesh.dp.size)[mesh.dp.rank].split(2)
    found = []
    for _ in range(2):
        described = ppo.describe_tokens({"policy": policy, "ref_policy": reference}, rollout, 0.9, rows)
        found.append([mesh.folded.sum(x, "dp") for x in described[:2]])
        for unit in model.units:
            if unit.trainable:
                unit.flat.add_(torch.linspace(0, 0.02, len(unit.flat)))
    return own, found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TUNINGS)
def test_shared_reference_is_the_model_before_it_learns(name, case):
    tuning = of_case(TUNINGS[name], case)
    _, [(_, expected), (_, still)] = reference_logprobs(case, Layout(), Tuning(), is_shared=False)
    assert torch.equal(expected, still)
    own, [(old, ref), (moved, ref_after)] = reference_logprobs(case, Layout(), tuning)
    assert torch.equal(ref, ref_after) and torch.equal(old, ref), "the KL penalty begins at 0"
    assert (moved - old).abs().max() > 1e-3
    torch.testing.assert_close(ref, expected, rtol=0, atol=1e-12)
    if tuning.lora.rank:
        assert own == 0
    layouts = [(2, Layout(zero=3)), (2, Layout(tp=2)), (4, Layout(tp=2, zero=3, offload=("frozen",)))]
    layouts += [(2, Layout(pp=2)), (4, Layout(pp=2, zero=3))] if name.startswith("lora") and case != "llama" else []
    for ranks, layout in layouts[:: 1 if case in ("gpt2", "qwen3") else 2]:
        if layout.pp > 1 and tuning.unfrozen_layers:
            continue
        for own, [(old, ref), (_, ref_after)] in run_ranks(ranks, reference_logprobs, case, layout, tuning):
            assert (ref - expected).abs().max() <= 1e-12, layout
            torch.testing.assert_close(ref_after, ref, rtol=0, atol=0)
            torch.testing.assert_close(old, ref, rtol=0, atol=1e-13)
            assert own == 0 or not tuning.lora.rank


def test_the_trunk_is_computed_once(monkeypatch):
    """Frozen layers run once for policy and reference, the others once for each."""
    calls = []
    forward = Decoder.forward

    def counting(self, x, *args, layers=None, **kwargs):
        calls.append(len(layers))
        return forward(self, x, *args, layers=layers, **kwargs)

    monkeypatch.setattr(Decoder, "forward", counting)
    reference_logprobs("gpt2", Layout(), Tuning(unfrozen_layers=1))
    assert sum(calls) == 2 * 4 * (3 + 1 + 1)  # twice, of 4 micro-batches
    calls.clear()
    reference_logprobs("gpt2", Layout(), Tuning(unfrozen_layers=1, lora=Lora(rank=2)))
    assert sum(calls) == 2 * 4 * (3 + 1 + 1)


# --- files -----------------------------------------------------------------------------------------------------------


def adapted(folder, layout, tuning, out=None):
    """A decoder of a folder with drawn adapters; its logits and those of what was exported from it, if it was."""
    mesh = init_mesh(layout)
    decoder = set_trained(load_decoder(str(folder), mesh, torch.float32), tuning)
    with torch.no_grad():
        if not tuning.lora.adapters:
            drawn = Decoder(decoder.config, mesh)
            set_trained(drawn, tuning)
            draw(drawn, mesh)
            for name, parameter in decoder.named_parameters():
                if ".adapter." in name:
                    parameter.copy_(drawn.get_parameter(name))
    data_parallel({"policy": decoder}, mesh, layout)
    if out is not None:
        save_decoder(decoder, out, mesh)
    if layout != Layout():
        return None
    ids = torch.arange(24).view(2, 12)
    return decoder(ids, torch.arange(12).expand(2, 12), torch.zeros_like(ids)).detach() @ decoder.lm_head_weight[:131].T


def make_model(case, folder, num_layers=2):
    architectures = {"gpt2": "GPT2", "gpt_neox": "GPTNeoX", "llama": "Llama", "qwen3": "Qwen3"}
    layers = {"n_layer" if case == "gpt2" else "num_hidden_layers": num_layers}
    hf_config = {**CASES[case], **layers, "architectures": [f"{architectures[case]}ForCausalLM"]}
    decoder = Decoder(config_from_hf(hf_config, "test")[0], init_mesh())
    decoder.hf_config = hf_config
    draw(decoder, init_mesh())
    save_decoder(decoder, folder, init_mesh())


@pytest.mark.parametrize("case", CASES)
def test_merged_export_equals_the_adapted_model(case, tmp_path):
    make_model(case, tmp_path / "base")
    lora = of_case(LORA, case)
    logits = adapted(tmp_path / "base", Layout(), lora, tmp_path / "one")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(exported(ids).logits.detach(), logits, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (base(ids).logits - logits).abs().max() > 1e-2
    for ranks, layout in [(2, Layout(tp=2)), (2, Layout(zero=3)), (4, Layout(pp=2, tp=2)), (4, Layout(pp=2, zero=3))]:
        run_ranks(ranks, adapted, tmp_path / "base", layout, lora, tmp_path / "several")
        for file in ("model.safetensors", "adapters.safetensors"):
            one, several = (load_file(tmp_path / name / file) for name in ("one", "several"))
            assert one.keys() == several.keys()
            for name in one:
                assert (several[name] - one[name]).abs().max() <= 1e-6, (layout, name)
    # the adapters alone, on their base again
    going_on = Tuning(lora=Lora(adapters=str(tmp_path / "one")))
    assert torch.equal(adapted(tmp_path / "base", Layout(), going_on), logits)
    run_ranks(4, adapted, tmp_path / "base", Layout(pp=2, tp=2), going_on, tmp_path / "again")
    one, again = (load_file(tmp_path / name / "adapters.safetensors") for name in ("one", "again"))
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_merged_reward_model_opens_in_transformers(tmp_path):
    model, mesh = make_tiny_model(tmp_path / "tiny"), init_mesh()
    decoder = set_trained(load_decoder(str(model), mesh, torch.float32, lm_head=False), of_case(LORA, "gpt2"))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".adapter." in name:
                parameter.add_(0.1)
    head = ScalarHead(32, mesh, std=0.3)
    from tasks.random_walks import make_tokenizer

    save_reward_model(decoder, head, tmp_path / "rm", mesh, make_tokenizer(), 0.0)
    ids = torch.tensor([[1, 2, 3, 21]])
    hidden = decoder(ids, torch.arange(4)[None], torch.zeros_like(ids))
    expected = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")(ids).logits
    torch.testing.assert_close(head(hidden[:, -1]), expected[:, 0], rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "rm/adapters.json").read_text())["base"] == str(model)


def test_adapters_of_another_base_are_refused(tmp_path):
    make_model("gpt2", tmp_path / "base")
    adapted(tmp_path / "base", Layout(), of_case(LORA, "gpt2"), tmp_path / "one")
    # the same architecture, one number of one tensor changed
    make_model("gpt2", tmp_path / "other")
    tensors = load_file(tmp_path / "other/model.safetensors")
    name = next(name for name in tensors if name.endswith("ln_f.weight"))
    tensors[name][7] += 1e-3
    save_file(tensors, tmp_path / "other/model.safetensors", {"format": "pt"})
    going_on = Tuning(lora=Lora(adapters=str(tmp_path / "one")))
    with pytest.raises(ValueError, match=r"adapters of .*one are of .*base.*other.*has other weights.*--model"):
        adapted(tmp_path / "other", Layout(), going_on)
    for less in (dict(unfrozen_layers=1), dict(freeze=("layers.0.qkv",))):
        with pytest.raises(ValueError, match=r"adapters.safetensors holds layers.0.*leave those flags out"):
            adapted(tmp_path / "base", Layout(), replace(going_on, **less))
    with pytest.raises(FileNotFoundError, match="holds no adapters.json"):
        adapted(tmp_path / "base", Layout(), Tuning(lora=Lora(adapters=str(tmp_path / "base"))))
    with pytest.raises(ValueError, match="--lora.rank 5.*have rank 3"):
        adapted(tmp_path / "base", Layout(), Tuning(lora=Lora(rank=5, adapters=str(tmp_path / "one"))))


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (Tuning(unfrozen_layers=2), "--unfrozen-layers 2 of 2 layers: give 1 to 1, or 0"),
        (
            Tuning(freeze=("layer.0",)),
            "--freeze layer.0 is no part of this model: it has embedding, position_embedding",
        ),
        (Tuning(freeze=("layers.7",)), "--freeze layers.7 is no part.*layers.0 to layers.1"),
        (Tuning(freeze=("*",)), "leave nothing to train"),
        (Tuning(freeze=("layers.0-1",), lora=Lora(rank=2)), "leave nothing to train"),
        (LORA, "--lora.targets lm_head: the LM head of this model is its embedding"),
        (Tuning(lora=Lora(rank=100)), "--lora.rank 100 is more than the model's width 48"),
    ],
)
def test_set_trained_rejects(tuning, message):
    decoder = Decoder(config_from_hf(CASES["gpt2"], "test")[0], init_mesh())
    with pytest.raises(ValueError, match=message):
        set_trained(decoder, tuning)


@pytest.mark.parametrize(("flags", "message"), [((-1, 1.0), "--lora.rank -1"), ((2, 0.0), "--lora.alpha 0.0")])
def test_lora_rejects(flags, message):
    with pytest.raises(ValueError, match=message):
        Lora(*flags)


def test_ppo_refuses_a_shared_trunk_in_stages():
    with pytest.raises(ValueError, match="--unfrozen-layers.*--layout.pp.*--lora.rank.*--freeze"):
        ppo.Args(unfrozen_layers=1, layout=Layout(pp=2))
    ppo.Args(unfrozen_layers=1, layout=Layout(pp=2), kl_coef=0.0)  # without a reference there is nothing to share


# --- whole runs ------------------------------------------------------------------------------------------------------

REWARD = ROOT / "tests/letter_reward.py"
SHORT = (
    "--reward",
    f"{REWARD}:share",
    "--batch-size",
    16,
    "--minibatch-size",
    8,
    "--microbatch-size",
    4,
    "--eval-samples",
    8,
    "--kl-coef",
    0.1,
)
OPTIONS = {  # flag -> values, of which every pair is run
    "what": [
        ("--lora.rank", 2),
        ("--unfrozen-layers", 2),
        ("--freeze", "embedding", "layers.0-1"),
        ("--unfrozen-layers", 1, "--lora.rank", 2, "--lora.targets", "qkv", "ffn_in"),
    ],
    "ranks": [
        (1, ()),
        (2, ("--layout.zero", 3)),
        (4, ("--layout.tp", 2, "--layout.zero", 2)),
        (2, ("--layout.pp", 2, "--layout.rollout", "folded")),
        (2, ("--layout.pp", 2, "--layout.rollout", "rotation")),
    ],
    "memory": [
        ("--layout.recompute", "full"),
        ("--layout.recompute", "selective", "--layout.offload", "optimizer"),
        ("--layout.offload", "frozen", "optimizer"),
        (),
    ],
    "value": [(), ("--value-model", "copy"), ("--advantage", "rloo", "--samples-per-prompt", 2)],
    "dtype": [(), ("--dtype", "bfloat16")],
}


def pairwise(options):
    """Choices in which every pair of values of two options occurs; greedily, the same every time."""
    names = list(options)
    combinations = list(itertools.product(*(range(len(options[name])) for name in names)))
    open_pairs = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(names)), 2)
        for a in range(len(options[names[i]]))
        for b in range(len(options[names[j]]))
    }

    def pairs(choice):
        return {(i, choice[i], j, choice[j]) for i, j in itertools.combinations(range(len(names)), 2)}

    while open_pairs:
        choice = max(combinations, key=lambda choice: len(pairs(choice) & open_pairs))
        open_pairs -= pairs(choice)
        yield {name: options[name][i] for name, i in zip(names, choice, strict=True)}


@pytest.fixture(scope="module")
def plain_rows(tmp_path_factory):
    """Flags -> rows of metrics of their run on one process, each made once."""

    @functools.cache
    def rows_of(flags):
        folder = tmp_path_factory.mktemp("plain")
        run_on_ranks("ppo.py", *flags, "--output-dir", "run", cwd=folder)
        return read_rows(folder / "run")

    return rows_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", hf_config={**TINY_GPT2, "n_layer": 4})


@pytest.mark.parametrize("choice", list(pairwise(OPTIONS)), ids=lambda x: "-".join(str(v) for v in x.values())[:60])
def test_savers_change_no_mathematics(choice, tiny, plain_rows, tmp_path):
    """Every pair of options: the script itself stops where rollouts and training, or policy and reference, disagree.

    On one process the same run without what saves memory alone gives the same metrics.
    """
    ranks, layout = choice["ranks"]
    what = choice["what"]
    if "--layout.pp" in layout and "--unfrozen-layers" in what:
        what = ("--lora.rank", 2)  # refused, see above
    maths = (*SHORT, "--model", tiny, "--max-iterations", 2, "--eval-every", 2, *what, *choice["value"])
    flags = (*maths, *choice["dtype"], *choice["memory"], *layout)
    run_on_ranks("ppo.py", *flags, "--output-dir", "run", cwd=tmp_path, ranks=ranks)
    rows = read_rows(tmp_path / "run")
    assert len(rows) == 2 and all(row["skipped_steps"] == 0 and row["grad_norm"] > 0 for row in rows)
    if not choice["dtype"]:
        assert abs(rows[0]["kl"]) <= 1e-5 and rows[0]["rollout_mismatch_max"] <= 1e-4
        for row, expected in zip(rows, plain_rows(maths), strict=True):
            assert row["rollout_hash"] == expected["rollout_hash"]
            for name in ("loss", "grad_norm", "kl", "entropy"):
                assert row[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), name
    exported = load_file(tmp_path / "run/model/model.safetensors")
    before = load_file(tiny / "model.safetensors")
    frozen = [f"transformer.h.{i}." for i in range(2)] + ["transformer.wte"]
    for name, x in exported.items():
        if "--freeze" in what and name.startswith(tuple(frozen)):
            assert torch.equal(x, before[name].to(x.dtype)), name
    assert any(not torch.equal(x, before[name].to(x.dtype)) for name, x in exported.items())


@pytest.mark.parametrize("script", ["sft", "reward_model", "ilql"])
def test_other_scripts_train_adapters(script, tiny, tmp_path):
    """On one process and in stages alike; what is exported is merged, and its adapters lie beside it."""
    flags = ("--model", tiny, "--batch-size", 8, "--max-steps", 3, "--eval-every", 3, "--lora.rank", 2)
    flags += ("--eval-samples", 8, "--advantage-scales", 1) if script == "ilql" else ()
    run_on_ranks(f"{script}.py", *flags, "--output-dir", "one", cwd=tmp_path)
    layout = ("--layout.pp", 2, "--layout.rollout", "folded")
    run_on_ranks(f"{script}.py", *flags, *layout, "--output-dir", "two", cwd=tmp_path, ranks=2)
    for row, expected in zip(read_rows(tmp_path / "two"), read_rows(tmp_path / "one"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)
    assert {"adapters.json", "adapters.safetensors"} <= {x.name for x in (tmp_path / "one/model").iterdir()}


def test_value_model_of_adapted_policy_begins_as_that(tiny, tmp_path, monkeypatch):
    """A copy has its adapters; another folder new ones, of the same rank."""

    class Enough(Exception):
        pass

    def stop(roles, *_):
        found.append(roles)
        raise Enough

    found = []
    flags = ["--model", str(tiny), *map(str, SHORT)]
    run_on_ranks("ppo.py", *flags, "--lora.rank", 2, "--max-iterations", 1, "--output-dir", "run", cwd=tmp_path)
    monkeypatch.setattr(ppo, "data_parallel", stop)
    for value_model in ("copy", str(tiny)):
        more = ["--lora.adapters", "run/model", "--value-model", value_model, "--output-dir", "out"]
        with pytest.raises(Enough):
            call_main("ppo", flags + more, tmp_path)
        policy, value = found[-1]["policy"], dict(found[-1]["value_model"].named_parameters())
        for name, parameter in policy.named_parameters():
            assert value[name].requires_grad == parameter.requires_grad == (".adapter." in name)
            if value_model != "copy" and ".adapter." in name:
                assert name.endswith("a") or not value[name].any(), name
            else:
                assert torch.equal(value[name], parameter), name


def test_value_and_reward_models_have_no_lm_head_to_freeze(tmp_path):
    """What is said of it is for the policy."""
    make_model("llama", tmp_path / "model")
    load = functools.partial(load_decoder, str(tmp_path / "model"), init_mesh(), torch.float32, lm_head=False)
    for tuning in (Tuning(freeze=("lm_head",)), Tuning(lora=Lora(rank=2, targets=("qkv", "lm_head")))):
        set_trained(load(), tuning)
        assert ppo.Args(model=str(tmp_path / "model"), value_model="copy", **vars(tuning)).job()
        with pytest.raises(ValueError, match="nothing to train: a value or reward model has no LM head"):
            set_trained(load(), replace(tuning, freeze=("embedding", "layers", "final_norm")))


def test_adapted_run_resumes_bit_for_bit(tiny, tmp_path):
    flags = ("--model", tiny, *SHORT, "--lora.rank", 2, "--save-every", 1, "--eval-every", 3)
    flags += ("--optim.schedule", "constant")
    run_on_ranks("ppo.py", *flags, "--max-iterations", 3, "--output-dir", "whole", cwd=tmp_path)
    run_on_ranks("ppo.py", *flags, "--max-iterations", 1, "--output-dir", "parts", cwd=tmp_path)
    run_on_ranks("ppo.py", *flags, "--max-iterations", 3, "--output-dir", "parts", "--resume", cwd=tmp_path)
    for file in ("model.safetensors", "adapters.safetensors"):
        whole, parts = (load_file(tmp_path / name / "model" / file) for name in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def adapters_after(layout, folder, resume):
    """Adapters, saved in a folder or filled from it under another layout."""
    mesh = init_mesh(layout)
    policy = Decoder(replace(config_from_hf(CASES["llama"], "test")[0], num_layers=4), mesh)
    set_trained(policy, LORA)
    draw(policy, mesh, seed=int(resume))
    model = data_parallel({"policy": policy}, mesh, layout)
    if resume:
        load_training_state(folder, list(model.pieces()), mesh)
    else:
        save_training_state(folder, 1, list(model.pieces()), {}, 1, mesh)
    return dict(policy.full_parameters(adapters=True))


def test_adapters_go_on_under_another_layout(tmp_path):
    expected = adapters_after(Layout(), tmp_path, False)
    for ranks, layout in [(2, Layout(pp=2)), (4, Layout(tp=2, zero=3))]:
        found = run_ranks(ranks, adapters_after, layout, tmp_path, True)[0]
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
