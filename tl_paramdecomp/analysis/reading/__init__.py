"""Where components are active and what they promote, for people to read."""
