"""Shows on the user's own settings that the guarantees hold: `action=check`."""
