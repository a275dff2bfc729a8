"""Text, paths and URLs on the command line arrive as they were typed."""

import inspect
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class, get_method
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from grn.cli.entry import entry_point
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.runtime.overrides import kind, literal


def read(argument):
    """The value that Hydra and OmegaConf make of an argument."""
    (given,) = literal([argument])
    parsed = OverridesParser.create().parse_override(given)
    assert not parsed.is_sweep_override()
    return OmegaConf.to_container(OmegaConf.create({"value": parsed.value()}), resolve=True)["value"]


def points(argument):
    """The same, of each point of a sweep."""
    (given,) = literal([argument], sweep=True)
    parsed = OverridesParser.create().parse_override(given)
    values = parsed.sweep_string_iterator() if parsed.is_sweep_override() else [parsed.get_value_element_as_str()]
    return [read(f"{parsed.get_key_element()}={value}") for value in values]


@pytest.mark.parametrize(
    "typed",
    [
        "cc12m-{00000..01242}.tar",
        "pipe:aws s3 cp s3://bucket/train-{000..255}.tar -",
        "runs/x/checkpoints/epoch=3-step=100.ckpt",
        "https://host/a.tar?sig=1&x=2,3",
        "données/digits",
        "一只猫",
        "a 'b' \"c\" (d) [e] {f} \\ g: h; #i $j 100% ~k",
        "'a",
        "\\",
        "a\\'",
        "  two  spaces  ",
        "2024",
        "1e-3",
        "true",
        "{a,b}.tar",
        "[a]b",
        "x,y",
        "a\nb",
    ],
)
@pytest.mark.parametrize(
    "key",
    ["data.train", "++data.parts.a.val", "ckpt_path", "out", "negative_prompt", "tokenizer.ckpt", "name"],
)
def test_a_value_as_it_stands(key, typed):
    assert read(f"{key}={typed}") == typed


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")))
def test_any_text(typed):
    quoted = len(typed.strip()) > 1 and typed.strip()[0] == typed.strip()[-1] and typed.strip()[0] in "'\""
    is_list = typed.startswith("[") and typed.endswith("]")
    if typed not in ("", "null") and not quoted and not is_list:
        assert read(f"negative_prompt={typed}") == typed
        if "${" not in typed:  # paths may refer to other keys
            assert read(f"data.root={typed}") == typed
        assert literal(literal([f"prompts=[a {typed}]"])) == literal([f"prompts=[a {typed}]"])


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("prompts=[a red car, sunny day]", ["a red car, sunny day"]),  # what a shell leaves of prompts=["..."]
        ("prompts=[a,b]", ["a", "b"]),
        ("prompts=[a cat,a dog, asleep]", ["a cat", "a dog, asleep"]),
        ('prompts=["a red car, sunny day","b"]', ["a red car, sunny day", "b"]),
        ('prompts=["a, b", "c"]', ["a, b", "c"]),
        ("prompts=['a']", ["a"]),
        ("prompts=[a cat's eye]", ["a cat's eye"]),
        ('prompts=["x" and "y"]', ['"x" and "y"']),
        ('prompts=[he said: "hi", twice]', ['he said: "hi", twice']),
        ("prompts=[3,null,true]", ["3", "null", "true"]),
        ("prompts=[price: ${x}]", ["price: ${x}"]),
        ("prompts=[]", []),
        ("prompts=null", None),
        ("negative_prompt=", ""),
        ("negative_prompt='it is'", "it is"),
        ("data.train=[a.tar, b-{0,1}.tar,https://c/d?e=f]", ["a.tar", "b-{0,1}.tar", "https://c/d?e=f"]),
        ('data.train="a,b"', "a,b"),
        ("source.val=1000", 1000),
        ("source.val=a=b.jsonl", "a=b.jsonl"),
        ("data.pixels={0.25M:1,1M:3}", {"0.25M": 1, "1M": 3}),
        ("data.weights={images:0.5,clips:0.5}", {"images": 0.5, "clips": 0.5}),
        ("model.depth=3", 3),
        ("training.betas=[0.9,0.95]", [0.9, 0.95]),
    ],
)
def test_lists_and_what_hydra_reads(typed, expected):
    assert read(typed) == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("data.root=a,b=c", ["a", "b=c"]),
        ("prompts=[a, b],[c]", [["a, b"], ["c"]]),
        ("data.train=x-{0,1}.tar,y", ["x-{0,1}.tar", "y"]),
        ('data.train="x,y"', ["x,y"]),
        ("negative_prompt=a, b,c", ["a, b", "c"]),
        ("data.root=choice(a,b)", ["a", "b"]),
        ("data.root=a", ["a"]),
    ],
)
def test_sweeps_over_text(typed, expected):
    assert points(typed) == expected


def test_what_may_mean_two_things_is_told(capsys):
    with pytest.raises(UserError, match=r"^prompts=\[a\],\[b\] is two lists: add -m to run both, or quote"):
        literal(["prompts=[a],[b]"])
    literal(["prompts=[a red car, sunny day]"])
    said = capsys.readouterr().err
    assert said.startswith("prompts: one text, in which commas before spaces are commas")
    assert said.count("\n") == 1
    literal(["prompts=[a,b]", 'prompts=["a, b"]', "data.train=[a, b]"])
    assert not capsys.readouterr().err


def test_arguments_are_quoted_once():
    """Processes that Lightning starts get what the first one made of its arguments."""
    arguments = ["prompts=[a, b]", "data.train=a=b", "ckpt=x", "~data.root", "+a.b=c,d"]
    assert literal(literal(arguments)) == literal(arguments)


def test_a_command_gets_what_was_typed(monkeypatch, tmp_path):
    seen = {}

    @entry_point("bench")
    def main(config):
        seen.update(OmegaConf.to_container(config))

    out = str(tmp_path / "a=b, {c} [d] é")
    monkeypatch.setattr(sys, "argv", ["bench", f"out={out}", "benchmark.ckpt=x,y=z", "benchmark=sampler"])
    main()
    assert (seen["out"], seen["benchmark"]["ckpt"]) == (out, "x,y=z")
    assert Path(out).is_dir()


def leaves(node, above=()):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, str(key)))
        else:
            yield (*above, str(key)), value


# Texts of the config that are names of something, and what Hydra reads of them is right.
NAMES = {
    *("_target_", "key", "mode", "filename", "reference", "accelerator", "strategy", "precision", "matmul_precision"),
    *("activation_checkpointing", "dtype", "labeling", "lr_schedule", "format", "position", "attention", "direction"),
    *("update", "kappa_form"),
}


def test_keys_of_text_are_known():
    """What the config's own values show to be text, a path or a URL, and what classes say of keys that are null."""
    unknown = set()
    for path in sorted(CONF.rglob("*.yaml")):
        group = path.relative_to(CONF).parent.parts
        if group[:1] in (("cli",), ("hydra",), ("experiment",), ("prompt_list",), ("search",)):
            continue
        values = yaml.safe_load(path.read_text()) or {}
        values.pop("defaults", None)
        typed = parameters(values)
        for keys, value in leaves(values, group):
            looks_so = isinstance(value, str) and "${" not in value and ("/" in value or " " in value)
            says_so = value in (None, "???") and typed.get(keys[-1]) in ("text",)
            if (looks_so or says_so) and kind(".".join(keys)) is None and keys[-1] not in NAMES:
                unknown.add(f"{path.relative_to(CONF)}: {'.'.join(keys)}")
    assert not unknown


def parameters(values):
    """Parameter -> "text" of those that a config's class may be given texts or paths for."""
    if "_target_" not in values:
        return {}
    target = values["_target_"]
    try:
        made = get_class(target)
    except ValueError:
        made = get_method(target)
    found = {}
    for name, parameter in inspect.signature(made).parameters.items():
        annotation = parameter.annotation
        options = typing.get_args(annotation) or (annotation,)
        if str in options or Path in options:
            found[name] = "text"
    return found


def test_every_config_still_composes():
    """With the keys of text given as strange texts."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = ["ckpt=a=b,c", "out=d {e}", "prompts=[f, g,h]", "init='i j'", "mask=k[l].png"]
        config = compose("sample", literal(given))
    assert (config.ckpt, config.out, config.init, config.mask) == ("a=b,c", "d {e}", "i j", "k[l].png")
    assert config.prompts == ["f, g", "h"]
