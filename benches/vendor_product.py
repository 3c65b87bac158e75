# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0"]
# ///
"""Times the matrix products of a layer of Llama-3-8B by the vendor's library (cuBLAS), through PyTorch.

    uv run benches/vendor_product.py --tokens 1534 --dtype bf16

It is what `orpo-wgpu bench` on the same card is held against, whose pairs of 1,024 and 2,048 tokens have 1,534 and 3,070 when they
are packed. A product is timed twice: from rest, and after a second of nothing else, when a card has come to its power limit.
Prints Markdown.
"""

import argparse
import time

import torch

HIDDEN, KEYS, INTERMEDIATE = 4096, 1024, 14336
# Columns that a linear takes and gives, and how many of its kind a layer has.
LINEARS = {
    "q_proj, o_proj": (HIDDEN, HIDDEN, 2), "k_proj, v_proj": (HIDDEN, KEYS, 2),
    "gate_proj, up_proj": (HIDDEN, INTERMEDIATE, 2), "down_proj": (INTERMEDIATE, HIDDEN, 1),
}  # fmt: skip
SQUARES = (4096, 8192)
REST_S, HOT_S, TIMED_S = 1.0, 1.0, 0.2


def seconds_of(product, device: str, at_least_s: float) -> float:
    """The mean time of a product, run back to back for about so long."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    n, took = 1, 0.0
    while took < at_least_s:
        n = max(n + 1, int(n * at_least_s / took)) if took else n
        synchronize()
        started = time.perf_counter()
        for _ in range(n):
            product()
        synchronize()
        took = time.perf_counter() - started
    return took / n


def timed(n_rows: int, n_in: int, n_out: int, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of `[n_rows, n_in] x [n_out, n_in]ᵀ`: from rest, and hot."""
    x = torch.randn(n_rows, n_in, device=args.device).to(args.type)
    weight = torch.randn(n_out, n_in, device=args.device).to(args.type)
    y = torch.empty(n_rows, n_out, device=args.device, dtype=args.type)

    def product() -> None:
        torch.mm(x, weight.t(), out=y)

    product()
    time.sleep(REST_S)
    rested = seconds_of(product, args.device, args.seconds / 10)
    seconds_of(product, args.device, HOT_S * args.seconds / TIMED_S)
    return rested, seconds_of(product, args.device, args.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1534)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=TIMED_S, help="of each timing (%(default)s)")
    args = parser.parse_args()
    args.type = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {args.dtype}, {args.tokens} tokens\n")
    print("| product | TFLOP/s from rest | hot |\n|---|---|---|")

    def row(name: str, flops: float, seconds: tuple[float, float]) -> None:
        print(f"| {name} | " + " | ".join(f"{flops / s / 1e12:.4g}" for s in seconds) + " |", flush=True)

    total_flops, total = 0.0, [0.0, 0.0]
    for name, (n_in, n_out, n_of_kind) in LINEARS.items():
        flops, seconds = 2.0 * args.tokens * n_in * n_out, timed(args.tokens, n_in, n_out, args)
        row(name, flops, seconds)
        total_flops += n_of_kind * flops
        total = [sum_ + n_of_kind * s for sum_, s in zip(total, seconds, strict=True)]
    row("all seven", total_flops, tuple(total))
    for n in SQUARES:
        row(f"{n} x {n} x {n}", 2.0 * n**3, timed(n, n, n, args))


if __name__ == "__main__":
    main()
