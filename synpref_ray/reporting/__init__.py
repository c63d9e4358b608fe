"""Tables, metrics and events that a run leaves behind."""
