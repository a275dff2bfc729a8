import json
import re
import shlex
import struct

import av
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from test_generation import GUIDED, tiny_bundle

from grn.media import pictures
from grn.media.images import center_crop, resize_and_crop, to_tensor
from grn.media.video import probe_video
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.networks.captioned_refiner import CaptionedRefiner
from grn.networks.text_encoder import ByteT5
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.sampling import films
from grn.sampling import sample as command
from grn.sampling.start_clip import start_from
from grn.sampling.text_bundle import TextRefinerBundle


def test_samples_are_written_in_their_order(tmp_path, monkeypatch):
    """Whatever the order in which they are done."""
    monkeypatch.setattr(command, "load_refiner", lambda *_, **__: (tiny_bundle(GUIDED), {"ckpt": "x", "step": 1}))
    reports = []
    for batch_size in (12, 5):
        out = tmp_path / str(batch_size)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            overrides = ["ckpt=x", "num=12", "device=cpu", "images=true", f"batch_size={batch_size}", f"out={out}"]
            command.sample(compose("sample", overrides))
        reports.append(json.loads((out / "samples.json").read_text()) | {"seconds": 0})
    assert reports[0] == reports[1]
    assert reports[0]["steps"] != sorted(reports[0]["steps"])
    for steps, trace, last, decision in zip(
        *(reports[0][key] for key in ("steps", "entropy_trace", "entropy", "entropy_at_decision"))
    ):
        assert (len(trace), trace[-1], trace[GUIDED.schedule.warmup]) == (steps, last, decision)
    for name in ("samples.png", "sorted.png", *(f"images/{i:05d}-{i % 5}.png" for i in range(12))):
        assert (tmp_path / "12" / name).read_bytes() == (tmp_path / "5" / name).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["num=abc"], "^num=abc must be a whole number, at least 1"),
        (["num=0"], "^num=0 must be a whole number"),
        (["batch_size=0"], "^batch_size=0 must be a whole number, at least 1"),
        (["batch_size=2.5"], r"^batch_size=2\.5 must be a whole number"),
        (["columns=abc"], "^columns=abc must be a whole number"),
        (["seed=abc"], "^seed=abc: a whole number"),
        (["labels=9"], r"^labels=\[9\]: labels of this checkpoint"),
        (["init=5"], "^init: the path of an image, .* not int"),
        (["init=true"], "^init: the path of an image, .* not bool"),
        (["init={a:1}"], "^init: the path of an image, .* not dict"),
        (["init=[a.png,a.png]"], "^init: several pictures are for clips"),
        (["init=a.png", "mask=[a.png]"], "^mask: the path of an image, .* not list"),
    ],
)
def test_mistakes_take_one_line(tmp_path, monkeypatch, overrides, complaint):
    monkeypatch.setattr(command, "load_refiner", lambda *_, **__: (tiny_bundle(GUIDED), {"ckpt": "x", "step": 1}))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("a.png")
    with pytest.raises(UserError, match=complaint) as error:
        run(tmp_path, *overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def text_module():
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2, 2), blocks_per_stage=1,
        temporal=(True, True),
    )  # fmt: skip
    refiner = TextRefiner(
        channels=3, classes=4, depth=1, width=24, heads=2, attention="one_way", mlp_ratio=11, text_width=16, max_text=32
    )
    encoder = ByteT5(width=16, depth=1, heads=2, hidden=16, max_length=32)
    sampler = Sampler(Linear(2))
    network, asked = CaptionedRefiner(refiner, encoder), ["a five falling", "a three rising"]
    return TextRefinerBundle(network, tokenizer, sampler, labeling="ind", prompts=asked, size=(16, 16)).eval()


def run(tmp_path, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        command.sample(compose("sample", ["ckpt=x", "device=cpu", f"out={tmp_path / 'out'}", *overrides]))
    return tmp_path / "out"


@pytest.fixture
def clips(monkeypatch):
    bundle = text_module()
    monkeypatch.setattr(command, "load_refiner", lambda *_, **__: (bundle, {"ckpt": "x", "step": 1}))
    return bundle


def of_frames(frames):
    """The tokens' shape of such clips of 16x16."""
    return 3, 1 + (frames - 1) // 4, 2, 2


def decoded(path):
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def test_clips_are_written_as_mp4(clips, tmp_path):
    out = run(tmp_path, "num=3", "frames=9", "fps=8", "batch_size=2")
    assert sorted(path.name for path in (out / "videos").iterdir()) == ["00000.mp4", "00001.mp4", "00002.mp4"]
    info = probe_video((out / "videos" / "00001.mp4").read_bytes(), "mp4")
    assert (info.width, info.height, info.fps, info.codec) == (16, 16, 8.0, "h264")
    assert len(decoded(out / "videos" / "00000.mp4")) == 9
    assert Image.open(out / "samples.png").size[0] > 16
    with Image.open(out / "refinement.gif") as film:
        assert film.n_frames == 3  # noise, and two steps
    assert json.loads((out / "samples.json").read_text())["prompts"] == clips.prompts + clips.prompts[:1]


def test_a_first_frame_stays(clips, tmp_path):
    """Its latent is the same in every sample; the others are drawn."""
    Image.linear_gradient("L").convert("RGB").resize((40, 40)).save(tmp_path / "frame.png")
    watched = []
    clips.generate_queue = lambda *args, original=clips.generate_queue, **kwargs: (
        watched.append((rows, refined)) or (rows, refined) for rows, refined in original(*args, **kwargs)
    )
    run(tmp_path, "num=4", "frames=9", f"init={tmp_path / 'frame.png'}", "film=false")
    ((_, refined),) = watched
    pixels = to_tensor(center_crop(Image.open(tmp_path / "frame.png"), 16))
    given = clips.tokenize(pixels[None])[0]
    assert torch.equal(refined.tokens[:, :, :1], given.expand(4, -1, -1, -1, -1))
    assert not torch.equal(refined.tokens[0, :, 1:], refined.tokens[2, :, 1:])


def test_pictures_of_a_list_are_what_clips_go_on_from(clips, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    out = run(tmp_path, "num=1", "frames=9", f"init=[{tmp_path}/a.png,{tmp_path}/a.png]", "film=false")
    assert json.loads((out / "samples.json").read_text())["init"] == [f"{tmp_path}/a.png"] * 2


@pytest.mark.parametrize(
    ("fps", "asked", "times"), [(24, 5, range(43, 48)), (24, None, range(43, 48)), (12, 5, range(38, 48, 2))]
)
def test_a_clip_goes_on_from_the_end_of_another(clips, moving_digits, tmp_path, fps, asked, times):
    source = moving_digits(tmp_path / "videos", 1) / "000.mp4"  # 48 frames, 24 a second
    clips.context_latents = 2
    start = start_from(clips, source, shape=of_frames(13), frames=asked, fps=fps)
    with av.open(str(source)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    pixels = torch.cat([to_tensor(resize_and_crop(frames[time], 16, 16)) for time in times], dim=1)
    given = clips.tokenize(pixels[None])[0]
    assert torch.equal(start.tokens[0, :, :2], given)
    assert start.redraw[0, 0, :, 0, 0].tolist() == [False, False, True, True]


def test_the_report_tells_what_a_clip_went_on_from(clips, moving_digits, tmp_path):
    source = moving_digits(tmp_path / "videos", 1) / "000.mp4"
    clips.context_latents = 2
    asked = {"frames": 13, "fps": 12, "height": 24, "width": 16, "negative_prompt": "a six"}
    overrides = [f"{key}={value}" for key, value in asked.items()]
    report = json.loads((run(tmp_path, "num=1", *overrides, f"init={source}") / "samples.json").read_text())
    assert {key: report[key] for key in asked} == asked
    assert (report["init"], report["init_frames"]) == (str(source), 5)
    report = json.loads((run(tmp_path, "num=1", *overrides[:2]) / "samples.json").read_text())
    assert (report["frames"], report["fps"], report["init"], report["init_frames"]) == (13, 12, None, None)
    report = json.loads((run(tmp_path, "num=1", "frames=1") / "samples.json").read_text())
    assert (report["frames"], report["fps"], report["init_frames"]) == (1, None, None)


def test_pictures_of_clips_that_go_on_show_what_was_drawn(clips, tmp_path, monkeypatch):
    """The last frames; the film those of the first latents that are drawn."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "frame.png")
    shown, streams = [], []
    monkeypatch.setattr(pictures, "sorted_grid", lambda images, *_: shown.append(images) or pictures.grid(images))
    clips.decode_stream = lambda tokens, decode=clips.decode_stream: (
        streams.append([tokens.shape[2], *decode(tokens)]) or streams[-1][1:]
    )
    for init, place, of_film in (("null", 0, 1), (tmp_path / "frame.png", 12, 2)):
        streams.clear()
        run(tmp_path, "num=2", "frames=13", f"init={init}")
        started = [] if init == "null" else [1]  # start.png
        # Two clips; noise and two steps.
        assert [latents for latents, *_ in streams] == [4, 4, *started, of_film, of_film, of_film]
        assert torch.equal(shown.pop(), torch.cat([frames[place] for _, *frames in streams[:2]]))


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_of_a_long_clip_no_more_than_its_end_is_read(clips, moving_digits, tmp_path, suffix):
    """A file of nearly a gibibyte, most of it a hole before the media data."""
    data, size = bytearray((moving_digits(tmp_path / "videos", 1) / "000.mp4").read_bytes()), 900 * 2**20
    (tmp_path / "short.mp4").write_bytes(data)
    chunks, media = data.index(b"stco") + 8, data.index(b"mdat") - 4  # of an index behind the media data
    count, offset = struct.unpack_from(">II", data, chunks)
    assert count == 1
    struct.pack_into(">II", data, chunks, 1, offset + size)
    with open(tmp_path / f"long.{suffix}", "wb") as file:
        file.write(data[:media] + struct.pack(">I4s", size, b"mdat"))
        file.seek(media + size)
        file.write(data[media:])
    clips.context_latents = 2
    long, short = (
        start_from(clips, tmp_path / name, shape=of_frames(13), fps=24) for name in (f"long.{suffix}", "short.mp4")
    )
    assert torch.equal(long.tokens, short.tokens)


def test_an_anamorphic_clip_is_seen_as_players_show_it(clips, tmp_path):
    picture, seen = Image.linear_gradient("L").rotate(90).convert("RGB"), []
    clips.tokenize = lambda pixels, tokenize=clips.tokenize: seen.append(pixels[0]) or tokenize(pixels)
    for width, aspect in ((64, None), (32, 2)):
        path = tmp_path / f"{width}.mp4"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=16, options={"qp": "1"})
            stream.width, stream.height, stream.pix_fmt = width, 32, "yuv444p"
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            for _ in range(6):
                file.mux(stream.encode(av.VideoFrame.from_image(picture.resize((width, 32)))))
            file.mux(stream.encode())
        start_from(clips, path, shape=of_frames(9))
    plain, squeezed = (pixels.float() for pixels in seen)
    assert (plain - squeezed).abs().max() < 8
    assert plain.std() > 30  # the middle half of the gradient


@pytest.mark.parametrize("fps", [0, -8, "a", float("nan"), float("inf")])
def test_a_wrong_rate_is_not_the_fault_of_the_file(clips, moving_digits, tmp_path, fps):
    source = moving_digits(tmp_path / "videos", 1) / "000.mp4"
    for init in (source, None):
        with pytest.raises(UserError, match=r"^fps=.*: frames a second"):
            start_from(clips, init, shape=of_frames(9), fps=fps)


def test_going_on_where_training_did_not_is_warned_of(clips, caplog):
    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue", "black", "white", "red")]
    start_from(clips, pictures, shape=of_frames(9), frames=5)
    assert "training gave 0 (training.context_latents)" in caplog.text
    caplog.clear()
    clips.context_latents = 2
    start = start_from(clips, pictures[:3], shape=of_frames(17))  # of three, the last one
    assert start.redraw[0, 0, :, 0, 0].tolist() == [False, True, True, True, True]
    assert not caplog.text


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["frames=8"], r"8 frames are not 1 \+ 4\*k"),
        (["frames=abc"], "frames=abc: a whole number"),
        (["height=abc"], "^height=abc: a whole number of pixels"),
        (["height=[8]"], r"^height=\[8\]: a whole number of pixels"),
        (["width=16.0"], r"^width=16\.0: a whole number of pixels"),
        (["prompts=5"], "^prompts=5: a list of texts"),
        (["batch_size=0"], "^batch_size=0 must be a whole number, at least 1"),
        (["frames=9", "init=5"], "^init: the path of an image, .* not int"),
        (["frames=9", "init={a:1}"], "^init: the path of an image, .* not dict"),
        (["frames=1", "init=[frame.png,frame.png]"], "^init: several pictures are for clips"),
        (["frames=9", "fps=0"], "fps=0: frames a second"),
        (["frames=9", "fps=0.0001"], r"^fps=0\.0001: frames a second"),
        (["frames=9", "fps=abc"], "^fps=abc: frames a second"),
        (["frames=9", "init=frame.png", "strength=0.5"], r"strength=0\.5: clips go on from init as it is"),
        (["frames=9", "init=frame.png", "init_frames=4"], r"init_frames=4 must be 1 \+ 4\*k"),
        (["frames=9", "init=frame.png", "init_frames=5"], "init has 1 frames"),
        (["frames=9", "init=frame.png", "init_frames=9"], "init_frames=9 leaves nothing to draw of frames=9"),
        (["frames=1", "init=frame.png", "init_frames=1"], "init_frames=1 is of clips"),
        (["frames=9", "init=nothing.mp4"], "init=nothing.mp4: there is no such file"),
        (["frames=9", "init=a.svg"], "^init=a.svg: give one of png, jpg, jpeg, webp, .*mp4"),
        (["frames=1", "init=a.svg"], "^init=a.svg: give one of png, jpg, jpeg, webp, "),
        (["frames=9", "init=no_clip.mp4"], "init=no_clip.mp4: "),
        (["frames=99999997"], "are more than a text refiner's"),
    ],
)
def test_mistakes_about_clips(clips, tmp_path, monkeypatch, overrides, complaint):
    Image.new("RGB", (16, 16)).save(tmp_path / "frame.png")
    (tmp_path / "a.svg").write_bytes(b"GIF89a")
    (tmp_path / "no_clip.mp4").write_bytes(b"ftyp" * 100)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        run(tmp_path, "num=1", *overrides)


@pytest.mark.parametrize("sampler", [GUIDED, Sampler(Linear(3))], ids=["entropy", "linear"])
def test_samples_are_sorted_by_entropy_and_states_stand_beside_the_film(tmp_path, monkeypatch, sampler):
    monkeypatch.setattr(command, "load_refiner", lambda *_, **__: (tiny_bundle(sampler), {"ckpt": "x", "step": 1}))
    given = {}
    monkeypatch.setattr(
        pictures,
        "sorted_grid",
        lambda images, difficulty, steps, columns: (
            given.update(difficulty=difficulty.tolist(), steps=steps.tolist()) or pictures.grid(images, columns)
        ),
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        command.sample(compose("sample", ["ckpt=x", "num=12", "device=cpu", "film_states=true", f"out={tmp_path}"]))
    report = json.loads((tmp_path / "samples.json").read_text())
    expected = report["entropy_at_decision"]
    if sampler is not GUIDED:  # the entropy of whose first step says little
        expected = [sum(trace) / len(trace) for trace in report["entropy_trace"]]
    assert given == {"difficulty": pytest.approx(expected, abs=2e-5), "steps": report["steps"]}
    film = Image.open(tmp_path / "refinement.gif")
    assert film.n_frames == max(report["steps"]) + 1  # it begins with noise
    width, height = (pictures.scale_for(16) * n for n in (5 * (2 * 16 + 2) + 2, 3 * (16 + 2) + 2))
    assert film.size == (width, height + films.FILM_CAPTION)


def test_a_page_says_what_draws_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_refiner", lambda *_, **__: (tiny_bundle(GUIDED), {"ckpt": "x", "step": 1}))
    asked = ["ckpt=x", "num=3", "seed=4", "labels=[2,0]", "device=cpu", "bf16=true", "ema=none", "film=false"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        command.sample(compose("sample", [*asked, "html=true", f"out={tmp_path}"]))
        page = (tmp_path / "refinement.html").read_text()
        facts = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["facts"]
        _, _, *shown = shlex.split(facts["command"])
        command.sample(compose("sample", [*shown, "device=cpu", f"out={tmp_path / 'again'}"]))
    first, again = (json.loads((folder / "samples.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert first | {"seconds": 0} == again | {"seconds": 0}
    assert {"bf16=True", "ema=none", "labels=[2,0]"} <= set(shown)


def test_prompts_as_people_give_them(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa seven\r\n\n a one \n")
    assert command.read_prompts(str(path)) == ["a seven", "a one"]
    assert command.read_prompts(["a seven", 3]) == ["a seven", "3"]
    for odd in (5, {"a": 1}, True):
        with pytest.raises(UserError, match=r"^prompts=.*: a list of texts, prompts=\[\.\.\.\], or a text file"):
            command.read_prompts(odd)
