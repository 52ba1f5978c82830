"""One token's experts: the GPU's program and the host's side, which exchange data through a mailbox."""
