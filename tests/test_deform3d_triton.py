"""deform3d_triton against float64 autograd through F.grid_sample.

Its kernels are interpreted, and compiled ahead of time. Triton decides at import whether its
kernels are interpreted, so the tests of the kernels' numbers run in a second process, with
TRITON_INTERPRET=1 (test_kernels_in_the_interpreter starts it). On a machine with a GPU they run on
it as well, in this process.
"""

# B clips, Q queries, S cells of all levels, M heads, L levels, P points of a level,
# D channels of a head; (t, h, w)

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import deform3d_triton  # noqa: E402
from deform3d_triton import (  # noqa: E402
    deform_attn_3d,
    deform_attn_3d_fused,
    deform_attn_3d_reference,
)

triton = deform3d_triton.triton
INTERPRETED = (triton is not None
               and not isinstance(deform3d_triton._forward_kernel, triton.JITFunction))
GPU = torch.cuda.is_available() and triton is not None and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ["torch"] * (not INTERPRETED) + ["triton"] * (INTERPRETED or GPU)
kernels = pytest.mark.skipif(not (INTERPRETED or GPU), reason="needs TRITON_INTERPRET=1 or a GPU")
compiled = pytest.mark.skipif(triton is None or INTERPRETED,
                              reason="needs Triton, and no TRITON_INTERPRET")
plain = pytest.mark.skipif(INTERPRETED, reason="runs in the process without TRITON_INTERPRET")
# Relative L2 errors. A GPU's exp and log are approximate, hence the wider first one there.
TOLERANCE = {torch.float32: 3e-6 if GPU else 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2,
             torch.float64: 1e-13}


def relative_error(result, expected):
    return float((result.detach().double() - expected.detach()).norm() / expected.detach().norm())


def make_case(shapes, batch=1, queries=3, heads=2, points=2, dim=12, dtype=torch.float32, seed=0):
    """Leaves (value, references, offsets, logits) of `dtype` on DEVICE, and scales (L, 3).

    The points lie off cell borders."""
    generator = torch.Generator().manual_seed(seed)
    levels, cells = len(shapes), sum(t * h * w for t, h, w in shapes)
    sizes = torch.tensor(shapes, dtype=torch.float64)  # (L, 3)
    value = torch.randn(batch, cells, heads, dim, generator=generator)
    references = torch.rand(batch, queries, levels, 3, generator=generator).to(dtype).double()
    # Coordinates with fractions from 0.1 to 0.9, from a cell and a half outside of the level to as
    # far past its end.
    low = torch.rand(batch, queries, heads, levels, points, 3, generator=generator)
    low = ((sizes[:, None] + 2) * low).floor() - 1
    cell = low + 0.1 + 0.8 * torch.rand(low.shape, generator=generator)  # (B, Q, M, L, P, 3)
    offsets = cell + 0.5 - (references * sizes)[:, :, None, :, None]  # in cells of the level
    logits = torch.randn(batch, queries, heads, levels, points, generator=generator)
    leaves = [x.to(dtype).to(DEVICE).requires_grad_() for x in (value, references, offsets, logits)]
    return leaves, (1 / sizes).to(DEVICE)


def expected_fused(leaves, shapes, scales):
    """Float64 copies of the leaves, and the definition's result for them."""
    copies = [x.detach().double().requires_grad_() for x in leaves]
    value, references, offsets, logits = copies
    weights = logits.flatten(3).softmax(3).view(logits.shape)
    locations = references[:, :, None, :, None] + offsets * scales[:, None]
    return copies, deform_attn_3d_reference(value, shapes, locations, weights)


def assert_like_grid_sample(case, shapes, backend, tolerance=None):
    """Output and every gradient of the fused function within the relative error of its dtype."""
    leaves, scales = case
    copies, expected = expected_fused(leaves, shapes, scales)
    result = deform_attn_3d_fused(leaves[0], shapes, *leaves[1:], scales, backend=backend)
    tolerance = tolerance or TOLERANCE[leaves[0].dtype]
    assert result.dtype == leaves[0].dtype and result.shape == expected.shape
    assert relative_error(result, expected) < tolerance
    if backend == "torch":  # which computes otherwise where no gradient is wanted
        with torch.no_grad():
            result_alone = deform_attn_3d_fused(leaves[0], shapes, *leaves[1:], scales,
                                                backend=backend)
            assert result_alone.dtype == result.dtype
            assert relative_error(result_alone, expected) < tolerance
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(result)
    gradients = torch.autograd.grad(result, leaves, grad)
    for name, gradient, truth in zip(("value", "references", "offsets", "logits"), gradients,
                                     torch.autograd.grad(expected, copies, grad.double())):
        assert relative_error(gradient, truth) < tolerance, name


# Shapes, and what differs from make_case's defaults; one level is of one cell, few fill their last
# tile.
CASES = {
    "eight heads": ([(3, 5, 4)], dict(heads=8, queries=2)),
    "many points": ([(2, 7, 16), (1, 1, 1), (4, 3, 2), (1, 2, 5)],
                    dict(heads=1, points=8, dim=32)),
    "wide heads": ([(3, 4, 5), (2, 2, 3)], dict(batch=2, points=3, heads=1, dim=64)),
    "three levels": ([(16, 3, 2), (1, 9, 4), (2, 1, 6)],
                     dict(batch=2, queries=5, dim=32, points=1)),
}


PAIRS = [(name, torch.float32) for name in CASES]
PAIRS += [(name, torch.bfloat16) for name in ("eight heads", "wide heads", "three levels")]
PAIRS += [(name, torch.float16) for name in ("eight heads", "wide heads")]


@pytest.mark.parametrize("name, dtype", PAIRS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_equal_grid_sample(backend, name, dtype):
    shapes, sizes = CASES[name]
    assert_like_grid_sample(make_case(shapes, dtype=dtype, **sizes), shapes, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_level_of_ninety_cells_in_float32(backend):
    shapes = [(1, 90, 1)]
    case = make_case(shapes, heads=1, points=4, dim=32, queries=8)
    assert_like_grid_sample(case, shapes, backend, tolerance=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_computed_in_float64(backend):
    shapes = [(2, 3, 4), (1, 2, 2)]
    assert_like_grid_sample(make_case(shapes, dtype=torch.float64, heads=1, dim=4), shapes, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    shapes = [(1, 2, 2), (2, 1, 1)]
    leaves, scales = make_case(shapes, dtype=torch.float64, heads=1, points=1, queries=1, dim=2)
    def function(value, *rest):
        return deform_attn_3d_fused(value, shapes, *rest, scales, backend=backend)
    torch.autograd.gradcheck(function, leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("shapes, points", [([(3, 4, 2)], 1), ([(2, 5, 3), (1, 4, 2)], 3)],
                         ids=["point", "levels"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_given_locations_and_weights_equal_grid_sample(backend, shapes, points):
    (value, _, offsets, weights), scales = make_case(shapes, batch=2, points=points)
    locations = (0.5 + offsets.detach() * scales[:, None].float()).requires_grad_()
    # weights that are no soft-max: of either sign, and no sum in particular
    leaves = (value, locations, weights)
    copies = [x.detach().double().requires_grad_() for x in leaves]
    result = deform_attn_3d(value, shapes, *leaves[1:], backend=backend)
    expected = deform_attn_3d_reference(copies[0], shapes, *copies[1:])
    assert relative_error(result, expected) < 1e-6
    gradients = torch.autograd.grad(result.square().sum(), leaves)
    for gradient, truth in zip(gradients, torch.autograd.grad(expected.square().sum(), copies)):
        assert relative_error(gradient, truth) < 4e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_and_expanded_inputs(backend):
    shapes = [(2, 3, 2), (1, 2, 1)]
    (value, references, offsets, logits), scales = make_case(shapes, batch=2)
    value = value.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)  # odd strides
    value.requires_grad_()
    offsets = offsets.detach().transpose(0, 4).contiguous().transpose(0, 4).requires_grad_()
    references = references[:, :, :1].detach().expand(-1, -1, 2, -1).requires_grad_()  # stride 0
    case = ((value, references, offsets, logits), scales)
    assert_like_grid_sample(case, shapes, backend, tolerance=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_locations_far_outside_infinite_or_nan_count_as_zero(backend):
    shapes = [(2, 3, 2)]
    bad = [1e6, -1e6, 1e20, -1e20, float("inf"), float("-inf"), float("nan"), 3e9, -3e9]
    # 0 * inf would show
    value = torch.full((1, 12, 1, 4), float("inf"), device=DEVICE).requires_grad_()
    locations = torch.full((1, 1, 1, 1, 3 * len(bad), 3), 0.4, device=DEVICE)
    for index, number in enumerate(bad):
        for axis in range(3):
            locations[..., 3 * index + axis, axis] = number
    locations.requires_grad_()
    weights = torch.ones(1, 1, 1, 1, 3 * len(bad), device=DEVICE, requires_grad=True)
    out = deform_attn_3d(value, shapes, locations, weights, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    alone = deform_attn_3d(value.detach(), shapes, locations.detach(), weights.detach(),
                           backend=backend)
    assert torch.equal(alone, out)
    for gradient in torch.autograd.grad(out.sum(), (value, locations, weights)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_over_a_constant_map_is_that_constant_and_q_may_differ_from_s(backend):
    shapes = [(4, 6, 5), (2, 3, 3)]
    value = torch.full((1, 138, 2, 8), 3.5, device=DEVICE)
    references = torch.full((1, 7, 2, 3), 0.5, device=DEVICE)
    (_, _, offsets, logits), _ = make_case(shapes, queries=7, points=1)
    scales = torch.full((2, 3), 0.1)
    out = deform_attn_3d_fused(value, shapes, references, offsets.clamp(-0.9, 0.9), logits, scales,
                               backend=backend)
    torch.testing.assert_close(out, torch.full((1, 7, 16), 3.5, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_query_gives_an_empty_result_and_zero_gradient(backend):
    (value, *rest), scales = make_case([(1, 2, 2)], queries=0)
    out = deform_attn_3d_fused(value, [(1, 2, 2)], *rest, scales, backend=backend)
    alone = deform_attn_3d(value.detach(), [(1, 2, 2)], rest[1].detach(), rest[2].detach(), backend)
    assert out.shape == alone.shape == (1, 0, 24)
    out.sum().backward()
    assert torch.equal(value.grad, torch.zeros_like(value))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_values_with_float32_offsets_under_autocast(backend):
    shapes = [(2, 3, 2)]
    leaves, scales = make_case(shapes)
    leaves[0] = leaves[0].detach().bfloat16().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        result = deform_attn_3d_fused(leaves[0], shapes, *leaves[1:], scales, backend=backend)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    copies, expected = expected_fused(leaves, shapes, scales)
    expected.sum().backward()
    assert relative_error(result, expected) < 1e-2
    for leaf, copy in zip(leaves, copies):
        assert leaf.grad.dtype == leaf.dtype and relative_error(leaf.grad, copy.grad) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    shapes = [(1, 3, 2)]
    leaves, scales = make_case(shapes, heads=1, points=1, dim=4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(value, references, offsets, logits):
        return 2 * deform_attn_3d_fused(value, shapes, references, offsets, logits, scales,
                                        backend=backend)

    result = function(*leaves)
    eager = 2 * deform_attn_3d_fused(leaves[0], shapes, *leaves[1:], scales, backend=backend)
    torch.testing.assert_close(result, eager)
    gradients = torch.autograd.grad(result.sum(), leaves)
    for gradient, truth in zip(gradients, torch.autograd.grad(eager.sum(), leaves)):
        torch.testing.assert_close(gradient, truth)


@kernels
def test_operator_passes_opcheck():
    shapes = [(1, 3, 2)]
    leaves, scales = make_case(shapes, heads=1, points=1, dim=4, queries=2)
    value, references, offsets, logits = leaves
    sample = torch.ops.deform3d.sample.default
    torch.library.opcheck(sample, (value, references, offsets, logits, scales.float(), [1, 3, 2]))
    given = (value, None, offsets, logits, None, [1, 3, 2])
    torch.library.opcheck(sample, given, test_utils=("test_schema", "test_faketensor"))


@kernels
def test_flops_are_counted():
    shapes = [(1, 3, 2)]
    leaves, scales = make_case(shapes, heads=1, points=2, dim=4, queries=2)
    with FlopCounterMode(display=False) as forward:
        result = deform_attn_3d_fused(leaves[0], shapes, *leaves[1:], scales, backend="triton")
    # (query, point) pairs, corners, channels, multiply and add
    assert forward.get_total_flops() == 4 * 8 * 4 * 2
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    assert backward.get_total_flops() == 4 * 8 * 4 * 4


@pytest.fixture
def deterministic():
    # it also fills torch.empty with NaN: whatever is not written shows
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@kernels
@pytest.mark.parametrize("name", ["eight heads", "wide heads"])
def test_deterministic_path_repeats_itself_and_writes_everything(deterministic, name):
    shapes, sizes = CASES[name]
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
    leaves, scales = make_case(shapes, **sizes)
    assert_like_grid_sample((leaves, scales), shapes, "triton")
    if GPU:
        def run():
            result = deform_attn_3d_fused(leaves[0], shapes, *leaves[1:], scales)
            return torch.autograd.grad(result.sum(), leaves)
        first = run()
        assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run()))


@kernels
def test_deterministic_path_scales_with_the_gradient(deterministic):
    shapes = [(1, 2, 2)]
    (value, _, locations, weights), _ = make_case(shapes, heads=1, points=1)
    locations = locations.detach() * 0.1 + 0.5
    def gradient(factor, weight):
        out = deform_attn_3d(value, shapes, locations, weight * weights, backend="triton")
        return torch.autograd.grad(out.sum() * factor, value)[0]
    one = gradient(1.0, 1.0)
    assert one.abs().max() > 0
    for exponent in (-30, 30):  # powers of two: nothing but the exponent may change
        expected = one * 2.0 ** exponent
        torch.testing.assert_close(gradient(2.0 ** exponent, 1.0), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient(1.0, 2.0 ** exponent), expected, rtol=1e-6, atol=0)
    # fixed point has no infinity; a wrong number it must not be
    assert gradient(float("inf"), 1.0).isnan().all()


@kernels
def test_sizes_past_int32_are_refused():
    # 2^31 elements, one of them stored
    value = torch.zeros(1, device=DEVICE).expand(1, 2 ** 26, 8, 4)
    locations = torch.zeros(1, 1, 8, 1, 1, 3, device=DEVICE)
    with pytest.raises(ValueError, match="2147483648 elements a clip"):
        shapes = [(2 ** 6, 2 ** 10, 2 ** 10)]
        deform_attn_3d(value, shapes, locations, locations[..., 0], backend="triton")
    value = torch.zeros(1, 1, 8, 4, device=DEVICE)
    locations = torch.zeros(1, device=DEVICE).expand(1, 2 ** 25, 8, 1, 3, 3)
    with pytest.raises(ValueError, match="elements a clip"):
        deform_attn_3d(value, [(1, 1, 1)], locations, locations[..., 0], backend="triton")
    value = torch.zeros(1, 1, 8, 64, device=DEVICE)
    locations = torch.zeros(1, device=DEVICE).expand(1, 2 ** 22, 8, 1, 1, 3)
    with pytest.raises(ValueError, match="output .* has 2147483648 elements a clip"):
        deform_attn_3d(value, [(1, 1, 1)], locations, locations[..., 0], backend="triton")
    value = torch.zeros(65536, 1, 1, 1, device=DEVICE)
    locations = torch.zeros(65536, 1, 1, 1, 1, 3, device=DEVICE)
    with pytest.raises(ValueError, match="65535"):
        deform_attn_3d(value, [(1, 1, 1)], locations, locations[..., 0], backend="triton")


@plain
def test_reference_equals_a_loop_over_corners():
    shapes, generator = [(2, 3, 4), (1, 2, 1)], torch.Generator().manual_seed(0)
    value = torch.randn(1, 26, 2, 3, generator=generator, dtype=torch.float64)
    locations = torch.rand(1, 2, 2, 2, 2, 3, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(1, 2, 2, 2, 2, generator=generator, dtype=torch.float64)
    expected = torch.zeros(1, 2, 2, 3, dtype=torch.float64)
    for q, m, level, p in torch.cartesian_prod(*(torch.arange(2),) * 4).tolist():
        size, start = shapes[level], 24 * level
        for t in range(size[0]):
            for h in range(size[1]):
                for w in range(size[2]):
                    cell = locations[0, q, m, level, p] * torch.tensor(size) - 0.5
                    share = (1 - (cell - torch.tensor((t, h, w))).abs()).clamp(min=0).prod()
                    sample = share * value[0, start + (t * size[1] + h) * size[2] + w, m]
                    expected[0, q, m] += weights[0, q, m, level, p] * sample
    result = deform_attn_3d_reference(value, shapes, locations, weights)
    torch.testing.assert_close(result, expected.flatten(2))


@plain
def test_misfits_are_errors_with_both_shapes():
    shapes = [(1, 2, 3)]
    value = torch.zeros(1, 6, 2, 4)
    locations = torch.zeros(1, 5, 2, 1, 3, 3)
    weights = torch.zeros(1, 5, 2, 1, 3)
    references, scales = torch.zeros(1, 5, 1, 3), torch.ones(1, 3)
    def fused(value=value, references=references, locations=locations, weights=weights,
              scales=scales):
        return deform_attn_3d_fused(value, shapes, references, locations, weights, scales)
    def given(value=value, shapes=shapes, locations=locations, weights=weights):
        return deform_attn_3d(value, shapes, locations, weights)
    assert given().shape == fused().shape == (1, 5, 8)
    for message, call in {
        r"\(1, 6, 2, 4\) has 6 cells, but shapes \[\(1, 2, 4\)\] have 8":
            lambda: given(shapes=[(1, 2, 4)]),
        r"\(1, 5, 2, 1, 3, 3\) must be weights \(1, 5, 2, 1, 2\)":
            lambda: given(weights=weights[..., :2]),
        r"\(1, 5, 2, 1, 3, 3\).*value \(1, 6, 1, 4\)": lambda: given(value=value[:, :, :1]),
        r"value must be \(B, S, M, D\).*\(6, 2, 4\)": lambda: given(value=value[0]),
        r"triples of positive sizes.*\(1, 6\)": lambda: given(shapes=[(1, 6)]),
        r"at least one channel": lambda: given(value=value[..., :0]),
        r"references \(1, 4, 1, 3\) must be .* \(1, 5, 1, 3\)":
            lambda: fused(references=references[:, :4]),
        r"scales \(2, 3\) must be \(L, 3\) = \(1, 3\)": lambda: fused(scales=torch.ones(2, 3)),
        r"scales are constants": lambda: fused(scales=scales.requires_grad_()),
        r"value is on cpu but locations on meta": lambda: given(locations=locations.to("meta")),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="floating point.*int64"):
        given(locations=locations.long())


@plain
def test_a_backend_that_cannot_run_says_what_to_do(monkeypatch):
    value, locations = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1, 3)
    def ask(backend):
        return deform_attn_3d(value, [(1, 1, 1)], locations, locations[..., 0], backend=backend)
    with pytest.raises(ValueError, match="'cuda' is unknown; there are"):
        ask("cuda")
    if triton is not None:
        with pytest.raises(RuntimeError, match="value is on cpu.*TRITON_INTERPRET=1"):
            ask("triton")
    monkeypatch.setattr(deform3d_triton, "triton", None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        ask("triton")
    assert ask("auto").shape == (1, 1, 1)


@plain
def test_module_imports_and_serves_without_triton():
    program = ("import sys; sys.modules['triton'] = None; import torch, deform3d_triton as d; "
               "one = torch.ones(1, 1, 1, 1); "
               "x = torch.full((1, 1, 1, 1, 1, 3), 0.5); "
               "print(d.deform_attn_3d(one, [(1, 1, 1)], x, one[..., None]))")
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 0 and "1." in result.stdout, result.stderr


@pytest.fixture(scope="module", autouse=True)
def interpreter_run(request, tmp_path_factory):
    """This file in a process of its own, interpreted.

    It is started before the first test, so that it runs beside them."""
    wanted = any(item.name == "test_kernels_in_the_interpreter" for item in request.session.items)
    if not wanted or INTERPRETED or triton is None:
        yield None
        return
    log = tmp_path_factory.mktemp("interpreter") / "log"
    environment = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="",
                       OMP_NUM_THREADS="1")
    with open(log, "w") as file:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__,
                   "--durations=10"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file,
                                   stderr=subprocess.STDOUT)
    yield process, log
    process.kill()
    process.wait()


def compile_for(kernel, dtype, target, lanes):
    """One kernel, compiled for a GPU that need not be there.

    At the size of UCF101-24: M 8, L 4, P 8, D 32."""
    import triton.language as tl
    from triton.compiler import ASTSource
    forward = kernel is deform3d_triton._forward_kernel
    row = 32 * (2 if forward and dtype == "bf16" else 4)  # bytes, as in deform3d_triton._tile
    constants = dict(M=8, L=4, P=8, D=32, BLOCK_Q=lanes * 16 // row, BLOCK_D=32, BLOCK_P=32)
    constants |= dict(FUSED=True, COMPUTE=tl.float32)
    if not forward:
        constants.update(REFERENCE_GRAD=False, DETERMINISTIC=False)
    types = {"levels": "*i32", "num_queries": "i32", "num_cells": "i32"}
    # as in training: under autocast offsets and references stay in float32
    lowered = ("value", "logits", "out", "grad_out", "grad_logits")
    types |= dict.fromkeys(lowered, f"*{dtype}")
    signature = {}
    for name in kernel.arg_names:
        signature[name] = "constexpr" if name in constants else types.get(name, "*fp32")
    indices = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    pointers = {}
    for name, kind in signature.items():
        if kind[0] == "*":
            pointers[indices[name]] = [["tt.divisibility", 16]]
    constants = {indices[name]: constant for name, constant in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=pointers)
    return triton.compile(source, target=target, options={"num_warps": 1})


@compiled
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_for_nvidia_few_registers_no_spill_wide_loads(
        capability, name, dtype, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("cuda", capability, 32)
    program = compile_for(getattr(deform3d_triton, name), dtype, target, lanes=32)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(program.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    def run(tool, option):
        command = [tools / tool, option, binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\d+)", run("cuobjdump", "-res-usage"))[1])
    code = run("nvdisasm", "-c")
    print(f"{registers} registers, {len(re.findall(r'LDG[.A-Z]*128', code))} 16-byte loads")
    assert registers <= (64 if name == "_forward_kernel" else 128)
    assert not re.search(r"\b(LDL|STL)\b", code), "spills"
    assert not re.search(r"\b(BAR|LDS|STS)\b", code), "a barrier or shared memory"
    # a lane's share of a row is 16 bytes of what is added: in the backward, 8 of bfloat16
    narrow = name == "_backward_kernel" and dtype == "bf16"
    assert re.search(rf"LDG[.A-Z]*{64 if narrow else 128}", code), "no wide load"
    if name == "_backward_kernel":
        assert re.search(r"REDG?\S*ADD", code), "atomics whose result is unread"
        assert not re.search(r"\bATOMG?\b", code), "atomics whose result is unread"
        if capability >= 90:
            assert "F32x4" in code, "atomics of 16 bytes"


@compiled
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
def test_compiled_for_amd_no_spill_wide_loads(name, dtype, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("hip", "gfx942", 64)
    program = compile_for(getattr(deform3d_triton, name), dtype, target, lanes=64)
    code = program.asm["amdgcn"]
    assert re.search(r"\.vgpr_spill_count:\s+0\b", code)
    assert re.search(r"\.sgpr_spill_count:\s+0\b", code)
    assert "_load_dwordx4" in code, "no 16-byte load"


@plain
@pytest.mark.skipif(triton is None, reason="needs Triton")
def test_kernels_in_the_interpreter(interpreter_run):
    process, log = interpreter_run
    code = process.wait()
    output = log.read_text()
    print(output)
    assert code == 0, output[-8000:]
    assert int(re.search(r"(\d+) passed", output)[1]) >= 26, output
