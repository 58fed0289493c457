"""Judgement of versions: against what setup.py asks for, and between ranks."""

from collections.abc import Callable, Hashable, Sequence

from engine.setup_checks.finding import Finding, ok, problem, warning
from engine.setup_checks.rank_facts import RankFacts, UnreadableRank, by_value, names_of
from engine.setup_checks.required_packages import INSTALL, Requirement, Requirements
from engine.setup_checks.software_facts import SoftwareFacts

NAMED = ("torch", "deepspeed", "transformers")  # required packages with a line each
# NCCL that keeps operations of several communicators in one order; without it, the target does not run beside the draft.
NCCL_OF_COLOCATED = Requirement("NCCL", ">=2.26")
SAME_EVERYWHERE = "Install the same versions on every node, or install DraftSpeed once on a file system that all nodes share"
GPU_EXTRAS = "Run `pip install -e '.[gpu]'`"
NVML = "nvidia-ml-py"  # which changes no result
OPTIONAL_ON_GPU = {  # what follows if a package is missing, and how to fix it
    "triton": (
        "attention and loss run in plain PyTorch, which is slower",
        "Install a build of torch for CUDA, which brings Triton",
    ),
    "liger-kernel": ("norms run in plain PyTorch, which is slower", GPU_EXTRAS),
    NVML: ("metrics.jsonl has no figures of the GPU", GPU_EXTRAS),
}


def judge_software(ranks: Sequence[RankFacts], requirements: Requirements) -> list[Finding]:
    """Return the findings on the versions of all ranks; those of rank 0 are shown if all are the same."""
    facts = ranks[0].software
    findings = [_judge_python(ranks, requirements)]
    findings.append(ok("DraftSpeed", f"{facts.draftspeed}, source {facts.source}"))
    others = []
    for needed in requirements.packages:
        finding = _judge_required(ranks, needed)
        if finding.fix or needed.name in NAMED:
            findings.append(finding)
        else:
            others.append(f"{needed.name} {facts.versions[needed.name]}")
    findings.append(ok("other packages", ", ".join(others)))
    findings += _judge_cuda(ranks)
    findings += _judge_optional(facts, requirements)
    return findings + _judge_differences(ranks)


def judge_copies(own: RankFacts, unreadable: Sequence[UnreadableRank]) -> list[Finding]:
    """Return a finding for each copy of DraftSpeed whose facts that of rank 0 cannot read. own: facts of rank 0."""
    copies: dict[str, list[UnreadableRank]] = {}
    for rank in unreadable:
        copies.setdefault(f"{rank.draftspeed}, source {rank.source}", []).append(rank)
    here = f"{own.software.draftspeed}, source {own.software.source} on {names_of([own])}"
    return [
        problem("DraftSpeed", f"differs: {here}; {copy} on {names_of(ranks)}, whose facts cannot be read here", SAME_EVERYWHERE)
        for copy, ranks in copies.items()
    ]


def _judge_python(ranks: Sequence[RankFacts], requirements: Requirements) -> Finding:
    wanted = requirements.python
    wrong = [rank for rank in ranks if not wanted.allows(rank.software.python)]
    if wrong:
        text = f"{wrong[0].software.python} on {names_of(wrong)}; needs {wanted.versions}"
        return problem("Python", text, "Create the environment with a Python of these versions")
    return ok("Python", ranks[0].software.python)


def _judge_required(ranks: Sequence[RankFacts], needed: Requirement) -> Finding:
    missing = [rank for rank in ranks if needed.name not in rank.software.versions]
    if missing:
        return problem(needed.name, f"is not installed on {names_of(missing)}; needs {needed.versions}", f"Run `{INSTALL}`")
    wrong = [rank for rank in ranks if not needed.allows(rank.software.versions[needed.name])]
    if wrong:
        found = wrong[0].software.versions[needed.name]
        return problem(needed.name, f"{found} on {names_of(wrong)}; needs {needed.versions}", f"Run `{INSTALL}`")
    return ok(needed.name, f"{ranks[0].software.versions[needed.name]} (needs {needed.versions})")


def _judge_cuda(ranks: Sequence[RankFacts]) -> list[Finding]:
    """Return findings on CUDA, the driver and NCCL."""
    without = [rank for rank in ranks if not rank.software.sees_gpu]
    facts = ranks[0].software
    if not without:
        findings = [ok("CUDA", f"{facts.cuda} of torch, driver {facts.driver or 'of unknown version'}")]
        if facts.nccl is not None and not NCCL_OF_COLOCATED.allows(facts.nccl):
            text = f"{facts.nccl}; older than 2.26, so ranks that share a target run it before the draft, not at the same time"
            return [*findings, warning("NCCL", text, "Install a newer torch, which brings a newer NCCL")]
        return [*findings, ok("NCCL", facts.nccl or "none")]
    name = "CUDA"
    first = without[0].software
    with_driver = [rank for rank in without if rank.software.driver is not None]
    if len(without) < len(ranks):
        text = f"no GPU can be used on {names_of(without)}, and the other ranks have one"
        return [problem(name, text, "Run `nvidia-smi` there, and start the job on nodes with the same GPUs")]
    if not with_driver:
        return [ok(name, "no NVIDIA driver, so training runs on the CPU")]
    if first.hides_gpus:
        return [ok(name, "the GPUs are hidden by CUDA_VISIBLE_DEVICES, so training runs on the CPU")]
    found = with_driver[0].software
    if found.cuda is None:
        text = f"torch {found.versions['torch']} is a build without CUDA, and there is a GPU driver ({found.driver})"
        return [problem(name, text, "Install a build of torch for CUDA; pytorch.org gives the command")]
    text = f"torch for CUDA {found.cuda} cannot use the GPU with the driver {found.driver}"
    return [problem(name, text, "Run `nvidia-smi`; install a newer driver, or a build of torch for the driver's CUDA")]


def _judge_optional(facts: SoftwareFacts, requirements: Requirements) -> list[Finding]:
    """Return findings on packages without which training works."""
    findings = []
    for name, (consequence, fix) in OPTIONAL_ON_GPU.items():
        version = facts.versions.get(name)
        wanted = requirements.optional_versions(name)
        if version is None and not facts.sees_gpu:
            findings.append(ok(name, "not installed; used on GPUs only"))
        elif version is None:
            findings.append(warning(name, f"is not installed, so {consequence}", fix))
        elif facts.sees_gpu and not wanted.allows(version):
            fix = f"Run `{INSTALL}`" if name == "triton" else GPU_EXTRAS
            findings.append(warning(name, f"{version}; needs {wanted.versions}", fix))
        else:
            findings.append(ok(name, version))
    version = facts.versions.get("flash-attn")
    if facts.sees_gpu:
        used = "attention of targets runs in blocks" if facts.flash is None else f"in use: {facts.flash}"
    else:
        used = "used on GPUs only"
    findings.append(ok("flash-attn", f"{version or 'not installed'}; {used}"))
    return [*findings, _judge_apex(facts)]


def _judge_apex(facts: SoftwareFacts) -> Finding:
    if facts.has_nvidia_apex:
        return ok("apex", "NVIDIA's; its FusedAdam is the optimizer on GPUs")
    if facts.has_apex:
        text = "is not NVIDIA's package or cannot be imported; torch's fused AdamW takes its place"
        return warning("apex", text, "Run `pip uninstall apex`: the package of this name on PyPI is unrelated")
    return ok("apex", "not installed; torch's fused AdamW takes its place on GPUs")


def _judge_differences(ranks: Sequence[RankFacts]) -> list[Finding]:
    """Return a finding for each version that is not the same on all ranks."""
    names = sorted({name for rank in ranks for name in rank.software.versions} - {NVML})
    findings = []
    compared: list[tuple[str, Callable[[SoftwareFacts], Hashable]]] = [
        ("Python", lambda facts: facts.python),
        ("DraftSpeed", lambda facts: f"{facts.draftspeed}, source {facts.source}"),
        ("CUDA of torch", lambda facts: facts.cuda),
        ("NCCL", lambda facts: facts.nccl),
        ("apex", lambda facts: facts.has_nvidia_apex),
        ("flash attention", lambda facts: facts.flash),
    ]
    for name in names:
        compared.append((name, lambda facts, name=name: facts.versions.get(name)))  # type: ignore[misc]
    for name, value_of in compared:
        text = _difference(ranks, value_of)
        if text:
            findings.append(problem(name, text, SAME_EVERYWHERE))
    drivers = _difference(ranks, lambda facts: facts.driver)
    if drivers:
        findings.append(warning("driver", drivers, "Install the same driver on all nodes"))
    nvml = _difference(ranks, lambda facts: facts.versions.get(NVML))
    if nvml:
        findings.append(warning(NVML, nvml, SAME_EVERYWHERE))
    return findings


def _difference(ranks: Sequence[RankFacts], value_of: Callable[[SoftwareFacts], Hashable]) -> str:
    """Return which nodes have which value; "" if all ranks have the same."""
    groups = by_value(ranks, [value_of(rank.software) for rank in ranks])
    if len(groups) == 1:
        return ""
    parts = [f"{'none' if value is None else value} on {names_of(members)}" for value, members in groups]
    return "differs: " + "; ".join(parts)
