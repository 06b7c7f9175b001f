"""Multi-scale 3-D deformable sampling (Sec. 4.1, supplement C).

Triton kernels, PyTorch reference, autograd, dispatch.

What is computed. Every query q of every head m looks at P points in each of L feature maps and
returns their weighted mean:

    out[q, m] = sum over levels l and points p of
                a[q, m, l, p] * value_l[m] at location x[q, m, l, p]

    x = reference[q, l] + offset[q, m, l, p] * scale[l]    one equation for each of the axes t, h, w
    a = softmax over the L*P points of logits[q, m]

A location counts 0 and 1 as the outer edges of a level, so cell i of n has its centre at
(i + 0.5) / n, and x lies at c = x * n - 0.5 in units of cells. "value at x" is trilinear: along
each axis the two cells around c, floor(c) and floor(c) + 1, weigh 1 - |c - cell|; each of the
2*2*2 corners weighs the product of its three axis weights; a corner outside the level is zero.

The derivative. Let G = d loss / d out[q, m] (a vector of D channels), v_k the eight corner
vectors, u_k = ut * uh * uw their trilinear weights. All but the value's gradient needs one number
per corner, the dot product g_k = G . v_k:

    d loss / d value at corner k  +=  a * u_k * G     (a sum over all queries that touch the cell)
    d loss / d a                   =  s = sum_k u_k * g_k
    d loss / d logit               =  a * (s - sum over points of a * s)
                                   =  a * (s - G . out)     as in FlashAttention
    d loss / d c along t           =  a * sum_k (1 at the upper corners, -1 at the lower)
                                              * uh * uw * g_k; h, w alike
    d loss / d offset              =  d loss / d c * n * scale
    d loss / d reference           =  sum over heads and points of d loss / d c * n

The loop nest that the kernels stand for:

    for clip b, head m, tile of BLOCK_Q queries:         # in parallel: the grid, one program each
        for level l, point p:                            # in turn, inside the program
            for corner k of 8:                           # unrolled
                for query of the tile, channel d of D:   # in parallel: the lanes of the warp
                    out[b, q, m, d] += a * u_k * value_l[b, corner, m, d]

Why it is fast and small. Locations and soft-maxed weights live in registers only, in the forward
and again in the backward, which recomputes them; stored, they would take 273 MB a layer at the
size of UCF101-24's clips. A program is one warp, whose lanes hold 16 bytes of a row of value each,
so that a corner is one full-width load and a sum over channels a few shuffles: no shared memory,
no barrier. What a program writes belongs to it alone, except the value's gradient, where many
queries meet in one cell: that, and nothing else, takes atomics, in float32 (bfloat16 would lose
most of the sum). Their order changes from run to run and with it the rounding; under
torch.use_deterministic_algorithms(True) the same kernel adds integers, in fixed point, whose sum
has no order.

Precision: float16, bfloat16 and float32 values are located and summed in float32, float64
throughout in float64. For training bfloat16 is recommended over float16: the value's gradient sums
over thousands of queries, and cast to float16 such sums overflow first.

Departures from the paper: none in the result. The op published with it is CUDA only, and its
backward scatters four of the corners with the weights of the other four and adds where it should
multiply; so gradients are checked against autograd through F.grid_sample instead.
"""

# B clips, Q queries, S cells of all levels, M heads, L levels, P points of a level,
# D channels of a head; (t, h, w)

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
except ImportError:
    # there are wheels for Linux only; asking for the kernels elsewhere is an error (_run)
    triton = None


if triton is not None:

    @triton.jit
    def _neighbour(cell, size, UPPER: tl.constexpr):
        """The lower or upper of the two cells around a coordinate on an axis of `size`.

        -> index, weight, inside."""
        position = tl.floor(cell) + UPPER
        # Tested before the cast to an integer: 1e20, inf and NaN compare as outside, but their
        # casts could be anything.
        inside = (position >= 0) & (position < size)
        # where also keeps NaN out of the products below
        weight = tl.where(inside, 1 - tl.abs(cell - position), 0)
        return tl.where(inside, position, 0).to(tl.int32), weight, inside

    @triton.jit
    def _normaliser(logits, row, in_query,
                    POINTS: tl.constexpr, BLOCK_P: tl.constexpr, COMPUTE: tl.constexpr):
        """Maximum and inverse sum of the soft-max over a head's points.

        weight = exp(logit - maximum) * inverse sum."""
        point = tl.arange(0, BLOCK_P)
        # BLOCK_P is the next power of two (Triton's vectors need one); the points past L*P must
        # not count, hence -inf.
        in_point = (point < POINTS)[None, :]
        x = tl.load(logits + row[:, None] * POINTS + point[None, :],
                    mask=in_query[:, None] & in_point, other=0)
        x = tl.where(in_point, x.to(COMPUTE), -float("inf"))  # (BLOCK_Q, BLOCK_P)
        top = tl.max(x, 1)
        return top, 1 / tl.sum(tl.exp(x - top[:, None]), 1)

    @triton.jit
    def _level(levels, references, scales, query, in_query, level,
               L: tl.constexpr, FUSED: tl.constexpr, COMPUTE: tl.constexpr):
        """A level's sizes and first cell; base and unit of its coordinates, in t, h, w.

        cell = base + offset * unit."""
        depth = tl.load(levels + level * 4)
        height = tl.load(levels + level * 4 + 1)
        width = tl.load(levels + level * 4 + 2)
        start = tl.load(levels + level * 4 + 3)
        unit_t, unit_h, unit_w = depth.to(COMPUTE), height.to(COMPUTE), width.to(COMPUTE)
        base_t = tl.full(query.shape, -0.5, COMPUTE)
        base_h, base_w = base_t, base_t
        if FUSED:
            reference = references + (query * L + level) * 3
            base_t += tl.load(reference, mask=in_query, other=0).to(COMPUTE) * unit_t
            base_h += tl.load(reference + 1, mask=in_query, other=0).to(COMPUTE) * unit_h
            base_w += tl.load(reference + 2, mask=in_query, other=0).to(COMPUTE) * unit_w
            unit_t *= tl.load(scales + level * 3)
            unit_h *= tl.load(scales + level * 3 + 1)
            unit_w *= tl.load(scales + level * 3 + 2)
        return depth, height, width, start, base_t, base_h, base_w, unit_t, unit_h, unit_w

    @triton.jit
    def _forward_kernel(
        value,          # (B, S, M, D)
        references,     # (B, Q, L, 3); unused unless FUSED
        offsets,        # (B, Q, M, L, P, 3); unless FUSED the locations
        logits,         # (B, Q, M, L, P); unless FUSED the weights
        scales,         # (L, 3), dtype COMPUTE; unused unless FUSED
        levels,         # (L, 4) int32: T_l, H_l, W_l and the number of cells before the level
        out,            # (B, Q, M, D), written
        num_queries, num_cells,  # Q, S
        M: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
        # FUSED: references, offsets and logits are given (True), or locations and weights (False)
        FUSED: tl.constexpr,
        COMPUTE: tl.constexpr,  # tl.float32, or tl.float64 for float64 values
        BLOCK_Q: tl.constexpr,  # queries of a tile
        # D and L * P, rounded up to powers of two
        BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    ):
        # Program (i, m, b) computes head m of clip b for queries i * BLOCK_Q and on. Neighbouring
        # programs hold neighbouring queries of one head, which sample neighbouring cells: they
        # find each other's rows in the cache.
        query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        head = tl.program_id(1)
        # B clips may pass 2^31 elements; one clip may not (_run)
        batch = tl.program_id(2).to(tl.int64)
        channel = tl.arange(0, BLOCK_D)[None, :]
        in_query = query < num_queries  # the last tile may hang over the end of the queries
        in_channel = channel < D        # D need not be a power of two
        row = query * M + head          # a (query, head) pair within the clip
        value += batch * num_cells * (M * D) + head * D
        offsets += batch * num_queries * (M * L * P * 3)
        logits += batch * num_queries * (M * L * P)
        out += batch * num_queries * (M * D)
        if FUSED:
            references += batch * num_queries * (L * 3)
            top, inverse = _normaliser(logits, row, in_query, L * P, BLOCK_P, COMPUTE)
        total = tl.zeros((BLOCK_Q, BLOCK_D), COMPUTE)
        for level in range(L):
            depth, height, width, start, base_t, base_h, base_w, unit_t, unit_h, unit_w = _level(
                levels, references, scales, query, in_query, level, L, FUSED, COMPUTE)
            for point in range(P):
                entry = row * (L * P) + level * P + point
                # Queries past the end load zeros and sample some cell for nothing; their rows are
                # not stored.
                offset = offsets + entry * 3
                cell_t = base_t + tl.load(offset, mask=in_query, other=0).to(COMPUTE) * unit_t
                cell_h = base_h + tl.load(offset + 1, mask=in_query, other=0).to(COMPUTE) * unit_h
                cell_w = base_w + tl.load(offset + 2, mask=in_query, other=0).to(COMPUTE) * unit_w
                weight = tl.load(logits + entry, mask=in_query, other=0).to(COMPUTE)
                if FUSED:
                    weight = tl.exp(weight - top) * inverse
                for upper_t in tl.static_range(2):
                    index_t, weight_t, inside_t = _neighbour(cell_t, depth, upper_t)
                    for upper_h in tl.static_range(2):
                        index_h, weight_h, inside_h = _neighbour(cell_h, height, upper_h)
                        for upper_w in tl.static_range(2):
                            index_w, weight_w, inside_w = _neighbour(cell_w, width, upper_w)
                            cell = start + (index_t * height + index_h) * width + index_w
                            position = cell[:, None] * (M * D) + channel
                            # A corner outside is masked, not only weighted by zero: 0 * inf would
                            # be NaN.
                            mask = (inside_t & inside_h & inside_w)[:, None] & in_channel
                            corner = tl.load(value + position, mask=mask, other=0).to(COMPUTE)
                            total += (weight * weight_t * weight_h * weight_w)[:, None] * corner
        tl.store(out + row[:, None] * D + channel, total, mask=in_query[:, None] & in_channel)

    @triton.jit
    def _backward_kernel(
        value, references, offsets, logits, scales, levels,  # as in the forward
        out,                # (B, Q, M, D), the forward's result; unused unless FUSED
        grad_out,           # (B, Q, M, D)
        # (1,) dtype COMPUTE: what stands for 1.0 in grad_value if DETERMINISTIC; else unused
        fixed_point,
        # (B, S, M, D) zeros, dtype COMPUTE or, if DETERMINISTIC, int64; added to
        grad_value,
        # (B, Q, M, L, 3) dtype COMPUTE, one share a head; written if REFERENCE_GRAD
        grad_references,
        grad_offsets,       # (B, Q, M, L, P, 3), written
        grad_logits,        # (B, Q, M, L, P), written
        num_queries, num_cells,
        M: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
        FUSED: tl.constexpr, REFERENCE_GRAD: tl.constexpr, DETERMINISTIC: tl.constexpr,
        COMPUTE: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    ):
        # The grid, the masks and the loops are the forward's.
        query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        head = tl.program_id(1)
        batch = tl.program_id(2).to(tl.int64)
        channel = tl.arange(0, BLOCK_D)[None, :]
        in_query = query < num_queries
        in_channel = channel < D
        row = query * M + head
        value += batch * num_cells * (M * D) + head * D
        grad_value += batch * num_cells * (M * D) + head * D
        offsets += batch * num_queries * (M * L * P * 3)
        grad_offsets += batch * num_queries * (M * L * P * 3)
        logits += batch * num_queries * (M * L * P)
        grad_logits += batch * num_queries * (M * L * P)
        tile = batch * num_queries * (M * D) + row[:, None] * D + channel
        in_tile = in_query[:, None] & in_channel
        grad = tl.load(grad_out + tile, mask=in_tile, other=0).to(COMPUTE)  # G
        if FUSED:
            references += batch * num_queries * (L * 3)
            grad_references += batch * num_queries * (M * L * 3)
            top, inverse = _normaliser(logits, row, in_query, L * P, BLOCK_P, COMPUTE)
            result = tl.load(out + tile, mask=in_tile, other=0).to(COMPUTE)
            mean = tl.sum(grad * result, 1)  # G . out = sum of a * s
        scattered = grad
        if DETERMINISTIC:
            scattered = grad * tl.load(fixed_point)
        for level in range(L):
            depth, height, width, start, base_t, base_h, base_w, unit_t, unit_h, unit_w = _level(
                levels, references, scales, query, in_query, level, L, FUSED, COMPUTE)
            sum_t = tl.zeros((BLOCK_Q,), COMPUTE)
            sum_h, sum_w = sum_t, sum_t
            for point in range(P):
                entry = row * (L * P) + level * P + point
                offset = offsets + entry * 3
                cell_t = base_t + tl.load(offset, mask=in_query, other=0).to(COMPUTE) * unit_t
                cell_h = base_h + tl.load(offset + 1, mask=in_query, other=0).to(COMPUTE) * unit_h
                cell_w = base_w + tl.load(offset + 2, mask=in_query, other=0).to(COMPUTE) * unit_w
                weight = tl.load(logits + entry, mask=in_query, other=0).to(COMPUTE)
                if FUSED:
                    weight = tl.exp(weight - top) * inverse
                grad_weight = tl.zeros((BLOCK_Q,), COMPUTE)
                grad_t, grad_h, grad_w = grad_weight, grad_weight, grad_weight
                for upper_t in tl.static_range(2):
                    index_t, weight_t, inside_t = _neighbour(cell_t, depth, upper_t)
                    for upper_h in tl.static_range(2):
                        index_h, weight_h, inside_h = _neighbour(cell_h, height, upper_h)
                        for upper_w in tl.static_range(2):
                            index_w, weight_w, inside_w = _neighbour(cell_w, width, upper_w)
                            cell = start + (index_t * height + index_h) * width + index_w
                            position = cell[:, None] * (M * D) + channel
                            mask = (inside_t & inside_h & inside_w & in_query)[:, None] & in_channel
                            corner = tl.load(value + position, mask=mask, other=0).to(COMPUTE)
                            dot = tl.sum(grad * corner, 1)  # g_k
                            grad_weight += weight_t * weight_h * weight_w * dot
                            grad_t += (2 * upper_t - 1) * (weight_h * weight_w * dot)
                            grad_h += (2 * upper_h - 1) * (weight_t * weight_w * dot)
                            grad_w += (2 * upper_w - 1) * (weight_t * weight_h * dot)
                            share = (weight * weight_t * weight_h * weight_w)[:, None] * scattered
                            if DETERMINISTIC:
                                share = share.to(tl.int64)
                            # Relaxed: the sums are read after the kernel, so nothing but the
                            # adding has to be atomic.
                            tl.atomic_add(grad_value + position, share, mask=mask, sem="relaxed")
                if FUSED:
                    grad_weight = weight * (grad_weight - mean)
                tl.store(grad_logits + entry, grad_weight, mask=in_query)
                tl.store(grad_offsets + entry * 3, weight * grad_t * unit_t, mask=in_query)
                tl.store(grad_offsets + entry * 3 + 1, weight * grad_h * unit_h, mask=in_query)
                tl.store(grad_offsets + entry * 3 + 2, weight * grad_w * unit_w, mask=in_query)
                sum_t += weight * grad_t
                sum_h += weight * grad_h
                sum_w += weight * grad_w
            if REFERENCE_GRAD:
                share_of_head = grad_references + (row * L + level) * 3
                tl.store(share_of_head, sum_t * depth, mask=in_query)
                tl.store(share_of_head + 1, sum_h * height, mask=in_query)
                tl.store(share_of_head + 2, sum_w * width, mask=in_query)


def _tile(value, element_size):
    """(queries of a program, its warps): one warp, each lane 16 bytes of rows.

    A row is D elements of `element_size` bytes."""
    lanes = torch.cuda.get_device_properties(value.device).warp_size if value.is_cuda else 32
    return max(1, lanes * 16 // (triton.next_power_of_2(value.shape[3]) * element_size)), 1


@functools.lru_cache(maxsize=256)
def _level_table(shapes, device):
    """Flat sizes (T_0, H_0, W_0, T_1, ...) -> (L, 4) int32: T, H, W, first cell.

    Cached, as it is copied to the GPU."""
    sizes = list(zip(shapes[0::3], shapes[1::3], shapes[2::3]))
    starts = itertools.accumulate(map(math.prod, sizes), initial=0)
    rows = [(*size, start) for size, start in zip(sizes, starts)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _launch(kernel, value, references, offsets, logits, scales, shapes, others, element_size,
            **flags):
    """Run `kernel` over a grid of (query tiles, heads, clips).

    Its tiles are for rows of elements of `element_size` bytes. `others` are its pointers past the
    level table, contiguous; references and scales None: locations, weights given."""
    batch, num_cells, heads, dim = value.shape
    _, num_queries, _, levels, points, _ = offsets.shape
    block_queries, num_warps = _tile(value, element_size)
    grid = (triton.cdiv(num_queries, block_queries), heads, batch)
    if 0 in grid:
        return  # no query or no clip: nothing to write, and a launch of no program is an error
    scales = None if scales is None else scales.to(_compute_dtype(value))
    inputs = []
    for tensor in (value, references, offsets, logits, scales):
        inputs.append(None if tensor is None else tensor.contiguous())
    # a launch goes to the current device, which need not be the tensors'
    with torch.cuda.device_of(value):
        kernel[grid](*inputs, _level_table(tuple(shapes), value.device), *others,
                     num_queries, num_cells, M=heads, L=levels, P=points, D=dim,
                     FUSED=references is not None, **flags, num_warps=num_warps,
                     BLOCK_Q=block_queries, BLOCK_D=triton.next_power_of_2(dim),
                     BLOCK_P=triton.next_power_of_2(levels * points),
                     COMPUTE=tl.float64 if value.dtype == torch.float64 else tl.float32)


@torch.library.custom_op("deform3d::sample", mutates_args=())
def _sample(value: Tensor, references: Tensor | None, offsets: Tensor, logits: Tensor,
            scales: Tensor | None, shapes: list[int]) -> Tensor:
    """The forward as an operator that torch.compile and autograd know.

    references None: locations, weights given."""
    heads_and_channels = value.shape[2] * value.shape[3]
    out = value.new_empty(value.shape[0], offsets.shape[1], heads_and_channels)  # (B, Q, M * D)
    _launch(_forward_kernel, value, references, offsets, logits, scales, shapes, (out,),
            value.element_size())
    return out


@torch.library.custom_op("deform3d::sample_backward", mutates_args=())
def _sample_backward(grad_out: Tensor, out: Tensor, value: Tensor, references: Tensor | None,
                     offsets: Tensor, logits: Tensor, scales: Tensor | None, shapes: list[int],
                     reference_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward -> gradients of value, references, offsets and logits.

    That of references has no elements unless `reference_grad`."""
    compute, deterministic = _compute_dtype(value), torch.are_deterministic_algorithms_enabled()
    fixed_point = None
    if deterministic:
        fixed_point = _fixed_point(grad_out, logits if references is None else None, compute)
    grad_value = torch.zeros(value.shape, dtype=torch.int64 if deterministic else compute,
                             device=value.device)
    grad_references = value.new_empty(offsets.shape[:4] + (3,) if reference_grad else 0,
                                      dtype=compute)  # per head
    grad_offsets, grad_logits = offsets.new_empty(offsets.shape), logits.new_empty(logits.shape)
    others = (out.contiguous(), grad_out.contiguous(), fixed_point,
              grad_value, grad_references, grad_offsets, grad_logits)
    # Tiled by what is added, not by what is read: 8 queries of bfloat16 would take 138 registers a
    # lane, 4 take 72.
    _launch(_backward_kernel, value, references, offsets, logits, scales, shapes, others,
            compute.itemsize, REFERENCE_GRAD=reference_grad, DETERMINISTIC=deterministic)
    if deterministic:
        # NaN where a gradient was not finite
        grad_value = (grad_value.double() / fixed_point).to(compute)
    if reference_grad:
        grad_references = grad_references.sum(2).to(references.dtype)  # (B, Q, L, 3)
    return grad_value.to(value.dtype), grad_references, grad_offsets, grad_logits


def _compute_dtype(value):
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _fixed_point(grad_out, weights, dtype):
    """What stands for 1.0 in int64, a power of two.

    It is as large as the largest sum that can occur leaves room for. A cell's sum is at most
    max |G| times the sum of its head's weights, and soft-maxed ones sum to 1 a query. At the size
    of UCF101-24's clips the step is then 2^-45 of max |G|: finer than float32. `weights`
    (B, Q, M, L, P), or None if they are soft-maxed. An inf or NaN in them or in grad_out makes
    this NaN, and with it every quotient by it."""
    if grad_out.numel() == 0:
        return grad_out.new_ones(1, dtype=dtype)
    if weights is None:
        total = float(grad_out.shape[1])
    else:
        total = weights.double().abs().sum((1, 3, 4)).amax()
    bound = (grad_out.abs().amax().double() * total).clamp(min=2.0 ** -40)  # 0-d
    fixed_point = (61 - bound.log2()).floor().exp2()
    return torch.where(bound.isfinite(), fixed_point, math.nan).to(dtype).reshape(1)


@_sample.register_fake
def _(value, references, offsets, logits, scales, shapes):
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


@_sample_backward.register_fake
def _(grad_out, out, value, references, offsets, logits, scales, shapes, reference_grad):
    grad_references = references
    if not reference_grad:
        grad_references = value.new_empty(0, dtype=_compute_dtype(value))
    return tuple(x.new_empty(x.shape) for x in (value, grad_references, offsets, logits))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.shapes = inputs
    ctx.save_for_backward(output, *tensors)


def _autograd(ctx, grad_out):
    reference_grad = ctx.needs_input_grad[1]  # False where there are none
    gradients = torch.ops.deform3d.sample_backward(
        grad_out, *ctx.saved_tensors, ctx.shapes, reference_grad)
    return gradients[0], gradients[1] if reference_grad else None, *gradients[2:], None, None


_sample.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.deform3d.sample)
def _forward_flops(value_shape, references_shape, offsets_shape, logits_shape, *args, **kwargs):
    """Eight corners of D channels, a multiplication and an addition each.

    The location arithmetic is not counted."""
    return math.prod(logits_shape) * 8 * value_shape[3] * 2


@register_flop_formula(torch.ops.deform3d.sample_backward)
def _backward_flops(grad_out_shape, result_shape, *args, **kwargs):
    """The forward's twice.

    A corner's dot product, and the scaled addition to the value's gradient."""
    return 2 * _forward_flops(*args)


def deform_attn_3d_reference(value, shapes, locations, weights):
    """The definition in plain PyTorch, F.grid_sample level by level.

    Any device, any floating dtype, differentiable. Shapes as in deform_attn_3d; float16 and
    bfloat16 are computed in float32. It stores the sampled vectors of a level, (B, Q, M, P, D),
    and of all levels if a gradient is wanted."""
    batch, _, heads, dim = value.shape
    compute, total, start = _compute_dtype(value), 0, 0
    for level, shape in enumerate(shapes):
        volume = value[:, start:start + math.prod(shape)].to(compute)  # (B, t*h*w, M, D)
        volume = volume.permute(0, 2, 3, 1).reshape(batch * heads, dim, *shape)  # (B*M, D, t, h, w)
        # (B, Q, M, P, 3): edges -1 and 1, (w, h, t)
        grid = (2 * locations[:, :, :, level].to(compute) - 1).flip(-1)
        grid = grid.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # (B*M, 1, Q, P, 3)
        sampled = F.grid_sample(volume, grid, padding_mode="zeros",
                                align_corners=False)  # (B*M, D, 1, Q, P)
        weight = weights[:, :, :, level].to(compute)  # (B, Q, M, P)
        weight = weight.transpose(1, 2).flatten(0, 1)  # (B*M, Q, P)
        total = total + (sampled[:, :, 0] * weight[:, None]).sum(-1)  # (B*M, D, Q)
        start += math.prod(shape)
    total = total.view(batch, heads * dim, locations.shape[1])  # (B, M*D, Q)
    return total.transpose(1, 2).to(value.dtype)  # (B, Q, M*D)


def _bags(value, locations, weights, shape):
    """A level of one head as bags of rows.

    A sample is a weighted sum of eight rows, a query one of 8 * P.
    value (t*h*w, D), locations (Q, P, 3), weights (Q, P) -> rows of the level with a rim of zero
    cells, so that no corner needs a mask, ((t+2)*(h+2)*(w+2), D); the numbers of the rows, int32,
    and their weights, both (Q, 8*P)."""
    rows = F.pad(value.unflatten(0, shape), (0, 0, 1, 1, 1, 1, 1, 1)).flatten(0, 2)
    # (P, Q): the longest axis last, as PyTorch loops fastest over long ones
    cells, share = 0, weights.t()
    for axis, size in enumerate(shape):
        cell = locations[..., axis].t() * size - 0.5  # (P, Q)
        # both neighbours of what lies further out are on the rim
        cell = cell.nan_to_num(nan=-2.0).clamp(-2, size)
        low = cell.floor()
        # (2, P, Q), counted from the rim on
        index = torch.stack([low + 1, low + 2]).clamp_(0, size + 1).int()
        # (2, P, Q) -> (2, 1, .., P, Q), beside (2, .., P, Q) of the axes before
        new = (2,) + (1,) * axis
        cells = cells * (size + 2) + index.unflatten(0, new)
        share = share * torch.stack([low + 1 - cell, cell - low]).unflatten(0, new)
    return rows, *(x.flatten(0, 3).t().contiguous() for x in (cells, share))


def _locate(references, offsets, scales, dtype):
    """references (..., L, 3), offsets (..., M, L, P, 3) -> locations like offsets."""
    return references.to(dtype)[..., None, :, None, :] + offsets.to(dtype) * scales[:, None]


def _sample_torch(value, shapes, references, offsets, logits, scales):
    """The backend "torch"; references None: offsets are locations and logits weights.

    A head and level at a time through F.embedding_bag, which takes a quarter of grid_sample's time
    on a CPU. Where a gradient is wanted grid_sample serves: at the size of the synthetic preset it
    is the faster one, by 1.3."""
    batch, _, heads, dim = value.shape
    fused, dtype = references is not None, _compute_dtype(value)
    weights = logits  # (B, Q, M, L, P)
    if fused:
        weights = logits.to(dtype).flatten(3).softmax(3).view(logits.shape)
    inputs = (value, references, offsets, logits)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        locations = _locate(references, offsets, scales, dtype) if fused else offsets
        return deform_attn_3d_reference(value, shapes, locations, weights)
    out = torch.zeros(batch, offsets.shape[1], heads, dim,
                      dtype=dtype, device=value.device)  # (B, Q, M, D)
    parts = value.split([math.prod(shape) for shape in shapes], 1)  # L x (B, t*h*w, M, D)
    places = itertools.product(range(batch), range(heads), enumerate(shapes))
    for clip, head, (level, shape) in places:
        locations = offsets[clip, :, head, level].to(dtype)  # (Q, P, 3)
        if fused:
            one = slice(level, level + 1)
            locations = _locate(references[clip, :, one], locations[:, None, None], scales[one],
                                dtype)[:, 0, 0]
        part = parts[level][clip, :, head].to(dtype)  # (t*h*w, D)
        weight = weights[clip, :, head, level].to(dtype)  # (Q, P)
        rows, cells, share = _bags(part, locations, weight, shape)
        # (Q, D)
        out[clip, :, head] += F.embedding_bag(cells, rows, per_sample_weights=share, mode="sum")
    return out.flatten(2).to(value.dtype)  # (B, Q, M*D)


def _check(value, shapes, offsets, logits, points, strengths):
    """Errors, each with both shapes, where the arguments do not fit each other.

    -> shapes as a list of int triples."""
    value_shape = tuple(value.shape)
    offset_shape = tuple(offsets.shape)
    logit_shape = tuple(logits.shape)
    if (len(value_shape), len(offset_shape), len(logit_shape)) != (4, 6, 5):
        raise ValueError(f"value must be (B, S, M, D), {points} (B, Q, M, L, P, 3), "
                         f"{strengths} (B, Q, M, L, P), "
                         f"but they are {value_shape}, {offset_shape} and {logit_shape}")
    shapes = [tuple(int(size) for size in shape) for shape in shapes]
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
        raise ValueError("shapes must be (T, H, W) triples of positive sizes, one a level, "
                         f"but they are {shapes}")
    cells = sum(math.prod(shape) for shape in shapes)
    if value_shape[1] != cells:
        raise ValueError(f"value {value_shape} has {value_shape[1]} cells, "
                         f"but shapes {shapes} have {cells}")
    if offset_shape != logit_shape + (3,):
        raise ValueError(f"{points} {offset_shape} must be {strengths} {logit_shape} "
                         "with a last axis of 3 (t, h, w)")
    if (offset_shape[0], *offset_shape[2:4]) != (value_shape[0], value_shape[2], len(shapes)):
        raise ValueError(f"{points} {offset_shape} (B, Q, M, L, P, 3) and value {value_shape} "
                         f"(B, S, M, D) with {len(shapes)} levels {shapes} differ in B, M or L")
    if value_shape[3] == 0 or logit_shape[4] == 0:
        raise ValueError(f"value {value_shape} and {strengths} {logit_shape} "
                         "need at least one channel and one point")
    _check_alike(value, points, offsets)
    _check_alike(value, strengths, logits)
    return shapes


def _check_alike(value, name, tensor):
    if not (value.is_floating_point() and tensor.is_floating_point()):
        raise TypeError(f"value and {name} must be floating point, "
                        f"but they are {value.dtype} and {tensor.dtype}")
    if tensor.device != value.device:
        raise ValueError(f"value is on {value.device} but {name} on {tensor.device}; "
                         "move them to one device")


def _run(value, shapes, references, offsets, logits, scales, backend):
    """The backend asked for, or the one that serves value's device.

    Raises where it cannot run, or not at this size."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend {backend!r} is unknown; there are 'auto', 'triton' and 'torch'")
    if backend == "torch" or backend == "auto" and not value.is_cuda:
        return _sample_torch(value, shapes, references, offsets, logits, scales)
    if triton is None:
        raise RuntimeError("the Triton kernels need the package triton, which is not installed: "
                           "pip install triton (Linux), or ask for backend='torch', which is "
                           "slower and takes more memory")
    # In the interpreter the kernel is no JITFunction, and runs on any device.
    if not value.is_cuda and isinstance(_forward_kernel, triton.JITFunction):
        driver = "" if torch.cuda.is_available() else " and no GPU driver is active"
        raise RuntimeError("the Triton kernels need a GPU, but value is on "
                           f"{value.device}{driver}: move the tensors to a GPU, ask for "
                           "backend='torch', or set TRITON_INTERPRET=1 before Python starts to run "
                           "them in the interpreter (slow)")
    # Within a clip the kernels count in int32: past it they would wrap around, silently.
    output = (*offsets.shape[:3], value.shape[-1])  # (B, Q, M, D)
    for name, shape in (("value", tuple(value.shape)), ("output", output),
                        ("locations or offsets", tuple(offsets.shape))):
        if math.prod(shape[1:]) >= 2 ** 31:
            raise ValueError(f"{name} {shape} has {math.prod(shape[1:])} elements a clip, but the "
                             "Triton kernels count to 2^31 - 1; use smaller clips, or fewer "
                             "queries a call (none depends on another)")
        if max(shape[0], shape[2]) > 65535:
            raise ValueError(f"{name} {shape}: at most 65535 clips and heads fit the kernels' "
                             "grid; split the batch")
    flat_shapes = [size for shape in shapes for size in shape]
    return torch.ops.deform3d.sample(value, references, offsets, logits, scales, flat_shapes)


def deform_attn_3d(value, shapes, locations, weights, backend="auto"):
    """Weighted means of trilinear samples at given locations -> (B, Q, M * D) in value's dtype.

    value (B, S, M, D), S = sum of T_l*H_l*W_l, levels one after another, each in (t, h, w) order;
    shapes [(T_l, H_l, W_l), ...]; locations (B, Q, M, L, P, 3) in (t, h, w) order, 0 and 1 the
    outer edges of a level, any value allowed (outside, inf and NaN count as zero);
    weights (B, Q, M, L, P);
    backend "triton", "torch" or "auto" (triton for CUDA tensors, torch otherwise).
    Errors: ValueError or TypeError where arguments do not fit, RuntimeError where the backend
    cannot run."""
    shapes = _check(value, shapes, locations, weights, "locations", "weights")
    return _run(value, shapes, None, locations, weights, None, backend)


def deform_attn_3d_fused(value, shapes, references, offsets, logits, scales, backend="auto"):
    """The same with location = reference + offset * scale and weight = soft-max of the logits.

    The soft-max is over a head's L*P points.
    references (B, Q, L, 3) in (t, h, w) order; offsets (B, Q, M, L, P, 3); logits (B, Q, M, L, P);
    scales (L, 3), constants without a gradient: 1 / (T_l, H_l, W_l) counts offsets in cells. The
    rest as in deform_attn_3d."""
    shapes = _check(value, shapes, offsets, logits, "offsets", "logits")
    scales = torch.as_tensor(scales, dtype=_compute_dtype(value), device=value.device)
    expected = (*offsets.shape[:2], len(shapes), 3)
    if tuple(references.shape) != expected:
        raise ValueError(f"references {tuple(references.shape)} must be (B, Q, L, 3) = {expected} "
                         f"to fit offsets {tuple(offsets.shape)}")
    if tuple(scales.shape) != (len(shapes), 3):
        raise ValueError(f"scales {tuple(scales.shape)} must be (L, 3) = {(len(shapes), 3)} "
                         f"to fit shapes {shapes}")
    if scales.requires_grad:
        raise ValueError("scales are constants, but these require a gradient; pass scales.detach()")
    _check_alike(value, "references", references)
    return _run(value, shapes, references, offsets, logits, scales, backend)
