"""AdamW over many tensors in one launch, in Triton.

    g = grad / grad_scale;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = w (1 - lr decay) - lr m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps)

Grid: chunks of CHUNK values of the tensors one after the other; tables on the device say which tensor a chunk belongs
to and where the tensors are. 28 bytes a value are moved: w, g, m, v read, w, m, v written. Unless `skip` is 0, nothing
is.

The equations are stated in reference.py; the tables and argument checks live in api.py.
"""

import triton
import triton.language as tl

CHUNK, BLOCK, WARPS = 8192, 2048, 8


@triton.jit
def _address(table_ptr, i, num_tensors, ROW: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table_ptr + ROW * num_tensors + i).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def adamw_kernel(
    addresses_ptr,
    sizes_ptr,
    decays_ptr,
    chunks_ptr,
    corrections_ptr,
    grad_scale_ptr,
    skip_ptr,
    num_tensors,
    num_chunks,
    lr,
    beta1,
    beta2,
    eps,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.load(chunks_ptr + tl.program_id(0))
    begin = tl.load(chunks_ptr + num_chunks + tl.program_id(0))
    weight_ptr = _address(addresses_ptr, i, num_tensors, 0, ALIGNED)
    m_ptr = _address(addresses_ptr, i, num_tensors, 1, ALIGNED)
    v_ptr = _address(addresses_ptr, i, num_tensors, 2, ALIGNED)
    grad_ptr = _address(addresses_ptr, i, num_tensors, 3, ALIGNED)
    size = tl.where(tl.load(skip_ptr) == 0.0, tl.load(sizes_ptr + i), 0)
    shrunk = 1.0 - lr * tl.load(decays_ptr + i)
    rate = lr / tl.load(corrections_ptr + i)
    root = tl.sqrt(tl.load(corrections_ptr + num_tensors + i))
    grad_scale = tl.load(grad_scale_ptr)

    for start in range(0, CHUNK, BLOCK):
        # NOTE: chunks begin at multiples of 8192, so that aligned tensors are read in vectors.
        offs = tl.multiple_of(begin + start, 16) + tl.arange(0, BLOCK)
        mask = offs < size
        g = tl.load(grad_ptr + offs, mask=mask, other=0.0) / grad_scale
        m = tl.load(m_ptr + offs, mask=mask, other=0.0)
        v = tl.load(v_ptr + offs, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
        m = beta1 * m + (1.0 - beta1) * g
        v = beta2 * v + (1.0 - beta2) * g * g
        weight = weight * shrunk - rate * m / (tl.sqrt(v) / root + eps)
        tl.store(m_ptr + offs, m, mask=mask)
        tl.store(v_ptr + offs, v, mask=mask)
        tl.store(weight_ptr + offs, weight, mask=mask)
