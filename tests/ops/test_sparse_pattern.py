from __future__ import annotations

import oracle
import pytest
import torch

from sparseticket import ops
from sparseticket.reference.sparse_pattern import sparse_pattern as reference

SHAPES = [(1, 1), (3, 17), (17, 63), (100, 100), (300, 700), (513, 40), (0, 5), (5, 0), (2, 70000)]


def _padded(n):
    return (n + 15) // 16 * 16


def _decoded(pattern, rows, k, kept, transposed):
    """What the reference says, read out of the kernels' layout; and the segments, if any."""
    words = pattern.numpy().view("uint32")
    assert words[:4].tolist() == [rows, k, kept, transposed]
    order = len(words) - (kept if transposed else 0)
    listed = _padded(kept if k > 65536 else (kept + 1) // 2)
    columns = words[order - listed : order]
    columns = (columns if k > 65536 else columns.view("uint16"))[:kept]
    parts = [words[16 : 16 + rows + 1], columns, *([words[order:]] if transposed else [])]
    segments = words[16 + _padded(rows + 1) : order - listed]
    return torch.cat([torch.tensor(p.astype("int64")) for p in parts]), segments.view("uint16")


@pytest.mark.parametrize("transposed", [False, True])
def test_lists_what_the_reference_does(isa, transposed):
    torch.manual_seed(0)
    for shape in SHAPES:
        for _, mask, words in oracle.patterns(shape):
            kept = int(mask.sum())
            pattern = ops.sparse_pattern(words, shape[1], kept, transposed)
            rows, k = reversed(shape) if transposed else shape
            listed, segments = _decoded(pattern, rows, k, kept, transposed)
            expected = reference(words, shape[1], kept, transposed).long()
            assert torch.equal(listed, expected)
            counts = torch.tensor(segments.reshape(-1, 4)[:, 2].astype("int64"))
            assert int(counts.sum()) == kept  # the segments cover every value once


def test_segments_are_sorted_runs_within_a_block():
    torch.manual_seed(0)
    mask = torch.rand(300, 1000) < 0.2  # blocks of 128 columns, strips of 256 rows
    kept = int(mask.sum())
    words = ops.pack_mask(mask)
    listed, raw = _decoded(ops.sparse_pattern(words, 1000, kept), 300, 1000, kept, False)
    columns = listed[301:]
    segments = torch.tensor(raw.astype("int64"))[: 4 * 300 * 8].view(-1, 4)
    starts, counts = segments[:, 0] + 65536 * segments[:, 1], segments[:, 2]
    at = 0
    for first, n in ((0, 256), (256, 44)):
        for block in range(8):
            here = slice(at, at + n)
            assert bool((counts[here].diff() <= 0).all())
            rows = segments[here, 3]
            assert sorted(rows.tolist()) == list(range(n))
            for start, count, row in zip(starts[here], counts[here], rows, strict=True):
                live = mask[first + row, 128 * block :][:128].nonzero()[:, 0] + 128 * block
                assert torch.equal(columns[start : start + count], live)
            at += n


def test_opcheck():
    mask = torch.rand(4, 70) < 0.5
    words = ops.pack_mask(mask)
    torch.library.opcheck(ops.sparse_pattern, (words, 70, int(mask.sum()), True))


def test_errors():
    words = ops.pack_mask(torch.ones(3, 70, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"sparse_pattern: words: .*need int32 \(3, 6\)"):
        ops.sparse_pattern(words, 130, 210)
    with pytest.raises(ValueError, match=r"words: 210 live weights, but there are 100 values"):
        ops.sparse_pattern(words, 70, 100)
    with pytest.raises(ValueError, match=r"sparse_pattern: kept: got 211"):
        ops.sparse_pattern(words, 70, 211)
