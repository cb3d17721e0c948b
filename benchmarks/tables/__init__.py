"""Builds tables from closed forms and measurements of this project."""
