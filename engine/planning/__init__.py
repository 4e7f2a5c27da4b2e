"""What a run will take before it starts: memory of a process, time of a step, and which settings fit best."""
