"""Reading a run's conversations, with the progress and the summary that a person sees."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from engine.config import DataSection
from engine.data.chat import Document
from engine.data.dataset import load_documents
from engine.telemetry import Telemetry


def read_documents(section: DataSection, tokenizer: PreTrainedTokenizerBase, telemetry: Telemetry) -> list[Document]:
    """The documents of `section.train`. Raises ValueError as `load_documents` does."""
    num_bytes = sum(Path(path).stat().st_size for path in section.train)
    with telemetry.progress(num_bytes, "bytes") as progress:
        documents, report = load_documents(
            section.train,
            tokenizer,
            section,
            on_progress=lambda done, _: progress.move_to(done, "bytes of conversations"),
        )
    telemetry.note(report.summary())
    return documents
