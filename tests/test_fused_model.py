"""The transformers with the fused operators: the loss without logits, Triton kernels in whole models, dtypes."""

from dataclasses import replace

import pytest
import torch

from hmar.config import ModelConfig
from hmar.loss import (
    masked_loss,
    masked_targets,
    next_scale_loss,
    next_scale_targets,
    token_weights,
)
from hmar.model import DropPath, MaskedTransformer, NextScaleTransformer, Residual, run
from hmar.parallelize import narrow_residual_stream
from hmar_kernels import triton_device

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, the operators' GPU tests run the kernels"
)

TINY = ModelConfig(
    depth=2, width=24, num_heads=3, num_classes=5, vocab_size=11, code_dim=4, sides=(1, 2, 3), drop_path=0.0
)


def build(cls, config=TINY):
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def draw(config=TINY, batch=3):
    generator = torch.Generator().manual_seed(1)
    length = config.pyramid.length
    classes_B = torch.randint(config.num_classes, (batch,), generator=generator)
    inputs_BLE = torch.randn(batch, length - 1, config.code_dim, generator=generator)
    codes_BL = torch.randint(config.vocab_size, (batch, length), generator=generator)
    return classes_B, inputs_BLE, codes_BL


def gradients(model, loss):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.fixture
def triton_is_chosen(monkeypatch):
    """What "auto" takes on a GPU, here under the interpreter."""
    calls = []
    monkeypatch.setattr(triton_device, "choose", lambda *_: (calls.append("triton") or "triton", "for this test"))
    return calls


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_next_scale_loss_without_logits(pattern, weighted):
    model = NextScaleTransformer(TINY, pattern)
    model.load_state_dict(build(NextScaleTransformer).state_dict())
    classes_B, inputs_BLE, codes_BL = draw()
    weights_L = token_weights(TINY.pyramid) if weighted else None
    logits_BLV = model(classes_B, inputs_BLE)
    expected = next_scale_loss(logits_BLV, codes_BL, weights_L)
    loss, correct_BL = model(classes_B, inputs_BLE, targets=next_scale_targets(codes_BL, weights_L))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), atol=1e-5, rtol=1e-4)
    assert torch.equal(correct_BL, logits_BLV.argmax(-1) == codes_BL)


@pytest.mark.parametrize("hidden", ["some", "per_image", "none"])
def test_masked_loss_without_logits(hidden):
    model = build(MaskedTransformer).train()
    classes_B, inputs_BLE, codes_BL = draw()
    masked = torch.arange(14) % 3 == 1
    if hidden == "per_image":
        masked = torch.stack([masked, ~masked, masked])
    elif hidden == "none":
        masked = torch.zeros(14, dtype=torch.bool)
    arguments = (classes_B, inputs_BLE, inputs_BLE.flip(1), masked)
    logits_BLV = model(*arguments)
    expected = masked_loss(logits_BLV, codes_BL, masked)
    loss, correct_BL = model(*arguments, targets=masked_targets(codes_BL, masked))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), atol=1e-5, rtol=1e-4)
    assert torch.equal(correct_BL, logits_BLV.argmax(-1) == codes_BL)


@interpreted
@pytest.mark.parametrize("shared", [False, True], ids=["modulation_of_each_block", "shared_modulation"])
@pytest.mark.parametrize("cls", [NextScaleTransformer, MaskedTransformer])
def test_triton_in_a_whole_model(cls, shared, triton_is_chosen, monkeypatch):
    """Loss and gradients of every parameter, with drop-path, are those of the references."""
    config = replace(TINY, shared_modulation=shared, drop_path=0.5)
    model = build(cls, config).train()
    classes_B, inputs_BLE, codes_BL = draw(config)
    masked = torch.arange(14) % 3 == 1
    if cls is NextScaleTransformer:
        arguments, targets = (classes_B, inputs_BLE), next_scale_targets(codes_BL, token_weights(config.pyramid))
    else:
        arguments = (classes_B, inputs_BLE, inputs_BLE.flip(1), masked)
        targets = masked_targets(codes_BL, masked)

    results = []
    for impl in ("triton", "reference"):
        if impl == "reference":
            monkeypatch.undo()
        torch.manual_seed(2)
        loss, correct_BL = model(*arguments, targets=targets)
        results.append((loss, correct_BL, gradients(model, loss)))
    # a block has two norms, the heads' split and GELU, and the head a norm and its loss
    assert len(triton_is_chosen) == 4 * config.depth + 2
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=2e-4)


@interpreted
def test_triton_generates_what_the_reference_does(triton_is_chosen, monkeypatch):
    model = build(NextScaleTransformer).eval()
    classes_B, inputs_BLE, _ = draw()
    with torch.no_grad():
        actual = model(classes_B, inputs_BLE)
        monkeypatch.undo()
        torch.testing.assert_close(actual, model(classes_B, inputs_BLE), atol=2e-5, rtol=2e-4)


@interpreted
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("stream_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_that_a_block_keeps(stream_dtype, compiled, triton_is_chosen):
    """22 C a token, 24 C with a float32 stream: the residual stream 2 (4), two branches 2 each, q, k, v and
    attention's result 8, the hidden layer 8.

    Of weights, rounded copies of the modulation's and of the projection behind attention. Vectors of images and numbers
    of tokens come on top; a second stream, a norm, GELU's result or another weight would be far above the limit.
    """
    torch._dynamo.reset()
    config = replace(TINY, depth=3, width=96, sides=(1, 2, 4, 8))
    model = build(lambda config: NextScaleTransformer(config, attention="triton"), config).train()
    classes_B, inputs_BLE, _ = draw(config, batch=2)
    narrow_residual_stream(model, stream_dtype)
    cond_BC, x_BLC = model.embedding(classes_B, inputs_BLE)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autocast("cpu", torch.bfloat16):
        # NOTE: the last block stands for all: the first one has nothing to add to the stream.
        stream = run(model.blocks[:-1], Residual(x_BLC), cond_BC, model.masks[None])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.blocks[-1](stream, cond_BC, model.masks[None])
    found = sum(storage.nbytes() for storage in kept.values())
    expected = (20 + stream_dtype.itemsize) * x_BLC.numel() + 2 * (6 + 1) * config.width**2
    assert expected <= found < 1.05 * expected


@interpreted
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_training_compiles_without_graph_breaks(impl, triton_is_chosen, monkeypatch):
    torch._dynamo.reset()
    if impl == "reference":
        monkeypatch.undo()
    model = build(NextScaleTransformer).train()
    classes_B, inputs_BLE, codes_BL = draw()
    targets = next_scale_targets(codes_BL, token_weights(TINY.pyramid))
    expected = model(classes_B, inputs_BLE, targets=targets)
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(classes_B, inputs_BLE, targets=targets)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(model, actual[0]), gradients(model, expected[0]), atol=1e-5, rtol=1e-4)


def test_dropped_branches_leave_the_stream_as_it_is(monkeypatch):
    """Both branches of every block, and for the images that are dropped only."""
    model = build(NextScaleTransformer, replace(TINY, drop_path=0.5)).train()
    monkeypatch.setattr(DropPath, "forward", lambda self, x: x * torch.tensor([0.0, 1, 0])[:, None, None])
    classes_B, inputs_BLE, _ = draw()
    cond_BC, x_BLC = model.embedding(classes_B, inputs_BLE)
    stream = Residual(x_BLC)
    for block in model.blocks:
        stream = block(stream, model.shared_modulation(cond_BC), model.masks[None])
        zeros_B1C = torch.zeros(3, 1, TINY.width)
        y_BLC, _ = stream.norm(zeros_B1C, zeros_B1C)
        assert torch.equal(y_BLC[::2], x_BLC[::2]) and not torch.equal(y_BLC[1], stream.x_BLC[1])
        assert not torch.equal(stream.x_BLC[1], x_BLC[1])


@pytest.mark.parametrize("shared", [False, True], ids=["modulation_of_each_block", "shared_modulation"])
@pytest.mark.parametrize("stream_dtype", [None, torch.bfloat16], ids=["as_embedded", "bf16"])
def test_dtypes_under_autocast(stream_dtype, shared):
    """The residual stream is float32, as embeddings are, unless it is narrowed; branches are bfloat16, and so are
    gates, scales and shifts but for those to which a float32 table is added."""
    model = build(NextScaleTransformer, replace(TINY, shared_modulation=shared))
    if stream_dtype is not None:
        narrow_residual_stream(model, stream_dtype)
    stream, modulation = stream_dtype or torch.float32, torch.float32 if shared else torch.bfloat16
    classes_B, inputs_BLE, codes_BL = draw()
    seen = []

    def look(module, arguments, output):
        seen.append((type(module).__name__, arguments, output))

    for block in model.blocks:
        for module in (block, block.attention, block.mlp):
            module.register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(classes_B, inputs_BLE, targets=next_scale_targets(codes_BL))
    assert loss.dtype == torch.float32
    assert [name for name, _, _ in seen] == ["Attention", "MLP", "Block"] * 2
    for name, arguments, output in seen:
        if name == "Block":
            assert isinstance(output, Residual)
            assert [x.dtype for x in output if x is not None] == [stream, torch.bfloat16, modulation]
        else:
            assert [x.dtype for x in arguments[1:3]] == [modulation, modulation]
            assert [x.dtype for x in output] == [stream, torch.bfloat16]
