import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import flex_attention as flex

from grn.networks import attention
from grn.networks.attention import (
    BLOCK,
    PackedExact,
    PackedFlex,
    Recorder,
    WithText,
    packed_attention,
    packed_block_mask,
)

CPU = torch.device("cpu")
LENGTHS = [(253, 5), (48, 7), (0, 3), (300, 0), (1, 126), (2, 1), (1, 1), (0, 300), (129, 130)]


def tokens_of(lengths):
    """(sample, is text) of every token, told one by one."""
    return [(i, text) for i, counts in enumerate(lengths) for text in (False, True) for _ in range(counts[text])]


def allowed(lengths):
    """bool [queries, keys] by the definition."""
    tokens = tokens_of(lengths)
    sample = torch.tensor([sample for sample, _ in tokens])
    text = torch.tensor([text for _, text in tokens])
    return (sample[:, None] == sample) & (~text[:, None] | text)


def heads(lengths, *, queries=4, kv=2, dtype=torch.float32):
    torch.manual_seed(0)
    total = sum(map(sum, lengths))
    return [torch.randn(1, count, total, 16, dtype=dtype) for count in (queries, kv, kv)]


def by_definition(q, k, v, mask):
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=3) @ v


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_both_backends_are_the_definition():
    q, k, v = heads(LENGTHS)
    expected = by_definition(q, k, v, allowed(LENGTHS))
    torch.testing.assert_close(PackedExact(tuple(LENGTHS))(q, k, v), expected, atol=1e-5, rtol=1e-5)
    unfused = PackedFlex(packed_block_mask(LENGTHS, CPU), compiled=False)
    torch.testing.assert_close(unfused(q, k, v), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.full
@pytest.mark.slow  # compiles a kernel for the CPU
def test_compiled_flex_skips_no_block_that_matters():
    q, k, v = heads(LENGTHS)
    attend = packed_attention(LENGTHS, CPU, backend="flex")
    torch.testing.assert_close(attend(q, k, v), by_definition(q, k, v, allowed(LENGTHS)), atol=1e-5, rtol=1e-5)


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled, as `torch.compile` here runs it as it is, also on the way back, which the CPU cannot."""
    made, compile = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **given: compile(f, backend=lambda g, _: made.append(g) or g, **given)
    )
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_warn_once", lambda warning_id, message, **_: pytest.fail(message))
    attention._fused_flex_attention.cache_clear()
    torch._dynamo.reset()
    yield made
    attention._fused_flex_attention.cache_clear()
    torch._dynamo.reset()


@pytest.mark.full
def test_flex_attention_stays_fused_in_all_kinds_of_calls(graphs):
    """Dynamo compiles a function eight times and then leaves it as it is, with all scores in memory."""
    for kv in (2, 4):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            for lengths in ([(3, 2)], [(130, 20), (0, 7)], [(0, 30)], [(200, 3), (50, 90)]):
                with mode():
                    packed_attention(lengths, CPU, backend="flex")(*heads(lengths, kv=kv))
    assert 8 < len(graphs) <= 18


def test_flex_attention_beyond_dynamos_limit_is_an_error(graphs):
    other = [(300, 20), (0, 7)]
    with torch._dynamo.config.patch(recompile_limit=1):
        packed_attention(LENGTHS, CPU, backend="flex")(*heads(LENGTHS))
        attend, given = packed_attention(other, CPU, backend="flex"), heads(other)
        with pytest.raises(FailOnRecompileLimitHit):
            attend(*given)


@pytest.mark.parametrize("lengths", [LENGTHS, [(128, 128), (256, 128)], [(3, 2)], [(0, 500), (0, 20)]], ids=str)
def test_blocks_are_those_of_the_definition(lengths):
    mask = packed_block_mask(lengths, CPU)
    pairs = allowed(lengths)
    total = len(pairs)
    blocks = -(-total // BLOCK)
    padded = torch.zeros(blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    padded[:total, :total] = pairs
    padded = padded.view(blocks, BLOCK, blocks, BLOCK).transpose(1, 2).flatten(2)
    needed, full = torch.zeros(blocks, blocks, dtype=torch.bool), torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        for counts, indices, into in (
            (mask.kv_num_blocks, mask.kv_indices, needed),
            (mask.full_kv_num_blocks, mask.full_kv_indices, full),
        ):
            into[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
    assert not (needed & full).any()
    assert torch.equal(full, padded.all(dim=2))  # nothing is computed unmasked that should be masked
    assert (needed | full)[padded.any(dim=2)].all()  # nothing that matters is skipped
    sample = torch.tensor([sample for sample, _ in tokens_of(lengths)])
    first, last = sample[::BLOCK], sample[BLOCK - 1 :: BLOCK]
    last = torch.cat([last, sample[-1:]])[:blocks]
    far = (first[:, None] > last) | (last[:, None] < first)
    assert not (needed | full)[far].any()  # blocks without a sample in common are


def test_the_exact_backend_is_the_default_where_flex_has_no_gradients():
    assert isinstance(packed_attention(LENGTHS, CPU), PackedExact)
    assert isinstance(packed_attention(LENGTHS, torch.device("meta")), PackedExact)


def test_texts_of_different_lengths():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, count, 6, 16) for count in (4, 2, 2))
    keys, values = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    lengths = [3, 5]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None, None, None]
    out = WithText(keys, values, mask)(q, k, v)
    for row, length in enumerate(lengths):
        alone = WithText(keys[row : row + 1, :, :length], values[row : row + 1, :, :length], None)
        expected = alone(q[row : row + 1], k[row : row + 1], v[row : row + 1])
        torch.testing.assert_close(out[row : row + 1], expected, atol=1e-6, rtol=1e-5)


def test_a_recorder_keeps_what_goes_through():
    q, k, v = heads([(2, 3)])
    pattern = PackedExact(((2, 3),))
    recorder = Recorder(pattern)
    assert torch.equal(recorder(q, k, v), pattern(q, k, v))
    assert recorder.keys is k
    assert recorder.values is v
