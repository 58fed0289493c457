"""Read a run's conversations, with a progress bar and a printed summary."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from engine.config.sections import Config, DataSection
from engine.data.dataset import DataReport, load_documents
from engine.data.documents import Documents, chosen_documents, evenly_spread
from engine.data.tokenised import tokenise
from engine.host.telemetry import Telemetry
from engine.parallel.mesh import World


def read_documents(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, world: World, telemetry: Telemetry
) -> tuple[Documents, DataReport]:
    """Return the documents of `section.train` and the report on its conversations.

    Documents come from the cache in `section.cache_dir`, or are read into memory if that is null.
    Raises ValueError under the conditions of `load_documents`.
    """
    num_bytes = sum(Path(path).stat().st_size for path in section.train if Path(path).is_file())
    with telemetry.progress(num_bytes, "bytes") as progress:

        def show(done: int, total: int) -> None:
            progress.move_to(done, "bytes of conversations")

        documents: Documents
        if section.cache_dir is None:
            documents, report = load_documents(section.train, tokenizer, section, on_progress=show)
        else:
            builds = world.local_rank == 0
            documents, report = tokenise(
                section.train, tokenizer, section, builds=builds, on_progress=show, warn=telemetry.warn
            )
    telemetry.note(report.summary())
    return documents, report


def read_held_out(config: Config, tokenizer: PreTrainedTokenizerBase, world: World) -> Documents:
    """Return `evaluation.num_documents` documents of `data.held_out`, evenly spread; a collective.

    Conversations that cannot be used are left out. Raises ValueError on all ranks if none can be
    used, or if a node cannot read them.
    """
    section = replace(config.data, train=config.data.held_out, held_out=(), max_bad_share=1.0)

    def read() -> Documents:
        return read_documents(section, tokenizer, world, Telemetry(speaks=False))[0]

    chosen = None
    for reads_now in (world.local_rank == 0, world.local_rank > 0):  # the first rank of a node tokenises for the others
        problem = None
        if reads_now:
            try:
                documents = read()
                chosen = chosen_documents(documents, evenly_spread(len(documents), config.evaluation.num_documents))
                if not chosen.assistant_tokens.any():
                    problem = "the held-out conversations have no assistant tokens to predict"
            except (ValueError, OSError) as error:
                problem = str(error)
        problems = [found for found in world.gather(problem) if found is not None]
        if problems:
            raise ValueError(problems[0])
    assert chosen is not None, "every rank has read"
    return chosen
