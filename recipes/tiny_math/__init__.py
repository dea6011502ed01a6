"""The embedded model, its problems, the script that built both, and a study of training settings."""
