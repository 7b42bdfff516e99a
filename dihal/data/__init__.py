"""Text: documents, their split, token caches, packed training windows, evaluation windows.

``dihal.data.module`` (which needs Lightning) is imported by its own name.
"""

from dihal.data.batch import Batch
from dihal.data.text import Corpus, Document, read_corpus, read_documents, split_documents

__all__ = ["Batch", "Corpus", "Document", "read_corpus", "read_documents", "split_documents"]
