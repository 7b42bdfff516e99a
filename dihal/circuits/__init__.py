"""Which parts of two models solve a task, and whether they are the same parts.

A circuit is a set of edges between components (attention heads, MLPs) that suffices for a task.
Edges are scored by attribution (``attribute``), a set of them is judged by running it
(``evaluate``), and two models of one block structure are compared (``compare``).
"""
