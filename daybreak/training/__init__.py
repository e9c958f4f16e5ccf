"""Training: learning-rate schedules, stopping safely, what people see, and the loop that calls them in order."""
