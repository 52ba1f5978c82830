"""Memory plans, the runners of CPU and GPU, the decode program, and sessions."""
