"""What stands behind ``longctx verify``: ranks of a case, whole runs on their mesh, and the table of meshes."""
