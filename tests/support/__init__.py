"""What several tests share: strategies, the zoo, training loops, workers."""
