"""Which beginnings of held-out documents are continued."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dihal.errors import UsageError
from dihal.evaluation.generation import Prompts

if TYPE_CHECKING:
    from dihal.data.packing import EvaluationWindows

__all__ = ["Chosen", "choose_prompts"]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Prompts with the document each comes from."""

    prompts: Prompts
    documents: list[int]
    """Number of each prompt's document, an index of `keys`."""
    keys: list[str]
    """Identities of the documents."""

    def fingerprint(self) -> str:
        """Hex sha256 over prompts, real continuations and documents."""
        digest = hashlib.sha256()
        for tensor in (self.prompts.prompts, self.prompts.real, torch.tensor(self.documents)):
            digest.update(tensor.contiguous().numpy().tobytes())
        digest.update("\n".join(self.keys).encode())
        return digest.hexdigest()


def choose_prompts(windows: EvaluationWindows, *, samples: int, prompt_tokens: int, new_tokens: int) -> Chosen:
    """Return one prompt per document first, then further windows of the same documents.

    Only windows with ``prompt_tokens + new_tokens`` real tokens serve, so that every prompt has a real continuation
    of the length that is written.

    Raises:
        UsageError: too few such windows.
    """
    length = prompt_tokens + new_tokens
    visits: dict[int, int] = {}
    order = []
    for row in (windows.attention_mask.sum(-1) >= length).nonzero().squeeze(-1).tolist():
        document = int(windows.document_ids[row, 0])
        visits[document] = visits.get(document, 0) + 1
        order.append((visits[document], row))
    chosen = [row for _, row in sorted(order)[:samples]]
    if len(chosen) < samples:
        raise UsageError(
            f"{len(chosen)} windows of held-out text have {prompt_tokens} + {new_tokens} tokens, {samples} samples were "
            "asked for. Lower samples, prompt_tokens or new_tokens, give more held-out text, or raise "
            f"data.sequence_length ({windows.input_ids.shape[1]}) to at least the sum."
        )
    ids = windows.input_ids[chosen, :length]
    owners = windows.document_ids[chosen, 0].tolist()
    numbers = {document: index for index, document in enumerate(dict.fromkeys(owners))}
    names = {document.index: document.key for document in windows.documents}
    return Chosen(
        prompts=Prompts(prompts=ids[:, :prompt_tokens].contiguous(), real=ids[:, prompt_tokens:].contiguous()),
        documents=[numbers[owner] for owner in owners],
        keys=[names[document] for document in numbers],
    )
