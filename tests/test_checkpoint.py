"""Model folders that do not fit, what an export holds, and training states that survive crashes and damage."""

import errno
import json
import os
import resource
import shutil
import signal
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from parallel import checkpoint, files, training_state  # noqa: E402
from parallel.checkpoint import (  # noqa: E402
    eos_ids,
    full_heads,
    load_decoder,
    load_heads,
    save_decoder,
    write_heads,
)
from parallel.families import config_from_hf  # noqa: E402
from parallel.mesh import init_mesh  # noqa: E402
from parallel.model import Decoder, ScalarHead  # noqa: E402
from parallel.training_state import Piece, load_training_state, save_training_state  # noqa: E402
from tasks.random_walks import make_tokenizer  # noqa: E402
from tests.ranks import context, run_ranks  # noqa: E402
from tests.scripts import TINY_GPT2, make_tiny_model  # noqa: E402

MESH = init_mesh()
NEOX = dict(
    model_type="gpt_neox",
    vocab_size=23,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
)

# --- Hugging Face folders -------------------------------------------------------------------------------------------


def load(folder, dtype=torch.float32):
    return load_decoder(str(folder), MESH, dtype)


def no_space(tensors, path, *_):
    """What takes the place of save_file: a disk that is full halfway."""
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def edit_weights(folder, edit):
    """Rewrites model.safetensors with what `edit` makes of its dict of tensors."""
    tensors = {name: x.clone() for name, x in load_file(folder / "model.safetensors").items()}
    save_file(edit(tensors), folder / "model.safetensors", {"format": "pt"})


def assert_same_weights(actual, expected):
    for (name, a), b in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_files_without_prefix_and_with_old_buffers_load(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    expected = load(folder)
    buffers = {f"h.{i}.attn.{name}": torch.ones(1, 1, 4, 4) for i in range(2) for name in ("bias", "masked_bias")}
    edit_weights(folder, lambda tensors: {n.removeprefix("transformer."): x for n, x in tensors.items()} | buffers)
    assert_same_weights(load(folder), expected)


def test_neox_head_loads_under_both_names_and_is_written_as_embed_out(tmp_path):
    folder = make_tiny_model(tmp_path / "model", hf_config=NEOX)
    expected = load(folder)
    assert "embed_out.weight" in load_file(folder / "model.safetensors")
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors.pop("embed_out.weight")})
    assert_same_weights(load(folder), expected)


def test_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    expected = load(folder)
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()})
    assert_same_weights(load(folder), expected)
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs .* tie_word_embeddings to false"):
        load(folder)


DOES_NOT_FIT = {  # case -> (a tensor, what it becomes, what the message must name)
    "missing": ("transformer.h.1.mlp.c_fc.bias", None, ["no tensor"]),
    "unknown": ("transformer.h.2.ln_1.weight", torch.ones(32), ["no place", "gpt2"]),
    "shape": ("transformer.wpe.weight", torch.ones(65, 32), ["[65, 32]", "[64, 32]"]),
    "shape, transposed": ("transformer.h.0.attn.c_attn.weight", torch.ones(96, 32), ["[96, 32]", "[32, 96]"]),
    "infinite, transposed": ("transformer.h.0.mlp.c_proj.weight", torch.full((128, 32), -torch.inf), ["infinite"]),
    "NaN": ("transformer.ln_f.bias", torch.tensor([0.0] * 31 + [torch.nan]), ["NaN"]),
}


@pytest.mark.parametrize("case", DOES_NOT_FIT)
def test_load_rejects_tensors_that_do_not_fit(case, tmp_path):
    name, tensor, words = DOES_NOT_FIT[case]
    folder = make_tiny_model(tmp_path / "model")
    edit_weights(folder, lambda tensors: {n: x for n, x in (tensors | {name: tensor}).items() if x is not None})
    with pytest.raises(ValueError) as raised:
        load(folder)
    for word in (str(folder), name, *words):
        assert word in str(raised.value)


def test_load_rejects_folders_without_readable_weights(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1000])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        load(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is pickled.*save_pretrained\(NEW_FOLDER\)"):
        load(folder)
    index = {"weight_map": {"transformer.wte.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00001-of-00001.safetensors cannot be read"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        load(tmp_path / "nowhere")


def test_hub_id_without_a_network_is_a_clear_error(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="some-owner/no-such-model is no folder here and cannot be fetched"):
        load("some-owner/no-such-model")


def test_export_keeps_configs_tokenizer_and_dtype(tmp_path):
    source = make_tiny_model(tmp_path / "source", hf_config={**TINY_GPT2, "attn_pdrop": 0.25, "my_note": [1, {"a": 2}]})
    generation = {"eos_token_id": [21, 7], "max_length": 50, "my_flag": 1}
    (source / "generation_config.json").write_text(json.dumps(generation))
    decoder = load(source, torch.bfloat16)
    save_decoder(decoder, tmp_path / "model", MESH, make_tokenizer())
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config == {**json.loads((source / "config.json").read_text()), "dtype": "bfloat16"}
    assert json.loads((tmp_path / "model/generation_config.json").read_text()) == generation
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert reopened.dtype == torch.bfloat16
    assert torch.equal(reopened.transformer.wte.weight, decoder.embedding.weight[:23])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("bcd")["input_ids"] == make_tokenizer()("bcd")["input_ids"]
    assert eos_ids(str(tmp_path / "model"), tokenizer) == [7, 21]


def test_eos_ids_are_those_of_all_three_files(tmp_path):
    folder = make_tiny_model(tmp_path / "model", hf_config={**TINY_GPT2, "eos_token_id": 3})
    tokenizer = make_tokenizer()
    assert eos_ids(str(folder), tokenizer) == sorted({3, tokenizer.eos_token_id})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5, 3]}))
    assert eos_ids(str(folder), tokenizer) == sorted({3, 5, 7, tokenizer.eos_token_id})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    tokenizer.eos_token = None
    assert eos_ids(str(folder), tokenizer) == [3]


def anonymous_bytes():
    """Memory of this process that no file backs."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


def peak_of(function):
    """What a function returns, and the most anonymous memory while it ran, beyond what there was before."""
    peak, done, before = 0, threading.Event(), anonymous_bytes()

    def watch():
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    result = function()
    done.set()
    thread.join()
    return result, max(peak, anonymous_bytes()) - before


def peak_of_load(folder):
    """Most anonymous memory while a decoder is loaded, as a multiple of its size."""
    decoder, peak = peak_of(lambda: load(folder))
    return peak / sum(parameter.nbytes for parameter in decoder.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_holds_no_second_copy(tmp_path):
    hf_config = {**NEOX, "vocab_size": 4000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6}
    decoder = Decoder(config_from_hf(hf_config, "config.json")[0], MESH, seed=None)
    decoder.hf_config = hf_config
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(0.1)
    save_decoder(decoder, tmp_path / "model", MESH)
    del decoder
    with context.Pool(1) as pool:  # without freed memory to use again
        peak = pool.apply(peak_of_load, (tmp_path / "model",))
    assert 0.9 < peak < 1.05, peak


def test_export_replaces_a_folder_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = make_tiny_model(tmp_path / "model")
    (folder / "stale.txt").write_text("of the model before")
    old, new = load(folder), load(folder)
    with torch.no_grad():
        new.final_norm.bias.add_(1)
    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(RuntimeError, match="cannot write .*model: .*No space left on device"):
        save_decoder(new, folder, MESH)
    assert_same_weights(load(folder), old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    save_decoder(new, folder, MESH)
    assert_same_weights(load(folder), new)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not (folder / "stale.txt").exists()


def test_heads_come_back(tmp_path):
    heads = {"value_head": ScalarHead(5, MESH, std=0.3, seed=1), "reward_head": ScalarHead(7, MESH, std=0.3, seed=2)}
    write_heads(tmp_path, heads, full_heads(heads, MESH))
    described = json.loads((tmp_path / "heads.json").read_text())
    assert described["reward_head"] == {"kind": "ScalarHead", "shapes": {"weight": [1, 7], "bias": [1]}}
    blank = {"value_head": ScalarHead(5, MESH), "reward_head": ScalarHead(7, MESH)}
    load_heads(tmp_path, blank, MESH)
    for role, head in heads.items():
        assert_same_weights(blank[role], head)
    with pytest.raises(ValueError, match=r"value_head.weight is \[1, 5\], needed as \[1, 6\]"):
        load_heads(tmp_path, {"value_head": ScalarHead(6, MESH)}, MESH)
    with pytest.raises(ValueError, match="q_head.weight is missing"):
        load_heads(tmp_path, {"q_head": ScalarHead(5, MESH)}, MESH)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        load_heads(tmp_path / "nowhere", heads, MESH)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no heads.safetensors"):
        load_heads(tmp_path / "empty", heads, MESH)


# --- training state -------------------------------------------------------------------------------------------------


def state_of(step, offset=0.0):
    """Tensors as a run has them: views of one flat tensor, several types."""
    flat = torch.arange(10.0) / 3 + step + offset
    return {
        "policy.a": flat[:4].view(2, 2),
        "policy.b": flat[4:],
        "policy.b|m": flat[4:].bfloat16(),
        "optimizer|steps": torch.tensor(step),
    }


def pieces_of(tensors, mesh):
    """Each tensor in one box, which one of the ranks writes."""
    return [
        Piece(name, list(x.shape), (0,) * x.dim(), x, i % mesh.world_size == mesh.rank)
        for i, (name, x) in enumerate(tensors.items())
    ]


def save(folder, step, keep=2, mesh=MESH, offset=0.0):
    pieces = pieces_of(state_of(step, offset), mesh)
    save_training_state(folder, step, pieces, {"kl_coef": 0.1 + step, "best": None}, keep, mesh)


def load_state(folder, mesh=MESH):
    """Tensors and meta of the newest checkpoint."""
    tensors = {name: torch.zeros_like(x) for name, x in state_of(0).items()}
    meta = load_training_state(folder, pieces_of(tensors, mesh), mesh)
    return tensors, meta


def assert_is_state(saved, step, offset=0.0):
    tensors, meta = saved
    for name, x in state_of(step, offset).items():
        assert tensors[name].dtype == x.dtype and torch.equal(tensors[name], x), name
    assert (meta["step"], meta["kl_coef"], meta["best"]) == (step, 0.1 + step, None)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_training_state_comes_back_and_the_newest_are_kept(tmp_path):
    assert load_training_state(tmp_path / "checkpoints", [], MESH) is None
    for step in (1, 8, 9, 10):  # 10 is after 9
        save(tmp_path / "checkpoints", step)
    assert names_in(tmp_path / "checkpoints") == ["step-10", "step-9"]
    assert_is_state(load_state(tmp_path / "checkpoints"), 10)


def flip_byte(path, position=-3):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES = {  # case -> (what happens to the folder, what the warning must name)
    "truncated": (lambda f: os.truncate(f / "rank-0.safetensors", 100), "rank-0.safetensors is not what was written"),
    "flipped bit": (lambda f: flip_byte(f / "rank-0.safetensors"), "rank-0.safetensors is not what was written"),
    "no weights": (lambda f: (f / "rank-0.safetensors").unlink(), "there is no rank-0.safetensors"),
    "no meta": (lambda f: (f / "meta.json").unlink(), "there is no meta.json"),
    "torn meta": (lambda f: os.truncate(f / "meta.json", 40), "meta.json cannot be read"),
    "binary meta": (lambda f: (f / "meta.json").write_bytes(b"\xff\xfe\x00"), "meta.json cannot be read"),
    "meta of no object": (lambda f: (f / "meta.json").write_text("[1]"), "meta.json holds [1], not an object"),
    "meta without hashes": (lambda f: (f / "meta.json").write_text('{"step": 2}'), "meta.json cannot be read"),
    "changed meta": (
        lambda f: (f / "meta.json").write_text((f / "meta.json").read_text().replace("2.1", "2.2")),
        "meta.json is not what was written",
    ),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), "there is no meta.json"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_used(case, tmp_path):
    damage, reason = DAMAGES[case]
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-2")
    with pytest.warns(UserWarning) as warned:
        saved = load_state(tmp_path)
    assert_is_state(saved, 1)
    [warning] = [str(w.message) for w in warned]
    assert f"{tmp_path / 'step-2'} is damaged" in warning and reason in warning and "going on from step-1" in warning
    save(tmp_path, 2)  # the run comes to the same step again
    assert_is_state(load_state(tmp_path), 2)


def test_no_intact_checkpoint_is_an_error(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for step in (1, 2):
        flip_byte(tmp_path / f"step-{step}/rank-0.safetensors")
    with pytest.raises(ValueError, match="step-2 is damaged.*step-1 is damaged.*none before it: --overwrite"):
        load_state(tmp_path)


def killed_at(call, function):
    """Runs `function` in a forked process that dies by kill -9 at its call-th step on the disk; True if it got there.

    A step is one rename, removal, flush or file written; a weight file is also torn halfway.
    """
    child = os.fork()
    if child == 0:
        try:
            num_calls = 0

            def counted(original):
                def step(*args, **kwargs):
                    nonlocal num_calls
                    num_calls += 1
                    if num_calls == call:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args, **kwargs)

                return step

            def torn(write):
                whole_file = counted(write)

                def torn_file(tensors, path, *args):
                    Path(path).write_bytes(bytes(100))
                    return whole_file(tensors, path, *args)

                return counted(torn_file)

            checkpoint.save_file = torn(checkpoint.save_file)
            training_state.write_tensors = torn(training_state.write_tensors)
            for module in (checkpoint, training_state):
                module.write_json = counted(module.write_json)
            files.flush = training_state.flush = counted(files.flush)
            os.rename, os.unlink, os.rmdir = counted(os.rename), counted(os.unlink), counted(os.rmdir)
            function()
        finally:
            os._exit(0 if num_calls < call else 1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "an exception"
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("name", ["model", "run[1]"])  # the second one is a pattern of glob
def test_kill_at_any_moment_of_an_export_leaves_a_whole_model(name, tmp_path):
    source = load(make_tiny_model(tmp_path / "source"))
    new = load(tmp_path / "source")
    with torch.no_grad():
        new.final_norm.bias.add_(1)
    outcomes = []
    for call in range(1, 100):
        folder = tmp_path / str(call) / name
        save_decoder(source, folder, MESH)
        killed = killed_at(call, lambda folder=folder: save_decoder(new, folder, MESH))
        moved = folder.with_name(f"tmp-old-{name}")  # between the two renames there is no folder, only the old one here
        found = load(folder if folder.exists() else moved)
        outcomes.append(torch.equal(found.final_norm.bias, new.final_norm.bias))
        assert_same_weights(found, new if outcomes[-1] else source)
        with pytest.raises(RuntimeError, match="No space"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save_file", no_space)
            save_decoder(new, folder, MESH)
        assert_same_weights(load(folder), found)
        save_decoder(new, folder, MESH)
        assert_same_weights(load(folder), new)
        assert names_in(folder.parent) == [name]
        if not killed:
            break
    assert not killed and outcomes == sorted(outcomes) and outcomes.count(False) >= 6 and outcomes[-1], outcomes


def test_failed_rename_of_an_export_leaves_the_model_before(tmp_path, monkeypatch):
    folder = make_tiny_model(tmp_path / "model")
    old, new = load(folder), load(folder)
    with torch.no_grad():
        new.final_norm.bias.add_(1)
    rename, num_renames = os.rename, 0
    for fail_at in (1, 2, 3):  # the weights inside the new folder, the old folder away, the new folder in its place
        num_renames = 0

        def fail(source, target, fail_at=fail_at):
            nonlocal num_renames
            num_renames += 1
            if num_renames == fail_at:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", fail)
            with pytest.raises(RuntimeError, match="cannot write .*model: .*Permission denied"):
                save_decoder(new, folder, MESH)
        assert_same_weights(load(folder), old)
        assert names_in(tmp_path) == ["model"], fail_at


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step saved before"])
def test_kill_at_any_moment_of_a_save_leaves_an_intact_state(again, tmp_path):
    step, offset = (2, 0.5) if again else (3, 0.0)
    outcomes = []
    for call in range(1, 100):
        folder = tmp_path / str(call)
        save(folder, 1)
        save(folder, 2)
        killed = killed_at(call, lambda folder=folder: save(folder, step, offset=offset))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing may look complete and be damaged
            saved = load_state(folder)
        is_new = torch.equal(saved[0]["policy.b"], state_of(step, offset)["policy.b"])
        assert_is_state(saved, step if is_new else 2, offset if is_new else 0.0)
        outcomes.append(is_new)
        save(folder, 4)
        assert_is_state(load_state(folder), 4)
        assert names_in(folder) == [f"step-{3 if is_new and not again else 2}", "step-4"]
        if not killed:
            break
    assert not killed and is_new
    assert outcomes == sorted(outcomes) and outcomes.count(False) >= 6 and outcomes.count(True) >= 2, outcomes


def save_without_space(folder):
    """On each rank: what a save said that the disk did not take, and what was left."""
    mesh = init_mesh()
    save(folder, 1, mesh=mesh)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # bytes per file
    try:
        save(folder, 2, mesh=mesh)
        message = ""
    except RuntimeError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = names_in(folder)
    mesh.barrier()
    assert_is_state(load_state(folder, mesh), 1)
    save(folder, 3, mesh=mesh)
    assert_is_state(load_state(folder, mesh), 3)
    mesh.barrier()
    if mesh.is_logger:
        flip_byte(folder / "step-3/rank-1.safetensors")
    mesh.barrier()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert_is_state(load_state(folder, mesh), 1)
    return message, names, len(warned)


def test_two_ranks_agree_on_full_disks_and_on_the_checkpoint_they_resume(tmp_path):
    results = run_ranks(2, save_without_space, tmp_path)
    for rank, (message, names, num_warnings) in enumerate(results):
        assert "rank 0: cannot write" in message and "step-2" in message, (rank, message)
        assert names == ["step-1"] and num_warnings == 1, (rank, names, num_warnings)  # printed by rank 0 alone


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="cannot write .*file/checkpoints/step-1"):
        save(tmp_path / "file/checkpoints", 1)


def test_decoder_made_from_a_config_is_exported(tmp_path):
    decoder = Decoder(config_from_hf(NEOX, "config.json")[0], MESH)
    decoder.hf_config = NEOX
    save_decoder(decoder, tmp_path / "model", MESH)
    assert_same_weights(load(tmp_path / "model"), decoder)
    assert json.loads((tmp_path / "model/config.json").read_text()) == {**NEOX, "dtype": "float32"}
