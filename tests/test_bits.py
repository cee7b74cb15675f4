"""Masks: one bit a value."""

import pytest
import torch

from tinytl_hf.lean import bits


@pytest.mark.parametrize("values", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize("upper", [6.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_take_one_bit_a_value_and_are_exact_at_the_bounds(values, upper, dtype):
    x = (torch.randn(values, dtype=dtype) * 4).clamp(0, upper)
    x[: min(4, values)] = torch.tensor([0.0, 6.0, 1e-30, 5.96875])[: min(4, values)].to(dtype)
    packed = bits.pack(x, upper)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-values // 8)
    assert torch.equal(bits.unpack(packed, (values,)), ((x > 0) & (x < upper)).to(torch.uint8))


def test_on_devices_other_than_a_cpu_masks_are_applied_whole(monkeypatch):
    values = torch.randn(1001)
    expected = values * ((values > 0) & (values < 1))
    packed = bits.pack(values.clamp(0, 1), 1.0)
    sizes = []
    monkeypatch.setattr(
        bits, "unpack", lambda mask, shape, unpack=bits.unpack: sizes.append(shape) or unpack(mask, shape)
    )
    monkeypatch.setattr(bits, "CHUNK", 8)
    assert torch.equal(bits.mask_(values.clone(), packed), expected) and len(sizes) == 126
    other = torch.empty(1001, device="meta")
    assert bits.mask_(other, packed.to("meta")).shape == (1001,) and sizes[126:] == [(1001,)]
