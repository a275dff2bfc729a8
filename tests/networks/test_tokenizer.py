import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from grn.checkpoints.official_tokenizer import TOKENIZER_RULES
from grn.method import hbq
from grn.networks.tokenizer import (
    CausalConv3d,
    EncoderStage,
    FrameAttention,
    HBQTokenizer,
    RMSNorm,
    Upsample,
    for_inference,
)
from grn.runtime.errors import UserError
from grn.weights.mapping import load_strict, rename

CLIPS = [1, 5, 9, 17]


def tiny(**sizes):
    torch.manual_seed(0)
    defaults = {"latent_channels": 3, "dim": 8, "decoder_dim": 8, "multipliers": (1, 2, 2), "temporal": (False, True)}
    return HBQTokenizer(**defaults | {"blocks_per_stage": 1} | sizes)


@pytest.fixture(scope="module")
def reference(golden, golden_meta):
    """The golden file, and a tokenizer with its weights."""
    tensors, sizes = golden("tokenizer"), golden_meta["tokenizer"]
    network = HBQTokenizer(
        latent_channels=sizes["latent_channels"],
        dim=sizes["dim"],
        decoder_dim=sizes["dec_dim"],
        multipliers=sizes["dim_mult"],
        blocks_per_stage=sizes["num_res_blocks"],
        temporal=sizes["temperal_downsample"],
    )
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    load_strict(network, rename(state, TOKENIZER_RULES), source="tests/golden/tokenizer.safetensors")
    return tensors, network.eval()


@pytest.mark.parametrize("frames", CLIPS)
@torch.no_grad()
def test_encode_equals_reference(reference, frames):
    tensors, network = reference
    features = network.encode(tensors[f"T{frames}.video"])
    torch.testing.assert_close(features, tensors[f"T{frames}.features"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("frames", CLIPS)
@torch.no_grad()
def test_decode_equals_reference(reference, frames):
    tensors, network = reference
    video = network.decode(tensors[f"T{frames}.features"])
    torch.testing.assert_close(video, tensors[f"T{frames}.decoded"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("frames", CLIPS)
def test_streaming_equals_reference(reference, frames):
    tensors, network = reference
    video, features = tensors[f"T{frames}.video"], tensors[f"T{frames}.features"]
    encoded = list(network.encode_stream(video.unbind(2)))
    torch.testing.assert_close(torch.stack(encoded, dim=2), features, atol=1e-4, rtol=0)
    decoded = list(network.decode_stream(features.unbind(2)))
    torch.testing.assert_close(torch.stack(decoded, dim=2), tensors[f"T{frames}.decoded"], atol=1e-4, rtol=0)


def test_streaming_yields_as_soon_as_it_can():
    network, pulled = tiny().eval(), []

    def frames():
        for i in range(5):
            pulled.append(i)
            yield torch.zeros(1, 3, 8, 8)

    assert [len(pulled) for _ in network.decode_stream(network.encode_stream(frames()))] == [1, 3, 3, 5, 5]


@pytest.mark.parametrize("temporal", [(False, False), (True, False), (False, True), (True, True)])
@torch.no_grad()
def test_whole_clip_and_stream_agree_for_any_temporal_stride(temporal):
    network = tiny(temporal=temporal).eval()
    video = torch.rand(1, 3, 1 + 3 * network.temporal_stride, 8, 16) * 2 - 1
    features = network.encode(video)
    assert features.shape == (1, 3, 4, 1, 2)
    streamed = torch.stack(list(network.encode_stream(video.unbind(2))), dim=2)
    torch.testing.assert_close(streamed, features, atol=1e-5, rtol=0)
    decoded = network.decode(features)
    assert decoded.shape == video.shape
    streamed = torch.stack(list(network.decode_stream(features.unbind(2))), dim=2)
    torch.testing.assert_close(streamed, decoded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("multipliers", "temporal", "stride", "temporal_stride"),
    [((1, 2), (False,), 4, 1), ((1, 2), [True], 4, 2), ((1, 2, 4, 4), (False, True, True), 16, 4)],
)
@torch.no_grad()
def test_strides(multipliers, temporal, stride, temporal_stride):
    network = tiny(multipliers=multipliers, temporal=temporal)
    assert (network.stride, network.temporal_stride) == (stride, temporal_stride)
    video = torch.rand(2, 3, 1 + temporal_stride, stride, 2 * stride) * 2 - 1
    reconstruction, features = network(video)
    assert reconstruction.shape == video.shape
    assert features.shape == (2, 3, 2, 1, 2)
    assert features.abs().max() <= 1


@torch.no_grad()
def test_the_past_does_not_see_the_future(reference):
    tensors, network = reference
    video = tensors["T9.video"]
    changed = video.clone()
    changed[:, :, 5:] = changed[:, :, 5:].flip(0) + 0.1
    before, after = network.encode(video), network.encode(changed)
    torch.testing.assert_close(after[:, :, :2], before[:, :, :2], atol=1e-6, rtol=0)
    assert (after[:, :, 2] - before[:, :, 2]).abs().max() > 1e-3
    features = before.clone()
    features[:, :, 2] = -features[:, :, 2]
    past, changed = network.decode(before), network.decode(features)
    torch.testing.assert_close(changed[:, :, :5], past[:, :, :5], atol=1e-6, rtol=0)
    assert (changed[:, :, 5:] - past[:, :, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", [1, 3, (3, 1, 1)])
def test_one_frame_is_the_3d_convolution_of_a_padded_clip(kernel):
    torch.manual_seed(0)
    conv = CausalConv3d(4, 6, kernel)
    x = torch.randn(2, 4, 1, 5, 7, requires_grad=True)
    context = conv.kernel_size[0] - 1
    padded = F.pad(x, (0, 0, 0, 0, context, 0))
    in_3d = F.conv3d(padded, conv.weight, conv.bias, padding=conv.padding)
    torch.testing.assert_close(conv(x), in_3d)
    gradients = [torch.autograd.grad(out.square().sum(), (x, conv.weight)) for out in (conv(x), in_3d)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_gradients_pass_through_the_quantizer():
    network = tiny()
    torch.nn.init.normal_(
        network.encoder.middle.attention.out.weight, std=0.1
    )  # zero at first: nothing behind it learns
    torch.nn.init.normal_(network.decoder.middle.attention.out.weight, std=0.1)
    video = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    reconstruction, features = network(video)
    torch.testing.assert_close(reconstruction, network.decode(hbq.quantize(features.detach(), network.rounds)))
    reconstruction.square().mean().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


@pytest.mark.parametrize("labeling", ["ind", "bit"])
@torch.no_grad()
def test_tokens_stand_for_the_quantized_features(labeling):
    network = tiny(rounds=3).eval()
    video = torch.rand(2, 3, 3, 8, 16) * 2 - 1
    tokens = network.tokenize(video, labeling)
    channels, classes = hbq.num_tokens(network.latent_channels, network.rounds, labeling)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, channels, 2, 1, 2)
    assert 0 <= tokens.min() <= tokens.max() < classes
    torch.testing.assert_close(network.detokenize(tokens, labeling), network(video)[0])


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((1, 3, 1, 30, 32), "height 30 .* stride 8; the nearest is 32"),
        ((1, 3, 1, 32, 33), "width 33 .* the nearest is 32"),
        ((1, 3, 1, 3, 32), "height 3 .* the nearest is 8"),
        ((1, 3, 4, 8, 8), r"4 frames are not 1 \+ 2\*k.* the nearest is 5"),
        ((1, 3, 0, 8, 8), "0 frames .* the nearest is 1"),
        ((1, 1, 1, 8, 8), r"video must be \[B, 3, T, H, W\]"),
        ((1, 3, 8, 8), r"an image is T = 1"),
    ],
)
def test_bad_sizes_name_the_nearest_good_one(shape, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        tiny().encode(torch.zeros(shape))
    assert "\n" not in str(error.value)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 100), frames=st.integers(1, 100))
def test_the_size_proposed_is_valid_and_no_other_is_nearer(size, frames):
    network = tiny(multipliers=(1, 1, 1, 1), temporal=(False, True, True), dim=1, decoder_dim=1)
    for value, check, step, offset in (
        (size, lambda n: network.check_video((1, 3, 1, n, 16)), 16, 0),
        (frames, network._check_frames, 4, 1),
    ):
        try:
            check(value)
            assert (value - offset) % step == 0
        except UserError as error:
            proposed = int(str(error).split()[-1])
            check(proposed)
            assert abs(proposed - value) <= step // 2 or proposed == step + offset * (1 - step)


def test_streams_complain_too():
    network = tiny(temporal=(True, True)).eval()
    with pytest.raises(UserError, match=r"4 frames are not 1 \+ 4\*k"):
        list(network.encode_stream(torch.zeros(4, 1, 3, 8, 8)))
    with pytest.raises(UserError, match="height 9"):
        list(network.encode_stream(torch.zeros(1, 1, 3, 9, 8)))


def test_decoding_another_number_of_channels():
    with pytest.raises(UserError, match=r"features must be \[B, 3, T, H, W\], got \[1, 12, 1, 2, 2\]"):
        tiny().decode(torch.zeros(1, 12, 1, 2, 2))


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"multipliers": (1,), "temporal": ()}, "two stages or more"),
        ({"temporal": (False, True, True)}, "one entry less"),
        ({"multipliers": (1, 0, 1)}, "multipliers=0 must be a whole number"),
        ({"multipliers": ()}, "multipliers=.* must be a whole number"),
        ({"multipliers": (1, 3, 3)}, "encoder stage cannot go from 8 to 24 channels"),
        ({"multipliers": (1, 1, 8), "temporal": (False, False)}, "decoder stage cannot go from 64 to 8 channels"),
        ({"rounds": 9}, r"rounds=9 must be a whole number, 1 to 8"),
        ({"dim": 0}, "dim=.* must be a whole number"),
        ({"latent_channels": 0}, "latent_channels=.* must be a whole number"),
        ({"blocks_per_stage": 0}, "blocks_per_stage=.* must be a whole number"),
        ({"dropout": 1.0}, r"dropout .* \[0, 1\)"),
    ],
)
def test_sizes_that_do_not_fit(sizes, complaint):
    with pytest.raises(UserError, match=complaint):
        tiny(**sizes)


def test_full_size_on_the_meta_device():
    with torch.device("meta"):
        network = HBQTokenizer()
        reconstruction, features = network(torch.empty(1, 3, 5, 256, 256))
    assert sum(p.numel() for p in network.parameters()) == 702_687_612
    assert sum(p.numel() for p in network.encoder.parameters()) == 148_522_848
    assert features.shape == (1, 16, 2, 16, 16)
    assert reconstruction.shape == (1, 3, 5, 256, 256)
    with torch.device("meta"):
        joint = HBQTokenizer(latent_channels=64)
    assert sum(p.numel() for p in joint.parameters()) == 705_693_036


def test_bfloat16_autocast_keeps_features_in_float32(reference):
    tensors, network = reference
    video = tensors["T5.video"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        reconstruction, features = network(video)
    assert (features.dtype, reconstruction.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(features, tensors["T5.features"], atol=0.05, rtol=0)


@torch.no_grad()
def test_bfloat16_weights():
    network = tiny().to(torch.bfloat16)
    reconstruction, features = network(torch.rand(1, 3, 3, 8, 8) * 2 - 1)
    assert (features.dtype, reconstruction.dtype) == (torch.float32, torch.bfloat16)
    assert reconstruction.isfinite().all()


@pytest.mark.parametrize("frames", [pytest.param(1, marks=pytest.mark.full), 3])
def test_traces_into_one_graph(frames):
    network = tiny(multipliers=(1, 2), temporal=(True,)).eval()
    video = torch.rand(1, 3, frames, 4, 4) * 2 - 1
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(video), network(video))


def test_rms_norm_computes_in_float32():
    norm = RMSNorm(64)
    torch.nn.init.uniform_(norm.gamma, 0.5, 1.5)
    x = torch.randn(2, 64, 3, 4, 4) * 1e3
    expected = x / x.square().mean(dim=1, keepdim=True).sqrt() * norm.gamma.view(-1, 1, 1, 1)
    torch.testing.assert_close(norm(x), expected)
    x = x.bfloat16()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), atol=0, rtol=0)
    assert not norm(torch.zeros(1, 64, 2, 2)).any()


def test_attention_starts_as_identity_and_stays_within_a_frame():
    torch.manual_seed(0)
    attention = FrameAttention(8)
    x = torch.randn(2, 8, 3, 4, 4)
    assert torch.equal(attention(x), x)
    torch.nn.init.normal_(attention.out.weight)
    changed = x.clone()
    changed[:, :, 1, 0, 0] += 1
    moved = (attention(changed) - attention(x)).abs().amax(dim=(0, 1, 3, 4))
    assert moved[1] > 0
    assert moved[0] == moved[2] == 0


@pytest.mark.parametrize(("width", "has_shortcut"), [(8, True), (4, False)])
def test_last_encoder_stage_adds_its_input_where_widths_agree(width, has_shortcut):
    stage = EncoderStage(width, 8, 1, None, 0.0)
    block = stage.blocks[0]
    x = torch.randn(1, width, 1, 4, 4)
    torch.testing.assert_close(stage(x), block(x) + x if has_shortcut else block(x))


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        ((1, 1, 1), (1, 8, 8)),
        ((1, 8, 16), (1, 8, 16)),
        ((4, 9, 7), (5, 16, 8)),
        ((2, 8, 17), (5, 8, 24)),
        ((6, 15, 8), (9, 16, 8)),
        ((9, 8, 8), (9, 8, 8)),
    ],
)
@torch.no_grad()
def test_padding_repeats_the_last_frame_row_and_column(size, padded):
    network = tiny(temporal=(True, True)).eval()
    assert network.padded_size(size) == padded
    video = torch.rand(2, 3, *size) * 2 - 1
    extra = [b - a for a, b in zip(size, padded)]
    by_hand = F.pad(video, (0, extra[2], 0, extra[1], 0, extra[0]), mode="replicate")
    features = network.encode(video, pad=True)
    assert torch.equal(features, network.encode(by_hand))
    frames, height, width = size
    cropped = network.decode(features)[:, :, :frames, :height, :width]
    assert torch.equal(network.decode(features, size=size), cropped)
    reconstruction, same = network(video, pad=True)
    assert reconstruction.shape == video.shape
    assert torch.equal(same, features)
    tokens = network.tokenize(video, "bit", pad=True)
    assert torch.equal(tokens, network.tokenize(by_hand, "bit"))
    assert torch.equal(network.detokenize(tokens, "bit", size=size), reconstruction)


@torch.no_grad()
def test_padding_a_valid_size_changes_nothing():
    network = tiny().eval()
    video = torch.rand(1, 3, 3, 8, 16) * 2 - 1
    for plain, padded in zip(network(video), network(video, pad=True)):
        assert torch.equal(plain, padded)


def test_padding_has_a_gradient():
    video = (torch.rand(1, 3, 2, 5, 9) * 2 - 1).requires_grad_()
    tiny()(video, pad=True)[0].square().mean().backward()
    assert (video.grad != 0).all()


@settings(max_examples=100, deadline=None)
@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200)))
def test_the_padded_size_is_valid_and_the_least(size):
    with torch.device("meta"):
        network = tiny(multipliers=(1, 1, 1, 1), temporal=(False, True, True), dim=1, decoder_dim=1)
    padded = network.padded_size(size)
    network.check_video((1, 3, *padded))
    assert all(0 <= b - a < step for a, b, step in zip(size, padded, (4, 16, 16)))


def test_what_padding_cannot_mend():
    network = tiny()
    for shape, complaint in (
        ((1, 3, 0, 8, 8), "0 frames"),
        ((1, 3, 1, 0, 8), "height 0"),
        ((1, 3, 8, 8), "video must be"),
        ((1, 1, 1, 8, 8), "video must be"),
    ):
        with pytest.raises(UserError, match=complaint):
            network.encode(torch.zeros(shape), pad=True)


@pytest.mark.parametrize("size", [(1, 8, 8), (4, 8, 8), (3, 16, 17), (3, 0, 16), (3, 8, 16), (-1, 16, 16)])
def test_a_size_of_another_video(size):
    network = tiny()
    with pytest.raises(UserError, match=r"is not of the video of these features, which has \(3, 16, 16\) when padded"):
        network.decode(torch.zeros(1, 3, 2, 2, 2), size=size)


def test_upsampling_is_a_convolution_of_the_doubled_frames():
    torch.manual_seed(0)
    upsample = Upsample(5, temporal=False)
    x = torch.randn(2, 5, 3, 4, 7, requires_grad=True)
    doubled = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2, mode="nearest-exact")
    expected = upsample.space(doubled).unflatten(0, (2, 3)).transpose(1, 2)
    torch.testing.assert_close(upsample(x), expected)
    inputs = (x, upsample.space.weight, upsample.space.bias)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (upsample(x), expected))
    for gradient, reference in zip(ours, theirs):
        torch.testing.assert_close(gradient, reference, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("frames", [1, 5, 9])
@torch.no_grad()
def test_channels_stay_last_in_memory(frames, streamed):
    """Where they would not, convolutions and norms would still be right, and slower by a copy each."""
    network, reordered = tiny(temporal=(True, True)).eval(), []

    def check(module, arguments, output):
        wanted = torch.channels_last_3d if output.ndim == 5 else torch.channels_last
        if isinstance(module, torch.nn.Conv3d):  # a CPU's own choice: for small inputs it takes kernels without
            return output.contiguous(memory_format=wanted)
        if not output.is_contiguous(memory_format=wanted):
            reordered.append(names[module])
        return output

    names = {module: name for part in (network.encoder, network.decoder) for name, module in part.named_modules()}
    for module, name in names.items():
        if name and not isinstance(module, torch.nn.ModuleList):
            module.register_forward_hook(check)
    video = torch.rand(2, 3, frames, 16, 24) * 2 - 1
    if streamed:
        list(network.decode_stream(network.encode_stream(video.unbind(2))))
    else:
        network(video)
    assert reordered == []


def test_for_inference():
    network = tiny()
    video = torch.rand(1, 3, 3, 8, 8) * 2 - 1
    expected = network.encode(video).detach()
    assert for_inference(network) is network
    assert not network.training
    assert network.encode(video).requires_grad is False
    torch.testing.assert_close(network.encode(video), expected)
    for_inference(network, dtype=torch.bfloat16, compile=True)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    with torch.compiler.set_stance("force_eager"):  # the compiler itself takes minutes
        reconstruction, features = network(video)
    assert (features.dtype, reconstruction.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(features, expected, atol=0.05, rtol=0)
    assert network.state_dict().keys() == tiny().state_dict().keys()
