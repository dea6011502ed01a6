"""The embedded model, its problems, the script that made both, and a study of settings on them."""
