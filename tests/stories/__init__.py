"""What crosses rooms: whole runs, apps, deployments, and everyday trouble."""
