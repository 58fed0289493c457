"""The ranks of a job: how a command joins them, and how all of them end if one fails."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from torch import distributed

from engine.config.sections import ParallelSection
from engine.host.folder_lock import hold_folder
from engine.overlap.bridge import Bridge, OtherSideError, Sides, join_sides
from engine.parallel.mesh import World
from engine.parallel.zero import connect, disconnect
from engine.runtime.job_watch import ENDED, Job, JobWatch, end_at_once, open_watch
from engine.runtime.progress import Progress
from engine.runtime.run_stop import RunStoppedError
from engine.runtime.stacks import is_of_collective
from launcher.command import Environment, end_process, error_message

STACKS = "stacks"  # folder of the stacks of a hung job
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # Slurm sends the last one ahead of a time limit, if asked to
SECONDS_FOR_CAUSE = 5.0  # in which the watch ends a rank that has failed because of another one


@dataclass(frozen=True)
class JoinedJob:
    """This process as a rank of its job.

    whole: the job. world: the ranks that do the same work: all of them, or one side of a split job.
    bridge: connection between the two sides; None = there is one side.
    """

    whole: World
    world: World
    watch: JobWatch
    bridge: Bridge | None = None

    @property
    def is_target(self) -> bool:
        """Whether this rank runs the target for other ranks."""
        return self.bridge is not None and self.bridge.sides.is_target(self.whole.rank)

    @contextmanager
    def holding(self, folder: Path) -> Iterator[None]:
        """Context manager in which no other job writes a folder. Raises ValueError that names the job that does."""
        if self.whole.rank != 0:
            yield
            return
        with hold_folder(folder):
            yield

    def wait_for_other_side(self) -> None:
        """Wait until all ranks of the job are here, if it has two sides."""
        if self.bridge is not None:
            self.bridge.barrier()

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Context manager that ends all ranks if one of them raises an exception inside; the cause is printed once."""
        rank = self.whole.rank
        try:
            yield
        except RunStoppedError as stopped:
            self._stop(stopped)
        except (ValueError, OSError, ImportError) as error:
            message = error_message(error)
            if rank == 0:
                self._end(f"{Path(sys.argv[0]).name}: {message}", message)
            self.watch.fail(message)
            end_at_once(ENDED)
        except OtherSideError as error:
            self.watch.wait_for_cause(SECONDS_FOR_CAUSE)
            self._end(f"rank {rank}: {error_message(error)}", error_message(error))
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            if is_of_collective(error):
                self.watch.wait_for_cause(SECONDS_FOR_CAUSE)
            self._end(traceback.format_exc(), f"{type(error).__name__}: {error_message(error)}")

    def _stop(self, stopped: RunStoppedError) -> NoReturn:
        """End the job, whose run has stopped and is saved."""
        self.world.barrier()
        if self.whole.rank == 0:
            with suppress(OSError):  # the launcher that reads it may have ended
                print(f"{stopped}. To continue, run the same command with checkpoint.resume=true", flush=True)
            self.watch.fail(str(stopped), stopped.code)
        self.watch.wait_for_cause(SECONDS_FOR_CAUSE)
        end_at_once(stopped.code)

    def _end(self, text: str, cause: str) -> NoReturn:
        """Print a text and end the job because of an error of this rank."""
        sys.stderr.write(text.rstrip("\n") + "\n")
        self.watch.fail(cause)
        end_process(ENDED)

    def leave(self) -> None:
        """Leave the job, whose work is done; a collective."""
        disconnect()
        self.watch.leave()


def join_job(environment: Environment, parallel: ParallelSection, folder: Path, sides: Sides | None = None) -> JoinedJob:
    """Join the ranks of the job and begin to watch them; a collective.

    folder: where stacks are written if a rank hangs. sides: None = all ranks do the same work.
    Raises ValueError if the ranks do not find each other.
    """
    whole = World(**environment)
    timeout_s = parallel.timeout_s
    try:
        store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise ValueError(f"rank {whole.rank} does not find the other ranks at {place}: {reason}") from error
    job = Job(
        rank=whole.rank,
        size=whole.size,
        local_rank=whole.local_rank,
        command=Path(sys.argv[0]).name,
        host=os.environ["MASTER_ADDR"],
        stacks_folder=folder / STACKS,
        role="" if sides is None else sides.role_of(whole.rank),
    )
    # A rank that runs the target for others is idle whenever these do something else, which is no hang.
    is_target = sides is not None and sides.is_target(whole.rank)
    progress = Progress(0 if is_target else parallel.hang_s)
    watch = open_watch(job, progress, store, timeout_s)
    watch.take_signals(STOP_SIGNALS)
    watch.start()

    def join(own: World, own_store: distributed.Store) -> None:
        os.environ.update(RANK=str(own.rank), WORLD_SIZE=str(own.size))  # DeepSpeed reads these
        connect(own, timeout_s, parallel.cpu_threads, own_store)

    if sides is None:
        joined = JoinedJob(whole, whole, watch)
        with joined.ending_together():
            join(whole, distributed.PrefixStore("all", store))
        return joined
    with JoinedJob(whole, whole, watch).ending_together():
        world, bridge = join_sides(whole, sides, timeout_s, store, join)
    return JoinedJob(whole, world, watch, bridge)
