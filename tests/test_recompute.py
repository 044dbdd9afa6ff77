"""Recomputation on and off: the same bits of every gradient, fewer bytes kept, products repeated by `full` alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.families import config_from_hf
from parallel.mesh import Layout, init_mesh
from parallel.model import Decoder
from tests.ranks import run_ranks
from tests.test_model import CASES
from tests.zero_models import train

CONFIGS = {name: config_from_hf(hf_config, name)[0] for name, hf_config in CASES.items()}
SOME = ["gpt2", "gptj head 80 rotary 20", "gpt_neox head 96 rotary 24", "llama", "qwen3 head_dim 36"]
PRODUCTS = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}


class CountProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        self.count += fn.overloadpacket.__name__ in PRODUCTS
        return fn(*args, **(kwargs or {}))


def gradients_of(config, mode, seq_len=200):
    """Gradients, bytes that the forward keeps, and matrix products of the backward."""
    decoder = Decoder(config, init_mesh(), seed=3)
    decoder.recompute = mode
    ids = torch.randint(config.vocab_size, (2, seq_len), generator=torch.Generator().manual_seed(1))
    kept = {}

    def pack(x):  # what a checkpoint keeps is seen here, what it drops is not
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = decoder(ids, torch.arange(seq_len).expand_as(ids), torch.zeros_like(ids))
    for weight in decoder.parameters():
        kept.pop(weight.untyped_storage()._cdata, None)
    with CountProducts() as products:
        hidden.square().sum().backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    return gradients, sum(kept.values()), products.count


@pytest.mark.parametrize("seq_len", [40, 200])  # attention by hand and fused
@pytest.mark.parametrize("name", SOME)
def test_recomputation_gives_the_same_bits_and_keeps_less(name, seq_len):
    config = CONFIGS[name]
    expected, most, products = gradients_of(config, "none", seq_len)
    selective, fewer, selective_products = gradients_of(config, "selective", seq_len)
    full, fewest, full_products = gradients_of(config, "full", seq_len)
    for gradients in (selective, full):
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[key], gradient) for key, gradient in expected.items())
    assert fewest < 0.4 * most and fewest < fewer < 0.9 * most, (most, fewer, fewest)
    assert selective_products == products, "a matrix product was repeated"
    assert full_products > products


def test_full_recomputation_keeps_the_inputs_of_layers():
    """Per layer [tokens, hidden_size]; beside them what embeddings and the final norm keep, and the rotary tables."""
    config = CONFIGS["llama"]
    _, kept, _ = gradients_of(config, "full")
    tokens = 2 * 200
    activation = tokens * config.hidden_size * 4
    small = 8 * tokens * 4 + tokens * config.rotary_dim * 4
    assert config.num_layers * activation <= kept <= (config.num_layers + 1) * activation + small


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("name", ["gpt2", "qwen3 head_dim 36"])
def test_recomputation_on_two_ranks_gives_the_same_bits(name, zero):
    expected = run_ranks(2, train, CONFIGS[name], Layout(), "float32", 2)
    for mode in ("selective", "full"):
        for rank, actual in enumerate(
            run_ranks(2, train, CONFIGS[name], Layout(zero=zero, recompute=mode), "float32", 2)
        ):
            for a, b in zip(actual[:2], expected[rank][:2], strict=True):
                assert all(torch.equal(a[key], b[key]) for key in b), f"{mode}, rank {rank}"
            assert actual[2] == expected[rank][2]
