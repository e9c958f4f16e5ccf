"""The training engine: a parameter table, an arena, a hand-written schedule, and the step that runs it."""

from daybreak.engine.schedule import plan_engine
from daybreak.engine.spec import DTYPES, EngineSpec
from daybreak.engine.step import Engine, named_stats

__all__ = ["DTYPES", "Engine", "EngineSpec", "named_stats", "plan_engine"]
