"""The long-lived process: edges become events for the gate, its commands are carried out."""
