"""Pictures of a sweep: change of accuracy, and which tokens survive."""
