"""Every family that publishes a plan, shared by ranks in every way, beside Transformers on one process, a document at a time.

    python tests/parallel/family_matrix.py [--family NAME ...] [--json FILE] [--show]

Four ranks with batches of different lengths run tiny random models in fp32; `error` is the largest difference of auxiliary
states, last states and logits, of the reference's largest value, of each way and of each rank alone with its documents packed.
All families run in one set of processes.
"""

import argparse
import json
import re
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import distributed

from engine.data.documents import Document
from engine.data.packing import collate
from engine.models.target_families import check_family, final_logits
from engine.parallel.mesh import ALONE, TargetMesh, World
from engine.parallel.rules import PROOFS
from engine.target.frozen import FrozenTarget, capture
from tests.distributed import run_ranks
from tests.parallel.families import VOCAB, all_families, tiny_config, tiny_model

RANKS = 4
TOLERANCE = 1e-5
AUX = (0, 1, 2)
LENGTHS = ((5, 9), (12,), (3, 7, 2), (6, 1))  # of each rank's documents
PAGE = ROOT / "docs" / "targets.md"
TABLE = "| family | attention shared | experts shared | error | not shared, or refused |\n"
CASES = {"tp": (2, 1), "ep": (1, 2), "tp x ep": (2, 2), "tp in ep": (2, 4)}
IN_PARTS = {"tp x ep"}  # exchanged in two parts


def documents(rank: int) -> list[torch.Tensor]:
    """Token ids of a rank's documents; none repeats a token."""
    generator = torch.Generator().manual_seed(rank)
    return [3 + torch.randperm(VOCAB - 3, generator=generator)[:length] for length in LENGTHS[rank]]


def as_documents(rank: int) -> list[Document]:
    """A rank's documents, all of whose tokens are the assistant's."""
    return [Document(ids.numpy().astype("int32"), np.ones(len(ids), dtype=bool), ()) for ids in documents(rank)]


@torch.no_grad()
def reference(family: str, rank: int) -> list[torch.Tensor]:
    """Auxiliary states, last states and logits of a rank's tokens: whole model, own attention, a document at a time."""
    model = tiny_model(family)
    parts = []
    for ids_T in documents(rank):
        with capture(model, AUX) as seen:
            logits = model(input_ids=ids_T[None], use_cache=False).logits
        parts.append((seen.aux()[0], seen.last_hidden()[0], logits[0]))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def shared(family: str, rank: int, mesh: TargetMesh) -> tuple[list[torch.Tensor], FrozenTarget]:
    """The same of a target that ranks share, and that target."""
    target = FrozenTarget(tiny_model(family), AUX, mesh=mesh)
    states = run_own(target, rank)
    logits_TV = target.whole_head().logits(states[-1])
    return [*states, logits_TV[:, : final_logits(target.config).num_tokens]], target


def run_own(target: FrozenTarget, rank: int) -> list[torch.Tensor]:
    """Auxiliary and last states of a rank's documents; a collective of the target's mesh."""
    output = target(collate(as_documents(rank)), torch.arange(sum(LENGTHS[rank])))
    return [output.aux_TA, output.last_hidden_ND]


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in zip(found, expected, strict=True))


def in_step(world: World, call):
    """What `call` gives, or on every rank the error of the first that fails: nobody is left waiting in a collective."""
    result = None
    problem = None
    try:
        result = call()
    except Exception as error:
        problem = error
    problems: list = [None] * world.size
    distributed.all_gather_object(problems, None if problem is None else f"{type(problem).__name__}: {problem}")
    if first := next(filter(None, problems), None):
        raise RuntimeError(first) from problem
    return result


def run_family(family: str, world: World, meshes: dict[str, TargetMesh]) -> dict:
    """One row of the matrix. A case is left out where there is nothing that it would share."""
    row = {
        "family": family,
        "tp": False,
        "ep": False,
        "world": world.size,
        "alone": None,
        "error": None,
        "errors": {},
        "replicated": [],
        "reason": None,
    }
    try:
        check_family(tiny_config(family))
        expected = in_step(world, lambda: reference(family, world.rank))
        replicated = set()
        found, _ = in_step(world, lambda: shared(family, world.rank, ALONE))
        row["alone"], errors = relative(found, expected), []
        for name, mesh in meshes.items():
            found, target = in_step(world, lambda mesh=mesh: shared(family, world.rank, mesh))
            plan = target.plan
            if not plan.shared and not plan.experts:
                continue
            errors.append(relative(found, expected))
            row["tp"] |= bool(plan.heads)
            row["ep"] |= bool(plan.experts)
            row["errors"][name] = errors[-1]
            replicated |= {(re.sub(r"\.\d+\.", ".*.", block), why) for block, why in plan.replicated.items()}
        row["error"] = max((*errors, row["alone"])) if errors else None
        row["replicated"] = sorted(f"{block}: {why}" for block, why in replicated)
    except Exception as error:  # the other families are to run all the same
        row["reason"] = f"{type(error).__name__}: {error}"[:300]
        row["trace"] = traceback.format_exc()
    return row


def run_all(world: World, families: list[str]) -> list[dict]:
    torch.set_num_threads(1)
    meshes = {name: TargetMesh.make(world, *sizes, parts=1 + (name in IN_PARTS)) for name, sizes in CASES.items()}
    rows = []
    for family in families:
        row = run_family(family, world, meshes)
        everyone: list = [None] * world.size
        distributed.all_gather_object(everyone, row)
        worst = max(everyone, key=lambda one: (one["reason"] is not None, one["error"] or 0, one["alone"] or 0))
        rows.append(worst)
        if world.is_main:
            print(f"{family:22} {worst['error'] if worst['reason'] is None else worst['reason']}", flush=True)
    return rows


def write_proofs(rows: list[dict]) -> None:
    """What the library refuses by, and the page that shows it."""
    proofs = {}
    lines = []
    for row in rows:
        reason = row["reason"] or (None if row["error"] <= TOLERANCE else f"differs by {row['error']:.0e} when it is shared")
        words = ("RuntimeError: ", "ValueError: ", f"target family {row['family']!r} ")
        for word in words if reason else ():
            reason = reason.split("; ")[0].replace(word, "")
        error = None if reason else float(f"{row['error']:.1e}")
        proofs[row["family"]] = {"tp": row["tp"], "ep": row["ep"], "error": error, "reason": reason}
        shares = ["yes" if row[key] and not reason else "-" for key in ("tp", "ep")]
        lines.append(
            f"| {row['family']} | {shares[0]} | {shares[1]} | {error or '-'} | {reason or '; '.join(row['replicated'])} |"
        )
    PROOFS.write_text(json.dumps(proofs, indent=1) + "\n", encoding="utf-8")
    head = PAGE.read_text(encoding="utf-8").partition(TABLE)[0]
    PAGE.write_text(head + TABLE + "|---|---|---|---|---|\n" + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=all_families(), metavar="NAME", default=all_families())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="engine/parallel/proofs.json and docs/targets.md, of all families")
    parser.add_argument("--show", action="store_true", help="tracebacks of what failed")
    options = parser.parse_args()
    start = time.perf_counter()
    rows = run_ranks(run_all, RANKS, list(options.family))[0]
    passed = [row for row in rows if row["error"] is not None and row["error"] <= TOLERANCE]
    print(f"{len(passed)} of {len(rows)} within {TOLERANCE}, {sum(row['tp'] for row in passed)} of them with attention shared")
    print(f"{time.perf_counter() - start:.0f} s")
    for row in rows:
        if options.show and row.get("trace"):
            print(row["family"], row["trace"])
    if options.write:
        write_proofs(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
