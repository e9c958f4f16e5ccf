"""What people read before and after a run."""
