"""The parts of the GPU suite as data: command, required packages, and share of the time."""

from dataclasses import dataclass

JSON = "{json}"  # replaced by the path of the part's results file
DEVICE = "{device}"  # replaced by cuda or cpu


@dataclass(frozen=True)
class SuitePart:
    """One part of the suite.

    command: words after `python`, run from the repository's root. tiny: the words for `--tiny`.
    weight: share of the time, relative to the other parts.
    needs: packages that must be importable. needs_on_gpu: further packages for a run on a GPU.
    """

    name: str
    title: str
    command: tuple[str, ...]
    tiny: tuple[str, ...]
    weight: float
    needs: tuple[str, ...] = ()
    needs_on_gpu: tuple[str, ...] = ()


def _benchmark(module: str, shapes: tuple[str, ...], providers: tuple[str, ...], *more: str) -> tuple[str, ...]:
    """Return the command of one of the benchmarks that run on benchmarks/harness.py."""
    where = ("--device", DEVICE, "--json", JSON)
    return ("-m", module, *where, "--shapes", *shapes, "--providers", *providers, *more)


_SELF_CHECK = ("-m", "benchmarks.gpu_suite.self_check", "--device", DEVICE, "--json", JSON)
_KERNEL_TESTS = ("-m", "benchmarks.gpu_suite.kernel_tests", "--json", JSON)
_TRAINING = ("-m", "benchmarks.gpu_suite.compare_training", "--device", DEVICE, "--json", JSON)
_SPECFORGE = ("benchmarks/peers/bench_specforge.py", "--device", DEVICE, "--json", JSON)
_BLOCK = ("benchmarks/peers/bench_block.py", "--device", DEVICE, "--json", JSON)

PARTS = (
    SuitePart(
        name="self_check",
        title="every kernel against the reference, at one odd shape",
        command=_SELF_CHECK,
        tiny=_SELF_CHECK,
        weight=60,
        needs_on_gpu=("triton",),
    ),
    SuitePart(
        name="kernel_tests",
        title="GPU tests of kernels, attention and the training step, in parallel processes",
        command=(*_KERNEL_TESTS, "--marker", "gpu"),
        tiny=(*_KERNEL_TESTS, "--marker", "not gpu", "--files", "tests/kernels/test_matmul.py"),
        weight=170,
        needs=("pytest", "triton"),
    ),
    SuitePart(
        name="block_attention",
        title="attention of draft blocks at the shapes of Llama-3.1-8B, 512 blocks of 16 rows",
        command=_benchmark(
            "benchmarks.kernels.bench_anchored_attention",
            ("8b-4096-one-16x512", "8b-4096-many-16x512", "8b-4096-one-16x512-window1024"),
            ("tiles", "triton"),
            "--repeat",
            "10",
        ),
        tiny=_benchmark(
            "benchmarks.kernels.bench_anchored_attention", ("cpu-1024-many-8x128",), ("reference", "tiles"), "--repeat", "1"
        ),
        weight=40,
        needs=("rich",),
        needs_on_gpu=("triton",),
    ),
    SuitePart(
        name="token_loss",
        title="loss against tokens and distributions at the shapes of Llama-3.1-8B, 8192 rows",
        command=_benchmark(
            "benchmarks.kernels.bench_token_loss",
            ("8b-8192-hard", "8b-8192-soft", "8b-8192-bias"),
            ("chunks", "triton", "products"),
            "--repeat",
            "10",
        ),
        tiny=_benchmark("benchmarks.kernels.bench_token_loss", ("cpu-896-hard",), ("chunks", "products"), "--repeat", "1"),
        weight=40,
        needs=("rich",),
        needs_on_gpu=("triton",),
    ),
    SuitePart(
        name="training",
        title="train.py with ZeRO-3 and look-ahead, against the losses of the CPU",
        command=(*_TRAINING, "--steps", "40"),
        tiny=(*_TRAINING, "--steps", "2"),
        weight=90,
        needs=("deepspeed", "xxhash", "rich", "yaml"),
    ),
    SuitePart(
        name="step",
        title="the draft's step at the shapes of Llama-3.1-8B and Qwen3-30B-A3B, 16k tokens",
        command=_benchmark(
            "benchmarks.bench_train_step",
            tuple(
                f"{model}-16k-packed-{share}" for model in ("llama3.1-8b", "qwen3-30b-a3b") for share in ("1.0", "0.5", "0.3")
            ),
            ("compacted",),
            "--repeat",
            "5",
            "--profile",
            "15",
        ),
        tiny=_benchmark("benchmarks.bench_train_step", ("cpu-tiny-0.3",), ("compacted",), "--repeat", "1", "--profile", "5"),
        weight=150,
        needs=("rich", "yaml"),
        needs_on_gpu=("triton",),
    ),
    SuitePart(
        name="block_step",
        title="the step of DFlash and DSpark at the shapes of Qwen3-8B, 4096 tokens and 512 blocks",
        command=_benchmark(
            "benchmarks.bench_block_step",
            tuple(f"{method}-qwen3-8b-4096-{share}" for method in ("dflash", "dspark") for share in ("1.0", "0.3")),
            ("as in a run", "every row", "every mask row"),
            "--repeat",
            "5",
            "--profile",
            "15",
        ),
        tiny=_benchmark(
            "benchmarks.bench_block_step", ("dflash-cpu-tiny-128-0.3",), ("as in a run",), "--repeat", "1", "--profile", "5"
        ),
        weight=90,
        needs=("rich", "yaml"),
        needs_on_gpu=("triton",),
    ),
    SuitePart(
        name="target",
        title="the target's forward at Llama-3.1-8B, in bf16 and fp8",
        command=_benchmark(
            "benchmarks.bench_target",
            ("llama3.1-8b-32k",),
            ("packed", "packed fp8", "packed fp8 x fp8"),
            "--repeat",
            "5",
            "--profile",
            "10",
        ),
        tiny=_benchmark("benchmarks.bench_target", ("cpu-tiny",), ("packed", "packed fp8"), "--repeat", "1"),
        weight=90,
        needs=("rich", "yaml"),
        needs_on_gpu=("triton",),
    ),
    SuitePart(
        name="overlap",
        title="target and draft one after the other, against the target running ahead",
        command=_benchmark("benchmarks.bench_colocated", ("llama3.1-8b-16k-0.5",), ("serial", "run ahead"), "--repeat", "3"),
        tiny=_benchmark("benchmarks.bench_colocated", ("cpu-tiny-0.5",), ("serial", "run ahead"), "--repeat", "1"),
        weight=80,
        needs=("rich", "yaml"),
        needs_on_gpu=("triton",),
    ),
    SuitePart(
        name="specforge",
        title="the draft's step compared with SpecForge's, on the same machine",
        command=(*_SPECFORGE, "--mask", "1.0", "0.5", "0.3", "--hits", "all", "--rounds", "3", "--max_rounds", "5"),
        tiny=(*_SPECFORGE, "--shape", "cpu-tiny", "--mask", "0.5", "--hits", "all", "--rounds", "1", "--max_rounds", "1"),
        weight=80,
        needs=("specforge", "rich"),
        needs_on_gpu=("triton",),
    ),
    SuitePart(
        name="block_peers",
        title="the step of DFlash and DSpark compared with SpecForge's and speculators', at Qwen3-8B",
        command=(*_BLOCK, "--shape", "qwen3-8b", "--rounds", "3", "--max_rounds", "5"),
        tiny=(*_BLOCK, "--shape", "cpu-tiny", "--dtype", "float32", "--rounds", "1", "--max_rounds", "1"),
        weight=60,
        needs=("specforge", "speculators", "rich"),
        needs_on_gpu=("triton",),
    ),
)
