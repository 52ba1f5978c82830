"""What the router picked: recorded, counted, and replayed."""
