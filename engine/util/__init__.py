"""Utilities that every room uses."""
