"""One module per command of heartbeat-export."""
