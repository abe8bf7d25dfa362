"""The Triton kernels against the pure torch path, and the modes in bf16: needs a GPU."""

import pytest
import torch

from peft_control.memory import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def close(got, expected, tolerance):
    got, expected = got.double().cpu(), expected.double().cpu()
    assert torch.isfinite(got).all()
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
)
def test_kernels_equal_the_torch_path(dtype, tolerance):
    torch.manual_seed(0)
    x, dy, r = (torch.randn(37, 576, dtype=dtype) for _ in range(3))
    w = torch.randn(576, dtype=dtype)
    y, rstd = kernels.rms_norm(x.cuda(), w.cuda(), 1e-6, 1.0)
    y_ref, rstd_ref = kernels.rms_norm(x.double(), w.double(), 1e-6, 1.0)
    close(y, y_ref, tolerance)
    dx = kernels.rms_norm_backward(dy.cuda(), x.cuda(), w.cuda(), rstd, 1.0, r.cuda())
    close(
        dx,
        kernels.rms_norm_backward(dy.double(), x.double(), w.double(), rstd_ref, 1.0, r.double()),
        tolerance,
    )

    close(kernels.swiglu(x.cuda(), dy.cuda()), kernels.swiglu(x.double(), dy.double()), tolerance)
    got = kernels.swiglu_backward_(x.cuda(), dy.cuda(), r.cuda())
    for a, b in zip(got, kernels.swiglu_backward_(x.double(), dy.double(), r.double())):
        close(a, b, tolerance)

    heads = torch.randn(2, 5, 3, 64, dtype=dtype)
    angle = torch.randn(1, 5, 32).repeat(1, 1, 2)
    for backward in (False, True):
        got = kernels.rope(heads.cuda(), angle.cos().cuda(), angle.sin().cuda(), backward)
        close(
            got, kernels.rope(heads.double(), angle.cos().double(), angle.sin().double(), backward), tolerance
        )

    logits, labels = torch.randn(19, 20011, dtype=dtype) * 3, torch.randint(20011, (19,))
    labels[4] = -1
    ours, reference = logits.cuda(), logits.double()
    close(kernels.cross_entropy_(ours, labels.cuda()), kernels.cross_entropy_(reference, labels), 1e-5)
    close(ours, reference, tolerance)
    assert not ours[4].any()
