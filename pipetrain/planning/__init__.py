"""From settings that leave something open to settings that do not: measure the layers, let the planner choose."""
