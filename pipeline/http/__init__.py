"""What the HTTP door is made of: connections and their limits, who may ask, the queue of jobs, and the figures of /metrics."""
