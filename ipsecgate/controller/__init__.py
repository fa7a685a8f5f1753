"""The long-lived process: events from the edges go to the gate, its commands are carried out."""
