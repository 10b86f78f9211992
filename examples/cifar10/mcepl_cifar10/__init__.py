"""The reference setting of MCE-PL on CIFAR-10."""
