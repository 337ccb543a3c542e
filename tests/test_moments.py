"""Moments kept in another dtype or as 8-bit codes: the codes, both steps, and what the optimizer makes of them."""

import copy
import io
import itertools
import math

import pytest
import torch
from matrices import generator
from projected_state import ADAM, LEFT, RIGHT, State
from training import assert_same_on_a_cpu, gradient, same, set_gradients

from galore_rrf import GaLoreAdamW, moments, optimizer, reference
from galore_rrf.ops import adamw_, dequantize_moment, projected_adamw_, quantize_moment

pytestmark = pytest.mark.core

STATE_DTYPES = [torch.float32, torch.bfloat16, torch.uint8]
SHAPES = [
    (1,),
    (255,),
    (256,),
    (257,),
    (40000,),
    (17, 33),
    (3, 16, 16),
    (3, 17, 19),
    (2, 3, 4, 5),
    (0,),
    (4, 0),
]


def moment(shape, kind, is_signed):
    x = torch.randn(shape, generator=generator(1), dtype=torch.float64)
    if kind == "decades":
        x = x.sign() * 10 ** (12 * torch.rand(shape, generator=generator(2), dtype=torch.float64) - 6)
    if kind == "sparse":
        x = torch.where(x.abs() > 1, x, 0)
    return (x if is_signed else x.abs()).float()


# --- The codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("kind", ["normal", "decades", "sparse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_nearest(device, shape, kind, is_signed):
    """Guards against blocks that straddle matrices, a scale of another block, a code that is only near."""
    x = moment(shape, kind, is_signed).to(device)
    codes, scale = quantize_moment(x, is_signed)
    expected, expected_scale = reference.quantize_moment(x.cpu(), is_signed)
    assert (codes.dtype, codes.shape, scale.dtype) == (torch.uint8, x.shape, torch.float32)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(codes.cpu(), expected)
    back = dequantize_moment(codes, scale, is_signed)
    assert torch.equal(back.cpu(), reference.dequantize_moment(expected, expected_scale, is_signed))
    if not is_signed:  # -1 is no code
        again = quantize_moment(back, is_signed)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scale)


@pytest.mark.parametrize(("is_signed", "near"), [(True, 0.0071), (False, 0.0036)])
def test_error_of_the_codes(device, is_signed, near):
    """Guards against the documented accuracy: of the largest of a block, and of itself in the upper decades."""
    x = moment((256 * 200,), "decades", is_signed).to(device).view(-1, 256)
    codes, scale = quantize_moment(x, is_signed)
    relative = x / scale.unsqueeze(-1)
    off = (dequantize_moment(codes, scale, is_signed) - x).abs() / scale.unsqueeze(-1)
    assert float(off.max()) <= near
    for decade in range(1, 6):  # each with half as many codes as the one above it
        assert float(off[relative.abs() < 10.0**-decade].max()) <= near * 5.0**-decade
    exact = torch.zeros(300, device=device)
    exact[7] = 3.25
    codes, scale = quantize_moment(exact, is_signed)
    assert torch.equal(dequantize_moment(codes, scale, is_signed), exact)


def test_the_values_are_those_of_the_paper(device):
    """Guards against a table of another data type: 256 values, ascending, 0 and 1 and seven decades."""
    for is_signed in (True, False):
        ends = torch.tensor([-1.0 if is_signed else 0.0, 1.0])
        x = torch.linspace(*ends.tolist(), 65536)
        x = torch.cat(
            (x, 10 ** torch.linspace(-9, 0, 65536), -is_signed * 10 ** torch.linspace(-9, 0, 65536))
        )
        pieces = x.abs() if not is_signed else x
        blocks = torch.cat((pieces.view(-1, 1).expand(-1, 2), torch.ones(len(x), 254)), 1)
        codes, scale = quantize_moment(blocks.to(device), is_signed)
        values = dequantize_moment(codes, scale, is_signed)[:, 0].unique().cpu()
        expected = reference.dynamic_code(is_signed)
        assert len(expected) == 256
        if is_signed:  # -1 is not among them: 1 has no partner
            assert torch.equal(values, expected)
            assert float(expected[0]) > -1
        else:
            assert torch.equal(values, expected)


@pytest.mark.parametrize("is_signed", [True, False])
def test_a_nan_spoils_its_block_alone(device, is_signed):
    """Guards against a NaN that vanishes in the maximum, or reaches other blocks."""
    x = moment((1024,), "normal", is_signed).to(device)
    x[300] = math.nan
    back = dequantize_moment(*quantize_moment(x, is_signed), is_signed)
    assert back[256:512].isnan().all()
    assert back[:256].isfinite().all()
    assert back[512:].isfinite().all()


def test_a_variance_does_not_vanish(device):
    """Guards against steps of mean / eps: a variance far below its block's largest, or beside an overflow."""
    x = torch.tensor([1.0, 1e-12, 1e-30, 0.0, 3e-8], device=device)
    back = dequantize_moment(*quantize_moment(x, False), False)
    assert torch.equal(back > 0, x > 0)
    x[0] = math.inf
    back = dequantize_moment(*quantize_moment(x, False), False)
    assert back.isfinite().all()
    assert float(back[0]) == torch.finfo(torch.float32).max


@pytest.mark.parametrize("shape", [(64, 128), (256, 128)])
def test_steps_of_quiet_rows_stay_small(device, shape):
    """Guards against moments far below their block's largest: every step is a few learning rates at most."""
    for keys in ({}, {"rank": 32, "proj_type": "right"}):
        w = torch.nn.Parameter(torch.zeros(shape, device=device))
        opt = GaLoreAdamW([{"params": [w], **keys, "state_dtype": torch.uint8}], lr=1e-3, weight_decay=0.0)
        before = w.detach().clone()
        for step in range(4):
            w.grad = gradient(shape, step, device=device)
            w.grad[1::2] *= 1e-4 if step == 0 else 0
            opt.step()
            assert float((w - before).detach().abs().max()) <= 1e-2
            before = w.detach().clone()


def test_an_overflow_is_no_nan(device):
    """Guards against a block that one enormous gradient turns into NaN."""
    for keys in ({}, {"rank": 16}):
        w = torch.nn.Parameter(torch.zeros(128, 256, device=device))
        opt = GaLoreAdamW([{"params": [w], **keys, "state_dtype": torch.uint8}])
        for step in range(3):
            w.grad = gradient((128, 256), step, device=device)
            w.grad[5, 7] = 5e19 if step == 1 else 0
            opt.step()
        assert w.isfinite().all()


@pytest.mark.parametrize("kind", ["projected", "stack", "plain", "plain_stack", "tolerance"])
def test_state_follows_the_key_and_the_weight(device, kind):
    """Guards against a state_dtype set while training that is read only after loading, or a model cast on."""
    opt, w, small = make(device, kind, None, torch.float64)
    for step, (state_dtype, dtype) in enumerate(
        [
            (torch.uint8, torch.float64),
            (torch.uint8, torch.float32),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.uint8, torch.bfloat16),
        ]
    ):
        for p in (w, small):
            p.data = p.data.to(dtype)
        opt.param_groups[0]["state_dtype"] = state_dtype
        set_gradients([w, small], step)
        opt.step()
        assert {opt.state[w][name].dtype for name in moments.NAMES} == {state_dtype}
        assert all(key in opt.state[w] for key in moments.SCALES) == (state_dtype == torch.uint8)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert w.isfinite().all()


def test_coding_checks_its_arguments(device):
    """Guards against a scale of another layout that is read beyond its end."""
    codes, scale = quantize_moment(torch.ones(3, 20, 20, device=device), True)
    for bad in (scale.flatten(), scale[:2], scale.double()):
        with pytest.raises((ValueError, TypeError), match="scale"):
            dequantize_moment(codes, bad, True)
    with pytest.raises(TypeError, match="Byte codes"):
        dequantize_moment(codes.int(), scale, True)
    with pytest.raises(TypeError, match="floating-point"):
        quantize_moment(torch.ones(3, dtype=torch.int32, device=device), True)


@pytest.mark.parametrize("shape", [(300,), (3, 20, 20)])
def test_opcheck_of_the_codes(device, shape):
    """Guards against a fake implementation of another shape or dtype."""
    x = moment(shape, "normal", True).to(device)
    for values in (x, x.double(), x.bfloat16()):
        torch.library.opcheck(torch.ops.galore_rrf.quantize_moment.default, (values, True))
    torch.library.opcheck(torch.ops.galore_rrf.dequantize_moment.default, (*quantize_moment(x, True), True))


# --- The step of plain parameters ---------------------------------------------------------------------


class Plain:
    """The arguments of adamw_ for weights of several shapes."""

    def __init__(self, dtype, state_dtype, device="cpu", shapes=((5,), (300,), (17, 33), (3, 20, 20))):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.params = [torch.randn(s, generator=generator(i)).to(device, dtype) for i, s in enumerate(shapes)]
        self.steps = [torch.zeros((), device=device) for _ in shapes]
        self.moments = [{} for _ in shapes]
        for p, state in zip(self.params, self.moments, strict=True):
            for name in moments.NAMES:
                flat = torch.zeros(p.numel(), dtype=compute, device=device)
                kept = moments.kept(name, flat, state_dtype)
                state |= {key: v.view(p.shape) if key == name else v for key, v in kept.items()}

    def grads(self, number):
        return [
            torch.randn(p.shape, generator=generator(100 * number + i)).to(p.device, p.dtype)
            for i, p in enumerate(self.params)
        ]

    def on_cpu(self):
        """A copy where the reference runs."""
        twin = copy.deepcopy(self)
        twin.params = [p.cpu() for p in twin.params]
        twin.steps = [t.cpu() for t in twin.steps]
        twin.moments = [{key: value.cpu() for key, value in state.items()} for state in twin.moments]
        return twin

    def step(self, function, grads, **options):
        grads = [g.to(p.device) for g, p in zip(grads, self.params, strict=True)]
        lists = [[state[name] for state in self.moments] for name in moments.NAMES]
        scales = [[moments.scale(state, name) for state in self.moments] for name in moments.NAMES]
        return function(self.params, grads, *lists, self.steps, *scales, **options)


PLAIN = {key: value for key, value in ADAM.items() if key != "scale"}


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"correct_bias": False}], ids=str)
@pytest.mark.parametrize("arithmetic", ["torch", "galore_torch", "bitsandbytes"])
@pytest.mark.parametrize("state_dtype", [*STATE_DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_plain_step_equals_the_reference(device, dtype, state_dtype, arithmetic, options):
    """Guards against any departure from the formulae, tiles of a large parameter and blocks included."""
    if state_dtype == torch.float64 != dtype:
        pytest.skip("fp64 moments are of fp64 weights")
    tiles = {"shapes": ((70000,), (5,))} if arithmetic == "torch" and not options else {}
    mine = Plain(dtype, state_dtype, device, **tiles)
    theirs = mine.on_cpu()
    for number in range(4):
        grads = mine.grads(number)
        before = [g.clone() for g in grads]
        mine.step(adamw_, grads, **PLAIN, arithmetic=arithmetic, **options)
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
        theirs.step(reference.adamw_, grads, **PLAIN, arithmetic=arithmetic, **options)
        for p, q in zip((p.cpu() for p in mine.params), theirs.params, strict=True):
            accuracy = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 2.0**-6)
            if state_dtype == torch.uint8:  # a rounding that falls the other way is the width of a code
                off = (p.double() - q.double()).abs()
                assert float(off.max()) <= 0.02
                assert float(off.mean()) <= accuracy
            elif state_dtype == torch.bfloat16:
                torch.testing.assert_close(p, q, rtol=0, atol=max(accuracy, 3e-3))
            else:
                torch.testing.assert_close(p, q, rtol=0, atol=accuracy)
        assert [float(t) for t in mine.steps] == [number + 1.0] * len(mine.steps)


def test_plain_step_opcheck(device):
    """Guards against a schema that hides what is written."""
    for state_dtype in (torch.float32, torch.uint8):
        state = Plain(torch.float32, state_dtype, device)
        lists = [[s[name] for s in state.moments] for name in moments.NAMES]
        scales = [[moments.scale(s, name) for s in state.moments] for name in moments.NAMES]
        torch.library.opcheck(
            torch.ops.galore_rrf.adamw_.default,
            (state.params, state.grads(0), *lists, *scales, state.steps),
            {**PLAIN, "lr": torch.tensor(PLAIN["lr"], dtype=torch.float64)},
        )


# --- The projected step -------------------------------------------------------------------------------


def projected(dtype, state_dtype, device="cpu"):
    parts = [((24, 37), 6, LEFT), ((37, 24), 5, RIGHT), ((3, 14, 11), 3, RIGHT), ((2, 9, 61), 5, LEFT)]
    state = State(parts, dtype, device=device)
    scales = {"exp_avg_scales": [], "exp_avg_sq_scales": []}
    for name in moments.NAMES:
        kept = [moments.kept(name, m, state_dtype) for m in getattr(state, f"{name}s")]
        setattr(state, f"{name}s", [k[name] for k in kept])
        scales[f"{name}_scales"] = [moments.scale(k, name) for k in kept]
    return state, scales


def decoded(state, scales, name):
    return [
        moments.values({name: m, f"{name}_scale": s}, name).cpu().double()
        for m, s in zip(getattr(state, f"{name}s"), scales[f"{name}_scales"], strict=True)
    ]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rotated", ["rotate", "at the end", "reset", "keep"])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_projected_step_equals_the_reference(device, same_sketch, dtype, state_dtype, rotated, together):
    """Guards against codes read in another order than they were written, of a side, a stack or a refresh."""
    mine, my_scales = projected(dtype, state_dtype, device)
    theirs = mine.on_cpu()
    off_by = (
        0.006 if rotated == "at the end" else 0.003
    )  # what a step has rounded is rounded again as it moves
    their_scales = {name: [s.cpu().clone() for s in scales] for name, scales in my_scales.items()}
    for number, refresh in enumerate((0, -1, -1) if rotated == "keep" else (0, -1, 1, -1)):
        grads = mine.grads(number)
        given = None
        options = (
            {"moments": "rotate", "refresh_at": "end"} if rotated == "at the end" else {"moments": rotated}
        )
        here = {"asynchronous": together or device.type != "cpu"}
        outcomes = mine.step(projected_adamw_, grads, refresh, **options, **my_scales, **here)
        if rotated == "keep" and refresh >= 0:  # singular vectors have no sign
            theirs.bases = [q.cpu().clone() for q in mine.bases]
            given = [
                g.to(q.dtype) @ q if side == RIGHT else q.mT @ g.to(q.dtype)
                for g, q, side in zip(grads, mine.bases, mine.sides, strict=True)
            ]
        expected = theirs.step(reference.projected_adamw_, grads, refresh, given, **options, **their_scales)
        assert outcomes == expected
        for p, q in zip((p.cpu() for p in mine.params), theirs.params, strict=True):
            off = (p.double() - q.double()).abs()
            assert float(off.max()) <= (0.03 if state_dtype != torch.float32 else 2.0**-6)
            assert float(off.mean()) <= 2e-3
        for name in moments.NAMES:
            pairs = zip(decoded(mine, my_scales, name), decoded(theirs, their_scales, name), strict=True)
            for a, b in pairs:
                assert float((a - b).abs().max()) <= 0.03 * float(b.abs().max())
                assert float((a - b).abs().mean()) <= off_by * float(b.abs().max())


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_stack_is_coded_as_its_matrices(device, state_dtype):
    """Guards against blocks that straddle the matrices of a stack: threads share none."""
    stack = State([((3, 14, 11), 3, RIGHT)], torch.float32, device=device)
    singles = State([((14, 11), 3, RIGHT)] * 3, torch.float32, device=device)
    singles.params = [w.clone() for w in stack.params[0]]
    singles.keys = [stack.keys[0] + i for i in range(3)]
    kept = {}
    for state in (stack, singles):
        scales = {}
        for name in moments.NAMES:
            entries = [moments.kept(name, m, state_dtype) for m in getattr(state, f"{name}s")]
            setattr(state, f"{name}s", [e[name] for e in entries])
            scales[f"{name}_scales"] = [moments.scale(e, name) for e in entries]
        kept[state] = scales
    for number, refresh in enumerate((0, -1, 1)):
        grads = stack.grads(number)
        stack.step(projected_adamw_, grads, refresh, **kept[stack])
        singles.step(projected_adamw_, list(grads[0]), refresh, **kept[singles])
    for w, v in zip(stack.params[0], singles.params, strict=True):
        assert_same_on_a_cpu(w, v)


# --- The optimizer ------------------------------------------------------------------------------------

KINDS = {
    "projected": ((96, 160), {"rank": 48, "update_proj_gap": 3}),
    "stack": ((2, 96, 160), {"rank": 48, "update_proj_gap": 3}),
    "tolerance": ((96, 160), {"rank": 60, "tolerance": 0.3, "update_proj_gap": 2}),
    "svd": ((96, 160), {"rank": 48, "projector": "svd", "update_proj_gap": 3}),
    "published": ((96, 160), {"rank": 48, "preset": "published"}),
    "plain": ((96, 160), {}),
    "plain_stack": ((3, 50, 70), {}),
}


def make(device, kind, state_dtype, dtype=torch.float32):
    shape, keys = KINDS[kind]
    w = torch.nn.Parameter(torch.randn(shape, generator=generator(3)).to(device, dtype))
    small = torch.nn.Parameter(torch.randn(7, 5, generator=generator(4)).to(device, dtype))
    opt = GaLoreAdamW(
        [{"params": [("w", w), ("small", small)], **keys, "state_dtype": state_dtype}],
        lr=0.02,
        betas=(0.8, 0.9),
    )
    return opt, w, small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_kept_as_asked(device, kind, state_dtype, dtype):
    """Guards against a dtype that is lost at a refresh, and codes of moments too small to be worth it."""
    opt, w, small = make(device, kind, state_dtype, dtype)
    keys = None
    for step in range(5):
        set_gradients([w, small], step)
        opt.step()
        state = opt.state[w]
        keys = keys or set(state)
        assert set(state) == keys
        assert {state[name].dtype for name in moments.NAMES} == {state_dtype}
        assert all(s in state for s in moments.SCALES) == (state_dtype == torch.uint8)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        expected = compute if state_dtype == torch.uint8 else state_dtype
        assert opt.state[small]["exp_avg"].dtype == expected
    assert w.isfinite().all()


@pytest.mark.parametrize(("state_dtype", "allowed"), [(torch.bfloat16, 0.02), (torch.uint8, 0.05)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_trained_as_with_fp32_moments(device, kind, state_dtype, allowed):
    """Guards against moments spoilt where they are read, rotated or written: the updates stay nearly the same."""
    exact, w, small = make(device, kind, None)
    start = w.detach().clone()
    opt, v, small_too = make(device, kind, state_dtype)
    for step in range(12):
        set_gradients([w, small], step)
        set_gradients([v, small_too], step)
        exact.step()
        opt.step()
    if kind == "tolerance":  # five of its eight columns are noise, which Adam makes as large as the rest
        allowed *= 1.25
    assert float((v - w).detach().norm() / (w - start).detach().norm()) <= allowed
    torch.testing.assert_close(small, small_too, rtol=0, atol=1e-3 if state_dtype == torch.uint8 else 0.02)


@pytest.mark.parametrize("kind", ["projected", "plain"])
def test_bytes_of_the_state(device, kind):
    """Guards against codes beside which the full moments are kept: 8 bits and a sixty-fourth for the scale."""
    size = {}
    for state_dtype in (torch.float32, torch.bfloat16, torch.uint8):
        opt, w, small = make(device, kind, state_dtype)
        set_gradients([w, small], 0)
        opt.step()
        names = (*moments.NAMES, *moments.SCALES)
        size[state_dtype] = sum(opt.state[w][k].nbytes for k in names if k in opt.state[w])
    assert size[torch.bfloat16] == size[torch.float32] / 2
    assert size[torch.uint8] == size[torch.float32] * (1 + 1 / 64) / 4


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_to_the_bit(device, kind, state_dtype, dtype):
    """Guards against codes or scales that loading casts to the dtype of the weight."""
    opt, w, small = make(device, kind, state_dtype, dtype)
    for step in range(4):
        set_gradients([w, small], step)
        opt.step()
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "w": w.detach().clone(), "small": small.detach().clone()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, v, small_too = make(device, kind, state_dtype, dtype)
    v.data.copy_(saved["w"])
    small_too.data.copy_(saved["small"])
    resumed.load_state_dict(saved["opt"])
    copied = copy.deepcopy(opt)
    for step in range(4, 8):
        for o in (opt, resumed, copied):
            set_gradients([p for g in o.param_groups for p in g["params"]], step)
            o.step()
    assert same(opt.state_dict()["state"], resumed.state_dict()["state"])
    assert torch.equal(w, v)
    assert torch.equal(w, copied.param_groups[0]["params"][0])


@pytest.mark.parametrize("strides", ["transposed", "channels_last"])
def test_plain_weights_of_other_layouts(device, strides):
    """Guards against weights stepped in a copy that is thrown away."""
    shape = (60, 80) if strides == "transposed" else (20, 8, 6, 6)
    w = torch.randn(shape, generator=generator(5)).to(device)
    moved = w.mT.contiguous().mT if strides == "transposed" else w.to(memory_format=torch.channels_last)
    assert not moved.is_contiguous()
    plain, other = torch.nn.Parameter(w.clone()), torch.nn.Parameter(moved)
    opts = [GaLoreAdamW([p], state_dtype=torch.uint8, lr=0.1) for p in (plain, other)]
    for step, (p, opt) in itertools.product(range(3), zip((plain, other), opts, strict=True)):
        p.grad = gradient(shape, step, device=device)
        opt.step()
    assert torch.equal(plain, other)
    assert not torch.equal(plain, w)


@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_plain_bf16_weights_with_fp32_moments_equal_torchs_in_fp32(device, beta2):
    """Guards against moments rounded on their way: torch's AdamW on the weights in fp32, rounded once a step."""
    w = torch.nn.Parameter(torch.randn(300, 40, generator=generator(6)).to(device).bfloat16())
    opt = GaLoreAdamW([w], lr=0.01, betas=(0.9, beta2), state_dtype=torch.float32)
    mirror = torch.nn.Parameter(w.detach().float())
    adamw = torch.optim.AdamW([mirror], lr=0.01, betas=(0.9, beta2))
    for step in range(6):
        w.grad = gradient((300, 40), step, torch.bfloat16, device=device)
        mirror.grad = w.grad.float()
        opt.step()
        adamw.step()
        mirror.data.copy_(mirror.data.bfloat16())
    assert float((w.float() - mirror).detach().abs().max()) <= 2.0**-8
    assert float((w.float() != mirror).float().mean()) < 0.01  # roundings that fell the other way
    torch.testing.assert_close(
        opt.state[w]["exp_avg_sq"], adamw.state[mirror]["exp_avg_sq"], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kept", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("counted_on", ["cpu", "meta"])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_torch_is_handed_its_counts_where_it_wants_them(monkeypatch, options, counted_on, kept):
    """Guards against a plain state of ours or of a file, given to torch, whose count is on another device: beside
    the weight where it is fused or capturable, else on the CPU."""
    w = torch.nn.Parameter(torch.zeros(99, 99, device="meta"))
    w.grad = torch.zeros_like(w)
    opt = GaLoreAdamW([w])
    opt.param_groups[0].update(options)
    opt.state[w]["step"] = torch.zeros((), device=counted_on)
    for name in moments.NAMES:
        opt.state[w] |= moments.kept(name, torch.zeros(99 * 99, device="meta"), kept)
        opt.state[w][name] = opt.state[w][name].view(w.shape)
    handed = []
    monkeypatch.setattr(optimizer, "adamw", lambda *args, **_: handed.extend((*args[2:4], args[5])))
    if counted_on == "meta" and not options:  # there is nothing to copy, which shows that it would have been
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            opt.step()
        return
    opt.step()
    (exp_avg,), (exp_avg_sq,), (step,) = handed
    assert exp_avg.dtype == exp_avg_sq.dtype == torch.float32
    assert step.device.type == ("meta" if options else "cpu")


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"state_dtype": torch.float16}, ValueError, r"Invalid state_dtype: torch.float16 \(must be one of"),
        ({"state_dtype": "8bit"}, ValueError, "Invalid state_dtype: '8bit'"),
        ({"state_dtype": torch.uint8, "amsgrad": True}, ValueError, "Invalid amsgrad: True .*state_dtype"),
        ({"arithmetic": "galore_torch", "differentiable": True}, ValueError, "Invalid differentiable: True"),
    ],
)
def test_refused(keys, error, message):
    """Guards against keys that are dropped in silence."""
    with pytest.raises(error, match=message):
        GaLoreAdamW([torch.nn.Parameter(torch.zeros(9, 9))], **keys)


@pytest.mark.parametrize("name", ["amsgrad", "differentiable"])
@pytest.mark.parametrize("keys", [{"state_dtype": torch.uint8}, {"rank": 3}], ids=str)
def test_options_that_have_no_meaning_are_refused_later_too(device, keys, name):
    """Guards against an option set while training that is dropped in silence."""
    w = torch.nn.Parameter(torch.zeros(9, 9, device=device))
    opt = GaLoreAdamW([{"params": [w], **keys}])
    w.grad = gradient((9, 9), 0, device=device)
    opt.step()
    before = w.detach().clone()
    opt.param_groups[0][name] = True
    with pytest.raises(ValueError, match=f"Invalid {name}: True"):
        opt.step()
    assert torch.equal(w, before)


def test_sparse_and_complex_are_refused(device):
    """Guards against a crash in the operator, or half a step."""
    with pytest.raises(TypeError, match="complex64"):
        GaLoreAdamW(
            [torch.nn.Parameter(torch.zeros(99, 99, dtype=torch.complex64, device=device))],
            state_dtype=torch.uint8,
        )
    p = torch.nn.Parameter(torch.zeros(99, 99, device=device))
    opt = GaLoreAdamW([p], state_dtype=torch.uint8)
    p.grad = torch.ones(99, 99, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert not opt.state[p]


def test_scaled_gradients_are_unscaled_and_skipped(device):
    """Guards against GradScaler with fused=True, which leaves both to the optimizer."""
    opt, w, small = make(device, "plain", torch.uint8)
    mirror, v, small_too = make(device, "plain", torch.uint8)
    for o in (opt, mirror):
        o.param_groups[0]["fused"] = True
    set_gradients([w, small], 0)
    set_gradients([v, small_too], 0)
    w.grad *= 8
    small.grad *= 8
    opt.grad_scale, opt.found_inf = torch.tensor(8.0, device=device), torch.tensor(0.0, device=device)
    opt.step()
    mirror.step()
    assert torch.equal(w, v)
    opt.found_inf = torch.tensor(1.0, device=device)
    before = w.detach().clone()
    set_gradients([w, small], 1)
    opt.step()
    assert torch.equal(w, before)
    assert float(opt.state[w]["step"]) == 1
