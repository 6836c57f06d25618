"""Peak FLOP/s of one device, as its vendor states it: dense (no structured sparsity), fp32 accumulation.

NVIDIA prints tensor-core figures with sparsity in most of its data sheets; the dense figure is half of it.
A type that the hardware lacks, or whose figure the vendor does not give, is left out.
"""

import re

_TERA = 1e12

# (pattern of jax's device_kind, {type: TFLOP/s}). First match wins, so the special come before the general.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA GB200 NVL72 data sheet: per two GPUs 10,000 bf16 and 5,000 tf32 with sparsity, 160 fp32.
    (r"GB200", {"bf16": 2500, "fp16": 2500, "tf32": 1250, "fp32": 80}),
    # NVIDIA HGX platform page, B200: eight GPUs 36,000 bf16 and 18,000 tf32 with sparsity, 600 fp32.
    (r"\bB200", {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75}),
    # NVIDIA H200 data sheet: NVL 1,671 bf16 and 835 tf32 with sparsity, 60 fp32; SXM 1,979, 989 and 67.
    (r"H200 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    (r"H200", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    # NVIDIA H100 data sheets: PCIe 1,513 bf16 and 756 tf32 with sparsity, 51 fp32; NVL 1,671, 835 and 60;
    # SXM ("NVIDIA H100 80GB HBM3") 1,979, 989 and 67.
    (r"H100 PCIe", {"bf16": 756.5, "fp16": 756.5, "tf32": 378, "fp32": 51}),
    (r"H100 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    (r"H100.*HBM3|H100 SXM", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    # NVIDIA A100 data sheet: the same for SXM and PCIe; dense figures given.
    (r"A100", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    # NVIDIA L40S data sheet: dense figures given beside those with sparsity.
    (r"L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    # NVIDIA L4 data sheet: 242 bf16 and 120 tf32 with sparsity, 30.3 fp32.
    (r"\bL4$", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    # NVIDIA Ada GPU architecture white paper, appendix A: tensor cores with fp32 accumulation, dense.
    (r"RTX 4090$", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    # NVIDIA V100 data sheet; its tensor cores know fp16 only.
    (r"V100-SXM2", {"fp16": 125, "fp32": 15.7}),
    (r"V100-PCIE", {"fp16": 112, "fp32": 14}),
    # Google Cloud TPU documentation, "System architecture" of each version: peak compute per chip, bf16.
    (r"^TPU v4$", {"bf16": 275}),
    (r"^TPU (v5 lite|v5e)", {"bf16": 197}),
    (r"^TPU v5p?$", {"bf16": 459}),
    (r"^TPU (v6 lite|v6e)", {"bf16": 918}),
)

_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device (`jax.Device.device_kind`) in bf16, fp16, tf32 or fp32; NumPy's names do too.

    None where the table has no figure: say "unknown device", do not guess. JAX multiplies fp32 matrices in
    tf32 on Ampere and later unless told otherwise, so tf32 is the type to ask for there.
    """
    for pattern, peaks in _PEAKS:
        if re.search(pattern, device_kind):
            tera = peaks.get(_TYPES.get(dtype, dtype))
            return None if tera is None else tera * _TERA
    return None
