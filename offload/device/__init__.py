"""One GPU: memory, copy streams, events and compiled programs, and a stand-in of CPU memory for tests."""
