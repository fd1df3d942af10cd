"""Drivers of hypervisors: how each is started, told what to do, and asked to stop (spec companions 1)."""
