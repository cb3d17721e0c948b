"""Tables that are built from closed forms and measurements of this project."""
