"""Measurement of acceptance by the ranks that run the target, while those of the draft wait."""

import io

import torch

from engine.evaluation.acceptance import AcceptanceReport
from engine.evaluation.samples import Sample
from engine.hidden_states.remote_target import RemoteTarget
from engine.models.draft_method import ServedDraft


class RemoteEvaluator:
    """An `AcceptanceEvaluator` on the ranks of the target.

    samples: replies of the draft measured last to a few prompts of the first of these ranks.
    """

    def __init__(self, target: RemoteTarget, num_prompts: int) -> None:
        self._calls = target.calls
        self._num_prompts = num_prompts
        self.samples: list[Sample] = []

    def measure_draft(self, draft: ServedDraft) -> AcceptanceReport:
        """Send the draft and return the report; a collective of the draft's ranks.

        Raises ValueError if the draft cannot be sent.
        """
        if self._num_prompts == 0:
            return self.measure_prompt_lookup()
        written = io.BytesIO()
        try:
            torch.save(draft, written)
        except Exception as error:
            problem = f"this draft cannot be sent to the ranks of the target ({error})"
            raise ValueError(f"{problem}; set evaluation.num_prompts=0, or overlap.placement to colocated or serial") from error
        report, self.samples = self._calls.call("measure_draft", written.getvalue())
        return report

    def measure_prompt_lookup(self) -> AcceptanceReport:
        """Return the report of the baseline without a draft; a collective of the draft's ranks."""
        return self._calls.call("measure_prompt_lookup")
