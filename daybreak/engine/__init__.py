"""The training engine: a parameter table, an arena, a hand-written schedule, and the step that runs it."""

from daybreak.engine.step import DTYPES, Engine, named_stats, plan_engine

__all__ = ["DTYPES", "Engine", "named_stats", "plan_engine"]
