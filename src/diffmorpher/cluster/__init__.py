"""Films and benchmarks on more than one machine: who makes what, and what happens when somebody dies over it."""
