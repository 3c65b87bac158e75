# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0", "transformers==5.17.0", "trl==1.16.0", "peft==0.21.2",
#                 "tokenizers==0.23.3", "safetensors==0.8.0", "datasets==5.2.0", "accelerate==1.15.0"]
# ///
"""Trains the same model on the same pairs with orpo-wgpu and with its peers, and compares speed, memory and figures.

    uv run benches/peers.py --make DIR --shape llama3-8b-instruct --max_length 1024
    uv run benches/peers.py --run DIR --device cuda --binary target/release/orpo-wgpu

    uv run benches/peers.py --make DIR --shape tiny-256-2
    uv run benches/peers.py --run DIR --device cpu --binary target/release/orpo-wgpu
    uv run benches/peers.py --parity DIR --binary target/release/orpo-wgpu

`--make` writes random weights, an adapter to start from and pairs; nothing is downloaded. `--run` prints Markdown: a
table of speed and memory, and what every engine logged at every step. `--parity` is the second part alone, in fp32, on
the CPU and on whatever `orpo-wgpu devices` lists. Peers are TRL with PEFT and, where they are installed (`uv run --with
liger-kernel`), Liger's kernels and Unsloth. Each engine runs in a process of its own; one that fails is a row that says
why. Tokens are those of both sequences of a pair, without padding, for all engines alike.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# A process's peak memory counts from that of the process that started it: nothing large is imported here.
HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "tests" / "fixtures"
CARD = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
ENVIRONMENT = os.environ | {
    "CUDA_VISIBLE_DEVICES": CARD, "PYTHONPATH": os.pathsep.join([str(FIXTURES), *sys.path]), "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip

PEERS = {
    "trl": ("TRL + PEFT", "trl"),
    "liger": ("TRL + PEFT, Liger's kernels", "liger_kernel"),
    "liger-loss": ("TRL + PEFT, Liger's kernels and loss", "liger_kernel"),
    "unsloth": ("Unsloth + TRL", "unsloth"),
}  # the engines in Python: their names in tables, and the module that each needs
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "liger-kernel", "unsloth", "triton")
# Names that ms-swift, whose flags orpo-wgpu has, shares with ORPOConfig: both sides are given the same.
SAME = {
    "beta": 0.1, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "weight_decay": 0.1, "adam_beta1": 0.9,
    "adam_beta2": 0.95, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "gradient_accumulation_steps": 1,
    "logging_steps": 1, "seed": 42,
}  # fmt: skip
WARM_UP = 2  # steps that medians leave out
BY_STEP = ("loss", "log_odds_chosen", "rewards/accuracies", "grad_norm")
METRICS = (*BY_STEP, "nll_loss", "log_odds_ratio", "rewards/chosen", "rewards/rejected", "rewards/margins",
           "logps/chosen", "logps/rejected")  # fmt: skip


@dataclass
class Result:
    """What came of an engine. `steps` are its log, in TRL's names; memory is None where it was not measured; `backward` is what
    it runs again in backward: a card's free memory has ours run less again than it may."""

    engine: str
    dtype: str
    failure: str | None = None
    seconds: list[float] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    peak_bytes: int | None = None
    tensor_bytes: int | None = None
    backward: str = ""

    @property
    def title(self) -> str:
        return PEERS[self.engine][0] if self.engine in PEERS else f"orpo-wgpu --device {self.engine}"


def train_with(engine: str, args: argparse.Namespace) -> Result:
    """Trains with one engine."""
    # Shaders have no bf16.
    dtype = "fp16" if engine == "wgpu" and args.dtype == "bf16" else args.dtype
    result = Result(engine, dtype)
    with tempfile.TemporaryDirectory() as output:
        command = (peer_command if engine in PEERS else own_command)(engine, dtype, Path(output), args)
        result.failure, result.peak_bytes, log = watch(command, args.device == "cuda", args.limit)
        result.backward = "layers run again" if args.gradient_checkpointing else "everything kept"
        if result.failure is None and engine in PEERS:
            told = json.loads(Path(output, "result.json").read_text())
            result.seconds, result.steps, result.tensor_bytes = told["seconds"], told["steps"], told["tensor_bytes"]
        elif result.failure is None:
            result.steps = [json.loads(line) for line in Path(output, "logging.jsonl").read_text().splitlines()]
            packed = tokens_by_step(args, "packed")
            result.seconds = [n / line["tokens_per_second"] for n, line in zip(packed, result.steps, strict=True)]
            result.backward = backward_of(log)
            if args.device == "cuda":
                result.tensor_bytes = max(line["memory_bytes"] for line in result.steps)
    return result


def settings(args: argparse.Namespace) -> dict:
    """What both sides are given."""
    return SAME | {
        "max_steps": args.steps, "max_length": args.about["max_length"],
        "gradient_checkpointing": args.gradient_checkpointing,
    }  # fmt: skip


def own_command(engine: str, dtype: str, output: Path, args: argparse.Namespace) -> list[str]:
    flags = settings(args) | {
        "model_id_or_path": args.folder / "model", "adapters": args.folder / "adapter",
        "dataset": args.folder / "pairs.jsonl", "dataset_test_ratio": 0, "dataset_shuffle": False, "strict": True,
        "loss_compat": "trl", "warmup_ratio": 0, "batch_size": args.batch_size, "dtype": dtype, "device": engine,
        "save_steps": args.steps, "report_to": "none", "output_dir": output, "add_output_dir_suffix": False,
    }  # fmt: skip
    told = [(name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in flags.items()]
    return [str(args.binary), "train", *(word for name, value in told for word in (f"--{name}", value))]


def peer_command(engine: str, dtype: str, output: Path, args: argparse.Namespace) -> list[str]:
    job = {
        "peer": engine, "folder": str(args.folder), "device": args.device, "dtype": dtype,
        "settings": settings(args) | {"per_device_train_batch_size": args.batch_size},
        "result": str(output / "result.json"),
    }  # fmt: skip
    return [sys.executable, str(HERE / "peer_trainer.py"), json.dumps(job)]


def watch(command: list[str], on_card: bool, limit_s: float) -> tuple[str | None, int | None, str]:
    """Runs a process to its end: why it failed, if it did, the most memory that it took, and what it said.

    On a card that is by how much the card's used memory grew, in which Vulkan and CUDA count alike (the list of compute
    processes leaves Vulkan's out); elsewhere what the process had resident.
    """
    query = ["nvidia-smi", f"--id={CARD}", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=100"]
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as readings:
        meter = subprocess.Popen(query, stdout=readings) if on_card else None
        time.sleep(1 if on_card else 0)  # the first reading is of the card before it
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        deadline, too_long = time.monotonic() + limit_s, False
        while not (waited := os.wait4(process.pid, os.WNOHANG))[0]:
            too_long = time.monotonic() > deadline
            if too_long:
                process.kill()
            time.sleep(0.05)
        _, status, usage = waited
        process.returncode = os.waitstatus_to_exitcode(status)
        peak_bytes = usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        if meter:
            meter.terminate()
            meter.wait()
            readings.seek(0)
            used = [int(line) for line in readings.read().split()]
            peak_bytes = (max(used) - min(used)) << 20
        log.seek(0)
        said = log.read()
        if too_long:
            print(said, file=sys.stderr)
            return f"took more than {limit_s:.0f} s", peak_bytes, said
        return failure_of(process.returncode, said), peak_bytes, said


def backward_of(log: str) -> str:
    """What our run says that it runs again in backward, at the end of the line of its predicted memory."""
    lines = [line for line in log.splitlines() if line.startswith("memory ")]
    return lines[0].rsplit("; ", 1)[-1] if lines else ""


def failure_of(code: int, log: str) -> str | None:
    """The line of the log that says why, None where all went well."""
    if code == 0:
        return None
    print(log, file=sys.stderr)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("orpo-wgpu: ")]
    last = (own or lines or ["it said nothing"])[-1].removeprefix("orpo-wgpu: ")
    return (f"ended by signal {-code}: {last}" if code < 0 else last)[:160].replace("|", "/")


def tokens_by_step(args: argparse.Namespace, kind: str) -> list[int]:
    """Tokens of each step's pairs: of their `sequences`, or those that are computed when they are `packed`."""
    tokens, pairs = args.about["tokens"], args.steps * args.batch_size
    of_pair = [tokens[i % len(tokens)][kind] for i in range(pairs)]
    return [sum(of_pair[i : i + args.batch_size]) for i in range(0, pairs, args.batch_size)]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def speed_table(results: list[Result], args: argparse.Namespace) -> str:
    """The median and the fastest step, and the tokens of an average one in the median's time."""
    tokens = statistics.mean(tokens_by_step(args, "sequences")[WARM_UP:])
    trl = next((r for r in results if r.engine == "trl" and r.failure is None), None)
    rows = []
    for result in results:
        if result.failure is not None:
            rows.append([result.title, result.dtype, f"failed: {result.failure}", *[""] * 6])
            continue
        median, fastest = statistics.median(result.seconds[WARM_UP:]), min(result.seconds[WARM_UP:])
        ratio = f"{statistics.median(trl.seconds[WARM_UP:]) / median:.2f}" if trl else ""
        memory = [f"{n / 2**30:.2f} GiB" if n else "" for n in (result.peak_bytes, result.tensor_bytes)]
        steps = [f"{median:.3f}", f"{fastest:.3f}", f"{tokens / median:.0f}"]
        rows.append([result.title, result.dtype, *steps, *memory, result.backward, ratio])
    where = "on the card" if args.device == "cuda" else "resident"
    memory = [f"peak memory, {where}", "of it tensors"]
    header = ["engine", "dtype", "s a step", "the fastest", "tokens/s", *memory, "backward", "times TRL's speed"]
    return table(header, rows)


def parity_tables(results: list[Result]) -> str:
    """Every step by engine, and how far each engine is from the first."""
    results = [result for result in results if result.failure is None]
    if len(results) < 2:
        return "Fewer than two engines ran: there is nothing to compare.\n"
    first, *others = results
    parts = []
    for metric in BY_STEP:
        rows = [
            [str(step), *(f"{line[metric]:#.7g}" for line in lines)]
            for step, lines in enumerate(zip(*(result.steps for result in results), strict=True), 1)
        ]
        parts.append(table([metric, *(f"{result.title}, {result.dtype}" for result in results)], rows))
    rows = []
    for metric in METRICS:
        expected = [line[metric] for line in first.steps]
        largest = max(abs(value) for value in expected) or 1.0
        apart = [max(abs(a[metric] - b) for a, b in zip(other.steps, expected, strict=True)) for other in others]
        rows.append([metric, f"{largest:.4g}", *(f"{difference / largest:.1e}" for difference in apart)])
    parts.append(f"Largest difference to {first.title} at a step, as a share of the largest value:\n")
    parts.append(table(["metric", "largest", *(f"{other.title}, {other.dtype}" for other in others)], rows))
    return "\n".join(parts)


def choose(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The engines that can run, and why the others cannot."""
    of_device = {"cuda": [*PEERS, "cuda", "wgpu"], "cpu": ["trl", "cpu"]}
    engines = ["trl", "cpu", "wgpu", "cuda"] if args.parity else of_device[args.device]
    listed = said_by([str(args.binary), "devices"]).splitlines()
    left_out = {}
    for engine in args.engines or engines:
        if engine in PEERS:
            if importlib.util.find_spec(PEERS[engine][1]) is None:
                left_out[engine] = f"there is no module `{PEERS[engine][1]}`"
        elif engine != "cpu":
            lines = [line for line in listed if line.split()[:1] == [f"{engine}:0"]]
            if not lines:
                left_out[engine] = "`orpo-wgpu devices` does not list it"
            elif "software" in lines[0] and not args.parity:
                left_out[engine] = "its only adapter is software"
    return [engine for engine in args.engines or engines if engine not in left_out], left_out


def said_by(command: list[str]) -> str:
    """Standard output of a command, "" where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False).stdout.strip()
    except OSError:
        return ""


def describe(args: argparse.Namespace, left_out: dict[str, str]) -> str:
    """The machine, the versions and the work."""
    versions = [f"Python {platform.python_version()}", said_by([str(args.binary), "--version"])]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            pass
    cpu = [line.split(": ")[1] for line in said_by(["cat", "/proc/cpuinfo"]).splitlines() if "model name" in line]
    query = "--query-gpu=name,driver_version,memory.total"
    card = said_by(["nvidia-smi", f"--id={CARD}", query, "--format=csv,noheader"])
    sequences = [tokens["sequences"] for tokens in args.about["tokens"]]
    checkpointing = "on" if args.gradient_checkpointing else "off"
    lengths = f"{min(sequences)} to {max(sequences)}, on average {statistics.mean(sequences):.0f}"
    lines = [
        f"Card: {card or 'none'}",
        f"CPU: {cpu[0] if cpu else platform.processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before",
        f"Versions: {', '.join(versions)}",
        f"Model: {args.about['shape']}, random weights, LoRA of rank 8 on all linear layers",
        f"Step: pairs {args.batch_size}, tokens of a pair {lengths}, gradient checkpointing {checkpointing}",
        *(f"Left out: {engine}, {reason}" for engine, reason in left_out.items()),
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def run(args: argparse.Namespace) -> None:
    args.about = json.loads((args.folder / "about.json").read_text())
    engines, left_out = choose(args)
    print(describe(args, left_out), flush=True)
    results = []
    for engine in engines:
        started = time.monotonic()
        results.append(train_with(engine, args))
        took = f"{time.monotonic() - started:.0f} s"
        print(f"{results[-1].title}: {results[-1].failure or took}", file=sys.stderr)
        if not args.parity:
            # What was measured so far stays where a later engine, or the time for all of them, does not get through.
            print(speed_table(results, args), file=sys.stderr, flush=True)
    if not args.parity:
        print(speed_table(results, args))
    print(parity_tables(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--make", type=Path, metavar="DIR", help="write a model and pairs there, and train nothing")
    what.add_argument("--run", type=Path, metavar="DIR", help="compare speed, memory and figures on what --make wrote")
    what.add_argument("--parity", type=Path, metavar="DIR", help="compare figures alone")
    parser.add_argument("--shape", default="tiny-256-2", help="llama3-8b-instruct, or tiny-HIDDEN-LAYERS (%(default)s)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="Llama-3's, instead of one of 512 tokens")
    parser.add_argument("--max_length", type=int, help="tokens of each sequence, instead of 50 to 300")
    parser.add_argument("--binary", type=Path, default=HERE.parent / "target/release/orpo-wgpu", metavar="FILE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on cuda, fp32 on cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=1, help="pairs of a step")
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--engines", type=lambda names: names.split(","), help="those of trl,liger,liger-loss,unsloth,"
                        "cuda,wgpu,cpu that are wanted; default: all of the device")  # fmt: skip
    parser.add_argument("--limit", type=float, default=600, help="seconds that an engine may take (%(default)s)")
    args = parser.parse_args()
    args.folder = args.run or args.parity
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    if args.make:
        sys.path.insert(0, str(FIXTURES))
        from peer_model import make

        make(args.make, args.shape, args.tokenizer, args.max_length)
    elif args.steps <= WARM_UP:
        parser.error(f"--steps: {WARM_UP} are left out of medians, so more are needed")
    elif not args.binary.exists():
        parser.error(f"--binary: there is no {args.binary}")
    else:
        run(args)


if __name__ == "__main__":
    main()
