"""What relay and agents say to each other under Flower."""
