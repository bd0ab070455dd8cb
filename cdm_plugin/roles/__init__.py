"""What the network of a role is: weights of its own or adapters of a shared base, a moving average, attention."""
