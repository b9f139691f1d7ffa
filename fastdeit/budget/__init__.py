"""What a run will take, before it starts: time, memory, data rate, energy, cost."""
