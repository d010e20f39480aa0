from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops, prng
from sparseticket.reference.masked_linear import masked_linear
from sparseticket.reference.regenerate import regenerate
from sparseticket.reference.ticket_linear import ticket_linear as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIGMA = prng.round_bf16(0.37)  # as modules round it: every dtype holds the same weights
LAST = 2**63 - 1
# (batch rows, K, O): every kernel (rows 1, 2, up to 6, panels of 16 with few and many rows left),
# more than one tile of outputs (64, 4,096) and slab of words (512 and 4,096 columns), no elements
SIZES = [
    *[(1, 1, 1), (1, 63, 3), (3, 17, 100), (4, 100, 17), (2, 130, 1), (2, 4096, 2), (5, 8300, 3)],
    *[(1, 1100, 300), (20, 33, 4100), (6, 17, 4100), (16, 100, 63), (30, 63, 17)],
    *[(17, 3, 1), (63, 100, 3), (0, 5, 4), (2, 0, 4), (100, 0, 4), (3, 5, 0)],
]
RECIPE = (5, 7, "signed_constant", SIGMA)


def _inputs(batch, k, rows, dtype, dist="signed_constant", seed=5, layer=7, bias=True):
    """x, the weight that the op must use, bias."""
    weight = regenerate(seed, layer, (rows, k), dist, SIGMA, dtype=dtype)
    return [
        torch.randn(batch, k, dtype=dtype),
        weight,
        torch.randn(rows, dtype=dtype) if bias else None,
    ]


def _pair(words, dist="signed_constant", seed=5, layer=7, **derived):
    return (
        lambda x, w, b: ops.ticket_linear(x, words, b, seed, layer, dist, SIGMA, **derived),
        lambda x, w, b: masked_linear(x, w, words, b),
    )


def _derived(words, k, names):
    """What a caller may keep of the layer."""
    makers = {
        "signs": lambda: ops.sign_words(5, 7, (words.shape[0], k)),
        "codes": lambda: ops.ticket_codes(words, k, 5, 7),
        "codes_t": lambda: ops.ticket_codes(words, k, 5, 7, None, True),
    }
    return {name: makers[name]() for name in names.split()}


def _ran(kernel, isa):
    """The path that a kernel belongs to."""
    if kernel == "materialised":
        return kernel
    name = kernel.removesuffix(f" {isa}")
    assert name in {f"lookup gemv {k}" for k in ("seed", "two-plane", "sign-only", "ternary")} | {
        "four-Russians"
    }
    return "fused"


@pytest.mark.parametrize("derived", ["", "signs", "codes codes_t"])
@pytest.mark.parametrize(
    ("path", "isa", "dtype"), oracle.routes(torch.float32, torch.bfloat16), indirect=["path", "isa"]
)
def test_forward_and_backward(path, isa, dtype, derived):
    torch.manual_seed(0)
    for i, (batch, k, rows) in enumerate(SIZES):
        for _, _, words in oracle.patterns((rows, k)):
            inputs = _inputs(batch, k, rows, dtype, bias=i % 2 == 0)
            kept = _derived(words, k, derived)
            args = (inputs[0], words, None, *RECIPE)
            assert _ran(ops.explain_op("ticket_linear", *args, **kept).kernel, isa) == path
            oracle.compare(*_pair(words, **kept), inputs, [0, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_kept(isa, path, dtype):
    torch.manual_seed(0)
    for batch, k, rows in SIZES:
        signs = ops.sign_words(5, 7, (rows, k))
        full = ops.pack_mask(torch.ones(rows, k, dtype=torch.bool))
        inputs = _inputs(batch, k, rows, dtype)
        oracle.compare(_pair(None, signs=signs)[0], _pair(full)[1], inputs, [0, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_product(isa, path, dtype):
    torch.manual_seed(0)
    for batch, k, rows in SIZES:
        _, mask, words = next(oracle.patterns((rows, k), "rows"))
        weight = regenerate(5, 7, (rows, k), "signed_constant", SIGMA, dtype=dtype)

        def op(x, w, b, words=words, k=k):
            return ops.ticket_linear(x, words, b, *RECIPE, columns=k)

        def reference_of(x, w, b, mask=mask):
            return torch.nn.functional.linear(x, (w * mask).t(), b)

        inputs = [torch.randn(batch, rows, dtype=dtype), weight, torch.randn(k, dtype=dtype)]
        oracle.compare(op, reference_of, inputs, [0, 2])


def test_what_is_not_finite_spreads_as_in_a_dense_layer(isa, path):
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((40, 70), "half"))
    for batch in (1, 4, 20):
        for bad in (torch.inf, -torch.inf, torch.nan):
            x, weight, _ = _inputs(batch, 70, 40, torch.float32)
            x[0, 5] = bad
            got, expected = _pair(words)[0](x, weight, None), _pair(words)[1](x, weight, None)
            assert not bool(got[0].isfinite().any())
            assert bool(got[1:].isfinite().all())
            if batch > 2 or path == "materialised":  # the exact same values but for two-plane rows
                assert torch.equal(got[0].nan_to_num(7, 8, 9), expected[0].nan_to_num(7, 8, 9))


@pytest.mark.parametrize("dist", ["uniform", "normal"])
def test_other_distributions_are_materialised(path, dist):
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((5, 70), "rows"))
    for dtype in DTYPES:
        inputs = _inputs(3, 70, 5, dtype, dist)
        choice = ops.explain_op("ticket_linear", inputs[0], words, None, 5, 7, dist, SIGMA)
        assert choice.kernel == "materialised"
        oracle.compare(*_pair(words, dist), inputs, [0, 2])


def test_the_reference_is_masked_linear_of_the_regenerated_weight():
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((5, 70), "rows"))
    for dist in prng.DISTRIBUTIONS:
        x, weight, bias = _inputs(3, 70, 5, torch.float64, dist)
        got = reference(x, words, bias, 5, 7, dist, SIGMA)
        assert torch.equal(got, masked_linear(x, weight, words, bias))


@pytest.mark.parametrize(("seed", "layer"), [(0, 0), (LAST, -1), (1, -LAST - 1), (0, LAST)])
def test_seeds_and_layers(path, seed, layer):
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((5, 70), "all"))
    inputs = _inputs(3, 70, 5, torch.float32, seed=seed, layer=layer)
    oracle.compare(*_pair(words, seed=seed, layer=layer), inputs, [0, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_caller_keeps_changes_no_bit(isa, path, dtype):
    torch.manual_seed(0)
    for batch, k in ((1, 4200), (9, 70)):
        _, _, words = next(oracle.patterns((5, k), "rows"))
        inputs = _inputs(batch, k, 5, dtype)
        bare, _ = _pair(words)
        for names in ("signs",) if batch == 1 else ("signs", "codes codes_t"):
            for change in (lambda t: t, oracle.FORMATS["sliced"]):
                kept = {n: change(t) for n, t in _derived(words, k, names).items()}
                got, _ = _pair(words, **kept)
                y, grad, grads = oracle.gradients(got, inputs, [0])
                y2, _, grads2 = oracle.gradients(bare, inputs, [0], grad)
                assert torch.equal(y, y2)
                assert torch.equal(grads[0], grads2[0])


@pytest.mark.parametrize("path", ["fused"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("derived", ["", "codes"])
def test_threads_give_equal_bits(isa, path, dtype, derived):
    torch.manual_seed(0)
    for batch, k, rows in [
        (4, 300, 163),
        (1, 300, 163),
        (1, 64, 2500),
        (16, 64, 2500),
        (39, 90, 80),
    ]:
        words = ops.pack_mask(torch.rand(rows, k) < 0.5)
        inputs = _inputs(batch, k, rows, dtype)
        op, _ = _pair(words, **_derived(words, k, derived))
        assert torch.equal(*oracle.by_threads(lambda op=op, inputs=inputs: op(*inputs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain_tells_what_runs(calls, dtype):
    torch.manual_seed(0)
    module = oracle.module_of("ticket_linear")
    rows, k = module.LOOKUP_OUTPUTS, 70
    words, signs = ops.pack_mask(torch.rand(rows, k) < 0.5), ops.sign_words(5, 7, (rows, k))
    codes = ops.ticket_codes(words, k, 5, 7)
    many = module.VECTOR_ROWS + 1
    over = module.LOOKUP_ROWS.get(dtype, 0) + 1
    cases = [
        (1, (words,), {}, "lookup gemv seed", ["ticket_linear"]),
        (1, (words,), {"signs": signs}, "lookup gemv two-plane", ["ticket_linear"]),
        (1, (None,), {"signs": signs}, "lookup gemv sign-only", ["ticket_linear"]),
        (1, (words,), {"codes": codes}, "lookup gemv ternary", ["lookup_linear"]),
        (3, (words,), {}, "lookup gemv ternary", ["ticket_codes", "lookup_linear"]),
        (many, (words,), {}, "four-Russians", ["ticket_codes", "lookup_linear"]),
        (many, (words,), {"codes": codes}, "four-Russians", ["lookup_linear"]),
        *([(over, (words,), {"codes": codes}, "materialised", [])] if over < 1000 else []),
    ]
    for batch, planes, kept, kernel, called in cases:
        args = (torch.randn(batch, k, dtype=dtype), *planes, None, *RECIPE)
        expected = (kernel, called) if dtype != torch.float64 else ("materialised", [])
        calls.clear()
        ops.ticket_linear(*args, **kept)
        assert calls == expected[1]
        assert ops.explain_op("ticket_linear", *args, **kept).kernel.startswith(expected[0])
    few = (torch.randn(many, k, dtype=dtype), words[:-1], None, *RECIPE)
    assert ops.explain_op("ticket_linear", *few).kernel == "materialised"
    large = torch.zeros(module.LARGE_OUTPUTS, words.shape[1], dtype=torch.int32)
    args = (torch.randn(over, k, dtype=dtype) if over < 1000 else few[0], large, None, *RECIPE)
    kernel = ops.explain_op("ticket_linear", *args).kernel
    assert kernel.startswith("materialised" if dtype == torch.float64 else "four-Russians")


@pytest.mark.parametrize("layout", oracle.FORMATS)
def test_layouts(path, layout):
    torch.manual_seed(0)
    change = oracle.FORMATS[layout]
    _, _, words = next(oracle.patterns((17, 63), "rows"))
    for dtype in DTYPES:
        x, weight, bias = _inputs(5, 63, 17, dtype)
        oracle.compare(*_pair(change(words)), [change(x), weight, change(bias)], [0, 2])


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 2)])
def test_leading_dimensions(path, lead):
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((5, 70), "rows"))
    _, weight, bias = _inputs(1, 70, 5, torch.float32)
    oracle.compare(*_pair(words), [torch.randn(*lead, 70), weight, bias], [0, 2])


def test_gradcheck():
    torch.manual_seed(0)
    _, _, words = next(oracle.patterns((3, 5), "rows"))
    x, weight, bias = (oracle.leaf(t) for t in _inputs(4, 5, 3, torch.float64))

    def op(x, b):
        return _pair(words)[0](x, weight, b)

    assert torch.autograd.gradcheck(op, (x, bias))
    assert torch.autograd.gradgradcheck(op, (x, bias))


def test_opcheck(path):
    torch.manual_seed(0)
    words, signs = ops.pack_mask(torch.rand(5, 70) < 0.5), ops.sign_words(5, 7, (5, 70))
    for dtype in DTYPES:
        x, _, bias = (oracle.leaf(t) for t in _inputs(3, 70, 5, dtype))
        codes = _derived(words, 70, "codes codes_t").values()
        for args in [
            (x, words, bias, *RECIPE),
            (x, words, None, *RECIPE, signs),
            (x, None, bias, *RECIPE, signs),
            (x, words, bias, *RECIPE, None, *codes),
            (x[:, :5], words, None, *RECIPE, None, *codes, 70),
        ]:
            torch.library.opcheck(ops.ticket_linear, args)


def test_compiled(path):
    torch.manual_seed(0)
    words = ops.pack_mask(torch.rand(5, 70) < 0.5)
    for dist in ("signed_constant", "normal"):
        oracle.check_compiled(_pair(words, dist)[0], _inputs(3, 70, 5, torch.float32, dist), [0, 2])


def test_errors():
    x, words = torch.randn(3, 70), torch.zeros(5, 4, dtype=torch.int32)
    bias, recipe, codes = torch.randn(5), RECIPE, torch.zeros(5, 16, dtype=torch.int32)
    for error, text, args in [
        (ValueError, r"x: got shape \(\), need last dimension", (x[0, 0], words, None, *recipe)),
        (ValueError, r"words: .*\(5, 4\), need int32 \(5, 2\)", (x[:, :9], words, None, *recipe)),
        (ValueError, r"words: got torch\.int64", (x, words.long(), None, *recipe)),
        (TypeError, r"x: got torch\.int64, need a floating", (x.long(), words, None, *recipe)),
        (ValueError, r"bias: got torch\.float32 \(4,\), need", (x, words, bias[1:], *recipe)),
        (ValueError, r"bias: got torch\.float64 \(5,\)", (x, words, bias.double(), *recipe)),
        (ValueError, r"dist: got 'x', accepted: signed", (x, words, None, 5, 7, "x", SIGMA)),
        (
            ValueError,
            r"signs: .*\(4, 4\), need int32 \(5, 4\)",
            (x, words, None, *recipe, words[1:]),
        ),
        (ValueError, r"words: got None, which needs", (x, None, None, *recipe)),
        (ValueError, r"codes: .*\(4, 16\), need", (x, words, None, *recipe, None, codes[1:])),
        (ValueError, r"codes_t: .*\(5, 16\), need", (x, words, None, *recipe, None, None, codes)),
        (
            ValueError,
            r"x: .*\(3, 70\), need .* last dimension 5",
            (x, words, None, *recipe, None, None, None, 70),
        ),
    ]:
        with pytest.raises(error, match="ticket_linear: " + text):
            ops.ticket_linear(*args)
    with pytest.raises(ValueError, match=r"seed: got -1, need an integer in \[0, 2\*\*63\)"):
        ops.ticket_linear(x, words, None, -1, 7, "signed_constant", SIGMA)
