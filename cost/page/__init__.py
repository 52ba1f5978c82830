"""The HTML page of a report, and the charts on it."""
