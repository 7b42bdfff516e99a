"""Evaluation: rows, metrics with intervals, result files, leaderboards.

``evaluate(EvalConfig)`` writes one JSON per row; ``leaderboard(LeaderboardConfig)`` ranks such files.
"""

from dihal.evaluation.leaderboard import leaderboard
from dihal.evaluation.run import evaluate

__all__ = ["evaluate", "leaderboard"]
