"""Evaluation: rows, metrics with intervals, result files, leaderboards.

``evaluate(EvalConfig)`` writes one JSON per row; ``leaderboard(LeaderboardConfig)`` ranks such files.
"""
