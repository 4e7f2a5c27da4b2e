"""Planning: memory of a process, time of a step, and the settings that fit best, before a run starts."""
