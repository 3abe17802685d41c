"""Published state dicts: there and back bit for bit, found inside other files, and every way not to fit."""

import pickle
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hmar.config import ModelConfig
from hmar.model import NextScaleTransformer
from hmar.published import MisfitError, find_published, import_published, load_published, read_config, to_published
from hmar.pyramid import SIDES_BY_RESOLUTION
from hmar.weightfile import read_weightfile
from published_files import MODEL, TOKENIZER, make, state_dict, training_checkpoint

KINDS = ("tokenizer", "var", "next-scale", "masked", "hmar")
SMALL = replace(MODEL, sides=(1, 2, 3), num_classes=3)
OTHER = ModelConfig(
    depth=3,
    width=48,
    num_heads=4,
    mlp_ratio=2.5,
    num_classes=5,
    vocab_size=11,
    code_dim=6,
    sides=(2, 2, 5),
    mask_depth=2,
    shared_modulation=True,
)
OTHER_TOKENIZER = replace(TOKENIZER, channels=64, multipliers=(2, 1, 3), num_res_blocks=1, code_dim=6, vocab_size=11)


def small(kind, **options):
    return state_dict(kind, config=SMALL, **options)


def assert_same(actual, expected):
    expected_state = expected.state_dict()
    assert actual.state_dict().keys() == expected_state.keys()
    for name, tensor in actual.state_dict().items():
        if name != "quantizer.idle_steps_V":
            assert tensor.dtype == expected_state[name].dtype
            assert torch.equal(tensor, expected_state[name]), name


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_bit_for_bit(kind, config):
    """Sizes, pattern and weights all come from the tensors, but for a tokenizer's sides and how deep stage 2 trains."""
    module = make(kind, config=config, tokenizer=TOKENIZER if config is SMALL else OTHER_TOKENIZER)
    untold = {"tokenizer": {"sides": config.sides}, "hmar": {}}
    given = untold.get(kind, {"mask_depth": config.mask_depth})
    imported = import_published(to_published(module), given=given)
    assert (imported.kind, imported.origin, imported.others) == (kind, "the file itself", ())
    assert imported.module.config == module.config
    assert getattr(imported.module, "pattern", None) == getattr(module, "pattern", None)
    assert_same(imported.module, module)
    again = to_published(imported.module)
    for name, tensor in to_published(module).items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32(dtype):
    weights = small("var")
    stored = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    module = import_published(stored).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert torch.equal(module.head.linear.weight, stored["head.weight"].float())


def wrapped(name, weights):
    def prefixed(prefix):
        return {prefix + key: tensor for key, tensor in weights.items()}

    return {
        "flat": weights,
        "nested": {"a": 1, "trainer": {"var_wo_ddp": weights, "optim": {"state": {0: {"step": torch.tensor(1.0)}}}}},
        "list": [{"lr": 1e-3}, weights],
        "ddp": {"model": prefixed("module.")},
        "compiled": {"state_dict": prefixed("_orig_mod.")},
        "both": {"model": prefixed("module._orig_mod.")},
        "averaged": {"ema": {"n_averaged": torch.tensor(7), **prefixed("module.")}},
        "submodule": {"state_dict": prefixed("network.var.")},
        "inner": {key.replace("blocks.1.", "blocks.1._orig_mod."): tensor for key, tensor in weights.items()},
        "lightning": {"state_dict": {**prefixed("var."), **{f"vae.{k}": v for k, v in small("tokenizer").items()}}},
    }[name]


@pytest.mark.parametrize(
    "name, origin",
    [
        ("flat", "the file itself"),
        ("nested", "trainer.var_wo_ddp"),
        ("list", "1"),
        ("ddp", "model (names without module.)"),
        ("compiled", "state_dict (names without _orig_mod.)"),
        ("both", "model (names without module. and _orig_mod.)"),
        ("averaged", "ema (names without module.)"),
        ("submodule", "state_dict (names without network.var.)"),
        ("inner", "the file itself (names without _orig_mod.)"),
        ("lightning", "state_dict (names without var.)"),
    ],
)
def test_state_dicts_are_found_and_named(name, origin):
    imported = import_published(wrapped(name, small("var")))
    assert (imported.kind, imported.origin) == ("var", origin)
    assert_same(imported.module, make("var", config=SMALL))
    assert imported.others == (("tokenizer in state_dict (names without vae.)",) if name == "lightning" else ())


def test_a_training_checkpoint_of_var_holds_model_and_tokenizer():
    checkpoint = training_checkpoint(config=SMALL)
    imported = import_published(checkpoint)
    assert (imported.kind, imported.origin) == ("var", "trainer.var_wo_ddp")
    assert imported.others == ("tokenizer in trainer.vae_local",)
    imported = import_published(checkpoint, kind="tokenizer", given={"sides": [1, 2, 3]})
    assert (imported.kind, imported.origin) == ("tokenizer", "trainer.vae_local")
    assert_same(imported.module, make("tokenizer", config=SMALL))
    with pytest.raises(ValueError, match='no weights for kind "hmar", but var in trainer'):
        import_published(checkpoint, kind="hmar")


def test_several_state_dicts_are_told_apart_by_their_part():
    checkpoint = {"model": small("hmar", seed=0), "ema": small("hmar", seed=1), "step": 4}
    with pytest.raises(ValueError, match=r"several state dicts that fit \(model, ema\): choose one by its part"):
        import_published(checkpoint)
    imported = import_published(checkpoint, part="ema")
    assert imported.origin == "ema"
    assert_same(imported.module, make("hmar", config=SMALL, seed=1))
    with pytest.raises(ValueError, match='no part "avg" with weights; it has model, ema'):
        import_published(checkpoint, part="avg")


def test_stage_one_from_var():
    weights = small("var")
    imported = import_published(weights, kind="next-scale")
    assert (imported.kind, imported.module.pattern) == ("next-scale", "block_diagonal")
    assert_same(imported.module, make("var", config=SMALL))
    with pytest.raises(ValueError, match='no weights for kind "var", but next-scale in the file itself'):
        import_published(small("next-scale"), kind="var")
    # Without the mask nothing tells the two apart.
    del weights["attn_bias_for_masking"]
    with pytest.raises(ValueError, match='say kind "var" or "next-scale"'):
        import_published(weights)
    assert import_published(weights, kind="var").module.pattern == "block_causal"
    weights["attn_bias_for_masking"] = torch.zeros(1, 1, 14, 14)
    with pytest.raises(ValueError, match="neither VAR's block-causal mask nor HMAR's block-diagonal one"):
        import_published(weights)


def problems_of(weights, **options):
    with pytest.raises(MisfitError) as error:
        import_published(weights, **options)
    assert "\n" not in str(error.value)
    assert all(problem in str(error.value) for problem in error.value.problems)
    return error.value.problems


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_tensor_is_named(kind):
    """Each one alone: also those that tell a size or mark the kind."""
    given = {"sides": SMALL.sides} if kind == "tokenizer" else None
    weights = small(kind)
    derived = ("lvl_1L", "zero_k_bias", "ema_vocab_hit_SV", "attn_bias_for_masking")
    parameters = [name for name in weights if not name.endswith(derived) and name != "mask_embed.weight"]
    if kind == "tokenizer":
        # All that tell a size, and some of the many others.
        parameters = [name for name in parameters if name.count(".") < 3] + parameters[::13]
    for name in parameters:
        rest = {key: tensor for key, tensor in weights.items() if key != name}
        shape = list(weights[name].shape)
        expected = f"missing {name} {shape}"
        defaults = {"class_emb.weight": [1001, 128], "word_embed.weight": [128, 32]}
        if kind != "tokenizer" and name in defaults:
            expected = f"missing {name} {defaults[name]}"
        if name == "quantize.embedding.weight":
            expected = f"missing {name} [4096, 8]"
        assert expected in problems_of(rest, kind=kind, given=given), name


def test_several_problems_are_listed_together():
    weights = small("hmar")
    del weights["mask_head.bias"], weights["base_blocks.0.attn.q_bias"]
    weights["surplus"] = torch.zeros(2)
    weights["ns_blocks.0.ffn.fc2.bias"] = torch.zeros(7)
    weights["pos_start"] = weights["pos_start"].long()
    weights["lvl_embed.weight"][1, 1] = float("inf")
    weights["mask_blocks.0.attn.zero_k_bias"] += 1
    assert sorted(problems_of(weights)) == [
        "lvl_embed.weight holds numbers that are not finite",
        "mask_blocks.0.attn.zero_k_bias is not zero; keys have no bias here",
        "missing base_blocks.0.attn.q_bias [128]",
        "missing mask_head.bias [16]",
        "ns_blocks.0.ffn.fc2.bias has shape [7], expected [128]",
        "pos_start has dtype torch.int64, expected floating-point numbers",
        "unexpected surplus [2]",
    ]


def test_a_long_list_of_problems_is_cut_in_the_message_only():
    weights = {name: tensor for name, tensor in small("var").items() if not name.startswith("blocks.0.")}
    weights |= {f"strange.{i}": torch.zeros(1) for i in range(60)}
    with pytest.raises(MisfitError) as error:
        import_published(weights)
    assert len(error.value.problems) == 60 + 12
    assert str(error.value).endswith("and 32 more")


def test_blocks_that_are_missing_altogether():
    """The last block gone leaves a smaller model that would fit; that it has more heads than blocks gives it away."""
    weights = {name: tensor for name, tensor in small("var").items() if not name.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"1 blocks of 2 heads, .* blocks seem to be missing or surplus.*say depth=1"):
        import_published(weights)
    assert import_published(weights, given={"depth": 1}).module.config.depth == 1
    weights = {name: tensor for name, tensor in small("var").items() if not name.startswith("blocks.")}
    with pytest.raises(ValueError, match="it holds no blocks"):
        import_published(weights)
    weights = small("hmar")
    weights |= {f"mask_blocks.1.{name[14:]}": weights[name] for name in weights if name.startswith("mask_blocks.0.")}
    with pytest.raises(ValueError, match="3 blocks of 2 heads"):
        import_published(weights)


def test_given_sizes_must_agree():
    weights = small("var")
    expected = ["depth is 2, not 20", "width is 128, not 1280", "num_heads is 2, not 20", "num_classes is 3, not 1000"]
    assert problems_of(weights, preset="d20-256")[:4] == expected
    assert problems_of(weights, given={"sides": (1, 2, 4)}) == ["sides is [1, 2, 3], not [1, 2, 4]"]
    module = import_published(weights, given={"depth": 2, "drop_path": 0.25, "sides": (1, 2, 3)}).module
    assert module.config == replace(SMALL, drop_path=0.25)
    with pytest.raises(ValueError, match='unknown key "heads"'):
        import_published(weights, given={"heads": 2})
    with pytest.raises(ValueError, match='unknown preset "d17-256"'):
        import_published(weights, preset="d17-256")


def test_the_pyramid_is_found_or_asked_for():
    weights = small("next-scale")
    del weights["lvl_1L"]
    with pytest.raises(ValueError, match=r"no lvl_1L, and no published pyramid has 3 scales of 14 tokens .*say sides="):
        import_published(weights)
    assert import_published(weights, given={"sides": [1, 2, 3]}).module.config.sides == (1, 2, 3)
    weights["lvl_1L"] = torch.tensor([[0] + [1] * 5 + [2] * 8])
    with pytest.raises(ValueError, match="lvl_1L does not count the tokens of square scales"):
        import_published(weights)
    for sides in SIDES_BY_RESOLUTION.values():
        shapes = {"pos_1LC": (1, sum(n * n for n in sides), 64), "lvl_embed.weight": (len(sides), 64)}
        shapes |= {"class_emb.weight": (11, 64), "blocks.0.attn.scale_mul_1H11": (1, 1, 1, 1)}
        weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        assert read_config("var", weights)[0].sides == sides


def test_a_tokenizer_takes_the_published_pyramid_or_asks():
    weights = state_dict("tokenizer")
    assert import_published(weights).module.pyramid.sides == SIDES_BY_RESOLUTION[256]
    assert import_published(weights, given={"sides": (1, 4, 9)}).module.pyramid.sides == (1, 4, 9)
    assert import_published(weights, preset=None, given=None).module.config == TOKENIZER
    with pytest.raises(ValueError, match=r"does not tell the sides of its 3 scales: say sides="):
        import_published(small("tokenizer"))


def test_names_that_collide_and_tensors_that_are_not_dense():
    weights = small("var")
    both = {**weights, "module.head.bias": weights["head.bias"]}
    with pytest.raises(ValueError, match=r"holds head.bias twice, once as module.head.bias"):
        import_published(both)
    # A few bytes that claim to be a terabyte.
    huge = {**weights, "class_emb.weight": torch.zeros(1, 128).expand(2**31, 128)}
    with pytest.raises(ValueError, match=r"class_emb.weight \[2147483648, 128\] is not a dense tensor"):
        import_published(huge)
    with pytest.raises(ValueError, match=r"head.bias .* is not a dense tensor"):
        import_published({**weights, "head.bias": weights["head.bias"].to_sparse()})
    with pytest.raises(ValueError, match=r"head.weight .* is not a dense tensor"):
        import_published({**weights, "head.weight": weights["head.weight"].to("meta")})


def test_a_derived_tensor_of_the_other_kind_is_unexpected():
    with pytest.raises(MisfitError, match=r"unexpected lvl_1L \[1, 3\]"):
        load_published(make("tokenizer", config=SMALL), {**small("tokenizer"), "lvl_1L": torch.zeros(1, 3)})


def test_a_tokenizer_and_a_transformer_in_one_place_are_told_apart_by_choice_only():
    """Nothing in the names separates them, so neither is taken silently, and both can be had."""
    transformer, tokenizer = small("var"), small("tokenizer")
    for tree, parts, origin in (
        ({**transformer, **tokenizer}, ("transformer", "tokenizer"), "the file itself"),
        ({**tokenizer, **transformer}, ("transformer", "tokenizer"), "the file itself"),
        ({"ema": {**tokenizer, **transformer}}, ("ema.transformer", "ema.tokenizer"), "ema"),
        (
            {"ema": {f"module.net.{name}": tensor for name, tensor in {**tokenizer, **transformer}.items()}},
            ("ema.net.transformer", "ema.net.tokenizer"),
            "ema (names without module. and net.)",
        ),
    ):
        message = f"a transformer and a tokenizer .*choose one by its part: --part {parts[0]} or --part {parts[1]}"
        with pytest.raises(ValueError, match=message):
            import_published(tree)
        for options in ({"part": parts[0]}, {"kind": "var"}):
            imported = import_published(tree, **options)
            assert imported.origin == f"{origin}, tensors of a transformer"
            assert_same(imported.module, make("var", config=SMALL))
        assert imported.others == (f"tokenizer in {origin}, tensors of a tokenizer",)
        for options in ({"part": parts[1]}, {"kind": "tokenizer"}):
            imported = import_published(tree, given={"sides": [1, 2, 3]}, **options)
            assert imported.origin == f"{origin}, tensors of a tokenizer"
            assert_same(imported.module, make("tokenizer", config=SMALL))
    with pytest.raises(ValueError, match='no part "vae" with weights; it has transformer, tokenizer'):
        import_published({**transformer, **tokenizer}, part="vae")
    # Strict as ever: what belongs to neither is reported.
    assert problems_of({**transformer, **tokenizer, "surplus": torch.zeros(2)}, kind="var") == [
        "unexpected surplus [2]"
    ]
    # One tensor with a name of the other family is a stray, not a second state dict.
    stray = {**transformer, "encoder.conv_in.weight": torch.zeros(2)}
    assert problems_of(stray) == ["unexpected encoder.conv_in.weight [2]"]


def test_state_dicts_of_one_family_under_prefixes_are_told_apart_by_their_part():
    var = [small("var", seed=seed) for seed in (0, 1)]
    prefixed = [
        {f"{prefix}.{k}": v for k, v in weights.items()}
        for prefix, weights in zip(("net", "net_ema"), var, strict=True)
    ]
    tree = {"state_dict": prefixed[0] | prefixed[1]}
    message = (
        r"that fit \(state_dict\.net, state_dict\.net_ema\): choose one by its part, as in --part state_dict\.net_ema"
    )
    for options in ({}, {"part": "state_dict"}):
        with pytest.raises(ValueError, match=message):
            import_published(tree, **options)
    for seed, part in enumerate(("state_dict.net", "state_dict.net_ema")):
        assert_same(import_published(tree, part=part).module, make("var", config=SMALL, seed=seed))


@pytest.fixture
def little_memory():
    """2 GB more than this process has."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * 2**30, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limit)


def claiming(sides):
    """A small file whose lvl_1L claims a large pyramid."""
    scales = [torch.full((side * side,), k, dtype=torch.int32) for k, side in enumerate(sides)]
    return {**small("var"), "lvl_1L": torch.cat(scales)[None]}


@pytest.mark.parametrize("sides", [(1, 2, 5000), (1,) * 5000], ids=["long", "many"])
@pytest.mark.parametrize("bias", ["small", "none", "claimed"])
def test_a_claimed_pyramid_costs_no_more_than_the_file(sides, bias, little_memory):
    """Its mask alone would have 10^14 entries."""
    weights = claiming(sides)
    length = weights["lvl_1L"].numel()
    if bias == "none":
        del weights["attn_bias_for_masking"]
    if bias == "claimed":
        weights["attn_bias_for_masking"] = torch.zeros(()).expand(1, 1, length, length)
    started = time.monotonic()
    for kind in ("var", "next-scale", None):
        with pytest.raises(ValueError, match=r"neither VAR's|scales 5000|pos_1LC|not a dense|does not tell VAR"):
            import_published(weights, kind=kind)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("kind", ["var", "next-scale"])
def test_every_entry_of_a_stored_mask_counts(kind):
    """Also when the pyramid has a single scale, where both masks are one, and for masks of other shapes."""
    weights = small(kind)
    bias = weights["attn_bias_for_masking"]
    for i, j in [(0, 0), (0, 1), (1, 0), (4, 4), (4, 5), (13, 0), (13, 13), (0, 13), (8, 3)]:
        changed = bias.clone()
        changed[0, 0, i, j] = 0 if changed[0, 0, i, j] else -torch.inf
        with pytest.raises(ValueError, match=r"attn_bias_for_masking \[1, 1, 14, 14\] is neither"):
            import_published({**weights, "attn_bias_for_masking": changed})
    for changed in (bias[0], bias[..., :-1], bias.expand(2, -1, -1, -1).contiguous(), bias[:, :, :13, :13]):
        with pytest.raises(ValueError, match="is neither VAR's"):
            import_published({**weights, "attn_bias_for_masking": changed})
    half = import_published({**weights, "attn_bias_for_masking": bias.to(torch.bfloat16)})
    assert half.kind == kind
    assert import_published(state_dict(kind, config=replace(SMALL, sides=(2,)))).kind == "var"


def test_other_contents_are_described():
    for tree, message in (
        ({"weight": torch.zeros(3), "bias": torch.zeros(3)}, "holds no weights .* but entries called weight, bias"),
        (torch.zeros(3), "only a Tensor"),
        ({}, "only a dict"),
        ({"args": {"depth": 3}}, "entries called args"),
        (make("var", config=SMALL).state_dict(), "entries called embedding.start_LC"),
    ):
        with pytest.raises(ValueError, match=message):
            import_published(tree)
    loop = {"trainer": {}}
    loop["trainer"]["again"] = loop
    assert find_published(loop) == []


def test_loading_checks_before_it_writes():
    target = make("var", config=SMALL, seed=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    weights = small("var")
    del weights["head.bias"]
    with pytest.raises(MisfitError):
        load_published(target, weights)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    with pytest.raises(ValueError, match="No published layout for Linear"):
        load_published(torch.nn.Linear(1, 1), {})


def test_imported_var_computes_what_the_original_does():
    source = make("var", config=SMALL)
    imported = import_published(wrapped("both", to_published(source))).module.eval()
    assert isinstance(imported, NextScaleTransformer)
    generator = torch.Generator().manual_seed(0)
    arguments = torch.tensor([0, 2]), torch.randn(2, 13, 8, generator=generator)
    with torch.no_grad():
        assert torch.equal(imported(*arguments), source(*arguments))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_damaged_files_never_raise_anything_but_a_sentence(tmp_path, zipped):
    """Bytes flipped all over a small file, and the file cut at many lengths: it loads, or a ValueError says why not."""
    path = tmp_path / "weights.pth"
    torch.save({"model": {"a": torch.arange(4.0), "n": 3}}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    damaged = [whole[:length] for length in range(0, len(whole), 23)]
    for place in torch.randint(len(whole), (300,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            read_weightfile(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > len(damaged) // 3


def test_safetensors_of_another_format(tmp_path):
    for content in (b"\x80\x02}.", b"PK\x03\x04", pickle.dumps([1]), b"\xff" * 64, b"{}"):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged or cut short"):
            read_weightfile(tmp_path / "x.safetensors")
