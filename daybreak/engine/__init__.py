"""The training engine: a parameter table, an arena, a hand-written schedule, and the step that runs it."""

from daybreak.engine.schedule import DTYPES, plan_engine
from daybreak.engine.step import Engine, named_stats

__all__ = ["DTYPES", "Engine", "named_stats", "plan_engine"]
