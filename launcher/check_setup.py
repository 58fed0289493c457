"""Check whether this machine or cluster is ready to train, and say what to fix: python launcher/check_setup.py

Runs alone, under `deepspeed` and `torchrun` and as a Slurm job, on all ranks that a run would have:

    deepspeed launcher/check_setup.py --folder outputs
    sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --wrap 'bash launcher/slurm/start_ranks.sh launcher/check_setup.py'

It checks versions, devices, the links between ranks, the disk, the kernels and two real training
steps, and takes about a minute. Exit code 0 = ready, 1 = a problem was found.
"""

import argparse
import atexit
import os
import socket
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# None of these imports a package that could be missing.
from engine import __version__
from engine.host.units import counted
from engine.setup_checks.finding import Finding, first_line, problem
from engine.setup_checks.required_packages import INSTALL, Requirements, installed_versions, judge_installed, python
from engine.setup_checks.setup_report import SetupReport

if TYPE_CHECKING:
    from engine.setup_checks.rank_facts import RankFacts
    from launcher.command import Environment
    from launcher.job_ranks import JoinedJob

TIMEOUT_S = 120
SECONDS_TO_HEAR = 1.0  # in which the other ranks learn that the job ends


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("outputs"),
        help="folder whose disk is measured, such as a run's output_dir; default: outputs",
    )
    parser.add_argument(
        "--ds_config",
        type=Path,
        default=Path("zero2"),
        help="DeepSpeed's JSON for the training steps, or the name of a shipped one; default: zero2",
    )
    parser.add_argument(
        "--timeout_s",
        type=int,
        default=TIMEOUT_S,
        help="seconds to wait for ranks that do not come, and limit of each check; kernels and training, which may have to "
        f"compile, may take five times as long; default: {TIMEOUT_S}",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of lines")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    arguments = parser.parse_args()
    if arguments.timeout_s < 1:
        parser.error("--timeout_s: expected at least 1 s")
    return arguments


def join_and_import(report: SetupReport, requirements: Requirements) -> "Environment":
    """Return the rank of this process, after importing what the other checks need.

    Ends this process with the findings if that is not possible.
    """
    findings = judge_installed(requirements, installed_versions([needed.name for needed in requirements.packages]))
    if findings:
        end_early(report, *findings)
    try:
        from launcher.command import join_environment

        environment = join_environment()
        import engine.setup_checks.check_list  # noqa: F401
        import launcher.job_ranks  # noqa: F401
    except Exception as error:  # a broken library may raise anything
        text = f"importing DraftSpeed fails: {type(error).__name__}: {first_line(str(error))}"
        fix = f"Run `{INSTALL}` with this Python, {python()}: the versions in constraints.txt work together"
        end_early(report, problem("packages", text, fix))
    return environment


def end_early(report: SetupReport, *findings: Finding) -> NoReturn:
    """End this process with a summary; on ranks other than 0 with a line on standard error."""
    report.add(*findings)
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        lines = "; ".join(f"{finding.name}: {finding.text}. {finding.fix}" for finding in findings)
        print(f"{Path(sys.argv[0]).name}: rank {rank} on {socket.gethostname()}: {lines}", file=sys.stderr)
    report.finish()
    time.sleep(SECONDS_TO_HEAR)
    sys.exit(1)


def own_facts(environment: "Environment", requirements: Requirements) -> "RankFacts":
    """Return the facts of this rank."""
    from engine.setup_checks.machine_facts import MachineFacts
    from engine.setup_checks.rank_facts import RankFacts
    from engine.setup_checks.software_facts import SoftwareFacts

    hides_gpus = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return RankFacts(
        rank=environment["rank"],
        local_rank=environment["local_rank"],
        local_size=environment["local_size"],
        host=socket.gethostname(),
        software=SoftwareFacts.own(requirements, ROOT, __version__, hides_gpus),
        machine=MachineFacts.own(environment["local_rank"]),
    )


def meet_ranks(
    report: SetupReport, environment: "Environment", requirements: Requirements, timeout_s: int
) -> tuple[list["RankFacts"], object]:
    """Return the facts of all ranks, and judge them on rank 0; other ranks get their own.

    Returns also the store in which the ranks have met, which must be kept until they have joined.
    Ends this process if the ranks cannot form a process group.
    """
    from engine.setup_checks import rank_arrival
    from engine.setup_checks.machine import has_devices, judge_machines
    from engine.setup_checks.software import judge_copies, judge_software

    own = own_facts(environment, requirements)
    size = environment["size"]
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    is_server = own.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = rank_arrival.open_store(host, port, size, is_server, timeout_s)
    except ValueError as error:
        end_early(report, problem("ranks", str(error), rank_arrival.OPEN_FIX))
    if own.rank != 0:
        rank_arrival.send_facts(store, own)
        try:
            goes_on = rank_arrival.shall_go_on(store, timeout_s)
        except ValueError as error:
            end_early(report, problem("ranks", str(error), "Look for its message"))
        if not goes_on:
            sys.exit(1)
        return [own], store
    arrived, unreadable = rank_arrival.collect_facts(store, own, size, timeout_s, report.busy)
    report.facts["ranks"] = [asdict(facts) for facts in arrived]
    report.begin("Versions")
    report.add(*judge_software(arrived, requirements), *judge_copies(own, unreadable))
    report.begin("Devices")
    report.add(*judge_machines(arrived))
    report.begin("Ranks")
    report.add(rank_arrival.judge_arrival([*arrived, *unreadable], size, timeout_s, f"{host}, port {port}"))
    can_go_on = len(arrived) == size and has_devices(arrived)
    rank_arrival.let_go_on(store, can_go_on)
    if not can_go_on:
        report.note("Links, disk, models, kernels and training are checked once these problems are fixed.")
        end_early(report)
    return arrived, store


def check_joined_ranks(
    report: SetupReport, job: "JoinedJob", everyone: list["RankFacts"], arguments: argparse.Namespace, ds_config: dict[str, Any]
) -> int:
    """Run the checks of ranks that have joined and return the exit code, the same on all ranks."""
    from huggingface_hub import constants

    from engine.runtime.job_watch import before_end, end_at_once
    from engine.runtime.stacks import is_of_collective
    from engine.setup_checks.check_list import CheckList, CheckSettings, make_temporary, remove_temporary
    from launcher.command import EMBEDDED_TARGET, error_message
    from launcher.job_ranks import SECONDS_FOR_CAUSE

    def end(text: str) -> NoReturn:
        job.watch.fail(text)
        end_at_once(1)

    settings = CheckSettings(
        own=next(facts for facts in everyone if facts.rank == job.world.rank),
        everyone=everyone,
        folder=arguments.folder.absolute(),
        ds_config=ds_config,
        target=EMBEDDED_TARGET,
        hub=Path(constants.HF_HOME),
        is_offline=constants.HF_HUB_OFFLINE,
        timeout_s=arguments.timeout_s,
        end=end,
    )
    temporary = make_temporary(job.world)
    if job.world.local_rank == 0:  # another rank could remove it while this one still checks
        remove = partial(remove_temporary, temporary)
        atexit.register(remove)
        before_end(remove)
    try:
        CheckList(job.world, report, settings, temporary).run()
    except Exception as error:
        if is_of_collective(error):  # another rank has failed before, and the watch says why
            job.watch.wait_for_cause(SECONDS_FOR_CAUSE)
        text = f"failed: {type(error).__name__}: {first_line(error_message(error))}"
        report.add(problem(report.check, text, "Remove the cause, or report this line with the output on standard error"))
        report.finish()
        raise
    return job.world.decide(lambda: report.exit_code)


def main() -> int:
    """Run all checks and return the exit code."""
    arguments = parse_arguments()
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    report = SetupReport(speaks=rank == 0, as_json=arguments.json)
    report.note(f"DraftSpeed {__version__}: checking {counted(size, 'rank')}")
    requirements = Requirements.read(ROOT / "setup.py")
    environment = join_and_import(report, requirements)

    from engine.config.ds_config import accumulation_steps, load_ds_config
    from engine.config.sections import ParallelSection
    from engine.runtime.job_watch import before_end, end_at_once
    from engine.setup_checks.check_list import LINKS_FIX, group_timeout_s
    from launcher.command import shipped_ds_config, stopping_at_errors
    from launcher.job_ranks import join_job

    with stopping_at_errors(rank):
        ds_config = load_ds_config(shipped_ds_config(str(arguments.ds_config)))
        accumulation_steps(ds_config, size)
    atexit.register(report.interrupt)
    before_end(report.interrupt)
    everyone, store = meet_ranks(report, environment, requirements, arguments.timeout_s)
    parallel = ParallelSection(timeout_s=group_timeout_s(arguments.timeout_s))
    with stopping_at_errors(rank), report.limit(arguments.timeout_s, LINKS_FIX, lambda text: end_at_once(1)):
        job = join_job(environment, parallel, arguments.folder)
    del store
    with job.ending_together():
        code = check_joined_ranks(report, job, everyone, arguments, ds_config)
    report.finish()
    job.leave()
    return code


if __name__ == "__main__":
    exit_code = main()
    from launcher.command import end_process

    end_process(exit_code)
