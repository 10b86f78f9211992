"""A network pretrained on the digits 0 to 4 learns 5 to 9, on each agent its own."""
