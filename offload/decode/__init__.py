"""One token's experts: the GPU's program and its host side, which run at once and meet in a mailbox."""
