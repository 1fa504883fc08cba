"""The commands: they parse, build and run, and turn errors into one line and an exit code."""
