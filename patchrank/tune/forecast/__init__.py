"""What a sweep is going to take: counted from shapes, and timed by a few steps."""
