"""Adapters on the Hub, and the card that tells of one."""
