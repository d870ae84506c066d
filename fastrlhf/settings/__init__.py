"""Settings of each command with their defaults and checks: YAML keys and CLI options alike."""
