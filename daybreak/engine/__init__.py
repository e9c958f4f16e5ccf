"""The training engine: a parameter table, an arena, the passes over a model, and the engine that runs them."""

from daybreak.engine.passes import plan_engine
from daybreak.engine.spec import DTYPES, EngineSpec
from daybreak.engine.step import Engine, named_stats

__all__ = ["DTYPES", "Engine", "EngineSpec", "named_stats", "plan_engine"]
