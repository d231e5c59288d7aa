"""The subcommands of heartbeat-train: one module each, or one for several of a kind."""
