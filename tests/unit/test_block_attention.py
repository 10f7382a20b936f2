"""Blocks attend to a context and to themselves as if all keys stood in one row, and so do their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepspec.drafters.block_attention import BlockMasks, attend_in_blocks
from deepspec.drafters.block_network import additive, block_mask, context_mask, own_block
from deepspec.target.attention import attend

BATCH, CONTEXT, BLOCKS, SIZE, DIM = 2, 23, 4, 5, 16


def seen(anchors: Tensor, window: int | None, causal: bool) -> Tensor:
    """What each place sees, written out: bool [batch, blocks·size, context + blocks·size]."""
    found = torch.zeros(BATCH, BLOCKS * SIZE, CONTEXT + BLOCKS * SIZE, dtype=torch.bool)
    for b in range(BATCH):
        for block in range(BLOCKS):
            anchor = int(anchors[b, block])
            for place in range(SIZE):
                at = anchor + place
                for key in range(CONTEXT):
                    found[b, block * SIZE + place, key] = key < anchor and (
                        window is None or at - key < window
                    )
                for other in range(SIZE):
                    back = place - other
                    near = (window is None or back < window) and not (causal and back < 0)
                    found[b, block * SIZE + place, CONTEXT + block * SIZE + other] = near
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(("window", "causal"), [(None, False), (None, True), (7, False), (3, True)])
def test_two_parts_are_one_attention(window, causal, heads, kv_heads, dtype):
    rng = torch.Generator().manual_seed(0)

    def random(heads: int, n: int) -> Tensor:
        return (
            torch.randn(BATCH, heads, n, DIM, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        )

    anchors = torch.randint(1, CONTEXT, (BATCH, BLOCKS), generator=rng)
    m = BLOCKS * SIZE
    read = [random(heads, m), *(random(kv_heads, n) for n in (CONTEXT, CONTEXT, m, m))]
    masks = BlockMasks(
        context_mask(anchors, CONTEXT, SIZE, window),
        additive(own_block(SIZE, window, causal, anchors.device)),
    )
    found = attend_in_blocks(read[0], (read[1], read[2]), (read[3], read[4]), masks, DIM**-0.5)
    whole = [x.detach().double().requires_grad_() for x in read]
    visible = seen(anchors, window, causal)
    assert torch.equal(block_mask(anchors, CONTEXT, SIZE, window, causal)[:, 0] == 0, visible)
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill_(~visible, -torch.inf)
    keys, values = torch.cat((whole[1], whole[3]), 2), torch.cat((whole[2], whole[4]), 2)
    expected = attend(whole[0], keys, values, mask[:, None].repeat(1, 1, heads // kv_heads, 1), None)
    slope = torch.randn(found.shape, generator=rng, dtype=torch.float64)
    if dtype == torch.bfloat16:  # under autocast, as without: softmax and sums are in float32
        with torch.autocast("cpu", torch.bfloat16):
            context, own = ((read[i].float(), read[i + 1].float()) for i in (1, 3))
            again = attend_in_blocks(read[0].float(), context, own, masks, DIM**-0.5)
        assert torch.equal(again, found)
    precision = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=precision)
    gradients = torch.autograd.grad(found, read, slope.to(dtype))
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, whole, slope), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2 * precision)
