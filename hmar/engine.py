"""The engine: generation with fixed shapes, as CUDA graphs on a GPU and step by step elsewhere.

    begin           modulation vectors of all blocks, once an image: they follow from the class alone
    predict k       next-scale pass on the inputs of scale k, draw into the codes
    masked k, i     hide the least confident codes, masked pass without the null class, draw into their places
    commit k        f_hat += contribution of the codes, and the inputs of scale k + 1
    decode          bf16, channels last (`hmar.decoder`)

The same arithmetic and the same random numbers as `hmar.generate`, whose plain functions say what is computed; here no
shape depends on data, nothing waits for the device within an image, and what is the same for every pass is computed
once. Around the model a pass has few kernels: three that add what codes contribute and make the next scale's inputs
(`hmar.scale_maps`), one that embeds tokens of codes in a dtype (`hmar_kernels.token_embedding`), one that tells which
codes stay hidden (`hmar_kernels.least_confident`), and one that draws codes and writes them where they belong.

An `Engine` holds the weights in the precision they are used in. For every batch size and setting it makes a `Program`:
buffers for the arguments, and the steps above, captured one after another into graphs that share a pool of memory. Read
`hmar.serve` for requests that arrive one by one.

Shapes: B images, R rows of the model (2B where the null class takes part), n tokens of one scale, m hidden ones, L
tokens of the pyramid, E code dimensions, S scales, P masked passes of an image, h w latent sides.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hmar.cuda_graphs import Graph, Recorder, lack_of_memory
from hmar.decoder import CONVOLUTIONS, FusedDecoder
from hmar.generate import (
    GenerationOutput,
    KnownCodes,
    LayerKeysValues,
    NonFiniteLogits,
    RampLike,
    SamplingConfig,
    ScheduleLike,
    check_known,
    check_pair,
    checked_classes,
    draw,
    image_keys,
    masked_passes,
    masked_step,
    refuse_nonfinite,
    resolve_ramp,
    resolve_schedule,
    stay_hidden,
    with_null,
)
from hmar.model import (
    HMAR,
    MLP,
    Attention,
    Block,
    Head,
    NextScaleTransformer,
    Residual,
    Scales,
    SharedModulation,
    TokenEmbedding,
)
from hmar.pyramid import Pyramid
from hmar.scale_maps import ScaleMaps
from hmar.tokenizer import Tokenizer
from hmar_kernels import (
    SampledCodes,
    SpanMask,
    blocks,
    least_confident,
    linear,
    linear_parts,
    qk_norm_attention,
    summed_modulated_norm,
    token_embedding,
    triton_device,
)
from hmar_kernels.blocks import BlockWeights, Table, transformer_blocks
from hmar_kernels.linear import MAX_NORMED_ROWS, unavailable_on
from hmar_kernels.qk_norm_attention import MAX_HEAD_DIM, MAX_LENGTH, KVCache
from hmar_kernels.token_embedding import Known

DECODED_PIXELS = 2 << 20  # decoded at once; more would not be faster, and at 1024 px would take most of the memory
# Width of the model up to -> rows of all images up to which `products="cuda"` takes the kernels for few rows.
# NOTE: measured by `bench.linear` (reports/data/linear_rows_h100.json, generation_steps_h100.json), us a block, with
# cuBLAS in brackets: at width 1024 20.6 (30.9) with 2 rows, 28.5 (29.3) with 32; at 1536 37.1 (40.3) with 16,
# 41.8 (40.6) with 18; at 1920 46.6 (51.2) with 16, 52.8 (50.9) with 18. `products="blocks"`, which takes up to 32 rows
# of short images before: 21.9, 29.6 and 38.1 with 16 rows.
FEW_ROWS = {1024: 32, math.inf: 16}
# Width of the model up to -> of the projection and of fc2, up to so many rows: into how many products K is divided.
# NOTE: measured on an H100 (reports/log.md, "products in parts"), with the norm that adds them up.
PARTS: dict[float, tuple[tuple[tuple[int, int], ...], ...]] = {
    1024: (((512, 2),), ((800, 4), (1152, 2))),
    1536: (((512, 2),), ((512, 2),)),
    math.inf: (((200, 2),), ((512, 2), (800, 3), (1152, 2))),
}
# Pairs of a query and a key of an image up to which `attention="fused"` takes a scale: what the longest one has alone.
# NOTE: where keys are cached by calculation; without those scales VAR's image of 256 px took 14 to 20 % longer.
FUSED_PAIRS = MAX_LENGTH**2
DECODERS = ("modules", "fused", "transposed")
PRODUCTS = ("cublas", "cuda", "blocks")
ATTENTIONS = ("separate", "fused")


class Settings(NamedTuple):
    """What the steps of an image depend on beside the weights: one `Program` each.

    guided_S: whether the null class takes part in the next-scale pass of each scale. masked_guided: in masked passes.
    edited: some codes are known, so that the number of hidden ones is an argument.
    """

    batch: int
    schedule: tuple[tuple[int, ...], ...]
    guided_S: tuple[bool, ...]
    masked_guided: bool
    temperature: float
    top_k: int
    top_p: float
    greedy: bool
    edited: bool

    @property
    def sampling(self) -> SamplingConfig:
        """As far as drawing goes."""
        return SamplingConfig(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, greedy=self.greedy, schedule=self.schedule
        )


class Resolved(NamedTuple):
    """Settings, and what multiplies an image's strength of guidance at each scale, and in masked passes [S + 1]."""

    settings: Settings
    factors: np.ndarray


def resolve(
    pyramid: Pyramid,
    batch: int,
    guided: bool,
    edited: bool,
    cached: bool,
    schedule: ScheduleLike,
    cfg_ramp: RampLike,
    masked_cfg_factor: float,
    temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
) -> Resolved:
    """guided: whether the strength of any image is positive. cached: see `Engine.is_cached`. Others: SamplingConfig."""
    ramp_S = resolve_ramp(pyramid, cfg_ramp)
    guided_S = tuple(guided and factor > 0 for factor in ramp_S)
    settings = Settings(
        batch=batch,
        schedule=resolve_schedule(pyramid, schedule),
        guided_S=(any(guided_S),) * len(ramp_S) if cached else guided_S,
        masked_guided=guided and masked_cfg_factor > 0,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
        edited=edited,
    )
    return Resolved(settings, np.array((*ramp_S, masked_cfg_factor)))


resolve_named = functools.lru_cache(maxsize=256)(resolve)
"""Of schedules and ramps with a name: others can be lists, and may change."""


class Engine:
    """Generates images with one model and tokenizer.

    Args:
        model: HMAR, or a NextScaleTransformer (VAR, or HMAR's first stage).
        device: where to compute; default is where the model is. The model itself may stay on the CPU.
        dtype: of products: torch.bfloat16 or torch.float16 (linear weights are kept in it, and the decoder, in
            bfloat16, is channels-last), or None for the weights' own. The residual stream keeps the weights' precision,
            as under autocast.
        capture: whether to capture CUDA graphs; default on a GPU. Without, the same steps run one by one.
        compile: a backend of torch.compile for transformer blocks, such as "inductor", or with a mode of it, as
            "inductor:max-autotune-no-cudagraphs". Default: none.
        compile_decoder: the same for the decoder.
        decoder: "modules" runs the tokenizer's own modules, "fused" `hmar.decoder.FusedDecoder`, "transposed" that with
            upsampling by transposed convolutions. Default: "transposed" in a dtype, "modules" in the weights' own.
        convolutions: of the decoder unless it is "modules": "torch", or "hopper" for the hand-written ones of
            `hmar_kernels.conv2d` where maps are large, in a dtype and on GPUs of compute capability 9.0. Default:
            "hopper" where it can run.
        products: "cublas", or "cuda" for products of at most FEW_ROWS rows, as in the small scales of one image, by
            the kernels of `hmar_kernels.linear`, with norms and residuals, or "blocks" for all blocks of a pass in one
            kernel of `hmar_kernels.blocks` where rows are few and nothing is cached, else as "cuda". In a dtype only.
            Default: "blocks" or "cuda" where the extension is built and its kernels can run.
        attention: "separate" normalises queries and keys in one kernel and attends in another, "fused" does both in
            `hmar_kernels.qk_norm_attention` where a scale, and what it sees, is short. In a dtype only. Default:
            "fused" on a GPU that has it.
        overlap: whether these kernels, and those of the embedding, of draws and of the quantizer's maps, may start, and
            read what no kernel writes, while the kernel before them still runs, on GPUs that can (compute capability
            9.0).
        cudnn_benchmark: whether cuDNN tries its algorithms for every shape of a convolution that a program is the first
            of its thread to have, instead of guessing the fastest. Sums may then be ordered in another way in another
            process.
        max_programs, max_bytes: how many programs are kept, and how much memory their graphs may hold together
            (default: half of the device's); the ones unused for longest go first. One program may always be kept.

    Weights that change in place (an optimizer, load_state_dict) are noticed and copied before the next images; after
    changes that leave no trace on the tensors (through `.data`) call `refresh`. Weights that are replaced by other
    tensors (load_state_dict(assign=True)) need a new engine, and are a RuntimeError. Any thread may call; one batch is
    generated at a time.
    """

    def __init__(
        self,
        model: HMAR | NextScaleTransformer,
        tokenizer: Tokenizer,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capture: bool | None = None,
        compile: str | None = None,
        compile_decoder: str | None = None,
        decoder: str | None = None,
        convolutions: str | None = None,
        products: str | None = None,
        attention: str | None = None,
        overlap: bool = True,
        cudnn_benchmark: bool = True,
        max_programs: int = 8,
        max_bytes: int | None = None,
    ):
        if not isinstance(model, (HMAR, NextScaleTransformer)):
            raise ValueError(f"A {type(model).__name__} cannot generate alone; HMAR and NextScaleTransformer can.")
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {dtype}; expected torch.bfloat16, torch.float16 or None for the weights' own.")
        if decoder not in (None, *DECODERS):
            raise ValueError(f"decoder is {decoder!r}; expected one of {', '.join(DECODERS)}, or None for the default.")
        for name, value, known in (
            ("convolutions", convolutions, CONVOLUTIONS),
            ("products", products, PRODUCTS),
            ("attention", attention, ATTENTIONS),
        ):
            if value not in (None, *known):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}, or None for the default.")
        if max_programs < 1:
            raise ValueError(f"max_programs is {max_programs}; at least one is needed.")
        self.device = torch.device(device if device is not None else tokenizer.quantizer.codebook.weight.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = dtype
        self.captures = self.device.type == "cuda" if capture is None else capture
        if self.captures and self.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, the engine's is {self.device}; leave capture out.")
        self.overlap, self.cudnn_benchmark = overlap, cudnn_benchmark
        check_pair(model.config, tokenizer)
        self.config = model.config
        self.max_programs = max_programs
        self.max_bytes = max_bytes
        if max_bytes is None and self.captures:
            self.max_bytes = torch.cuda.get_device_properties(self.device).total_memory // 2
        self.programs: OrderedDict[Settings, Program] = OrderedDict()
        self._pool, self._pool_bytes = None, 0
        # NOTE: a stream of its own, with which cuBLAS's workspace goes: another engine may run at the same time. It is
        # one for all programs, for the workspace, on an H100 of 32 MiB, stays for good.
        self._stream = torch.cuda.Stream(self.device) if self.captures else None
        self._lock, self._lock_owner = threading.Lock(), None
        with torch.no_grad():
            self._place(model, tokenizer)
            self.scale_maps = ScaleMaps(self.quantizer)
            self.decoding = self.decoder
            decoder = decoder or ("modules" if dtype is None else "transposed")
            if decoder != "modules":
                self.decoding = FusedDecoder(self.decoder, decoder == "transposed", convolutions)
            elif convolutions is not None:
                raise ValueError(f'convolutions is {convolutions!r}; the decoder "modules" has its own, leave it out.')
            self._derive()
        self._watched = self._sources_of_copies()
        self._versions = self._current_versions()
        self._remembered = [module for module in self.model.modules() if isinstance(module, Remembered)]
        products = self._products(products)
        if dtype is not None:
            has_kernels = self.device.type == "cuda" and triton_device.unavailable(self.device, dtype) is None
            self._fuse(
                products,
                attention or ("fused" if has_kernels and self.config.head_dim <= MAX_HEAD_DIM else "separate"),
                overlap,
            )
        if compile is not None:
            for block in self._blocks():
                self._compile(block, compile)
        if compile_decoder is not None:
            self._compile(self.decoding, compile_decoder)

    def _place(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Copies of the modules that share every parameter which is in its place already."""
        self.tokenizer_config, self.pyramid = tokenizer.config, tokenizer.pyramid
        products = {p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters(False)}
        decoder_dtype = None if self.dtype is None else torch.bfloat16
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        sources = (model, tokenizer.quantizer, tokenizer.post_quant_conv, tokenizer.decoder)
        self._owners = [
            (owner._parameters, name, parameter)
            for source in sources
            for owner in source.modules()
            for name, parameter in owner._parameters.items()
        ]

        def placed(module: nn.Module, dtype_of: Callable[[nn.Parameter], torch.dtype | None], **layout) -> nn.Module:
            memo = {}
            for parameter in module.parameters():
                tensor = parameter.detach().to(self.device, dtype_of(parameter))
                if layout and tensor.ndim == 4:
                    tensor = tensor.contiguous(**layout)
                memo[id(parameter)] = copied = nn.Parameter(tensor, requires_grad=False)
                self._pairs.append((parameter, copied))
            return copy.deepcopy(module, memo).to(self.device).eval()

        self.model = remembering(placed(model, lambda p: self.dtype if p in products else None))
        self.quantizer = placed(tokenizer.quantizer, lambda p: None)
        layout = {} if decoder_dtype is None else {"memory_format": torch.channels_last}
        self.post_quant_conv = placed(tokenizer.post_quant_conv, lambda p: decoder_dtype, **layout)
        self.decoder = placed(tokenizer.decoder, lambda p: decoder_dtype, **layout)

    def _products(self, wanted: str | None) -> str:
        """Of PRODUCTS what is wanted, or the fastest that can run."""
        config, dtype = self.config, self.dtype or torch.float32
        reasons = {"cublas": None, "cuda": unavailable_on(self.device, dtype, config.width)}
        reasons["blocks"] = "keys and values are cached" if self.is_cached else None
        if any(attention.q_bias_C.dtype != torch.float32 for attention in self._attentions()):
            reasons["blocks"] = "biases of q and v are not float32"
        for block_list in self._block_lists():
            sizes = config.width, config.hidden_width, config.head_dim, max(1, len(block_list))
            reasons["blocks"] = reasons["blocks"] or blocks.unavailable_on(self.device, dtype, *sizes)
        if wanted is None:
            return next(name for name in reversed(PRODUCTS) if reasons[name] is None)
        if reasons[wanted] is not None:
            other = self._products(None)
            raise ValueError(f'products="{wanted}" cannot run here: {reasons[wanted]}; products="{other}" would')
        return wanted

    def _fuse(self, products: str, attention: str, overlap: bool) -> None:
        few_rows = next(FEW_ROWS[width] for width in FEW_ROWS if self.config.width <= width)
        choices = Choices(0 if products == "cublas" else few_rows, attention, overlap)
        for remembered in self._remembered:
            layer = getattr(remembered.modulation, "linear", remembered.modulation)
            if isinstance(layer, nn.Linear) and remembered is not self.model.shared_modulation:
                remembered.modulation = FusedModulation(layer, choices)
        for name in self._block_list_names():
            fused = [FusedBlock(block, choices) for block in getattr(self.model, name)]
            together = products == "blocks" and fused
            setattr(self.model, name, nn.ModuleList([FusedBlocks(fused)] if together else fused))
        for name in self._head_names():
            setattr(self.model, name, FusedHead(getattr(self.model, name), choices))
        self.model.embedding = FusedTokenEmbedding(self.model.embedding, choices)

    def _compile(self, module: nn.Module, backend: str) -> None:
        # NOTE: every scale and batch size is a shape, and a mask, of its own.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 1024)
        torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 4096)
        backend, _, mode = backend.partition(":")
        module.compile(backend=backend, mode=mode or None, dynamic=False)

    def _derive(self) -> None:
        """What follows from the weights alone, in the same memory after every change of them."""
        self.scale_maps.derive()
        if isinstance(self.decoding, FusedDecoder):
            self.decoding.derive()
        for attention in self._attentions():
            if attention.bound_H is None:
                attention.bound_H = attention.logit_bound()
            attention.bound_H.copy_(attention.logit_bound())

    def _block_list_names(self) -> tuple[str, ...]:
        return ("trunk", "next_scale_blocks", "mask_blocks") if self.is_hmar else ("blocks",)

    def _block_lists(self) -> list[nn.ModuleList]:
        lists = [getattr(self.model, name) for name in self._block_list_names()]
        return [found[0].blocks if len(found) and isinstance(found[0], FusedBlocks) else found for found in lists]

    def _blocks(self) -> list[nn.Module]:
        return [block for block_list in self._block_lists() for block in block_list]

    def _attentions(self) -> list[Attention]:
        return [module for module in self.model.modules() if isinstance(module, Attention)]

    def _head_names(self) -> tuple[str, ...]:
        return ("next_scale_head", "mask_head") if self.is_hmar else ("head",)

    def _heads(self) -> list[nn.Module]:
        return [getattr(self.model, name) for name in self._head_names()]

    @property
    def is_hmar(self) -> bool:
        return isinstance(self.model, HMAR)

    @property
    def is_cached(self) -> bool:
        """Whether later scales read keys and values of earlier ones, as in VAR."""
        return not self.is_hmar and self.model.pattern == "block_causal"

    # --- weights ------------------------------------------------------------------------------------------------------

    def _sources_of_copies(self) -> list[nn.Parameter]:
        """Weights whose changes make a `refresh` necessary; those of all others are seen where they are."""
        derived_from = {id(parameter) for parameter in self.quantizer.parameters()}
        derived_from |= {id(attention.log_scale_H) for attention in self._attentions()}
        if isinstance(self.decoding, FusedDecoder):
            derived_from |= {id(parameter) for parameter in self.decoding.upsamples.parameters()}
        return [
            source
            for source, copied in self._pairs
            if (source.data_ptr() != copied.data_ptr() or id(copied) in derived_from) and not source.is_inference()
        ]

    def _current_versions(self) -> int:
        return sum(map(attrgetter("_version"), self._watched))

    def _refresh_if_changed(self) -> bool:
        for parameters, name, parameter in self._owners:
            if parameters.get(name) is not parameter:
                raise RuntimeError(
                    f"the weight {name} {list(parameter.shape)} was replaced by another tensor, as "
                    "load_state_dict(assign=True) does, and the engine has the old one: load weights in place "
                    "(assign=False), or make a new Engine"
                )
        changed = self._versions != self._current_versions()
        if changed:
            self.refresh()
        return changed

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights again. Graphs stay: they read the same memory."""
        for source, copied in self._pairs:
            if source.data_ptr() != copied.data_ptr():
                copied.copy_(source)
        self._derive()
        self._versions = self._current_versions()

    # --- images -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        class_B: Tensor,
        sampling: SamplingConfig | None = None,
        *,
        on_scale: Callable[[int, Tensor], None] | None = None,
        first_image: int = 0,
        seeds_B: Sequence[int] | Tensor | None = None,
        keys_B: Tensor | None = None,
        cfg_B: Sequence[float] | None = None,
        known: KnownCodes | None = None,
    ) -> GenerationOutput:
        """Images of the given classes; arguments as in `hmar.generate.generate_hmar`, and

        keys_B: keys of the images' random numbers, int64 [B], as `image_seed` gives them; instead of seeds.
        cfg_B: strengths of guidance, one an image, instead of that of `sampling`.

        The first call with a batch size and settings makes and captures their program, which takes seconds.
        """
        sampling = sampling or SamplingConfig()
        class_B = checked_classes(self.config, class_B, "cpu")
        batch = len(class_B)
        if keys_B is None:
            keys = image_keys(sampling, batch, first_image, seeds_B)
        elif keys_B.shape != (batch,) or keys_B.dtype != torch.int64:
            raise ValueError(f"keys_B is {keys_B.dtype} {list(keys_B.shape)}; expected int64 [{batch}], one an image.")
        else:
            keys = keys_B.tolist()
        cfg_B = [sampling.cfg] * batch if cfg_B is None else [replace(sampling, cfg=cfg).cfg for cfg in cfg_B]
        if len(cfg_B) != batch:
            raise ValueError(f"There are {len(cfg_B)} strengths of guidance for {batch} images; give one for each.")
        schedule = sampling.schedule if self.is_hmar else "none"
        named = isinstance(schedule, str | None) and isinstance(sampling.cfg_ramp, str)
        settings, factors = (resolve_named if named else resolve)(
            self.pyramid,
            batch,
            max(cfg_B) > 0,
            known is not None,
            self.is_cached,
            schedule,
            sampling.cfg_ramp,
            sampling.masked_cfg_factor,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.greedy,
        )
        if known is not None:
            check_known(known, batch, self.pyramid.length, self.config.vocab_size)
        with self._alone():
            # NOTE: looking at all weights takes the host as long as everything else before the first graph, so where
            # the device can work meanwhile, it begins; what old weights gave is dropped.
            begins = self.captures and on_scale is None
            if not begins:
                self._refresh_if_changed()
            program = self._program(settings)
            program.load(class_B, keys, np.outer(factors, cfg_B), known)
            output = program.run(on_scale)
            if begins and self._refresh_if_changed():
                output = program.run(on_scale)
            try:
                program.wait()
            except NonFiniteLogits as error:
                error.output = output
                raise
            return output

    @torch.no_grad()
    def decode(self, f_hat_BEhw: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of a quantised latent, which may be one of an early scale."""
        images = []
        with torch.autocast(self.device.type, enabled=False), self._convolutions():
            for part_BEhw in f_hat_BEhw.split(self.decoded_at_once):
                images.append(self.decoding(self.post_quant_conv(self.latents(part_BEhw))).clamp_(-1, 1))
        return images[0] if len(images) == 1 else torch.cat(images)

    @property
    def decoded_at_once(self) -> int:
        """Images of a batch that the decoder takes together."""
        return max(1, DECODED_PIXELS // (self.pyramid.side * self.tokenizer_config.stride) ** 2)

    def latents(self, f_hat_BEhw: Tensor) -> Tensor:
        """In the decoder's dtype and memory format."""
        layout = torch.contiguous_format if self.dtype is None else torch.channels_last
        return f_hat_BEhw.to(self.post_quant_conv.weight.dtype).contiguous(memory_format=layout)

    def _precision(self) -> AbstractContextManager:
        # NOTE: the cache of autocast would hold tensors of a graph's memory.
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False)

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Precision, device and cuDNN's choice of algorithms, as all steps run in them."""
        with ExitStack() as stack:
            for context in (self._precision(), self._current_device(), self._convolutions()):
                stack.enter_context(context)
            yield

    @contextmanager
    def _convolutions(self) -> Iterator[None]:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = before or (self.cudnn_benchmark and self.device.type == "cuda")
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

    def _current_device(self) -> AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    # --- programs -----------------------------------------------------------------------------------------------------

    @property
    def graph_bytes(self) -> int:
        """Memory that the graphs of all programs hold together."""
        return self._pool_bytes

    def forget(self) -> None:
        """Drop all programs and the memory of their graphs. Waits for the batch under way."""
        with self._alone():
            self._forget()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time. RuntimeError where it has entered already, from what a batch under way calls."""
        if self._lock_owner == threading.get_ident():
            raise RuntimeError(
                "the engine generates one batch at a time, and this is called from on_scale of the one under way: use "
                "its images when `generate` has returned, or another engine"
            )
        with self._lock:
            self._lock_owner = threading.get_ident()
            try:
                yield
            finally:
                self._lock_owner = None

    def _forget(self) -> None:
        self.programs.clear()
        self._pool, self._pool_bytes = None, 0
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _program(self, settings: Settings) -> Program:
        program = self.programs.get(settings)
        if program is not None:
            self.programs.move_to_end(settings)
            return program
        while len(self.programs) >= self.max_programs:
            self.programs.popitem(last=False)
        try:
            program = self._capture(settings)
        except RuntimeError as error:
            if not (self.programs and lack_of_memory(error)):
                raise
            program = None  # again below: what this error's frames hold is free there
        if program is None or (self.captures and self.programs and self.graph_bytes > self.max_bytes):
            # NOTE: graphs share a pool, of which nothing is given back before all of them are gone.
            program = None
            self._forget()
            program = self._capture(settings)
        self.programs[settings] = program
        return program

    def _capture(self, settings: Settings) -> Program:
        with self._surroundings():
            program = Program(self, settings)
            if self.captures:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._pool_bytes += program.capture(Recorder(self.device, self._pool, self._stream))
        return program


@dataclass
class Segment:
    """Steps that always run together: one graph.

    scale: the scale that is complete after them. row: the pass whose numbers of hidden codes say whether they run.
    """

    steps: list[Callable[[], None]]
    scale: int | None = None
    row: int | None = None
    graph: Graph | None = None

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for step in self.steps:
            step()


class Program:
    """The steps of a batch of images under one setting, and the buffers of its arguments.

    What a step leaves for later ones is an attribute. On a GPU it lies in the graphs' memory, which programs share, as
    they run one at a time; arguments and results have their own.
    """

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.sampling = settings.sampling
        pyramid, batch, device = engine.pyramid, settings.batch, engine.device
        # (scale, entry of its schedule) of every masked pass, in order; row 0 is for known codes, see masked_passes
        first = 0 if settings.edited else 1
        scales = range(1, pyramid.num_scales) if engine.is_hmar else ()
        self.rows = [(k, i) for k in scales for i in range(first, len(settings.schedule[k]))]
        # Classes, keys and strengths of guidance in one piece of memory, which one copy fills, at multiples of 16 bytes
        room, rows = batch + batch % 2, pyramid.num_scales + 1
        self.arguments = torch.zeros(2 * room + (rows * batch + 1) // 2, dtype=torch.int64, device=device)
        self.given = torch.zeros_like(self.arguments, device="cpu")
        parts = [
            (part[:batch], part[room : room + batch], part[2 * room :].view(torch.float32)[: rows * batch])
            for part in (self.arguments, self.given)
        ]
        self.class_B, self.keys_B, strengths = parts[0]
        self.strengths_SB = strengths.view(rows, batch)
        self.given_parts = [part.numpy() for part in parts[1]]
        self.positions_L = torch.arange(pyramid.length, device=device)
        self.f_hat_BEhw = engine.scale_maps.empty_f_hat(batch)
        self.codes_BL = torch.zeros(batch, pyramid.length, dtype=torch.int64, device=device)
        self.confidence_BL = torch.zeros(batch, pyramid.length, device=device)
        self.bad_SB = torch.zeros(pyramid.num_scales, batch, dtype=torch.bool, device=device)
        if settings.edited:
            self.known_codes_BL = torch.zeros(batch, pyramid.length, dtype=torch.int64, device=device)
            self.known_tokens_BL = torch.zeros(batch, pyramid.length, dtype=torch.bool, device=device)
            self.num_hidden_PB = torch.zeros(len(self.rows), batch, dtype=torch.int64, device=device)
        self.runs_P = [True] * len(self.rows)
        self.segments = self._segments()

    def _segments(self) -> list[Segment]:
        segments = [Segment([self._begin])]
        for k in range(self.engine.pyramid.num_scales):
            segments[-1].steps.append(partial(self._predict, k))
            for row, (scale, i) in enumerate(self.rows):
                if scale != k:
                    continue
                if self.settings.edited:
                    step = partial(self._masked_edit, row, k, i)
                    segments += [Segment([step], row=row), Segment([])]
                else:
                    segments[-1].steps.append(partial(self._masked, k, i))
            segments[-1].steps.append(partial(self._commit, k))
            segments[-1].scale = k
            segments.append(Segment([]))
        segments[-1].steps.append(self._decode)
        return [segment for segment in segments if segment.steps]

    def load(self, class_B: Tensor, keys: list[int], strengths_SB: np.ndarray, known: KnownCodes | None) -> None:
        """Fill the buffers."""
        for part, values in zip(self.given_parts, (class_B.numpy(), keys, strengths_SB.ravel()), strict=True):
            part[:] = values
        # NOTE: of ordinary memory, CUDA has taken what it copies when the call returns; only waiting is left out.
        self.arguments.copy_(self.given, non_blocking=True)
        if known is None:
            return
        batch, pyramid = self.settings.batch, self.engine.pyramid
        tokens_BL = known.tokens_BL.expand(batch, -1)
        self.known_codes_BL.copy_(known.codes_BL.expand(batch, -1))
        self.known_tokens_BL.copy_(tokens_BL)
        if self.rows:
            unknown_BL = ~tokens_BL.cpu()
            passes = {}
            for k in range(1, pyramid.num_scales):
                num_unknown = unknown_BL[:, pyramid.slice(k)].sum(1).tolist()
                passes[k] = masked_passes(self.settings.schedule[k], num_unknown)
            num_hidden_PB = torch.tensor([passes[k][i] for k, i in self.rows])
            self.runs_P = num_hidden_PB.any(1).tolist()
            self.num_hidden_PB.copy_(num_hidden_PB)

    def run(self, on_scale: Callable[[int, Tensor], None] | None) -> GenerationOutput:
        """All steps, and copies of what they gave. Waits for the device only where on_scale does."""
        # NOTE: graphs have their surroundings in them, and entering those takes the host longer than queueing a graph.
        with nullcontext() if self.engine.captures else self.engine._surroundings():
            for segment in self.segments:
                if segment.row is not None and not self.runs_P[segment.row]:
                    continue
                segment.run()
                if on_scale is not None and segment.scale is not None:
                    on_scale(segment.scale, self._f_hat())
        return GenerationOutput(self.images_BCHW.clone(), self.codes_BL.clone(), self._f_hat())

    def wait(self) -> None:
        """Until the device has come to the end; ValueError for logits that were not finite."""
        bad_SB = self.bad_SB.cpu()
        if bad_SB.any():
            refuse_nonfinite(range(len(bad_SB)), bad_SB)

    def _f_hat(self) -> Tensor:
        return self.f_hat_BEhw.clone(memory_format=torch.contiguous_format)

    def capture(self, recorder: Recorder) -> int:
        """Run all steps once, so that whatever is made on first use is there, then record them.

        Returns the bytes by which the recorder's pool has grown.
        """
        recorder.warm_up(self._run_segments)
        self._drop()
        del self.images_BCHW
        with recorder.measuring():
            for segment in self.segments:
                segment.graph, _ = recorder.record(segment.run)
            self._drop()
        return recorder.reserved_bytes

    def _run_segments(self) -> None:
        for segment in self.segments:
            segment.run()

    def _drop(self) -> None:
        """Let go of what steps leave for each other: once recorded, their memory is free for other programs."""
        self.inputs_BnE = self.hidden_Bn = self.caches = None
        for module in self.engine._remembered:
            module.vectors = None

    # --- steps --------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        engine, settings = self.engine, self.settings
        model = engine.model
        guided = any(settings.guided_S) or (settings.masked_guided and bool(self.rows))
        self.class_R, _ = with_null(guided, self.class_B, engine.config)
        model.embedding.classes.remember(self.class_R)
        cond_RC = model.embedding.classes(self.class_R)
        if isinstance(model.shared_modulation, Remembered):
            model.shared_modulation.remember(cond_RC)
        shared = model.shared_modulation(cond_RC)
        activated_RC = F.silu(cond_RC).to(engine.dtype or cond_RC.dtype)
        for block in engine._blocks():
            fused = isinstance(block.modulation.modulation, FusedModulation)
            block.modulation.remember(activated_RC if fused else shared)
        for head in engine._heads():
            head.modulation.remember(activated_RC)
        self.f_hat_BEhw.zero_()
        self.inputs_BnE = engine.scale_maps.first_inputs(self.f_hat_BEhw)
        self.bad_SB.zero_()
        self.caches = [LayerKeysValues(engine.pyramid.length) for _ in engine._blocks()] if engine.is_cached else None

    def _predict(self, k: int) -> None:
        engine, settings = self.engine, self.settings
        model, scale = engine.model, (k, k + 1)
        class_R, (inputs,) = self._with_null(settings.guided_S[k], self.inputs_BnE)
        if engine.is_hmar:
            logits_RnV = model.next_scale(class_R, inputs, scale)
        else:
            logits_RnV = model(class_R, inputs, scale, self.caches)
        span, drawn = engine.pyramid.slice(k), self._drawn(k)
        arguments = self.strengths_SB[k], self.keys_B, self.positions_L[span]
        draw(logits_RnV, self.sampling, *arguments, into=drawn, overlap=engine.overlap)
        self.hidden_Bn = None
        if settings.edited:
            self.hidden_Bn = ~self.known_tokens_BL[:, span]
            drawn.codes.copy_(torch.where(self.hidden_Bn, drawn.codes, self.known_codes_BL[:, span]))

    def _masked(self, k: int, i: int) -> None:
        """A masked pass that hides as many codes of every image; only their logits are computed."""
        num_hidden, drawn = sum(self.settings.schedule[k][i:]), self._drawn(k)
        places_Bm, positions_Bm, self.hidden_Bn = least_confident(
            drawn.confidence, self.hidden_Bn, count=num_hidden, first=self.engine.pyramid.offsets[k]
        )
        logits_RmV = self._masked_logits(k, self.settings.masked_guided, places_Bm)
        # NOTE: a kernel that does not overlap with others, the first of the residual, comes between positions and draw.
        options = {"into": drawn, "at_Bn": places_Bm, "overlap": self.engine.overlap}
        draw(logits_RmV, self.sampling, self.strengths_SB[-1], self.keys_B, positions_Bm, masked_step(i), **options)

    def _masked_edit(self, row: int, k: int, i: int) -> None:
        """A masked pass that hides as many codes of each image as the arguments say; none means that it is skipped."""
        # NOTE: the first pass that sees known codes takes the place of the next-scale pass, with its guidance.
        guided, strength = (self.settings.guided_S[k], k) if i == 0 else (self.settings.masked_guided, -1)
        num_hidden_B, drawn = self.num_hidden_PB[row], self._drawn(k)
        active_B1 = num_hidden_B[:, None] > 0
        fewer_Bn = stay_hidden(drawn.confidence, self.hidden_Bn, num_hidden_B)
        # NOTE: in place, for a graph that is skipped must leave what the next one reads as it was.
        self.hidden_Bn.copy_(torch.where(active_B1, fewer_Bn, self.hidden_Bn))
        logits_RnV = self._masked_logits(k, guided)
        positions_n = self.positions_L[self.engine.pyramid.slice(k)]
        codes_Bn, confidence_Bn, bad_Bn = draw(
            logits_RnV, self.sampling, self.strengths_SB[strength], self.keys_B, positions_n, masked_step(i)
        )
        drawn.codes.copy_(torch.where(self.hidden_Bn & active_B1, codes_Bn, drawn.codes))
        drawn.confidence.copy_(torch.where(active_B1, confidence_Bn, drawn.confidence))
        drawn.nonfinite.logical_or_(bad_Bn.any(1))

    def _drawn(self, k: int) -> SampledCodes:
        """The draws of scale k so far, in their places."""
        span = self.engine.pyramid.slice(k)
        return SampledCodes(self.codes_BL[:, span], self.confidence_BL[:, span], self.bad_SB[k])

    def _masked_logits(self, k: int, guided: bool, places_Bm: Tensor | None = None) -> Tensor:
        engine = self.engine
        residuals_BnE = engine.scale_maps.own_residual(self._drawn(k).codes, k, overlap=engine.overlap)
        class_R, arguments = self._with_null(guided, self.inputs_BnE, residuals_BnE, self.hidden_Bn)
        places_Rm = torch.cat([places_Bm, places_Bm]) if guided and places_Bm is not None else places_Bm
        return engine.model.masked(class_R, *arguments, (k, k + 1), places_Rm)

    def _with_null(self, guided: bool, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `hmar.generate.with_null`, of classes that are there already, and in the dtype of the embedding's weight;
        an embedding that rounds and repeats by itself takes the tensors as they are."""
        embedding, class_R = self.engine.model.embedding, self.class_R
        class_R = class_R if guided else class_R[: self.settings.batch]
        if isinstance(embedding, FusedTokenEmbedding):
            return class_R, list(tensors)
        dtype = embedding.codes.weight.dtype
        tensors = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
        return class_R, [torch.cat([tensor, tensor]) for tensor in tensors] if guided else tensors

    def _commit(self, k: int) -> None:
        codes_Bn, overlap = self._drawn(k).codes, self.engine.overlap
        self.inputs_BnE = self.engine.scale_maps.accumulate_(self.f_hat_BEhw, codes_Bn, k, overlap=overlap)

    def _decode(self) -> None:
        self.images_BCHW = self.engine.decode(self.f_hat_BEhw)


@dataclass(frozen=True)
class Choices:
    """How blocks and heads compute, see `Engine`. few_rows: up to which products are by the kernels for few."""

    few_rows: int
    attention: str
    overlap: bool


class FusedTokenEmbedding(nn.Module):
    """The embedding of one scale, whose tokens of codes are one kernel's. Rows of the model that are a multiple of the
    images, as with the null class, have the same tokens."""

    def __init__(self, embedding: TokenEmbedding, choices: Choices):
        super().__init__()
        self.pyramid, self.stream_dtype = embedding.pyramid, embedding.stream_dtype
        self.classes, self.codes, self.scales = embedding.classes, embedding.codes, embedding.scales
        self.start_LC, self.position_LC = embedding.start_LC, embedding.position_LC
        self.choices = choices

    def forward(
        self, class_R: Tensor, inputs_BnE: Tensor, scales: Scales, known: Known | None = None
    ) -> tuple[Tensor, Tensor]:
        k, last = scales
        assert last == k + 1, f"a pass has the tokens of one scale, got {scales}"
        cond_RC = self.classes(class_R)
        position_nC, scale_C = self.position_LC[self.pyramid.slice(k)], self.scales.weight[k]
        if k == 0:
            x_RnC = cond_RC[:, None] + self.start_LC + position_nC + scale_C
        else:
            x_RnC = token_embedding(
                inputs_BnE,
                self.codes.weight,
                self.codes.bias,
                position_nC,
                scale_C,
                known,
                copies=len(class_R) // len(inputs_BnE),
                overlap=self.choices.overlap,
            )
        return cond_RC, x_RnC if self.stream_dtype is None else x_RnC.to(self.stream_dtype)


class Summands(NamedTuple):
    """`Residual` whose branch is still the sum of parts and a bias, for the next norm to add up."""

    x_BLC: Tensor
    branch_PBLC: Tensor
    bias_C: Tensor
    gate_B1C: Tensor

    def norm(self, scale_B1C: Tensor, shift_B1C: Tensor) -> tuple[Tensor, Tensor]:
        arguments = self.x_BLC, self.branch_PBLC, self.bias_C, self.gate_B1C, scale_B1C, shift_B1C
        return summed_modulated_norm(*arguments)

    def take(self, wanted_Bm: Tensor) -> Summands:
        index_Bm1 = wanted_Bm[..., None]
        branch_PBmC = self.branch_PBLC.take_along_dim(index_Bm1[None], dim=2)
        return self._replace(x_BLC=self.x_BLC.take_along_dim(index_Bm1, dim=1), branch_PBLC=branch_PBmC)


Stream = Residual | Summands


def is_summed(stream: Stream) -> bool:
    """Whether nothing is left to be added."""
    return isinstance(stream, Residual) and stream.branch_BLC is None


def parts_of(rows: int, outputs: int, inputs: int) -> int:
    """Among how many products K is divided, of a layer that writes the residual stream."""
    of_layers = next(PARTS[width] for width in PARTS if outputs <= width)
    parts = next((parts for most, parts in of_layers[inputs > outputs] if rows <= most), 1)
    # NOTE: cuBLAS is fast where all parts begin at multiples of 16 bytes.
    return parts if inputs % (8 * parts) == 0 else 1


class FusedLinear(nn.Module):
    """A linear layer with what surrounds it in the same kernel, where its rows are few."""

    def __init__(self, layer: nn.Linear, choices: Choices, gelu: bool = False):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.choices, self.gelu = choices, gelu

    def takes(self, x_BLC: Tensor, vector_B1C: Tensor) -> bool:
        """Whether so many rows are few; with norms or gates of these vectors."""
        # NOTE: modulation that all blocks share is float32, which the kernels do not read.
        return x_BLC.shape[:-1].numel() <= self.choices.few_rows and vector_B1C.dtype == self.weight.dtype

    def normed(self, stream: Stream, scale_B1C: Tensor, shift_B1C: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and this layer of its norm."""
        if is_summed(stream) and self.takes(stream.x_BLC, scale_B1C):
            norm = {"norm": (scale_B1C, shift_B1C), "statistics": stream.statistics_BLT2}
            return stream.x_BLC, self._few(stream.x_BLC, **norm)
        x_BLC, h_BLC = stream.norm(scale_B1C, shift_B1C)
        return x_BLC, self(h_BLC)

    def added(self, x_BLC: Tensor, gate_B1C: Tensor, h_BLC: Tensor) -> Stream:
        """x + gate times this layer of h."""
        if self.takes(x_BLC, gate_B1C):
            surroundings = {"residual": x_BLC, "gate": gate_B1C}
            if x_BLC.shape[:-1].numel() > MAX_NORMED_ROWS:
                return Residual(self._few(h_BLC, **surroundings))
            y_BLC, statistics_BLT2 = self._few(h_BLC, **surroundings, return_statistics=True)
            return Residual(y_BLC, statistics_BLT2=statistics_BLT2)
        parts = parts_of(h_BLC.shape[:-1].numel(), *self.weight.shape)
        branch_PBLC = linear_parts(h_BLC, self.weight, parts) if parts > 1 else linear(h_BLC, self.weight)[None]
        return Summands(x_BLC, branch_PBLC, self.bias, gate_B1C)

    def forward(self, x_BLC: Tensor) -> Tensor:
        if x_BLC.shape[:-1].numel() <= self.choices.few_rows:
            return self._few(x_BLC)
        return linear(x_BLC, self.weight, self.bias, gelu=self.gelu)

    def _few(self, x_BLC: Tensor, **surroundings) -> Tensor | tuple[Tensor, Tensor]:
        options = {"impl": "cuda", "overlap": self.choices.overlap}
        return linear(x_BLC, self.weight, self.bias, gelu=self.gelu, **surroundings, **options)


class FusedModulation(nn.Module):
    """The vectors [R, 1, C] of a block or a head, from the class embedding after SiLU [R, C], in the weight's dtype."""

    def __init__(self, layer: nn.Linear, choices: Choices):
        super().__init__()
        self.linear = FusedLinear(layer, choices)

    def forward(self, activated_RC: Tensor) -> Sequence[Tensor]:
        return self.linear(activated_RC)[:, None].split(activated_RC.shape[1], dim=-1)


class FusedBlock(nn.Module):
    """A block of such layers, which reads and writes the residual stream in its products where rows are few."""

    def __init__(self, block: Block, choices: Choices):
        super().__init__()
        self.modulation = block.modulation
        self.attention, self.mlp = FusedAttention(block.attention, choices), FusedMLP(block.mlp, choices)

    def forward(self, stream: Stream, cond: Tensor, mask: SpanMask, cache: LayerKeysValues | None = None) -> Stream:
        gate_attn, gate_mlp, scale_attn, scale_mlp, shift_attn, shift_mlp = self.modulation(cond)
        stream = self.attention(stream, gate_attn, scale_attn, shift_attn, mask, cache)
        return self.mlp(stream, gate_mlp, scale_mlp, shift_mlp)

    def weights(self) -> BlockWeights:
        attention, mlp = self.attention.attention, self.mlp
        layers = self.attention.proj, mlp.fc1, mlp.fc2
        return BlockWeights(
            *(attention.qkv.weight, attention.q_bias_C, attention.v_bias_C, attention.log_scale_H),
            *(tensor for layer in layers for tensor in (layer.weight, layer.bias)),
        )


class FusedBlocks(nn.Module):
    """Such blocks one after the other, in one kernel where rows are few."""

    def __init__(self, fused: Sequence[FusedBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(fused)
        self.table = Table([block.weights() for block in fused])

    def forward(self, stream: Stream, cond: Tensor, mask: SpanMask, cache: LayerKeysValues | None = None) -> Stream:
        if is_summed(stream) and stream.x_BLC.shape[:-1].numel() <= blocks.MAX_ROWS:
            vectors = [block.modulation(cond) for block in self.blocks]
            if blocks.refusal_of_rows(stream.x_BLC, vectors, self.table.dtype) is None:
                # NOTE: a pass has the tokens of one scale, which all see each other under either mask.
                options = {"max_log_scale": Attention.MAX_LOG_SCALE, "impl": "cuda"}
                y_BLC, statistics_BLT2 = transformer_blocks(stream.x_BLC, self.table, vectors, **options)
                return Residual(y_BLC, statistics_BLT2=statistics_BLT2)
        for block in self.blocks:
            stream = block(stream, cond, mask, cache)
        return stream


class FusedAttention(nn.Module):
    """Attention of the tokens of one scale, and of earlier ones where they are cached."""

    def __init__(self, attention: Attention, choices: Choices):
        super().__init__()
        self.attention, self.choices = attention, choices
        self.qkv, self.proj = FusedLinear(attention.qkv, choices), FusedLinear(attention.proj, choices)

    def forward(
        self,
        stream: Stream,
        gate_B1C: Tensor,
        scale_B1C: Tensor,
        shift_B1C: Tensor,
        mask: SpanMask,
        cache: LayerKeysValues | None,
    ) -> Stream:
        x_BLC, qkv_BLM = self.qkv.normed(stream, scale_B1C, shift_B1C)
        return self.proj.added(x_BLC, gate_B1C, self._attended(qkv_BLM, mask, cache))

    def _attended(self, qkv_BLM: Tensor, mask: SpanMask, cache: LayerKeysValues | None) -> Tensor:
        module, (B, length, M) = self.attention, qkv_BLM.shape
        num_keys = length if cache is None else cache.length + length
        if length > MAX_LENGTH or length * num_keys > FUSED_PAIRS or self.choices.attention == "separate":
            return module.attended(qkv_BLM, mask, cache)
        H = len(module.log_scale_H)
        earlier = None if cache is None else KVCache(*cache.reserve(qkv_BLM, B, H, length, M // (3 * H)))
        # NOTE: a pass has the tokens of one scale, which see each other and all that is cached. What may overlap with a
        # product of cuBLAS begins .5 us later than what may not (reports/data/generation_steps_h100.json, "gaps").
        return qk_norm_attention(
            qkv_BLM,
            module.q_bias_C,
            module.v_bias_C,
            module.log_scale_H,
            max_log_scale=module.MAX_LOG_SCALE,
            cache=earlier,
            impl="triton",
            overlap=self.choices.overlap and qkv_BLM.shape[:-1].numel() <= self.choices.few_rows,
        )


class FusedMLP(nn.Module):
    """The MLP, with its GELU behind the first product and not a pass of its own."""

    def __init__(self, mlp: MLP, choices: Choices):
        super().__init__()
        self.fc1, self.fc2 = FusedLinear(mlp.fc1, choices, gelu=True), FusedLinear(mlp.fc2, choices)

    def forward(self, stream: Stream, gate_B1C: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Stream:
        x_BLC, hidden_BLM = self.fc1.normed(stream, scale_B1C, shift_B1C)
        return self.fc2.added(x_BLC, gate_B1C, hidden_BLM)


class FusedHead(nn.Module):
    """The head, with its norm in the same kernel where rows are few."""

    def __init__(self, head: Head, choices: Choices):
        super().__init__()
        self.modulation, self.linear = head.modulation, FusedLinear(head.linear, choices)

    def forward(self, stream: Stream, cond_BC: Tensor) -> Tensor:
        return self.linear.normed(stream, *self.modulation(cond_BC))[1]


class Remembered(nn.Module):
    """A modulation, or the class embedding, which is computed once an image, for all rows, and read by every pass."""

    def __init__(self, modulation: nn.Module):
        super().__init__()
        self.modulation = modulation
        self.vectors: Tensor | Sequence[Tensor] | None = None

    def remember(self, cond: Tensor) -> None:
        self.vectors = self.modulation(cond)

    def forward(self, cond: Tensor) -> Tensor | Sequence[Tensor]:
        # NOTE: rows of the null class come last, so a pass without it has the first ones.
        rows = cond.shape[0]
        if isinstance(self.vectors, Tensor):
            return self.vectors[:rows]
        return [vector[:rows] for vector in self.vectors]


def remembering(model: nn.Module) -> nn.Module:
    """The model with the class embedding and every modulation remembered: of blocks, heads, and what blocks share."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "modulation", None), nn.Module):
            module.modulation = Remembered(module.modulation)
    model.embedding.classes = Remembered(model.embedding.classes)
    if isinstance(model.shared_modulation, SharedModulation):
        model.shared_modulation = Remembered(model.shared_modulation)
    return model
