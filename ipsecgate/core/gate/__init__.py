"""The decisions: events in, commands out."""
