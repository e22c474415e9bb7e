"""Two towers and replicas: processes, exchanges, and which part of the net is where."""
