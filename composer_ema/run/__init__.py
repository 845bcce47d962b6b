"""One run's time and its averages, whoever trains: when an update is due and what it weighs. No events."""
