"""The command line: composing configurations, running commands, explaining mistakes."""
