"""Runs what ``longctx verify`` checks: ranks of a case, whole runs on their mesh, and the table of meshes."""
