"""Which device to compute on, and in which precision."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sheepop.utils.errors import ConfigError


def available_devices() -> list[str]:
    """Name the devices of this machine, fastest kind first."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:N` or `mps` into a device that is there.

    Raises:
        ConfigError: this machine has no such device; names those that it has.
    """
    present = available_devices()
    if name == "auto":
        return torch.device(present[0])
    if name == "cuda" and present[0].startswith("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    if name in present:
        return torch.device(name)
    raise ConfigError(
        f"device '{name}' is not on this machine. It has: {', '.join(present)}. "
        "Choose one of them with --device, or let --device auto do it."
    )


@dataclass(frozen=True)
class Precision:
    """How a forward pass computes.

    Attributes:
        autocast_dtype: None means plain fp32.
        needs_loss_scaling: whether small gradients would vanish without.
        has_fp8: whether large linear layers learn in 8 bits besides (`models/fp8.py`).
    """

    name: str
    autocast_dtype: torch.dtype | None
    needs_loss_scaling: bool
    has_fp8: bool = False


FP32 = Precision("fp32", None, False)
BF16 = Precision("bf16", torch.bfloat16, False)
FP16 = Precision("fp16", torch.float16, True)
FP8 = Precision("fp8", torch.bfloat16, False, has_fp8=True)


# On a CPU with bf16 instructions, narrower models lose more to the conversions than they gain (`docs/log.md`).
LEAST_WIDTH_FOR_CPU_BF16 = 256


def choose_precision(device: torch.device, *, use_amp: bool, d_model: int, asked: str = "auto") -> Precision:
    """Return the precision of training a model of width `d_model` on `device`.

    `auto` with `use_amp` is bf16 where the hardware computes in it and that is faster, else fp16 with loss scaling on
    a GPU, else fp32: a CPU without bf16 instructions would emulate them, several times slower than fp32.

    Raises:
        ConfigError: fp16 was asked for on a CPU, whose kernels do not train in it, or fp8 on a device without it.
    """
    if asked == "fp16" and device.type == "cpu":
        raise ConfigError("training.precision 'fp16' needs a GPU; on a CPU use 'fp32', or 'auto'.")
    if asked == "fp8" and not multiplies_fp8(device):
        raise ConfigError(
            f"training.precision 'fp8' needs an NVIDIA GPU of compute capability 8.9 or more (the generations Ada, "
            f"Hopper and Blackwell), and {device} is none. Use 'bf16', or 'auto'."
        )
    named = {"fp32": FP32, "bf16": BF16, "fp16": FP16, "fp8": FP8}
    if asked != "auto":
        return named[asked]
    if not use_amp or device.type == "mps":
        return FP32
    if device.type == "cuda":
        return BF16 if torch.cuda.is_bf16_supported(including_emulation=False) else FP16
    return BF16 if cpu_has_bf16() and d_model >= LEAST_WIDTH_FOR_CPU_BF16 else FP32


def multiplies_fp8(device: torch.device) -> bool:
    """Say whether this is a GPU with tensor cores for 8-bit floats; AMD's, of other formats, do not count."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def cpu_has_bf16() -> bool:
    """Say whether this processor multiplies bf16 matrices in hardware (AVX-512 BF16 or AMX on x86)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


@dataclass(frozen=True)
class KnownPeak:
    """Dense peaks in FLOP/s: bf16 and fp16 on tensor cores with fp32 sums, and plain fp32."""

    half: float
    single: float

    def at(self, dtype: torch.dtype | None) -> float:
        """Return the peak of products in `dtype`, where None is fp32; TensorFloat-32 runs at half the rate of bf16."""
        if dtype is not None:
            return self.half
        return self.single if torch.get_float32_matmul_precision() == "highest" else self.half / 2


# From the makers' data sheets; the name is matched from the left.
KNOWN_PEAKS = {
    "NVIDIA H200": KnownPeak(989e12, 67e12),
    "NVIDIA H100 PCIe": KnownPeak(756e12, 51e12),
    "NVIDIA H100": KnownPeak(989e12, 67e12),
    "NVIDIA A100": KnownPeak(312e12, 19.5e12),
    "NVIDIA L40S": KnownPeak(362e12, 91.6e12),
    "NVIDIA L40": KnownPeak(181e12, 90.5e12),
    "NVIDIA L4": KnownPeak(121e12, 30.3e12),
    "NVIDIA GeForce RTX 4090": KnownPeak(165e12, 82.6e12),
    "NVIDIA GeForce RTX 3090": KnownPeak(71e12, 35.6e12),
}
PEAK_SIZES = {"cpu": 1024}  # of the square matrices whose product is timed
PEAK_SIZE_ELSEWHERE = 4096  # long enough that starting it does not count
PEAK_ROUNDS = 8
PEAK_SECONDS = (
    0.1  # after which no further round begins: a type without instructions of its own may take seconds for one
)


def peak_flops(device: torch.device, dtype: torch.dtype | None = None) -> float:
    """Return the floating-point operations a second that the device can do at best in `dtype`; None is fp32.

    A known GPU answers with its data sheet. Anything else is measured, with as many threads as the run has, as the best
    of a few products of 1024 x 1024 matrices (some tens of milliseconds), on a GPU of larger ones: on a CPU in fp32 by
    the faster of PyTorch's two libraries, since the model uses either.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for prefix, peak in KNOWN_PEAKS.items():
            if name.startswith(prefix):
                return peak.at(dtype)
    size = PEAK_SIZES.get(device.type, PEAK_SIZE_ELSEWHERE)
    left = torch.ones(size, size, device=device, dtype=dtype or torch.float32)
    products = [lambda: left @ left]
    if device.type == "cpu" and dtype is None and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(left, left, None, "none", [], ""))
    return max(2 * size**3 / _best_seconds(product) for product in products)


def _best_seconds(product: Callable[[], torch.Tensor]) -> float:
    seconds: list[float] = []
    with torch.inference_mode():
        while len(seconds) < PEAK_ROUNDS and sum(seconds) < PEAK_SECONDS:
            start = time.perf_counter()
            product()[0, 0].item()  # reading a number waits for the device
            seconds.append(time.perf_counter() - start)
    return min(seconds)
