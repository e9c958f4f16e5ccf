"""Pages and tables that people read before and after a run."""
