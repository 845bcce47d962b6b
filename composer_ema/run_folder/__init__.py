"""What a run leaves on disk: one run at a time in a folder, its metrics, its checkpoints, and which it goes on from."""
